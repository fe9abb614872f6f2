"""The places where a method of meta-learning differs from MAML: what each gets, gives and keeps.

Each place is a plain callable, or two functions. A part that fills one is an `nn.Module` where it keeps something: its
parameters are meta-parameters, which get gradients from the outer loss, its buffers are state. Its random numbers come
from (seed, iteration, task, step), by `Problem.random` or `generator`, so that a resumed run draws the same ones. One
of the inner loop may have `check(problem)`, which raises ValueError, before anything is computed, for a network or a
pattern that it does not fit. The inner step has a place of its own, `lambda_maml.rules.Rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from .inner.problem import Problem, Turn, generator
from .inner.rule import Params, Rule
from .patterns import Pattern

__all__ = [
    "Estimator",
    "Learned",
    "Objective",
    "Params",
    "PatternChooser",
    "Penalty",
    "Problem",
    "Selector",
    "Solver",
    "TaskSource",
    "TaskWeights",
    "Turn",
    "checked",
    "descent_of",
    "generator",
]

Selector: TypeAlias = Callable[[Problem, Params, int], Tensor]
"""selector(problem, params, step): the indices of the support rows that a step learns from."""

Estimator: TypeAlias = Callable[[Problem, Params, int], tuple[Tensor, Params]]
"""estimator(problem, params, step): the support loss at `params`, and by name its gradients or what stands for them."""

Penalty: TypeAlias = Callable[[Params], Tensor]
"""penalty(params): a prior on the weights, one number, which is added to a loss."""

PatternChooser: TypeAlias = Callable[[Problem], Pattern]
"""chooser(problem): the pattern for one task; the problem is that of all layers. It stands wherever a pattern does."""


class Learned(NamedTuple):
    """What a solver found for a task."""

    params: Params
    """Of every name of the problem, its value after the inner loop; in second order in autograd's graph."""

    predict: Callable[[Any], Any] | None = None
    """The predictions for other inputs, where they are not those of the network with `params`."""

    path: tuple[Params, ...] = ()
    """The values before each step and after the last, where there are steps."""


class Solver(Protocol):
    """The whole inner loop: solver(problem) gives what was learned of the task.

    Where it is gradient descent as the core has it, it has `descent`, a rule and a number of steps (else None): such an
    adaptation runs as one without a solver does, by the fastest way. In first order what it finds is a constant whose
    gradient by the model's parameters is the identity; one that has parameters, or `in_graph`, says it itself, by what
    it adds to `problem.meta`.
    """

    def __call__(self, problem: Problem) -> Learned: ...


def descent_of(solver: Solver | None) -> tuple[Rule, int] | None:
    """The rule and the steps of a solver that is the core's own gradient descent; None of any other."""
    found: tuple[Rule, int] | None = getattr(solver, "descent", None)
    return found


def checked(part: Any, problem: Problem) -> None:
    """ValueError where a part says that it does not fit the problem."""
    check = getattr(part, "check", None)
    if check is not None:
        check(problem)


class Objective(nn.Module):
    """One task's part of the outer loss, from what was learned of it and its query set; `a + b` adds two.

    >>> class Squared(Objective):
    ...     def forward(self, problem, learned, xq, yq):
    ...         return (self.predictions(problem, learned, xq) - yq).square().mean()
    """

    adapts = True  # whether it asks for what was learned

    def forward(self, problem: Problem, learned: Learned, xq: Any, yq: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is an objective without `forward`")

    @staticmethod
    def predictions(problem: Problem, learned: Learned, x: Any) -> Any:
        """What the adapted network gives for other inputs."""
        return problem.predict(learned.params, x) if learned.predict is None else learned.predict(x)

    def __add__(self, other: Objective) -> Objective:
        return _Sum([self, other]) if isinstance(other, Objective) else NotImplemented


class _Sum(Objective):
    def __init__(self, parts: Sequence[Objective]) -> None:
        super().__init__()
        self.parts, self.adapts = nn.ModuleList(parts), any(part.adapts for part in parts)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    def forward(self, problem: Problem, learned: Learned, xq: Any, yq: Any) -> Tensor:
        return torch.stack([part(problem, learned, xq, yq) for part in self.parts]).sum()


class TaskWeights(Protocol):
    """How the losses of a meta-batch become one outer loss. State: buffers; weights by gradient: parameters."""

    def combine(self, losses: Tensor, iteration: int) -> Tensor:
        """The outer loss from the tasks' [T], differentiable."""
        ...

    def update(self, losses: Tensor, iteration: int) -> None:
        """Move the weights, after the outer step, by the same losses, detached."""
        ...


class TaskSource(Protocol):
    """Which tasks a meta-batch has, by their numbers: task k of a sequence depends on its number alone.

    `listens` says whether later draws depend on `report`.
    """

    listens: bool

    @property
    def size(self) -> int | None:
        """The number of tasks where it is finite."""
        ...

    def draw(self, iteration: int, count: int) -> list[int]:
        """The numbers of the tasks of an iteration."""
        ...

    def report(self, numbers: Sequence[int], losses: Tensor, iteration: int) -> None:
        """Hear what the outer losses [T] of these tasks were."""
        ...
