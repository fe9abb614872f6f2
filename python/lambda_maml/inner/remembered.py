"""Adaptations that were made before, ready to be made again on a CPU by one call: what depends only on the network, the
pattern and the shapes is kept with the network, for as long as it stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import cuda_graph
from lambda_kernels._torch import mode_active
from lambda_kernels.chain import backend_in_force
from lambda_kernels.program import memo_of

from ..patterns import Pattern
from ..plan import Plan
from .adaptation import Adaptation, Support
from .state import Outcome

__all__ = ["Again", "again", "keep", "refusals"]

_MOST = 64  # of a network's


class _Call(NamedTuple):
    run: Callable[..., list[Tensor] | None]
    rates: list[float] | None  # None: those of the call, one for all
    plan: Plan
    meta: dict[str, Tensor]  # the network's own parameters
    moved: tuple[str, ...]  # the names of what `run` gives
    updated: tuple[str, ...]


class Again(NamedTuple):
    """What an adaptation that was made before came to, and the plan that it followed."""

    plan: Plan
    outcome: Outcome


def again(
    model: nn.Module, xs: Any, ys: Any, pattern: str | Pattern | None, steps: Any, lr: Any, rule: Any, norm: str
) -> Again | None:
    """A first-order adaptation like an earlier one; None where it has to go, or fail, the long way."""
    if (
        type(xs) is not Tensor
        or type(ys) is not Tensor
        or type(steps) is not int
        or not isinstance(pattern, (str, Pattern))
    ):
        return None
    fixed = None
    if rule is not None:
        if (fixed := getattr(rule, "fixed", None)) is None:
            return None
    elif type(lr) is not float or not 0.0 < lr < float("inf"):
        return None
    with torch.enable_grad():  # as the steps run
        memo = memo_of(model, xs)
    found: _Call | None = memo.get(_key(xs, ys, pattern, steps, fixed, norm)) if memo else None
    if found is None or _watched(xs.device):
        return None
    new = found.run(xs, ys, steps, [lr] if found.rates is None else found.rates)
    if new is None:
        return None
    return Again(found.plan, Outcome(found.meta, dict(zip(found.moved, new)), found.updated, {}))


def refusals(a: Adaptation, support: Support) -> list[str]:
    """Why the next call like this one is not one prepared call; empty where it is."""
    why = []
    if len(a.stretches) != 1 or a.stretches[0].part.whole is None:
        return ["not all steps are one chain from the inputs on"]
    if a.stretches[0].rates is None or getattr(a.rule, "fixed", None) is None:
        why.append("the rates are not numbers that are known beforehand")
    if a.loss is not F.cross_entropy or a.second_order:
        why.append("it is for first order under torch.nn.functional.cross_entropy")
    if type(support.xs) is not Tensor or type(support.ys) is not Tensor:
        why.append("support inputs and targets are not one plain tensor each")
    elif _watched(support.xs.device):
        why.append(f"{mode_active() or 'a CUDA device'}: the prepared call is for a CPU outside of all modes")
    if a.buffers:
        why.append("the network has buffers, of which each learner has copies")
    return why


def keep(a: Adaptation, support: Support, pattern: str | Pattern | None, rule: Any) -> None:
    """Make an adaptation that went well ready, where one native operator made it; without `rule`, for any rate."""
    with torch.enable_grad():
        memo = memo_of(a.model, support.xs)
    if memo is None or support.tasks is not None or refusals(a, support) or support.labels is None or pattern is None:
        return
    (stretch,) = a.stretches
    chain = stretch.part.whole
    assert chain is not None
    x = support.xs.unsqueeze(0)
    run = chain.prepare(a.meta, stretch.part.updated, x, support.labels)
    if run is None:
        return
    if len(memo) >= _MOST:
        memo.clear()
    moved = chain.order(stretch.part.updated)
    rates = None if rule is None else stretch.row_by_row(moved)
    key = _key(support.xs, support.ys, pattern, a.steps, None if rule is None else rule.fixed, a.norm)
    memo[key] = _Call(run, rates, a.plan, a.meta, tuple(moved), a.updated)


def _key(xs: Tensor, ys: Tensor, pattern: str | Pattern, steps: int, rates: bytes | None, norm: str) -> Hashable:
    return pattern, steps, rates, norm, xs.shape, xs.dtype, xs.device, ys.shape, ys.dtype, ys.device, backend_in_force()


def _watched(device: torch.device) -> bool:
    """Whether something looks at, or changes, what torch's operators do, or records them: the prepared call runs
    none."""
    return cuda_graph.refusal(device) is None or mode_active() is not None
