"""The CPU's kernels for aarch64, which most devices run: cross-compiled, and run beside plain loops by QEMU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from machine import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
WHY = f"there is no {' and no '.join(MISSING)} (apt install g++-aarch64-linux-gnu qemu-user)"


@pytest.mark.skipif(bool(MISSING), reason=WHY)
def test_the_kernels_are_right_on_aarch64(tmp_path: Path) -> None:
    """With one thread in place of torch's: tests/kernels_alone/ATen."""
    program, alone = tmp_path / "kernels", ROOT / "tests" / "kernels_alone"
    flags = ["-std=c++20", "-O2", "-static", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "csrc" / "arena.cpp", alone / "main.cpp"]
    folders = [f"-I{alone}", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run(
        [COMPILER, *flags, *folders, *map(str, sources), "-o", str(program)], capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=PATIENCE)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout + done.stderr
    assert lines[0] == "kernels: generic" and len(lines) == 1 + 2 * (4 + 2 * 6 + 2 * 6)
