"""Many seeds in processes of their own, so that one that ends the process is a failure with a seed like any other."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import itertools
import logging
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

__all__ = ["Failure", "failures", "main", "shrunk"]

KINDS = ("network", "call", "operator")
AT_ONCE = {"network": 20, "call": 500, "operator": 2000}  # seeds of one process
GOOD = ("ok", "skipped", "refused")
HUNG = 600.0  # seconds after which a call of an operator ends its process
MEMORY = 6 << 30  # bytes of addresses for such a process: what asks for more is refused, not killed


class Failure(NamedTuple):
    """A seed that went wrong."""

    kind: str
    seed: int
    told: str

    def __str__(self) -> str:
        again = f"PYTHONPATH=tests python -m fuzz --kind {self.kind} --seed {self.seed}"
        return f"{self.kind} {self.seed}: {self.told}\n    {again}"


def _check(kind: str) -> Callable[[int], Any]:
    if kind == "operator":
        from .operators import check_operator

        return check_operator
    from .adaptations import check
    from .calls import check_call

    return check if kind == "network" else check_call


def _limit() -> None:
    """AddressSanitizer reserves more addresses than any limit; it has one of its own."""
    if not hasattr(ctypes.CDLL(None), "__asan_init"):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the user's code that the grammar writes
    logging.disable(logging.CRITICAL)


def _work(kind: str, seeds: range, answers: Any) -> None:
    _quiet()
    check = _check(kind)
    if kind == "operator":
        _limit()
    for seed in seeds:
        answers.send((seed, None))
        if kind == "operator":
            faulthandler.dump_traceback_later(HUNG, exit=True)
        if os.environ.get("LAMBDA_FUZZ_CRASH") == f"{kind} {seed}":  # what a test of this runner asks for
            os.abort()
        try:
            found = check(seed)
            answers.send((seed, (found.verdict, found.told)))
        except Exception as error:
            answers.send((seed, ("ERROR", f"the fuzz itself: {type(error).__name__}: {str(error)[:300]}")))


def _batch(kind: str, seeds: range, counts: Counter[str]) -> Iterator[Failure]:
    """The failures of some seeds, which run in one process for as long as it lives."""
    context = multiprocessing.get_context("spawn")
    while seeds:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kind, seeds, theirs))
        process.start()
        theirs.close()
        at = seeds[0]
        try:
            while True:
                at, answer = mine.recv()
                if answer is None:
                    continue
                verdict, told = answer
                counts[verdict] += 1
                if verdict not in GOOD:
                    yield Failure(kind, at, f"{verdict} {told}")
        except EOFError:
            process.join()
        if process.exitcode == 0:
            return
        counts["CRASH"] += 1
        yield Failure(kind, at, f"CRASH: the process ended with {process.exitcode}")
        seeds = range(at + 1, seeds.stop)


def failures(kind: str, seeds: Iterable[range], counts: Counter[str]) -> Iterator[Failure]:
    """The failures of batches of seeds; `counts` holds what came of all."""
    for batch in seeds:
        yield from _batch(kind, batch, counts)


def shrunk(seed: int) -> list[int]:
    """The pieces of a failing network that can be left out: it fails without them too."""
    from .adaptations import check
    from .grammar import network

    without: list[int] = []
    for piece in range(network(seed).pieces):
        if check(seed, [*without, piece]).verdict not in ("ok", "skipped"):
            without.append(piece)
    return without


def _show(kind: str, seed: int) -> None:
    """One seed in this process: what it is and what came of it; of a failing network also the shortest form."""
    _quiet()
    if kind == "operator":
        from .operators import check_operator, describe_operator

        _limit()
        print(describe_operator(seed), flush=True)
        print(check_operator(seed))
        return
    from .adaptations import check, describe
    from .calls import describe_call

    found = _check(kind)(seed)
    without = shrunk(seed) if kind == "network" and found.verdict not in ("ok", "skipped") else []
    print(describe(seed, without) if kind == "network" else describe_call(seed))
    print(found if not without else check(seed, without))


def main() -> None:
    """The command line: `make fuzz SECONDS=1800 SEED=0`."""
    what = "Random networks and calls beside plain PyTorch in float64, and operators with arguments that do not fit."
    parser = argparse.ArgumentParser("fuzz", description=what)
    parser.add_argument("--kind", choices=KINDS, help="without it, all in turn")
    parser.add_argument("--seed", type=int, help="show this one seed")
    parser.add_argument("--first", type=int, default=0, help="the first seed of a run")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--count", type=int, help="how many seeds of the kind, in place of a time")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.seed is not None:
        _show(options.kind or "network", options.seed)
        return
    end, counts, wrong = time.monotonic() + options.seconds, Counter[str](), 0
    kinds = [options.kind] if options.kind else list(KINDS)
    for turn in itertools.count():
        kind = kinds[turn % len(kinds)]
        begin = options.first + turn // len(kinds) * AT_ONCE[kind]
        stop = begin + AT_ONCE[kind]
        if options.count is not None:
            stop = min(stop, options.first + options.count)
        for failure in failures(kind, [range(begin, stop)], counts):
            wrong += 1
            print(failure, flush=True)
        if stop == options.first + options.count if options.count is not None else time.monotonic() > end:
            break
    print(", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    sys.exit(1 if wrong else 0)
