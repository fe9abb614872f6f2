"""What the benchmarks share: configurations, the plain loop, the correctness gate, and rounds that alternate with stock
PyTorch."""

from __future__ import annotations

import copy
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lambda_kernels import to_torch
from lambda_maml import Pattern, adapt, models
from lambda_maml.stock import inner_loop


class Configuration(NamedTuple):
    """A support set and the conv4 that adapts to it."""

    image_size: int  # pixels a side
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
    "mini-imagenet": Configuration(84, 3, 32, 5, 1, 5),
    "mini-imagenet-64": Configuration(84, 3, 64, 5, 5, 5),
}


class Problem(NamedTuple):
    """A network with random weights, support images xs [N, C, H, W] of random pixels, and their labels ys [N]."""

    model: models.Conv4
    xs: Tensor
    ys: Tensor

    def double(self) -> Problem:
        return Problem(copy.deepcopy(self.model).double(), self.xs.double(), self.ys)


def make_problem(c: Configuration, device: torch.device) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.conv4(c.ways, c.in_channels, c.width, c.image_size)
        xs = torch.randn(c.ways * c.shots, c.in_channels, c.image_size, c.image_size)
    ys = torch.arange(c.ways).repeat_interleave(c.shots)
    return Problem(model.to(device), xs.to(device), ys.to(device))


class PlainLoop:
    """The inner loop in stock PyTorch layers, `torch.autograd.grad` over what the pattern updates. `reset` puts the
    parameters back."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int, lr: float, norm: str) -> None:
        self.network = to_torch(problem.model)
        self.xs, self.ys, self.lr = problem.xs, problem.ys, lr
        self.start = {n: p.detach().clone() for n, p in self.network.named_parameters()}
        self.segments = [(self._free(bits, norm), count) for bits, count in pattern.segments(steps)]

    def _free(self, bits: str, norm: str) -> list[torch.nn.Parameter]:
        layers = [*(f"block{i + 1}" for i in range(models.BLOCKS)), "head"]
        if len(bits) != len(layers):
            raise ValueError(f"pattern {bits!r} has {len(bits)} bits, conv4 has {len(layers)} layers")
        updated = [layer for bit, layer in zip(bits, layers) if bit == "1"]
        return [
            p
            for name, p in self.network.named_parameters()
            if name.split(".")[0] in updated and not (norm == "never" and ".norm." in name)
        ]

    def reset(self) -> None:
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                p.copy_(self.start[name])

    def __call__(self) -> None:
        for free, count in self.segments:
            inner_loop(self.network, free, self.xs, self.ys, steps=count, lr=self.lr)

    def result(self) -> dict[str, Tensor]:
        """The adapted parameters."""
        self.reset()
        self()
        return {n: p.detach().clone() for n, p in self.network.named_parameters()}


# Over the distance of stock PyTorch, in units of the value's own length.
SLACK = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Where rounding turns the choice between two pixels of a pooling window, or the sign before a ReLU, two right results
# in float32 part by more than their digits, in stock PyTorch too. Such images are rare; a wrong kernel fails on all.
DRAWS = 3


def distance(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Euclidean, over all values of all tensors."""
    return float(sum((f.double() - t.double()).square().sum() for f, t in zip(found, truth, strict=True))) ** 0.5


def compare(what: str, ours: Sequence[Tensor], stock: Sequence[Tensor], truth: Sequence[Tensor], length: float) -> None:
    """AssertionError unless ours is as near to the float64 truth as twice stock PyTorch in its dtype, plus SLACK."""
    limit = 2 * distance(stock, truth) / length + SLACK[ours[0].dtype]
    mine = distance(ours, truth) / length
    assert mine <= limit, f"{what}: {mine:.3g} away from plain PyTorch in float64, {limit:.3g} allowed: no time taken"


def check_adapt(problem: Problem, pattern: Pattern, steps: int, lr: float, norm: str) -> None:
    """The gate of an adaptation: the same parameters as the plain loop, in float64 and in the dtype that is timed."""
    start = [p.detach() for p in problem.model.parameters()]
    doubled = problem.double()
    truth = list(PlainLoop(doubled, pattern, steps, lr, norm).result().values())
    moved = distance(truth, start)
    assert moved > 0, f"{pattern} with lr={lr} moves no parameter in {steps} steps: there is nothing to compare"
    compare(f"{pattern} in {doubled.xs.dtype}", _ours(doubled, pattern, steps, lr, norm), truth, truth, moved)
    for draw in range(DRAWS):
        truth = list(PlainLoop(problem.double(), pattern, steps, lr, norm).result().values())
        plain = list(PlainLoop(problem, pattern, steps, lr, norm).result().values())
        try:
            compare(f"{pattern} in {problem.xs.dtype}", _ours(problem, pattern, steps, lr, norm), plain, truth, moved)
        except AssertionError:
            if draw == DRAWS - 1:
                raise
            problem = problem._replace(xs=problem.xs.roll(1, dims=-1).flip(0))
        else:
            return


def _ours(problem: Problem, pattern: Pattern, steps: int, lr: float, norm: str) -> list[Tensor]:
    """The parameters that `adapt` gives."""
    learner = adapt(problem.model, problem.xs, problem.ys, pattern=pattern, steps=steps, lr=lr, norm=norm)
    return [t.detach() for t in learner.parameters_dict().values()]


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
    runs: Mapping[str, Callable[[], object]], *, seconds: float, rounds: int, synchronize: Callable[[], object],
    before: Callable[[str], object] = lambda name: None, warmup: int = 2,
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
