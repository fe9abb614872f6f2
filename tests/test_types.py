"""The code of README and of the page on Python is well typed: by mypy, and by pyright where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from machine import PATIENCE
from test_readme import README, ROOT, blocks

KEPT = "reveal_type(lk.convert(nn.Sequential()))\nreveal_type(lk.to_torch(nn.Linear(2, 3)))\n"
"""What is converted keeps its type."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each page's blocks as one program, the second one with KEPT behind them."""
    folder, found = tmp_path_factory.mktemp("types"), []
    for page, more in ((README, []), (ROOT / "docs" / "use.md", [KEPT])):
        found.append(folder / f"{page.stem.lower()}_page.py")
        found[-1].write_text("\n".join([*blocks(page, "python"), *more]), encoding="utf-8")
    return found


def test_mypy_finds_nothing(programs: list[Path]) -> None:
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, programs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition("is ")[2] for line in done.stdout.splitlines()] == [
        '"torch.nn.modules.container.Sequential"',
        '"torch.nn.modules.linear.Linear"',
    ]


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright_finds_nothing(programs: list[Path]) -> None:
    settings = {"extraPaths": [str(ROOT), str(ROOT / "python")]}
    (programs[0].parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["pyright", "--pythonpath", sys.executable, "-p", str(programs[0].parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
