"""One inner loop in stock PyTorch layers, in every way that is worth writing by hand: with the mask, with the frozen
prefix run once, as a CUDA graph, through torch.compile, and many tasks at once through torch.func.vmap."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import PlainLoop, Problem, Skip, Wrong, compare, updated_children
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels import to_torch
from lambda_kernels.agreement import DRAWS, distance
from lambda_maml import Pattern

LR, NORM = 0.01, "follow"


class Stock:
    """The inner loop in stock layers under a pattern. Frozen parameters need no gradient; with `prefix` the layers
    ahead of the first updated one run once, as someone would write it by hand. `layout` is that of images and weights
    in memory."""

    def __init__(
        self, problem: Problem, pattern: Pattern, steps: int, *, prefix: bool,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:  # fmt: skip
        self.network = to_torch(problem.model).to(memory_format=layout)  # type: ignore[call-overload]
        self.xs, self.ys, self.steps, self.layout = problem.xs, problem.ys, steps, layout
        updated = updated_children(self.network, str(pattern))
        children = dict(self.network.named_children())
        for name, child in children.items():
            child.requires_grad_(name in updated)
        first = list(children).index(updated[0]) if prefix else 0
        self.front = nn.Sequential(*list(children.values())[:first])
        self.rest = nn.Sequential(*list(children.values())[first:])
        self.free: dict[str, Tensor] = {n: p for n, p in self.rest.named_parameters() if p.requires_grad}
        self.start = {n: p.detach().clone() for n, p in self.free.items()}

    def reset(self) -> None:
        with torch.no_grad():
            for name, p in self.free.items():
                p.copy_(self.start[name])

    @torch.enable_grad()
    def __call__(self) -> None:
        with torch.no_grad():
            h = self.front(self.xs.contiguous(memory_format=self.layout))
        weights = list(self.free.values())
        for _ in range(self.steps):
            grads = torch.autograd.grad(F.cross_entropy(self.rest(h), self.ys), weights)
            with torch.no_grad():
                torch._foreach_add_(weights, grads, alpha=-LR)

    def result(self) -> list[Tensor]:
        """All adapted parameters."""
        self.reset()
        self()
        return [p.detach().clone() for p in self.network.parameters()]


class Graphed(Stock):
    """`Stock` with the prefix by hand, all steps captured as one CUDA graph over static buffers. A call copies the
    support set in and replays. `tuned`: channels-last, and cuDNN's algorithms chosen by measurement."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int, *, tuned: bool = False) -> None:
        if not problem.xs.is_cuda:
            raise Skip("CUDA graphs need a CUDA device")
        layout = torch.channels_last if tuned else torch.contiguous_format
        super().__init__(problem, pattern, steps, prefix=True, layout=layout)
        self.given = self.xs, self.ys
        self.xs, self.ys = self.xs.clone(memory_format=layout), self.ys.clone()
        chosen_before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, tuned
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    super().__call__()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                super().__call__()
        finally:
            torch.backends.cudnn.benchmark = chosen_before

    def __call__(self) -> None:
        self.xs.copy_(self.given[0])
        self.ys.copy_(self.given[1])
        self.graph.replay()


def gradient_step(network: nn.Module, weights: dict[str, Tensor], h: Tensor, ys: Tensor) -> dict[str, Tensor]:
    """The weights after one step, as new tensors."""

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(network, weights, (h,)), ys)

    grads = torch.func.grad(loss)(weights)
    return {name: w - LR * grads[name] for name, w in weights.items()}


class Functional(Stock):
    """`Stock` with the prefix by hand, each step by torch.func as new tensors."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int) -> None:
        super().__init__(problem, pattern, steps, prefix=True)
        self.prefix: Callable[[Tensor], Tensor] = self.front
        self.step: Callable[..., dict[str, Tensor]] = functools.partial(gradient_step, self.rest)
        self.final: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        h = self.prefix(self.xs)
        weights = self.start
        for _ in range(self.steps):
            weights = self.step(weights, h, self.ys)
        self.final = weights

    def result(self) -> list[Tensor]:
        self()
        final = {id(self.free[n]): t for n, t in self.final.items()}
        return [final.get(id(p), p).detach().clone() for p in self.network.parameters()]


class Compiled(Functional):
    """`Functional` with prefix and step (loss, gradients, update) each one compiled function; `how` is for
    torch.compile."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int, **how: Any) -> None:
        super().__init__(problem, pattern, steps)
        self.prefix = torch.compile(self.front, **how) if len(self.front) else self.front
        self.step = torch.compile(self.step, fullgraph=True, **how)

    def __call__(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().__call__()


class Residual(nn.Sequential):
    """A small network with skip connections: 8 layers, of which each block holds two."""

    def __init__(self, ways: int, in_channels: int, width: int, image_size: int) -> None:
        side = image_size // 2**4
        stem = nn.Sequential(*_convolution(in_channels, width), nn.ReLU(), nn.MaxPool2d(2))
        blocks = [(f"block{i + 1}", ResidualBlock(width)) for i in range(3)]
        head = nn.Linear(width * side * side, ways)
        super().__init__(OrderedDict([("stem", stem), *blocks, ("flatten", nn.Flatten()), ("head", head)]))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_convolution(width, width), nn.ReLU(), *_convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(x + self.branch(x)), 2)


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, track_running_stats=False)


def residual(ways: int, in_channels: int, width: int, image_size: int) -> nn.Module:
    return lk.convert(Residual(ways, in_channels, width, image_size))


def convolutional(ways: int, in_channels: int, width: int, image_size: int) -> nn.Module:
    """As conv4, with as many of its blocks as halve the images to no less than a pixel, at most four."""
    blocks = min(4, image_size.bit_length() - 1)
    side = image_size // 2**blocks
    layers = [
        (f"block{i + 1}", nn.Sequential(*_convolution(width if i else in_channels, width), nn.ReLU(), nn.MaxPool2d(2)))
        for i in range(blocks)
    ]
    head = nn.Linear(width * side * side, ways)
    return lk.convert(nn.Sequential(OrderedDict([*layers, ("flatten", nn.Flatten()), ("head", head)])))


class Tasks(NamedTuple):
    """xs [T, N, C, H, W], ys [T, N], xq [T, Q, C, H, W]."""

    model: nn.Module
    xs: Tensor
    ys: Tensor
    xq: Tensor

    def problem(self, task: int) -> Problem:
        return Problem(self.model, self.xs[task], self.ys[task])


class LogitsGate:
    """The plain loop's query logits, held against those of many tasks at once."""

    def __init__(self, tasks: Tasks, pattern: Pattern, steps: int) -> None:
        self.tasks = tasks
        self.plain = functools.cache(functools.partial(self._plain, pattern, steps))

    @torch.no_grad()
    def _plain(self, pattern: Pattern, steps: int, task: int, double: bool) -> Tensor:
        problem, xq = self.tasks.problem(task), self.tasks.xq[task]
        if double:
            problem, xq = problem.double(), xq.double()
        loop = PlainLoop(problem, pattern, steps, LR, NORM)
        loop()
        return loop.network(xq)

    def __call__(self, name: str, found: Tensor) -> None:
        """As harness.Gate: some tasks, and others where rounding at a kink may have parted them."""
        for draw in range(DRAWS):
            some = [(3 * draw + i) % len(found) for i in range(3)]
            plain, truth = ([self.plain(task, double) for task in some] for double in (False, True))
            length = distance(truth, [torch.zeros_like(t) for t in truth])
            try:
                return compare(f"the logits of {name}", list(found[some]), plain, truth, length)
            except Wrong:
                if draw == DRAWS - 1:
                    raise


class Vmapped:
    """Many tasks at once by torch.func.vmap over the stock network, with the mask and the prefix by hand: their query
    logits [T, Q, ways]."""

    def __init__(self, tasks: Tasks, pattern: Pattern, steps: int) -> None:
        self.stock = Stock(tasks.problem(0), pattern, steps, prefix=True)
        self.tasks = tasks

    @torch.no_grad()
    def __call__(self) -> Tensor:
        stock = self.stock

        def one(h: Tensor, ys: Tensor, xq: Tensor) -> Tensor:
            weights = stock.start
            for _ in range(stock.steps):
                weights = gradient_step(stock.rest, weights, h, ys)
            return torch.func.functional_call(stock.rest, weights, (stock.front(xq),))

        h = torch.func.vmap(stock.front)(self.tasks.xs) if len(stock.front) else self.tasks.xs
        return torch.func.vmap(one)(h, self.tasks.ys, self.tasks.xq)
