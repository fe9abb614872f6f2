"""The CUDA sources compiled by g++ with the emulator's headers in place of CUDA's."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY = "emulated.so"
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
    made, linked = folder / LIBRARY, folder / "linked"
    objects = compile_all(folder, *more)
    subprocess.run(["g++", "-shared", "-Wl,--no-undefined", *more, *map(str, objects), "-o", str(linked)], check=True)
    return linked.rename(made)  # what bears the name is whole


def kept_library() -> Path:
    """The emulated library of the sources as they are, in build/emulator: built once for all processes and runs."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    sources = sorted(path for folder in (HERE, SOURCES) for path in folder.iterdir() if path.is_file())
    text = b"\0".join([compiler, *map(str.encode, FLAGS), *(path.read_bytes() for path in sources)])
    folder = ROOT / "build" / "emulator" / hashlib.sha256(text).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / LIBRARY
        return made if made.exists() else library(folder)
