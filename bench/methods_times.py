"""Times of short runs on a machine with other work."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

from lambda_maml.timing import Timing, interleave

AT_LEAST = 10.0  # ms that are timed at once


def timed(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Timing]:
    """In processor time, which leaves out what the one thread waits for on a machine with other work; short runs in a
    row, as the first one after others finds nothing in the caches."""
    rounds = {name: max(1, round(AT_LEAST / once(run))) for name, run in runs.items()}
    many = {name: functools.partial(repeated, run, rounds[name]) for name, run in runs.items()}
    found = interleave(many, repeats=10**6, warmup=0, seconds=seconds, clock=time.process_time_ns)
    return {name: Timing(*(t / rounds[name] for t in found[name])) for name in runs}


def once(run: Callable[[], object]) -> float:
    """Milliseconds of a second call."""
    run()
    begin = time.process_time_ns()
    run()
    return max(time.process_time_ns() - begin, 1) / 1e6


def repeated(run: Callable[[], object], count: int) -> None:
    for _ in range(count):
        run()
