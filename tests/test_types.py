"""README's code is well typed: by mypy, and by pyright where it is installed; what is converted keeps its type."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from machine import PATIENCE
from test_readme import README, ROOT, blocks


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's blocks as one program, and a line that says what `convert` gives."""
    path = tmp_path_factory.mktemp("types") / "readme.py"
    kept = "reveal_type(lk.convert(nn.Sequential()))\nreveal_type(lk.to_torch(nn.Linear(2, 3)))\n"
    path.write_text("\n".join([*blocks(README, "python"), kept]), encoding="utf-8")
    return path


def test_mypy_finds_nothing(program: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition("is ")[2] for line in done.stdout.splitlines()] == [
        '"torch.nn.modules.container.Sequential"',
        '"torch.nn.modules.linear.Linear"',
    ]


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright_finds_nothing(program: Path) -> None:
    settings = {"extraPaths": [str(ROOT), str(ROOT / "python")]}
    (program.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["pyright", "--pythonpath", sys.executable, "-p", str(program.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
