"""One inner loop in stock PyTorch layers, in every way that is worth writing by hand: with the mask, with the frozen
prefix run once, as a CUDA graph, through torch.compile, and many tasks at once through torch.func.vmap."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Problem
from torch import Tensor, nn

from lambda_kernels import to_torch
from lambda_maml import Pattern

LR, NORM = 0.01, "follow"
LAYERS = ("block1", "block2", "block3", "block4", "head")


class Skip(Exception):
    """A column or a row that cannot be had here, and why."""


class Stock:
    """The inner loop in stock layers under a pattern. Frozen parameters want no gradient; with `prefix` the layers
    ahead of the first updated one run once, as someone would write it by hand."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int, *, prefix: bool) -> None:
        self.network = to_torch(problem.model)
        self.xs, self.ys, self.steps = problem.xs, problem.ys, steps
        bits = dict(zip(LAYERS, str(pattern), strict=True))
        children = dict(self.network.named_children())
        for name, child in children.items():
            child.requires_grad_(bits.get(name) == "1")
        first = [bits.get(name) for name in children].index("1") if prefix else 0
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
            h = self.front(self.xs)
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
        super().__init__(problem, pattern, steps, prefix=True)
        layout = torch.channels_last if tuned else torch.contiguous_format
        self.network.to(memory_format=layout)  # type: ignore[call-overload]
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


class Compiled(Stock):
    """`Stock` with the prefix by hand; prefix and step (loss, gradients, update) each one compiled function."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int, mode: str) -> None:
        super().__init__(problem, pattern, steps, prefix=True)
        # Without a GPU no code is generated, the step is only traced.
        how: dict[str, Any] = {"mode": mode} if problem.xs.is_cuda else {"backend": "aot_eager"}
        self.prefix = torch.compile(self.front, **how) if len(self.front) else self.front
        self.step = torch.compile(functools.partial(gradient_step, self.rest), fullgraph=True, **how)
        self.final: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        h = self.prefix(self.xs)
        weights = self.start
        for _ in range(self.steps):
            weights = self.step(weights, h, self.ys)
        self.final = weights

    def result(self) -> list[Tensor]:
        self()
        final = {id(self.free[n]): t for n, t in self.final.items()}
        return [final.get(id(p), p).detach().clone() for p in self.network.parameters()]


class Tasks(NamedTuple):
    """xs [T, N, C, H, W], ys [T, N], xq [T, Q, C, H, W]."""

    model: nn.Module
    xs: Tensor
    ys: Tensor
    xq: Tensor

    def problem(self, task: int) -> Problem:
        return Problem(self.model, self.xs[task], self.ys[task])  # type: ignore[arg-type]


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
