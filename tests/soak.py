"""Random adaptations, calls, shapes, arguments, bad files, kills, and many writers of one path, round after round:
`python tests/soak.py SECONDS SEED`, or make soak. Each round has seeds of its own; what went wrong is shown with the
command that does it again."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROUND = {"network": 20, "call": 500, "operator": 500, "hostile": 66, "killed": 2, "one_path": 3}
"""The parts of a round, and how often each does what it does: a kind of the fuzz, or a script of this folder."""


def arguments(name: str, times: int, seed: int) -> list[str]:
    """What Python is given for a part of round `seed`."""
    if name in ("network", "call", "operator"):
        return ["-m", "fuzz", "--kind", name, "--count", str(times), "--first", str(times * seed)]
    return [f"tests/{name}.py", str(times), *([] if name == "one_path" else [str(seed)])]


def part(name: str, times: int, seed: int) -> str:
    """What a part said that went wrong, with its command; "" where all is well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = arguments(name, times, seed)
    done = subprocess.run(
        [sys.executable, *command], cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1:] or [""]
    print(f"round {seed}, {name}: {last[0] if done.returncode == 0 else f'status {done.returncode}'}", flush=True)
    return f"PYTHONPATH=tests python {shlex.join(command)}\n{done.stdout}" if done.returncode else ""


def soak(seconds: float, first: int) -> Iterator[str]:
    """What went wrong, one part after another, for so long; each part at least once."""
    end = time.monotonic() + seconds
    for seed in itertools.count(first):
        for name, times in ROUND.items():
            if seed > first and time.monotonic() > end:
                return
            if wrong := part(name, times, seed):
                yield wrong


if __name__ == "__main__":
    faults = 0
    for fault in soak(float(sys.argv[1]), int(sys.argv[2])):
        faults += 1
        print(fault, flush=True)
    print(f"{faults} faults")
    sys.exit(1 if faults else 0)
