"""Threads and processes that write to one path and read it: none finds a part of a file, and nothing is left beside it.
`python tests/one_path.py TIMES` lets each of 4 processes' 8 threads write and read each kind of file so often."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lambda_kernels.backends.table import Choice, Table
from lambda_maml import checkpoint
from lambda_maml.files import read_json, write_json

PROCESSES, THREADS = 4, 8


class Kind(NamedTuple):
    """write: a file of so many equal rows. read: these rows."""

    name: str
    write: Callable[[Path, int], None]
    read: Callable[[Path], list[int]]


def _write_tensors(path: Path, count: int) -> None:
    checkpoint.write_tensors(path, {"rows": torch.full((count, 50), count)}, {"count": count})


def _read_tensors(path: Path) -> list[int]:
    tensors, meta = checkpoint.read_tensors(path)
    return [*tensors["rows"][:, 0].tolist(), meta["count"]][1:]


def _add_choice(path: Path, count: int) -> None:
    Table(path).add(str(count % 50), Choice("native", {"native": 1.0}, {"cuda": "x" * 50}))


def _read_choices(path: Path) -> list[int]:
    """A table that cannot be read is empty; it had an entry from the beginning."""
    return [len(choice.excluded["cuda"]) for choice in Table(path).choices.values()][:1] * 50


KINDS = (
    Kind("a.json", lambda path, count: write_json(path, [count] * count), read_json),
    Kind("a.safetensors", _write_tensors, _read_tensors),
    Kind("choices.json", _add_choice, _read_choices),
)


def seen(kind: Kind, path: Path) -> int:
    """How many rows there are. AssertionError where these are not those of one write."""
    rows = kind.read(path)
    assert rows and rows == [len(rows)] * len(rows), f"{path.name}: a part of a file: {rows[:3]}... of {len(rows)} rows"
    return len(rows)


def one_process(folder: Path, times: int, seed: int) -> None:
    """Several threads, each of which writes and reads in turn."""

    def one_thread(thread: int) -> None:
        draw = random.Random(f"{seed} {thread}")
        for _ in range(times):
            for kind in KINDS:
                kind.write(folder / kind.name, draw.randint(1, 3000))
                seen(kind, folder / kind.name)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one_thread, range(THREADS)))


def all_processes(folder: Path, times: int) -> None:
    """AssertionError with what a process said that found a part, or left one behind."""
    for kind in KINDS:
        kind.write(folder / kind.name, 1)
    command = [sys.executable, __file__, str(times), str(folder)]
    running = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for seed in range(PROCESSES)
    ]
    said = [process.communicate()[0] for process in running]
    assert not any(said) and not any(process.returncode for process in running), "\n".join(said)
    assert sorted(path.name for path in folder.iterdir()) == sorted(kind.name for kind in KINDS)


def main(times: str, *child: Any) -> None:
    torch.set_num_threads(1)
    if child:
        one_process(Path(child[0]), int(times), int(child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        all_processes(Path(folder), int(times))
    count = PROCESSES * THREADS * len(KINDS) * int(times)
    print(f"{PROCESSES} processes of {THREADS} threads: {count} files written and read, each whole")


if __name__ == "__main__":
    main(*sys.argv[1:])
