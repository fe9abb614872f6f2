"""examples/cpp, built and run: a program without Python adapts and classifies, to the bits of Python's result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machine import PATIENCE, needs_native
from test_build import needed_libraries

import lambda_kernels
from lambda_maml import adapt_tasks
from lambda_maml.models import conv4

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "cpp"
LIBRARY = Path(lambda_kernels.__file__).parent / "liblambda_kernels.so"

pytestmark = [
    needs_native,
    pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake"),
    pytest.mark.usefixtures("one_thread"),
]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as its CMakeLists.txt builds it."""
    folder = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (("-S", str(EXAMPLE), "-B", str(folder), prefix, "-Wno-dev"), ("--build", str(folder))):
        done = run("cmake", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "adapt"


@pytest.mark.slow
def test_it_gives_what_python_gives(program: Path, tmp_path: Path) -> None:
    for pattern, width, size in (("00011", 8, 28), ("11111", 16, 32)):
        model = conv4(ways=3, in_channels=2, width=width, image_size=size)
        xs, ys, xq = torch.randn(6, 2, size, size), torch.arange(3).repeat(2), torch.randn(4, 2, size, size)
        task = tmp_path / f"{pattern}.pt"
        torch.save({**model.state_dict(), "support": xs, "labels": ys, "query": xq}, task)
        done = run(program, LIBRARY, task, pattern, "5", "0.1", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        logits = torch.tensor([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
        with torch.no_grad():
            want = adapt_tasks(model, xs[None], ys[None], xq[None], pattern=pattern, steps=5, lr=0.1)[0]
        assert torch.equal(logits, want)
    done = run(program, LIBRARY, task, "0011", "5", "0.1")
    assert done.returncode == 1 and "the pattern 0011 has no bit for each of conv4's 5 layers" in done.stderr


def test_the_operators_need_no_python() -> None:
    (module,) = LIBRARY.parent.glob(f"_C.{sys.implementation.cache_tag}*.so")
    assert LIBRARY.name in needed_libraries(module)  # what Python calls, not a copy of it
    assert not [name for name in needed_libraries(LIBRARY) if "python" in name]
