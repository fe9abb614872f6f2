"""Adaptations that were made before, ready to be made again by one call: a native operator on a CPU, a replay on a CUDA
device. What depends only on the network, the pattern and the shapes is kept with the network, for as long as it stays
as it is."""

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
from . import recorded
from .adaptation import Adaptation, Support
from .state import Outcome

__all__ = ["Again", "Features", "again", "features_again", "keep", "keep_features", "refusals"]

_MOST = 64  # of a network's


class _Call(NamedTuple):
    run: Callable[..., list[Tensor] | None]  # of xs and ys, with `rates` of steps and rates too
    rates: list[float] | None  # None: those of the call, one for all; empty where they are recorded
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
    if not memo or mode_active(xs.device.type) is not None:
        return None
    if cuda_graph.refusal(xs.device) is None:
        rates = "recorded", lr if rule is None else fixed
        found: _Call | None = memo.get(_key(xs, ys, pattern, steps, rates, norm))
        new = None if found is None else found.run(xs, ys)
    else:
        found = memo.get(_key(xs, ys, pattern, steps, fixed, norm))
        new = None if found is None else found.run(xs, ys, steps, [lr] if found.rates is None else found.rates)
    if found is None or new is None:
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
    elif (mode := mode_active(support.xs.device.type)) is not None:
        why.append(f"{mode}: the prepared call is for what runs outside of all modes")
    if a.buffers:
        why.append("the network has buffers, of which each learner has copies")
    return why


def keep(a: Adaptation, support: Support, pattern: str | Pattern | None, rule: Any, replayed: bool) -> None:
    """Make an adaptation that went well ready, where one native operator made it, or one replay.

    Without `rule` it is for any rate in the first case, for its own in the second.
    """
    with torch.enable_grad():
        memo = memo_of(a.model, support.xs)
    if memo is None or support.tasks is not None or refusals(a, support) or support.labels is None or pattern is None:
        return
    (stretch,) = a.stretches
    chain = stretch.part.whole
    assert chain is not None
    moved = chain.order(stretch.part.updated)
    rates = None if rule is None else stretch.row_by_row(moved)
    fixed: Hashable = None if rule is None else rule.fixed
    run: Callable[..., list[Tensor] | None] | None
    if replayed:
        fixed = "recorded", stretch.rates if rule is None else fixed
        run, rates = recorded.prepared(a, support), []
    else:
        run = chain.prepare(a.meta, stretch.part.updated, support.xs.unsqueeze(0), support.labels)
    if run is None:
        return
    if len(memo) >= _MOST:
        memo.clear()
    key = _key(support.xs, support.ys, pattern, a.steps, fixed, a.norm)
    memo[key] = _Call(run, rates, a.plan, a.meta, tuple(moved), a.updated)


class Features(NamedTuple):
    """What a head that moves alone is fitted to, ready to be computed again."""

    run: Callable[[Tensor], Tensor | None]  # of xs: [N, F]
    plan: Plan
    meta: dict[str, Tensor]
    head: tuple[str, str]  # the names of its weight and its bias
    updated: tuple[str, ...]


def features_again(model: nn.Module, xs: Any, ys: Any, pattern: Any, norm: str) -> Features | None:
    """What an earlier call kept for tasks of this form; None where it has to go the long way."""
    if type(xs) is not Tensor or type(ys) is not Tensor or not isinstance(pattern, (str, Pattern)):
        return None
    with torch.enable_grad():
        memo = memo_of(model, xs)
    if not memo or mode_active(xs.device.type) is not None:
        return None
    found: Features | None = memo.get(_key(xs, ys, pattern, "features", None, norm))
    return found


def keep_features(a: Adaptation, support: Support, pattern: str | Pattern | None) -> None:
    """Make a frozen prefix in front of a head that moves alone ready, where one native operator runs it."""
    xs, ys = support.xs, support.ys
    if type(xs) is not Tensor or type(ys) is not Tensor or ys.dtype != torch.int64 or ys.shape != xs.shape[:1]:
        return
    part = a.plan.part(a.updated)
    whole, chain = part.whole, part.chain
    if pattern is None or whole is None or chain is None or chain.blocks or a.buffers or mode_active(xs.device.type):
        return
    head = whole.names[-2], whole.names[-1]
    with torch.enable_grad():
        memo = memo_of(a.model, xs)
    if memo is None or set(a.updated) != set(head):
        return
    run = whole.prepare_features(a.meta, xs.unsqueeze(0))
    if run is None:
        return
    if len(memo) >= _MOST:
        memo.clear()
    memo[_key(xs, ys, pattern, "features", None, a.norm)] = Features(run, a.plan, a.meta, head, a.updated)


def _key(xs: Tensor, ys: Tensor, pattern: str | Pattern, steps: Hashable, rates: Hashable, norm: str) -> Hashable:
    return pattern, steps, rates, norm, xs.shape, xs.dtype, xs.device, ys.shape, ys.dtype, ys.device, backend_in_force()
