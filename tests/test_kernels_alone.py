"""The CPU's kernels without torch, beside plain loops: for aarch64, which most devices run, cross-compiled and run by
QEMU; and under sanitizers, which `make sanitize` has for the whole extension."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from machine import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
ALONE = ROOT / "tests" / "kernels_alone"
FLAGS = ["-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HOST = os.environ.get("CXX") or "g++"
MISSING = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
WHY = f"there is no {' and no '.join(MISSING)} (apt install g++-aarch64-linux-gnu qemu-user)"
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]


def built(program: Path, compiler: str, *flags: str) -> Path:
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "csrc" / "arena.cpp", ALONE / "main.cpp"]
    folders = [f"-I{ALONE}", f"-I{ROOT / 'csrc'}"]
    command = [compiler, *FLAGS, *flags, *folders, *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return program


def assert_right(*command: object, **environment: str) -> str:
    """What the kernels say of themselves: their instruction set."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **environment}
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout + done.stderr
    assert len(lines) == 1 + 2 * (1 + 4 + 2 * 6 + 2 * 6)
    return lines[0]


@pytest.mark.skipif(bool(MISSING), reason=WHY)
def test_the_kernels_are_right_on_aarch64(tmp_path: Path) -> None:
    """With one thread in place of torch's: tests/kernels_alone/ATen."""
    program = built(tmp_path / "kernels", COMPILER, "-O2", "-static")
    assert assert_right(EMULATOR, program) == "kernels: generic"


@pytest.mark.slow
def test_address_and_undefined_behavior_sanitizers_find_nothing(tmp_path: Path) -> None:
    program = built(tmp_path / "kernels", HOST, *SANITIZED, "-fsanitize=address,undefined")
    for isa in ("generic", ""):
        assert_right(program, LAMBDA_KERNELS_ISA=isa, ASAN_OPTIONS="detect_leaks=0")


@pytest.mark.slow
def test_the_thread_sanitizer_finds_no_race(tmp_path: Path) -> None:
    """With threads that it sees being started and waited for: tests/threads_seen."""
    seen = f"-I{ROOT / 'tests' / 'threads_seen'}"
    program = built(tmp_path / "kernels", HOST, seen, *SANITIZED, "-fsanitize=thread", "-pthread")
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []  # of random addresses it bears only some
    for isa in ("generic", ""):
        assert_right(*fixed, program, LAMBDA_KERNELS_ISA=isa)
