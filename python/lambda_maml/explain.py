"""Which way an adaptation takes, and why it takes no faster one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import cuda_graph
from lambda_kernels.program import flatten

from .inner import channels, recorded, remembered
from .inner.adaptation import Adaptation, Support, describe
from .inner.checks import Loss
from .inner.loop import ways
from .inner.problem import FIRST, Problem
from .inner.rates import DEFAULT_LR, Rate
from .inner.rule import Rule
from .inner.rules import rule_of
from .learner import network_of
from .patterns import Pattern
from .places import PatternChooser, Solver, descent_of
from .solved import chosen, posed

__all__ = ["explain"]


def explain(
    model: nn.Module,
    xs: Any,
    ys: Any = None,
    *,
    pattern: str | Pattern | PatternChooser | None,
    steps: int = 5,
    lr: Rate = DEFAULT_LR,
    rule: Rule | None = None,
    norm: str = "follow",
    second_order: bool = False,
    loss: Loss = F.cross_entropy,
    solver: Solver | None = None,
) -> str:
    """How `adapt` would adapt to a support set, in words: the way of each stretch of steps, and why no faster one.

    The steps themselves are not run; a frozen prefix in front of a chain is, to see what it hands over.

    >>> print(explain(model, xs, pattern="00011", steps=5, lr=0.03))
    Conv4 under 00011, 5 steps of sgd(lr=0.03), first order
    steps 1 to 5: a chain from the inputs on (3 of 6 operations run once, 3 in every step)
    ...

    Args:
        ys: the labels; without them, class numbers are supposed. The others as in `adapt`; of a `solver` that is no
            gradient descent it says what is run once.

    Raises:
        ValueError, TypeError: as `adapt`, for its settings.
    """
    model = network_of(model)
    given, ys = ys is not None, _some_labels(xs) if ys is None else ys
    if callable(pattern):
        pattern = chosen(model, xs, ys, pattern, norm, loss, FIRST)
    if solver is not None and (descent := descent_of(solver)) is None:
        return _of_solver(*posed(model, xs, ys, pattern, norm, second_order, loss, solver, FIRST))
    if solver is not None and descent is not None:
        rule, steps = descent
    rule, told = rule_of(lr, rule), pattern
    if isinstance(pattern, Pattern) and pattern.rows:
        network = channels.split(model, xs, pattern, norm, rule)
        model, pattern = network.model, network.pattern
    a = describe(model, xs, pattern, rule, steps, norm, second_order, loss)
    support = a.support(xs, ys)
    if given:
        support = a.check_labels(support)
    order = "second order" if a.second_order else "first order"
    which = a.pattern if pattern is told else told
    lines = [f"{type(model).__name__} under {which}, {a.steps} steps of {a.rule!r}, {order}"]
    if pattern is not told:
        lines.append(
            "  chosen channels are layers of their own, joined with the frozen ones: no fused block computes that"
        )
    for stretch in a.stretches:
        found = ways(a, stretch, support)
        taken = next(way for way, why in found if not why)
        last = stretch.first + stretch.steps
        which = f"step {last}" if stretch.steps == 1 else f"steps {stretch.first + 1} to {last}"
        lines.append(f"{which}: {taken} ({_prefix(a, stretch.part)})")
        lines += [f"  not {way}: {'; '.join(why)}" for way, why in found if why]
    lines += _around(a, support)
    return "\n".join(lines)


def _some_labels(xs: Any) -> Tensor | None:
    """Class numbers for inputs [N, ...]."""
    inputs = flatten(xs)[0]
    return torch.zeros(inputs[0].shape[0], dtype=torch.int64, device=inputs[0].device) if inputs else None


def _of_solver(a: Adaptation, problem: Problem) -> str:
    """What is said of a solver that is no gradient descent as the core has it."""
    order = "second order" if a.second_order else "first order"
    return "\n".join(
        [
            f"{problem.network} under {a.pattern}, {a.rule!r}, {order}",
            f"a solver of its own ({_prefix(a, a.plan.part(a.updated))})",
            "  no chain, no CUDA graph, no prepared call: these are for gradient descent by the plain gradient",
            "  adapt_tasks goes task by task: a solver sees one task",
        ]
    )


def _prefix(a: Adaptation, part: Any) -> str:
    everything, once = len(a.plan.program.steps), len(part.prefix)
    return f"{once} of {everything} operations run once, {everything - once} in every step"


def _around(a: Adaptation, support: Support) -> list[str]:
    """The graph around the loop and the shortcut past it."""
    lines = []
    device = a.device
    why = [no] if (no := cuda_graph.refusal(device)) is not None else recorded.refusals(a, support)
    lines.append(
        f"  no CUDA graph: {'; '.join(why)}" if why else "the whole of it as one CUDA graph, from the second call on"
    )
    if isinstance(support.xs, Tensor) and (device.type == "cpu" or not why):
        again = remembered.refusals(a, support)
        first = "second" if why else "third"  # a graph is recorded in the second
        lines.append(
            f"  no prepared call: {'; '.join(again)}"
            if again
            else f"from the {first} call of these shapes on: one prepared call"
        )
    why_alone = a.plan.why_not_batched or a.why_unmapped or a.why_faster_alone(support)
    lines.append(
        f"  adapt_tasks goes task by task: {why_alone}" if why_alone else "adapt_tasks runs the tasks as batches"
    )
    return lines
