"""What `make gpu` compiles ahead, many kernels at a time, is what its rows look for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benches import module
from machine import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton")


# Kernels are compiled ahead in a pool, then asked for as a later run on a GPU asks for them: by tensors.
PROGRAM = """
import json, os, torch
from collections import Counter
from pathlib import Path
from unittest import mock
import gpu_build
from gpu_machine import REAL
from lambda_kernels.backends.triton import Triton
from triton.runtime.jit import JITFunction

def run():
    Triton().cross_entropy_grad(torch.randn(2, 5, 5), torch.zeros(2, 5, dtype=torch.int64))
    odd = torch.zeros(68)[1:65]  # not at a multiple of 16 bytes
    Triton().sgd_([torch.zeros(64), odd, torch.zeros(1)], [torch.zeros(64)] * 2 + [torch.zeros(1)], [0.1, 0.2, 0.0])

if __name__ == "__main__":
    with gpu_build.written_down() as wanted:
        run()
    failed = gpu_build.compile_all(list(wanted), 90, 1)
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    before = sorted(p.name for p in cache.iterdir())
    right = JITFunction.run
    gpu_build.set_driver(90)
    with mock.patch.object(JITFunction, "run", lambda self, *a, warmup, **o: right(self, *a, warmup=True, **o)):
        run()
    after = sorted(p.name for p in cache.iterdir())
    rows = gpu_build.launches(REAL, torch.device("meta"))
    print(json.dumps({
        "wanted": len(wanted), "failed": failed, "compiled": len(before), "found": after == before,
        "names": Counter(launch.name for launch in rows), "rows": len(rows), "different": len(set(rows)),
        "tiles": len({launch.options for launch in rows if launch.name == "convolve"}),
    }))
"""


@pytest.mark.slow
def test_a_later_run_finds_what_was_compiled_ahead(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)  # of a pool of processes each imports it
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "bench")))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.update(PYTHONPATH=path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == [] and found["wanted"] == found["compiled"] == 2 and found["found"]
    # what the benchmark's rows launch is written down once, with every tile
    assert found["rows"] == found["different"] and found["tiles"] > 1 and found["names"]["convolve"] > 12
    assert {"weight_gradient", "matrix_product", "normalise", "dense_gradient", "sgd"} < found["names"].keys()
    assert "moments" in found["names"]  # of the parts of a block, which are measured beside the whole


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_build = module("gpu_build")

    class Kernel:
        def run(self, *_: Any, **__: Any) -> None:
            raise ValueError("no such tile\nand more")

    monkeypatch.setattr(gpu_build, "broken", Kernel(), raising=False)
    launch = gpu_build.Launch("gpu_build", "broken", (), (("num_warps", 4),))
    assert gpu_build.compile_one(launch) == "broken (('num_warps', 4),): ValueError: no such tile"
