"""Adaptation time: measured here, or read from pytest-benchmark's JSON.

Adaptation time runs from support tensors to adapted parameters; the query forward is not in it.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import info, to_torch

from . import models
from .adapt import adapt
from .files import read_json
from .forms import Positive, checked
from .inner.checks import Loss
from .inner.rates import DEFAULT_LR, Rate
from .inner.rule import Rule
from .patterns import Pattern
from .places import Solver
from .plain_torch import inner_loop, inner_parameters
from .progress import Progress
from .trials import Trial

STOCK = "stock_full"
"""Name of the full pattern run by plain PyTorch among the timings."""


BUSY = 0.2
"""Quartiles that lie further apart than this share of the median are told as those of a busy machine."""
BESIDE = 0.1
"""Other processes that take more than this share of the processors meanwhile are told."""


class Timing(NamedTuple):
    """Milliseconds: the median and the quartiles around it."""

    median: float
    q1: float
    q3: float


def median_of(time: float | Timing) -> float:
    """The median of a timing; a number is one without quartiles."""
    return time.median if isinstance(time, Timing) else time


def is_tie(one: float | Timing, other: float | Timing) -> bool:
    """Whether two times cannot be told apart: each median lies between the other's quartiles, or they are equal.

    >>> is_tie(Timing(1.00, 0.97, 1.06), Timing(1.04, 0.99, 1.10)), is_tie(1.0, 1.04)
    (True, False)
    """
    if not (isinstance(one, Timing) and isinstance(other, Timing)):
        return median_of(one) == median_of(other)
    within = one.q1 <= other.median <= one.q3 and other.q1 <= one.median <= other.q3
    return within or one.median == other.median


def busy(times: Iterable[Timing], beside: float = 0.0) -> str | None:
    """That the machine was busy while it was timed: the quartiles of half of the times or more lie apart by more than a
    fifth of the median, or other processes took more than a tenth of the processors (`beside`); else None.

    >>> busy([Timing(1.0, 0.98, 1.04), Timing(2.0, 1.97, 2.1)]) is None
    True
    """
    spreads = [(t.q3 - t.q1) / t.median for t in times]
    middle = statistics.median(spreads) if spreads else 0.0
    why = []
    if middle > BUSY:
        why.append(f"the quartiles of an adaptation's time lie {middle:.0%} apart (median over patterns)")
    if beside > BESIDE:
        why.append(f"other processes took {beside:.0%} of the processors")
    if not why:
        return None
    return (
        f"the machine was busy while times were taken: {', and '.join(why)}; times that cannot be told apart count as "
        "equal: repeat it on a quiet machine, or for longer (--seconds)"
    )


class Work(NamedTuple):
    """Seconds: on the clock, of all processors' work since the machine started, and of this process's."""

    clock: float
    all: float
    own: float

    @classmethod
    def now(cls, statistics: str | Path = "/proc/stat") -> Work | None:
        """As of now; None where the system does not tell (it is Linux that does)."""
        try:
            first = Path(statistics).read_text(encoding="ascii").partition("\n")[0]
            user, nice, system, _, _, irq, softirq, stolen = map(int, first.split()[1:9])
        except (OSError, ValueError):
            return None
        ticks = user + nice + system + irq + softirq + stolen
        return cls(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())

    def beside(self, later: Work) -> float:
        """The share of all processors that other processes took till `later`; 0 where that is too soon to tell.

        >>> Work(0.0, 100.0, 7.0).beside(Work(2.0, 100.0 + os.cpu_count(), 7.0))
        0.5
        """
        passed = later.clock - self.clock
        if passed < TOLD_AFTER:
            return 0.0
        return max(0.0, later.all - self.all - (later.own - self.own)) / (passed * (os.cpu_count() or 1))


TOLD_AFTER = 0.2
"""Seconds from which on the system's count of work, in hundredths of a second, says something."""


class _Stats(msgspec.Struct):
    """Seconds."""

    median: Positive
    q1: Positive
    q3: Positive


class _About(msgspec.Struct):
    """What `timing_info` gives."""

    kind: str
    pattern: str
    device: str = "unknown device"
    environment: dict[str, Any] = {}


class _Benchmark(msgspec.Struct):
    extra_info: dict[str, Any] = {}
    stats: dict[str, Any] = {}


class _Document(msgspec.Struct):
    """pytest-benchmark's JSON, as far as it is read."""

    benchmarks: list[_Benchmark]


_REMEDY = "take the times anew: make timings"


class _Stock:
    """The plain loop, ready to run: its parameters are put back before each run, outside the clock."""

    def __init__(
        self, model: nn.Module, xs: Tensor, ys: Tensor, steps: int, lr: float, norm: str, loss: Loss, xq: Tensor | None
    ) -> None:
        self.model = to_torch(model)
        self.free = inner_parameters(self.model, norm)
        self.start = [p.detach().clone() for p in self.free]
        self.call = (xs, ys, steps, lr, loss)
        self.xq = xq

    def reset(self) -> None:
        with torch.no_grad():
            for p, start in zip(self.free, self.start, strict=True):
                p.copy_(start)

    def __call__(self) -> None:
        xs, ys, steps, lr, loss = self.call
        inner_loop(self.model, self.free, xs, ys, steps=steps, lr=lr, loss=loss)
        if self.xq is not None:
            with torch.no_grad():
                self.model(self.xq)


WARMUP, COUNTED = 2, 3
"""Rounds that are not counted, and those that always are, however little time there is."""


def interleave(
    runs: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = WARMUP, seconds: float | None = None,
    synchronize: Callable[[], object] = lambda: None, before: Callable[[str], object] = lambda name: None,
    progress: Progress | None = None, clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:  # fmt: skip
    """Time every entry of `runs` once per round, in an order shuffled anew, so that drift of the machine hits all.

    `warmup` rounds are not counted. After `seconds` no new round begins, but three are always counted. `before(name)`
    runs off the clock ahead of each call; `synchronize()` waits for the device. `clock` gives nanoseconds:
    `time.process_time_ns` counts what a thread computes, and not what it waits for on a machine that others use too.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for turn in range(-warmup, repeats):
            if seconds is not None and turn >= min(COUNTED, repeats) and time.perf_counter() - start > seconds:
                break
            gc.collect()
            shuffle(order)
            for name in order:
                before(name)
                synchronize()
                tick = clock()
                runs[name]()
                synchronize()
                if turn >= 0:
                    taken[name].append((clock() - tick) / 1e6)
            if progress is not None:
                progress(warmup + turn + 1, warmup + repeats, "timing rounds")
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(times) for name, times in taken.items()}


def _summary(times: Sequence[float]) -> Timing:
    q1, _, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return Timing(statistics.median(times), q1, q3)


def measure_times(
    model: nn.Module, xs: Tensor, ys: Tensor, *, patterns: Iterable[Pattern | str | Trial], steps: int,
    lr: Rate = DEFAULT_LR, rule: Rule | None = None, norm: str = "follow", loss: Loss = F.cross_entropy,
    stock: bool = True, xq: Tensor | None = None, repeats: int = 20, warmup: int = WARMUP, seconds: float | None = None,
    progress: Progress | None = None, solver: Solver | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Adaptation time of every pattern on xs [N, C, H, W], ys [N], interleaved in this process; keys are the patterns'
    texts. A `Trial` may have its own number of steps, and has the key `timed`.

    With `stock`, also that of the full pattern in plain PyTorch, under the name `STOCK`: its parameters are copied
    before the clock starts, while `adapt` pays for its own copies; it is plain gradient descent with one rate, so that
    it is left out for other rules. With `xq`, the times include classifying `xq`.
    """

    def ours(trial: Trial) -> Callable[[], object]:
        pattern, k = trial.pattern, steps if trial.steps is None else trial.steps

        def run() -> None:
            learner = adapt(
                model, xs, ys, pattern=pattern, steps=k, lr=lr, rule=rule, norm=norm, loss=loss, solver=solver
            )
            if xq is not None:
                with torch.no_grad():
                    learner(xq)

        return run

    trials = [p if isinstance(p, Trial) else Trial(Pattern.of(model, p)) for p in patterns]
    runs: dict[str, Callable[[], object]] = {trial.timed: ours(trial) for trial in trials}
    plain = stock and rule is None and solver is None and isinstance(lr, (int, float))
    yardstick = _Stock(model, xs, ys, steps, float(lr), norm, loss, xq) if plain else None  # type: ignore[arg-type]
    if yardstick is not None:
        runs[STOCK] = yardstick

    def before(name: str) -> None:
        if name == STOCK and yardstick is not None:
            yardstick.reset()

    synchronize = torch.cuda.synchronize if xs.is_cuda else (lambda: None)
    return interleave(
        runs, repeats=repeats, warmup=warmup, seconds=seconds, synchronize=synchronize, before=before, progress=progress
    )


def measure_passes(
    model: nn.Module, xs: Tensor, ys: Tensor, xq: Tensor, *, repeats: int = 20, seconds: float | None = None, **how: Any
) -> tuple[float, float]:  # fmt: skip
    """Median milliseconds of an adapted network's pass over a query set, and over the support set; `how` as in
    `adapt`."""
    learner = adapt(model, xs, ys, **how)

    def passing(x: Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                learner(x)

        return run

    wait = torch.cuda.synchronize if xs.is_cuda else (lambda: None)
    runs = {"query": passing(xq), "support": passing(xs)}
    found = interleave(runs, repeats=repeats, seconds=seconds, synchronize=wait)
    return found["query"].median, found["support"].median


def measure_time(
    model: nn.Module, xs: Tensor, ys: Tensor, *, pattern: Pattern | str, steps: int, lr: Rate = DEFAULT_LR,
    rule: Rule | None = None, norm: str = "follow", loss: Loss = F.cross_entropy,
    repeats: int = 20,
) -> float:  # fmt: skip
    """Median adaptation time in milliseconds: support tensors xs [N, C, H, W], ys [N] to adapted parameters.

    >>> measure_time(model, xs, ys, pattern="00011", steps=5, lr=0.03, repeats=3) > 0
    True

    The query forward is not in it; a device is waited for. pattern, steps, lr, rule, norm and loss are those of
    `adapt`; `repeats` runs are counted, after two that are not.

    Raises:
        ValueError, TypeError: as `adapt`, or `repeats` is below 1.
    """
    times = measure_times(
        model,
        xs,
        ys,
        patterns=[pattern],
        steps=steps,
        lr=lr,
        rule=rule,
        norm=norm,
        loss=loss,
        stock=False,
        repeats=repeats,
    )
    return times[str(Pattern.of(model, pattern))].median


def timing_info(
    model: nn.Module, xs: Tensor, *, pattern: Pattern | str, shots: int, steps: int, norm: str, stock: bool = False
) -> dict[str, Any]:
    """What a benchmark states of itself, for pytest-benchmark's `extra_info`; `read_timings` matches on it."""
    return {
        "kind": STOCK if stock else "adapt",
        "pattern": str(Pattern.of(model, pattern)),
        "network": models.config_of(model),
        "shots": shots,
        "steps": steps,
        "norm": norm,
        "dtype": str(xs.dtype).removeprefix("torch."),
        "device": str(xs.device),
        "environment": info.environment(xs.device),
    }


def read_timings(
    path: str | Path, *, patterns: Iterable[Pattern | str], network: Mapping[str, Any], shots: int, steps: int,
    norm: str, dtype: str = "float32",
) -> tuple[dict[str, Timing], dict[str, Any]]:  # fmt: skip
    """Adaptation times from pytest-benchmark's JSON (`--benchmark-json`), and the environment they were taken in.

    Benchmarks of other configurations in the same file are passed over. Raises ValueError if nothing in the file was
    taken for this network, shots, steps, norm and dtype (naming what differs), if a pattern is missing (naming it), or
    if one occurs twice. The entry `STOCK` is there if the file has one.
    """
    document: _Document = checked(read_json(path), _Document, path, _REMEDY)
    wanted = {"network": dict(network), "shots": shots, "steps": steps, "norm": norm, "dtype": dtype}
    found: dict[str, list[Timing]] = {}
    environments: dict[str, dict[str, Any]] = {}
    nearest: list[str] | None = None
    for index, benchmark in enumerate(document.benchmarks):
        extra = benchmark.extra_info
        if extra.get("kind") not in ("adapt", STOCK):
            continue
        about: _About = checked(extra, _About, path, _REMEDY, f"benchmarks[{index}].extra_info")
        differs = _differences({key: extra.get(key, "float32" if key == "dtype" else None) for key in wanted}, wanted)
        if differs:
            nearest = differs if nearest is None or len(differs) < len(nearest) else nearest
            continue
        try:
            name = STOCK if about.kind == STOCK else str(Pattern.parse(about.pattern))
        except ValueError as error:
            raise ValueError(f"{path}: benchmarks[{index}].extra_info.pattern: {error}; {_REMEDY}") from error
        stats: _Stats = checked(benchmark.stats, _Stats, path, _REMEDY, f"benchmarks[{index}].stats")
        found.setdefault(name, []).append(Timing(1e3 * stats.median, 1e3 * stats.q1, 1e3 * stats.q3))
        environments[about.device] = {"device": about.device, **about.environment}
    if not found:
        reason = f"the nearest differs in {', '.join(nearest)}" if nearest else "it holds no benchmark of kind 'adapt'"
        raise ValueError(f"{path}: no timing was taken for this configuration: {reason}")
    if len(environments) > 1:
        raise ValueError(f"{path}: mixes timings of {' and '.join(sorted(environments))}: keep one device in the file")
    twice = [name for name, timings in found.items() if len(timings) > 1]
    if twice:
        raise ValueError(f"{path}: pattern {', '.join(twice)} was timed more than once: keep one run in the file")
    missing = [str(p) for p in map(Pattern.parse, patterns) if str(p) not in found]
    if missing:
        raise ValueError(f"{path}: has no timing for pattern {', '.join(missing)} ({len(found)} others are there)")
    return {name: timing for name, (timing,) in found.items()}, next(iter(environments.values()))


def read_trials(
    path: str | Path, trials: Sequence[Trial], counts: Sequence[int], config: Mapping[str, Any]
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """`read_timings` of candidates with these numbers of steps, by `Trial.timed`; plain PyTorch's by `stock_of`."""
    found: dict[str, Timing] = {}
    environment: dict[str, Any] = {}
    for k in counts:
        own = [t for t in trials if t.steps in (None, k)]
        times, environment = read_timings(path, patterns={t.pattern: None for t in own}, steps=k, **config)
        found |= {t.timed: times[str(t.pattern)] for t in own}
        if STOCK in times:
            found[stock_of(own[0])] = times[STOCK]
    return found, environment


def stock_of(trial: Trial) -> str:
    """What plain PyTorch's time with a candidate's number of steps is called."""
    return STOCK if trial.steps is None else f"{STOCK}, {trial.steps} steps"


def _differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """Each field in which the two differ, as "steps (5 in the file, 10 here)"."""
    found = []
    for key in {**want, **have}:
        mine, theirs = want.get(key), have.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += [f"{key} {difference}" for difference in _differences(theirs, mine)]
        elif mine != theirs:
            found.append(f"{key} ({theirs} in the file, {mine} here)")
    return found
