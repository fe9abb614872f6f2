"""The CUDA sources compiled by g++ with the emulator's headers in place of CUDA's."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
# No fused multiply-add: plain IEEE steps, the same on any machine.
FLAGS = (
    "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-Wno-unknown-pragmas",
)  # fmt: skip


def compile_all(folder: Path, *more: str) -> list[Path]:
    """The objects of all kernels, in `folder`."""

    def one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        command = ["g++", *FLAGS, *more, f"-I{HERE}", "-x", "c++", "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sorted(SOURCES.glob("*.cu"), key=lambda path: -path.stat().st_size)))


def library(folder: Path, *more: str) -> Path:
    """The emulated library: the launchers of `_cuda.so`, for tensors on the CPU."""
    made = folder / "emulated.so"
    objects = compile_all(folder, *more)
    subprocess.run(["g++", "-shared", "-Wl,--no-undefined", *more, *map(str, objects), "-o", str(made)], check=True)
    return made
