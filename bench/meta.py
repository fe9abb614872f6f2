"""Who computes a meta-gradient: this project, stock PyTorch by hand, and the packages higher and learn2learn; and the
gate that holds their gradients against the plain loop's.

Each adapts to the support images of some tasks and adds to its parameters' `.grad` the gradient of the mean loss of the
query images, as in its own examples: by hand and in the packages a task at a time, with a backward pass for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from by_hand import LR, NORM
from harness import Configuration, Wrong, compare, make_problem, updated_children
from peers import FULL, LAST, learn2learn_maml, package
from torch import Tensor, nn

from lambda_kernels import to_torch
from lambda_kernels.agreement import DRAWS, distance
from lambda_maml import LambdaMAML, adapt_tasks

TASKS, QUERY = 4, 15  # of a meta-gradient; query images per class


class Batch(NamedTuple):
    """Tasks: xs [T, N, C, H, W], ys [T, N], xq [T, Q, C, H, W], yq [T, Q]."""

    xs: Tensor
    ys: Tensor
    xq: Tensor
    yq: Tensor


class MetaProblem(NamedTuple):
    """A network with random weights, and tasks of random pixels."""

    model: nn.Module
    batch: Batch

    def double(self) -> MetaProblem:
        xs, ys, xq, yq = self.batch
        return MetaProblem(copy.deepcopy(self.model).double(), Batch(xs.double(), ys, xq.double(), yq))


def make_meta_problem(c: Configuration, tasks: int = TASKS, query: int = QUERY) -> MetaProblem:
    generator = torch.Generator().manual_seed(1)

    def drawn(images: int) -> tuple[Tensor, Tensor]:
        shape = (tasks, c.ways * images, c.in_channels, c.image_size, c.image_size)
        labels = torch.arange(c.ways).repeat_interleave(images).repeat(tasks, 1)
        return torch.randn(*shape, generator=generator), labels

    return MetaProblem(make_problem(c, torch.device("cpu")).model, Batch(*drawn(c.shots), *drawn(query)))


class Case(NamedTuple):
    """Which gradient."""

    pattern: str
    second_order: bool

    def __str__(self) -> str:
        return f"{'second' if self.second_order else 'first'} order {self.pattern}"


CASES = (Case(FULL, True), Case(LAST, True), Case(FULL, False))


class Contender(Protocol):
    """A call gives the mean query loss of the tasks, and adds its gradient to that of the network's parameters."""

    network: nn.Module

    def __call__(self, batch: Batch) -> Tensor: ...


Make = Callable[[nn.Module, Case, int], Contender]  # for so many steps


def gradients(contender: Contender, batch: Batch) -> list[Tensor]:
    """By every parameter, in the network's order."""
    contender.network.zero_grad()
    contender(batch)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in contender.network.parameters()]


class Ours:
    """All tasks in one call."""

    def __init__(self, model: nn.Module, case: Case, steps: int) -> None:
        self.network = copy.deepcopy(model)
        self.given: dict[str, Any] = dict(
            pattern=case.pattern, steps=steps, lr=LR, norm=NORM, second_order=case.second_order
        )

    def __call__(self, batch: Batch) -> Tensor:
        logits = adapt_tasks(self.network, batch.xs, batch.ys, batch.xq, **self.given)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.yq.flatten())
        loss.backward()
        return loss.detach()


class Looped:
    """A task at a time."""

    network: nn.Module

    def __call__(self, batch: Batch) -> Tensor:
        share = 1 / len(batch.xs)
        losses = [self.task(share, *(t[i] for t in batch)) for i in range(len(batch.xs))]
        return torch.stack(losses).sum()

    def task(self, share: float, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        """The task's part of the loss, after its backward pass."""
        loss = share * self.query_loss(xs, ys, xq, yq)
        loss.backward()
        return loss.detach()

    def query_loss(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        raise NotImplementedError


class Verbs(Looped):
    """Ours by learn2learn's verbs."""

    def __init__(self, model: nn.Module, case: Case, steps: int) -> None:
        self.network, self.steps = copy.deepcopy(model), steps
        self.maml = LambdaMAML(self.network, LR, pattern=case.pattern, norm=NORM, first_order=not case.second_order)

    def query_loss(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        task = self.maml.clone()
        for _ in range(self.steps):
            task.adapt(F.cross_entropy(task(xs), ys))
        return F.cross_entropy(task(xq), yq)


class Stock(Looped):
    """The plain loop over functional calls of the stock network. With `prefix` the layers ahead of the first updated
    one run once a task, as someone would write it by hand."""

    def __init__(self, model: nn.Module, case: Case, steps: int, *, prefix: bool = False) -> None:
        self.network, self.steps, self.second_order = to_torch(model), steps, case.second_order
        children = dict(self.network.named_children())
        updated = updated_children(self.network, case.pattern)
        first = list(children).index(updated[0]) if prefix else 0
        self.front = nn.Sequential(*list(children.values())[:first])
        self.rest = nn.Sequential(*list(children.values())[first:])
        free = {id(p) for name in updated for p in children[name].parameters()}
        self.free = [name for name, p in self.rest.named_parameters() if id(p) in free]

    def query_loss(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        weights: dict[str, Tensor] = dict(self.rest.named_parameters())
        h = self.support(xs)
        for _ in range(self.steps):
            loss = F.cross_entropy(torch.func.functional_call(self.rest, weights, (h,)), ys)
            grads = torch.autograd.grad(loss, [weights[n] for n in self.free], create_graph=self.second_order)
            weights.update({n: weights[n] - LR * g for n, g in zip(self.free, grads)})
        return F.cross_entropy(torch.func.functional_call(self.rest, weights, (self.front(xq),)), yq)

    def support(self, xs: Tensor) -> Tensor:
        """What the layers in front make of the support images; in first order the gradient does not reach them so."""
        with torch.set_grad_enabled(self.second_order):
            h: Tensor = self.front(xs)
        return h


class Higher(Stock):
    def __init__(self, model: nn.Module, case: Case, steps: int) -> None:
        super().__init__(model, case, steps, prefix=True)
        self.innerloop = package("higher").innerloop_ctx
        self.optimizer = torch.optim.SGD(self.rest.parameters(), lr=LR)

    def task(self, share: float, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        how = {"copy_initial_weights": False, "track_higher_grads": self.second_order}
        with self.innerloop(self.rest, self.optimizer, **how) as (network, optimizer):
            h = self.support(xs)
            for _ in range(self.steps):
                optimizer.step(F.cross_entropy(network(h), ys))
            loss = share * F.cross_entropy(network(self.front(xq)), yq)
            if self.second_order:
                loss.backward()
            else:  # its weights have no graph then: the gradient by them is handed on
                grads = torch.autograd.grad(loss, list(network.parameters()))
                for p, grad in zip(self.rest.parameters(), grads):
                    p.grad = grad if p.grad is None else p.grad + grad
        return loss.detach()


class Learn2Learn(Stock):
    """With a frozen prefix as its examples of ANIL: the features outside of MAML."""

    def __init__(self, model: nn.Module, case: Case, steps: int) -> None:
        super().__init__(model, case, steps, prefix=True)
        self.maml = learn2learn_maml()(self.rest, lr=LR, first_order=not case.second_order)

    def query_loss(self, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        task = self.maml.clone()
        h = self.support(xs)
        for _ in range(self.steps):
            task.adapt(F.cross_entropy(task(h), ys))
        return F.cross_entropy(task(self.front(xq)), yq)


def stock_prefix(model: nn.Module, case: Case, steps: int) -> Stock:
    return Stock(model, case, steps, prefix=True)


PACKAGES: dict[str, Make] = {"higher": Higher, "learn2learn": Learn2Learn}


def contenders(case: Case) -> dict[str, Make]:
    """By hand and ours; the packages are PACKAGES."""
    own: dict[str, Make] = {"ours": Ours, "verbs": Verbs, "stock": Stock}
    return own if case.pattern == FULL else {**own, "stock_prefix": stock_prefix}


class MetaGate:
    """The plain loop's meta-gradient, held against those who claim to give the same."""

    def __init__(self, problem: MetaProblem, case: Case, steps: int) -> None:
        self.problems = [problem]
        self.case, self.steps = case, steps
        self.found: dict[tuple[int, bool], list[list[Tensor]]] = {}

    def problem(self, draw: int, *, double: bool) -> MetaProblem:
        while draw >= len(self.problems):
            last = self.problems[-1]
            self.problems.append(last._replace(batch=turned(last.batch)))
        return self.problems[draw].double() if double else self.problems[draw]

    def plain(self, draw: int, *, double: bool, tasks: int | None = None) -> list[Tensor]:
        """Of the first tasks, or of all."""
        if (draw, double) not in self.found:
            model, batch = self.problem(draw, double=double)
            stock, each = Stock(model, self.case, self.steps), range(len(batch.xs))
            self.found[draw, double] = [gradients(stock, Batch(*(t[i : i + 1] for t in batch))) for i in each]
        return [torch.stack(parts).mean(0) for parts in zip(*self.found[draw, double][:tasks])]

    def __call__(self, name: str, make: Make) -> Contender:
        """The contender for the first problem; Wrong unless it gives the plain loop's gradients: of two tasks in
        float64, and of all in the dtype that is timed."""
        model, batch = self.problem(0, double=True)
        some, truth = Batch(*(t[:2] for t in batch)), self.plain(0, double=True, tasks=2)
        length = distance(truth, [torch.zeros_like(t) for t in truth])
        what = f"the meta-gradient of {name}, {self.case}, in"
        compare(f"{what} {some.xs.dtype}", gradients(make(model, self.case, self.steps), some), truth, truth, length)
        contender = make(self.problems[0].model, self.case, self.steps)
        for draw in range(DRAWS):
            batch = self.problem(draw, double=False).batch
            plain, truth = (self.plain(draw, double=double) for double in (False, True))
            try:
                compare(f"{what} {batch.xs.dtype}", gradients(contender, batch), plain, truth, length)
                break
            except Wrong:
                if draw == DRAWS - 1:
                    raise
        return contender


def turned(batch: Batch) -> Batch:
    """Other images: each moved by a pixel."""
    xs, ys, xq, yq = batch
    return Batch(xs.roll(1, dims=-1), ys, xq.roll(1, dims=-1), yq)
