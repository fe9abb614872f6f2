"""What the benchmarks share: configurations, the plain loop, the correctness gate, and rounds that alternate with stock
PyTorch."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lambda_kernels import agreement, backends, to_torch
from lambda_kernels.agreement import DRAWS, distance
from lambda_maml import Pattern, adapt, models
from lambda_maml.plain_torch import inner_loop


class Skip(Exception):
    """A column or a row that cannot be had here, and why."""


class Configuration(NamedTuple):
    """A support set and the conv4 that adapts to it."""

    image_size: int  # pixels per side
    in_channels: int
    width: int  # channels of every block
    ways: int
    shots: int
    steps: int

    def __str__(self) -> str:
        size = f"{self.image_size}x{self.image_size}x{self.in_channels}"
        return f"{size}, width {self.width}, {self.ways}-way {self.shots}-shot, {self.steps} steps"


CONFIGURATIONS = {
    "omniglot": Configuration(28, 1, 64, 5, 1, 5),
    "glyphs": Configuration(28, 1, 32, 5, 1, 5),  # the network of `lambda-maml demo`
    "cifar": Configuration(32, 3, 32, 5, 5, 10),
    "cifar-1-shot": Configuration(32, 3, 32, 5, 1, 5),
    "mini-imagenet": Configuration(84, 3, 32, 5, 1, 5),
    "mini-imagenet-5-shot": Configuration(84, 3, 32, 5, 5, 10),
    "mini-imagenet-64": Configuration(84, 3, 64, 5, 5, 5),
}


class Problem(NamedTuple):
    """A network with random weights, support images xs [N, C, H, W] of random pixels, and their labels ys [N]."""

    model: nn.Module
    xs: Tensor
    ys: Tensor

    def double(self) -> Problem:
        return Problem(copy.deepcopy(self.model).double(), self.xs.double(), self.ys)


Build = Callable[[int, int, int, int], nn.Module]  # from ways, in_channels, width, image_size


def make_problem(c: Configuration, device: torch.device, build: Build = models.conv4) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(c.ways, c.in_channels, c.width, c.image_size)
        xs = torch.randn(c.ways * c.shots, c.in_channels, c.image_size, c.image_size)
    ys = torch.arange(c.ways).repeat_interleave(c.shots)
    return Problem(model.to(device), xs.to(device), ys.to(device))


def updated_children(network: nn.Module, bits: str) -> list[str]:
    """The network's children that a pattern updates, by name. A child is frozen or updated as a whole, be it one layer
    or several."""
    layers = {
        name: sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in child.modules())
        for name, child in network.named_children()
    }
    if len(bits) != sum(layers.values()):
        raise ValueError(f"pattern {bits!r} has {len(bits)} bits, the network has {sum(layers.values())} layers")
    rest = iter(bits)
    own = {name: {next(rest) for _ in range(count)} for name, count in layers.items()}
    if split := [name for name, of in own.items() if len(of) > 1]:
        raise ValueError(f"pattern {bits!r} updates a part of {', '.join(split)} only")
    return [name for name, of in own.items() if of == {"1"}]


class PlainLoop:
    """The inner loop in stock PyTorch layers, `torch.autograd.grad` over what the pattern updates. `reset` puts the
    parameters back."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int, lr: float, norm: str) -> None:
        self.network = to_torch(problem.model)
        self.xs, self.ys, self.lr = problem.xs, problem.ys, lr
        self.start = {n: p.detach().clone() for n, p in self.network.named_parameters()}
        self.segments = [(self._free(bits, norm), count) for bits, count in pattern.segments(steps)]

    def _free(self, bits: str, norm: str) -> list[nn.Parameter]:
        updated = updated_children(self.network, bits)
        fixed = {id(p) for m in self.network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        return [
            p
            for name, p in self.network.named_parameters()
            if name.split(".")[0] in updated and not (norm == "never" and id(p) in fixed)
        ]

    def reset(self) -> None:
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                p.copy_(self.start[name])

    def __call__(self) -> None:
        for free, count in self.segments:
            inner_loop(self.network, free, self.xs, self.ys, steps=count, lr=self.lr)

    def result(self) -> list[Tensor]:
        """All parameters, adapted."""
        self.reset()
        self()
        return [p.detach().clone() for p in self.network.parameters()]


class Wrong(AssertionError):
    """A result that is not the plain loop's: the red gate."""


def compare(what: str, ours: Sequence[Tensor], stock: Sequence[Tensor], truth: Sequence[Tensor], length: float) -> None:
    """Wrong unless ours is right by the rule of `lambda_kernels.agreement`; distances in units of `length`."""
    found = agreement.errors(ours, stock, truth, length)
    if not found.agree:
        away = f"{found.mine:.3g} away from plain PyTorch in float64, {found.limit:.3g} allowed"
        raise Wrong(f"{what}: {away}: no time taken")


class Gate:
    """What the plain loop gives under a pattern, held against those who claim to give the same."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int, lr: float, norm: str) -> None:
        self.problems = [problem]
        self.loop = functools.partial(PlainLoop, pattern=pattern, steps=steps, lr=lr, norm=norm)
        self.pattern = pattern
        self.found: dict[tuple[int, bool], list[Tensor]] = {}
        self.moved = distance(self.plain(0, double=True), [p.detach() for p in problem.model.parameters()])
        what = f"{pattern} with lr={lr} moves no parameter in {steps} steps"
        assert self.moved > 0, f"{what}: there is nothing to compare"

    def problem(self, draw: int, *, double: bool) -> Problem:
        while draw >= len(self.problems):
            last = self.problems[-1]
            self.problems.append(last._replace(xs=last.xs.roll(1, dims=-1).flip(0)))
        return self.problems[draw].double() if double else self.problems[draw]

    def plain(self, draw: int, *, double: bool) -> list[Tensor]:
        """The plain loop's parameters."""
        if (draw, double) not in self.found:
            self.found[draw, double] = self.loop(self.problem(draw, double=double)).result()
        return self.found[draw, double]

    def __call__(self, adapted: Callable[[Problem], Sequence[Tensor]], name: str = "") -> None:
        """Wrong unless adapted(problem) are the plain loop's parameters, in float64 and in the dtype that is timed."""
        what = f"{name} {self.pattern}".strip()
        doubled, truth = self.problem(0, double=True), self.plain(0, double=True)
        compare(f"{what} in {doubled.xs.dtype}", adapted(doubled), truth, truth, self.moved)
        for draw in range(DRAWS):
            problem, truth = self.problem(draw, double=False), self.plain(draw, double=True)
            ours, plain = adapted(problem), self.plain(draw, double=False)
            try:
                return compare(f"{what} in {problem.xs.dtype}", ours, plain, truth, self.moved)
            except Wrong:
                if draw == DRAWS - 1:
                    raise


def check_adapt(
    problem: Problem, pattern: Pattern, steps: int, lr: float, norm: str, double: str | None = None
) -> None:
    """The gate of an adaptation: the same parameters as the plain loop, in float64 and in the dtype that is timed.
    `double` names a backend for float64, where compiling the others for it takes too long."""

    def ours(problem: Problem) -> list[Tensor]:
        named = double if problem.xs.dtype == torch.float64 else None
        with contextlib.nullcontext() if named is None else backends.use_backend(named):
            learner = adapt(problem.model, problem.xs, problem.ys, pattern=pattern, steps=steps, lr=lr, norm=norm)
        return [t.detach() for t in learner.parameters_dict().values()]

    Gate(problem, pattern, steps, lr, norm)(ours)


def clock(run: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Seconds that one run takes, the garbage collector and other work of the device aside."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, seconds: float, rounds: int,
    synchronize: Callable[[], object] = lambda: None, before: Callable[[str], object] = lambda name: None,
    warmup: int = 2,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of every run in each round, in an order shuffled each round; entry i of all lists is round i.

    Rounds begin until `seconds` have passed, at least three and at most `rounds`. `before(name)` is off the clock.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    start = time.perf_counter()
    for turn in range(-warmup, rounds):
        if turn == 0:
            start = time.perf_counter()
        if turn >= min(3, rounds) and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name in order:
            before(name)
            took = clock(runs[name], synchronize)
            if turn >= 0:
                times[name].append(took)
    return times


class Column(NamedTuple):
    """What is timed; `per` adaptations a call; `reset` is off the clock."""

    call: Callable[[], object]
    per: int = 1
    reset: Callable[[], object] = lambda: None


def each_round(columns: Mapping[str, Column], **how: Any) -> dict[str, list[float]]:
    """Milliseconds an adaptation of every column in each round; `how` is for `interleaved`."""
    calls = {name: column.call for name, column in columns.items()}
    times = interleaved(calls, before=lambda name: columns[name].reset(), **how)
    return {name: [1e3 * t / columns[name].per for t in taken] for name, taken in times.items()}


def alternate(
    benchmark: Any,
    run: Callable[[], object],
    *,
    stock: PlainLoop | None,
    reset: Callable[[], object] = lambda: None,
    synchronize: Callable[[], object],
    limits: Mapping[str, float],
) -> None:
    """Time `run` by pytest-benchmark, with a run of `stock` ahead of every round, so that both see the same machine.

    Rounds: as many as `limits["seconds"]` holds, at least `limits["rounds"]`. `extra_info` gets the stock loop's median
    and quartiles of these rounds ("stock_alternating_ms"), and how often faster `run` was ("speedup_over_stock").
    """
    times: list[float] = []

    def setup() -> None:
        if stock is not None:
            stock.reset()
            times.append(clock(stock, synchronize))
        reset()
        synchronize()

    def timed() -> None:
        run()
        synchronize()

    rounds = 1
    if not benchmark.disabled:
        for _ in range(2):  # the first run of a shape is no measure
            start = time.perf_counter()
            setup()
            timed()
            took = time.perf_counter() - start
        rounds = max(int(limits["rounds"]), int(limits["seconds"] / took))
        times.clear()
    benchmark.pedantic(timed, setup=setup, rounds=rounds)
    if stock is not None and not benchmark.disabled:
        q1, median, q3 = (1e3 * t for t in quartiles(times))
        benchmark.extra_info["stock_alternating_ms"] = {"median": median, "q1": q1, "q3": q3}
        benchmark.extra_info["speedup_over_stock"] = median / (1e3 * benchmark.stats.stats.median)


def quartiles(times: Sequence[float]) -> list[float]:
    return statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3


def spread(values: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = quartiles(values)
    return {"median": median, "q1": q1, "q3": q3}


def reason(error: BaseException) -> str:
    """The error in a line, without paths of this machine."""
    text = " ".join(str(error).split()) or "no message"
    for folder in (Path(__file__).resolve().parents[1], Path(sys.prefix), Path.home()):
        text = text.replace(str(folder), "...")
    name = "" if isinstance(error, (AssertionError, Skip, backends.BackendError)) else f"{type(error).__name__}: "
    return name + (text if len(text) <= 300 else text[:300] + " ...")


def write(path: Path, document: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


Row = tuple[dict[str, Any], Callable[[], dict[str, Any]]]  # what a row is, and the function that fills it


def fill_rows(
    rows: Iterable[Row], document: dict[str, Any], path: Path | None, *, seconds: float = float("inf"),
    after: Callable[[], object] = lambda: None,
) -> int:  # fmt: skip
    """Fill the rows until the time is up, and write the document after each; how many gave a wrong result or broke."""
    start = time.perf_counter()
    document["rows"] = []
    failed = 0
    for row, fill in rows:
        begin = time.perf_counter()
        if begin - start > seconds:
            row.update(status="skipped", reason=f"no time was left of {seconds:.0f} s")
        else:
            print(f"{begin - start:6.1f} s  {row['name']}", flush=True)
            try:
                row.update({"status": "passed", **fill()})
            except Skip as why:
                row.update(status="skipped", reason=reason(why))
            except Exception as error:  # a row that breaks must not take the others with it
                row.update(status="failed", reason=reason(error))
            if row["status"] == "failed":
                failed += 1
                print(f"          failed: {row['reason']}", flush=True)
            row["seconds"] = round(time.perf_counter() - begin, 2)
        document["rows"].append(row)
        if path is not None:
            write(path, document)
        gc.collect()
        after()
    return failed
