"""Adaptation by a solver, around the core's description and checks of an adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .inner import checks, remembered
from .inner.adaptation import Adaptation, describe
from .inner.checks import Loss
from .inner.loop import outcome
from .inner.problem import Problem, Turn
from .inner.rule import Rule
from .inner.state import Outcome
from .learner import Learner
from .patterns import Pattern
from .places import Learned, PatternChooser, Solver, checked

__all__ = ["Solved", "check_inner", "chosen", "learned_by", "linked", "posed", "solve", "turns_of"]


class Solved(Learner):
    """A network that a solver adapted to one task; its predictions are the solver's own, where it has some."""

    def __init__(self, a: Adaptation, learned: Learned) -> None:
        params = learned.params if a.in_graph else {n: p.detach() for n, p in learned.params.items()}
        super().__init__(a.model, a.plan.program.modes, outcome(a, a.tie({**a.start(None), **params})))
        self.__dict__["_predict"] = learned.predict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        predict = self.__dict__["_predict"]
        return super().forward(*args, **kwargs) if predict is None else predict(*args, **kwargs)

    def freeze_statistics(self, xs: Any = None) -> Learner:
        if self.__dict__["_predict"] is not None:
            raise ValueError(
                "the solver's predictions are not those of a network whose norms could be frozen: "
                'keep statistics="batch", or take `to_module()`, the network with the parameters that it found'
            )
        return super().freeze_statistics(xs)


def solve(
    model: nn.Module, xs: Any, ys: Any, pattern: str | Pattern | None, norm: str, second_order: bool, loss: Loss,
    solver: Solver, turn: Turn,
) -> Learner:  # fmt: skip
    """The network as a solver adapts it to one task.

    Raises:
        ValueError, TypeError: pattern, shapes, labels, dtypes or devices do not fit, or the solver gives other names.
        FloatingPointError: what it found is infinite or NaN.
    """
    of_head = None if second_order and torch.is_grad_enabled() else getattr(solver, "of_head", None)
    if of_head is not None and (learner := _refitted(model, xs, ys, pattern, norm, of_head)) is not None:
        return learner
    a, problem = posed(model, xs, ys, pattern, norm, second_order, loss, solver, turn)
    learned = learned_by(solver, problem)
    if of_head is not None:
        remembered.keep_features(a, a.support(xs, ys), pattern)
    return Solved(a, learned)


def _refitted(
    model: nn.Module, xs: Any, ys: Any, pattern: Any, norm: str, of_head: Callable[..., list[Tensor]]
) -> Learner | None:
    """The network with a head in closed form, in the way that an earlier call prepared; None where that has to go, or
    fail, the long way."""
    known = remembered.features_again(model, xs, ys, pattern, norm)
    phi = None if known is None else known.run(xs)
    if known is None or phi is None:
        return None
    with torch.no_grad():
        try:
            new = of_head(phi, known.meta[known.head[0]], known.meta[known.head[1]], ys)
        except (ValueError, IndexError):  # a singular kernel, a label that is no class
            return None
        if not all(math.isfinite(t.sum().item()) for t in new):
            return None
    return Learner(model, known.plan.program.modes, Outcome(known.meta, dict(zip(known.head, new)), known.updated, {}))


def posed(
    model: nn.Module, xs: Any, ys: Any, pattern: str | Pattern | None, norm: str, second_order: bool, loss: Loss,
    solver: Any, turn: Turn,
) -> tuple[Adaptation, Problem]:  # fmt: skip
    """One task as a part gets it, checked."""
    steps = getattr(solver, "steps", None)
    if steps is None:  # of a closed form: the steps that a schedule has patterns for
        steps = len(Pattern.parse("MAML" if pattern is None else pattern).stages)
    a = describe(model, xs, pattern, solver, steps, norm, second_order, loss)
    if getattr(solver, "in_graph", False) and torch.is_grad_enabled():
        a = replace(a, in_graph=True)
    checks.check_support(a.parameters, xs, ys)
    problem = Problem(a, a.check_labels(a.support(xs, ys)), turn)
    checked(solver, problem)
    return a, problem


def check_inner(
    model: nn.Module, xs: Any, ys: Any, pattern: Any, steps: int, norm: str, second_order: bool, loss: Loss,
    rule: Rule, solver: Solver | None,
) -> None:  # fmt: skip
    """ValueError where a rule, or the solver in its place, does not fit network, pattern or steps; nothing is
    adapted."""
    if solver is None:
        describe(model, xs, pattern, rule, steps, norm, second_order, loss)
    else:
        posed(model, xs, ys, pattern, norm, second_order, loss, solver, Turn())


def learned_by(solver: Solver, problem: Problem) -> Learned:
    """What a solver finds, of the names and shapes that it was asked for, and finite."""
    with torch.enable_grad():
        learned = solver(problem)
    wanted = {n: list(p.shape) for n, p in problem.meta.items()}
    found = {n: list(p.shape) for n, p in learned.params.items()}
    if found != wanted:
        raise ValueError(f"{solver!r} gave {found}: a solver gives a tensor of each parameter's shape, {wanted}")
    with torch.no_grad():
        sums: list[Tensor] = [p.abs().sum().double() for p in learned.params.values()]
        if sums and not torch.isfinite(torch.stack(sums).sum()):
            raise FloatingPointError(
                f"adaptation under {problem.pattern} with {solver!r} diverged: parameters became infinite or NaN: "
                "lower its rate, raise its ridge, or look at the images' scale"
            )
    return learned


def linked(problem: Problem, learned: Learned) -> Learned:
    """What was learned, for an outer loss: in first order its gradient is that of the parameters to start from."""
    if problem.in_graph:
        return learned
    start = problem.start
    return learned._replace(params={n: p.detach() + (start[n] - start[n].detach()) for n, p in learned.params.items()})


def chosen(
    model: nn.Module, xs: Any, ys: Any, chooser: PatternChooser, norm: str, loss: Loss, turn: Turn
) -> Pattern:  # fmt: skip
    """The pattern that a chooser takes for one task.

    Raises:
        TypeError: it gives something else than a pattern.
    """
    _, problem = posed(model, xs, ys, "MAML", norm, False, loss, chooser, turn)
    with torch.enable_grad():
        found: object = chooser(problem)
    if not isinstance(found, Pattern):
        raise TypeError(f"{chooser!r} gave {found!r}: a chooser of patterns gives a Pattern")
    return found


def turns_of(tasks: int, turns: Any) -> list[Turn]:
    """The turns of so many tasks: as given, else the first iteration's."""
    found = [Turn(task=k) for k in range(tasks)] if turns is None else list(turns)
    if len(found) != tasks:
        raise ValueError(f"adapt_tasks: {tasks} tasks, but {len(found)} turns: give one for each")
    return found
