"""Peak memory of one adaptation, or one meta-gradient of second order, above parameters and inputs: the process's
resident set as Linux counts it, so that memory beyond torch's allocator is in it too.

A process of its own for each contender. It adapts to tiny images first, which loads libraries and starts threads; then
contender and problem are made, the mark of the highest resident set is put back, and the contender runs; then the same
once more, for what a first call does for its shapes alone. Pages of files, which are code that was not loaded before,
are not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import meta
import torch
from harness import Configuration, Skip, make_problem
from peers import BY_HAND, PACKAGES

from lambda_maml import Pattern

# What is freed goes back to the system at once: the resident set is what is in use.
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


class Peak(NamedTuple):
    """MiB of the first call and of a later one; what a first one leaves in caches counts in both."""

    first: float
    later: float


def peak(configuration: Configuration, pattern: str, contender: str, threads: int, query: int = 0) -> Peak:
    """Measured in a process of its own. Of one task's meta-gradient with so many query images per class, of an
    adaptation without."""
    command = [sys.executable, __file__, pattern, contender, *map(str, configuration)]
    command += [f"--threads={threads}", f"--query={query}"]
    done = subprocess.run(command, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise Skip(f"no peak: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Peak(*map(float, done.stdout.split()))


def status(field: str) -> float:
    """MiB, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return float(value) / 1024


Prepared = Callable[[Configuration], Callable[[], object]]  # ready to run once


def adaptation(pattern: str, contender: str, c: Configuration) -> Callable[[], object]:
    make = {**BY_HAND.get(pattern, {}), **PACKAGES}[contender]
    call = make(make_problem(c, torch.device("cpu")), Pattern(pattern), c.steps)
    call.reset()
    return call


def meta_gradient(pattern: str, contender: str, query: int, c: Configuration) -> Callable[[], object]:
    case = meta.Case(pattern, second_order=True)
    make = {**meta.contenders(case), **meta.PACKAGES}[contender]
    problem = meta.make_meta_problem(c, 1, query)
    return functools.partial(make(problem.model, case, c.steps), problem.batch)


def measure(configuration: Configuration, prepared: Prepared) -> Peak:
    """In this process."""
    prepared(configuration._replace(image_size=16, shots=1))()
    call = prepared(configuration)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peaks = status("RssAnon"), []
    for _ in Peak._fields:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # 5: VmHWM starts again at VmRSS
        call()
        peaks.append(status("VmHWM") - status("RssFile") - before)
        gc.collect()
    return Peak(*peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("pattern", choices=list(BY_HAND))
    parser.add_argument("contender")
    for name in Configuration._fields:
        parser.add_argument(name, type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--query", type=int, default=0, help="Images per class of a meta-gradient. Default: an adaptation"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    configuration = Configuration(*(getattr(given, name) for name in Configuration._fields))
    prepared: Prepared = functools.partial(adaptation, given.pattern, given.contender)
    if given.query:
        prepared = functools.partial(meta_gradient, given.pattern, given.contender, given.query)
    print(*measure(configuration, prepared))


if __name__ == "__main__":
    main()
