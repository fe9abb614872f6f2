"""The inner loop: K gradient steps on a support set (Finn et al. 2017, algorithm 1), for one task or many.

Steps in succession that update the same parameters are run by the first way that takes them: a chain from the inputs
on, a chain behind the frozen prefix, in second order or with learned rates a chain with its own way back, for any other
rule a chain's gradients, or autograd, which takes everything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import plan_of
from . import autograd, chain, outer, stepwise
from .adaptation import Adaptation, Stretch, Support
from .state import Outcome, verdict

__all__ = ["Result", "classify", "descend", "outcome", "ways"]


class Result(NamedTuple):
    """What an adaptation came to."""

    verdict: Tensor  # see `state.verdict`
    state: dict[str, Tensor]  # after the last step, by name
    logits: Tensor | None  # of the query inputs, where a chain gave them


def descend(a: Adaptation, support: Support, query: Tensor | None = None) -> Result:
    """All steps; the query's logits too, where one chain runs the whole network and `query` [T, Q, ...] is given."""
    state, rows, memory, logits = a.start(support.tasks), [], None, None
    query = query if len(a.stretches) == 1 else None
    with torch.enable_grad():
        for stretch in a.stretches:
            part = stretch.part
            if part.whole is not None and not chain.refusals(a, stretch, part.whole, support.xs, support):
                losses, state, logits = chain.run(a, stretch, part.whole, state, support.xs, support, query)
                rows.append(losses)
                continue
            state = autograd.leaves(a, state, part)
            prefix = autograd.Prefix(a, part, state, support)
            if part.chain is not None and not chain.refusals(a, stretch, part.chain, prefix.value, support):
                losses, state, _ = chain.run(a, stretch, part.chain, state, prefix.value, support)
                prefix.count(stretch.steps)
                rows.append(losses)
                continue
            if part.chain is not None and not outer.refusals(a, stretch, part.chain, prefix.value, support):
                losses_of_steps, state = outer.run(a, stretch, part.chain, state, prefix.value, support)
                prefix.count(stretch.steps)
                rows += losses_of_steps
                continue
            memory = autograd.remembered(a, state, support) if memory is None else memory
            if part.chain is not None and not stepwise.refusals(a, stretch, part.chain, support, prefix.value):
                losses_of_steps, state, memory = stepwise.run(
                    a, stretch, part.chain, state, prefix.value, support, memory
                )
                prefix.count(stretch.steps)
                rows += losses_of_steps
                continue
            losses_of_steps, state, memory = autograd.run(a, stretch, prefix, state, memory)
            rows += losses_of_steps
    return Result(verdict(rows, state, a.updated), state, logits)


def outcome(a: Adaptation, state: dict[str, Tensor], tasks: int | None = None) -> Outcome:
    """The adapted state with its place in autograd's graph."""
    return Outcome(a.start(tasks), state, a.updated, a.plan.program.aliases, a.in_graph)


def classify(a: Adaptation, state: dict[str, Tensor], xq: Any, tasks: int | None) -> Any:
    """The network's result for query inputs, with the parameters of a state."""
    program, modules = a.query(xq, tasks)
    logits = plan_of(a.model, program).classify(state, xq, tasks)
    if logits is not None:
        return logits
    return a.each_task(state, tasks, lambda own, x: program.evaluate(modules, own, x), xq)


def ways(a: Adaptation, stretch: Stretch, support: Support) -> list[tuple[str, list[str]]]:
    """The ways that `descend` has for a stretch, the fastest first, each with its refusals; autograd has none."""
    part = stretch.part
    whole = chain.refusals(a, stretch, part.whole, support.xs, support)
    if part.whole is None and part.chain is not None:
        whole = ["what comes before the first updated layer is no chain of fused blocks"]
    found = [("a chain from the inputs on", whole)]
    if whole:
        value = None
        if part.chain is not None:
            with torch.no_grad():
                value = autograd.Prefix(a, part, a.start(support.tasks), support).value
        found.append(("a chain behind the frozen prefix", chain.refusals(a, stretch, part.chain, value, support)))
        found.append(("a chain with its own way back", outer.refusals(a, stretch, part.chain, value, support)))
        found.append(("a chain's gradients", stepwise.refusals(a, stretch, part.chain, support, value)))
    return [*found, ("autograd", [])]
