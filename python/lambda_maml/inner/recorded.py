"""Adaptation on a CUDA device as one graph: the prefix, all K steps and, where no gradient is needed, the query
forward. A recording serves every later task, or batch of tasks, of the same shapes under the same pattern."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import cuda_graph
from lambda_kernels.program import tensors_of

from ..plan import why_opaque
from ..say import say_once
from .adaptation import Adaptation, Support
from .channels import has_split
from .loop import Result, classify, descend

__all__ = ["RECORDINGS", "adapted", "classified", "refusals"]

RECORDINGS = cuda_graph.Recordings(16)


def refusals(a: Adaptation, support: Support) -> list[str]:
    """Why this adaptation cannot be one graph, on any device; empty where it can."""
    why = []
    if has_split(a.model):
        why.append("a pattern of channels makes its layers anew in every call")
    if a.second_order:
        why.append("second order differentiates through the steps")
    if any(s.rates is None for s in a.stretches):
        why.append(
            f"{a.rule!r} is no gradient descent with known rates: what it remembers and learns would be recorded"
        )
    if a.plan.program.untraceable is not None:
        why.append(why_opaque(a.plan.program))
    elif a.plan.why_not_batched is not None:
        why.append(a.plan.why_not_batched)
    if getattr(F, getattr(a.loss, "__name__", ""), None) is not a.loss:
        why.append("the loss is none of torch.nn.functional: a graph would not run its code again")
    if not isinstance(support.xs, Tensor) or not isinstance(support.ys, Tensor):
        why.append("support inputs and targets are not one tensor each")
    own = support.xs, support.ys, *a.parameters.values(), *a.buffers.values()
    if odd := {type(t).__name__ for t in own if isinstance(t, Tensor) and _odd(t)}:
        why.append(f"{' and '.join(sorted(odd))}, a tensor of another kind, may do what a graph would not do again")
    return why


def _odd(t: Any) -> bool:
    """Whether something is no tensor, or one of a class of its own, which may have operators of its own."""
    return type(t) is not Tensor and type(t) is not nn.Parameter


def adapted(a: Adaptation, support: Support) -> dict[str, Tensor] | None:
    """The updated tensors after the last step; None where the caller has to run the adaptation.

    Raises as `Adaptation.check_labels` and `Adaptation.check_finite`.
    """

    def function(xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        result = descend(a, _within(a, support, xs, ys))
        state = result.state
        rows = [state[n].detach().reshape((*state[n].shape[: state[n].dim() - p.dim()], -1)) for n, p in own.items()]
        return torch.cat(rows, dim=-1), _judged(result, support, ys)

    own = {n: a.meta[n] for n in a.updated}
    results = _replayed(a, support, "adapted", function, (support.xs, support.ys))
    if results is None:
        return None
    parts = results[0].split([p.numel() for p in own.values()], dim=-1)
    return {n: part.reshape((*part.shape[:-1], *p.shape)).to(p.dtype) for (n, p), part in zip(own.items(), parts)}


def classified(a: Adaptation, support: Support, xq: Tensor) -> Tensor | None:
    """The query logits [T, Q, ways]; None where the caller has to adapt and classify."""

    def function(xs: Tensor, ys: Tensor, xq: Tensor) -> tuple[Tensor, Tensor]:
        result = descend(a, _within(a, support, xs, ys), xq)
        logits = result.logits
        if logits is None:
            with torch.no_grad():
                state = {n: t.detach() for n, t in result.state.items()}
                logits = classify(a, state, xq, support.tasks)
        if not isinstance(logits, Tensor):
            raise TypeError(f"the network gives a {type(logits).__name__}, not one tensor")
        return logits, _judged(result, support, ys)

    results = _replayed(a, support, "classified", function, (support.xs, support.ys, xq))
    return None if results is None else results[0]


def _replayed(
    a: Adaptation, support: Support, what: str, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...]
) -> tuple[Tensor, ...] | None:
    if cuda_graph.refusal(a.device) is not None or not a.steps or any(map(_odd, inputs)):
        return None
    name = type(a.model).__name__
    if why := refusals(a, support):
        say_once(f"{name} is adapted without a CUDA graph: {'; '.join(why)}")
        return None
    if support.labels is not None and a.plan.outputs is None:
        support = a.check_labels(support)  # they cannot be moved within unknown bounds
        if support.ignores:
            return None
    recording = RECORDINGS.get(_key(a, what, inputs), name, function, inputs)
    if recording is None:
        return None
    results = recording(*inputs)
    rows = results[-1].tolist()  # the one wait for the device
    if support.labels is not None:
        lowest, highest = ([int(v) for v in rows.pop()] for _ in range(2))
        outputs = a.plan.outputs
        if min(lowest) < 0 or (outputs is not None and max(highest) >= outputs):
            return None  # wrong, or left out by cross-entropy: the long way tells
    a.check_finite(rows, support.xs)
    return results


def _within(a: Adaptation, support: Support, xs: Tensor, ys: Tensor) -> Support:
    """The recording's own support set. Class labels are moved into the outputs' bounds: wrong ones are found by
    `_judged`, not by a fault on the device."""
    if support.labels is not None and a.plan.outputs is not None:
        ys = ys.clamp(0, a.plan.outputs - 1)
    labels = None if support.labels is None else ys.reshape(support.labels.shape)
    return support._replace(xs=xs, ys=ys, labels=labels)


def _judged(result: Result, support: Support, ys: Tensor) -> Tensor:
    """The verdict, and below it, for class labels, each task's highest and lowest."""
    if support.labels is None:
        return result.verdict
    low, high = torch.aminmax(ys.reshape(result.verdict.shape[1], -1), dim=1)
    return torch.cat([result.verdict, torch.stack([high, low]).double()])


def _key(a: Adaptation, what: str, inputs: tuple[Tensor, ...]) -> Hashable:
    """All that a recording depends on. The model's tensors are read where they lie, so their places belong to it."""
    parameters, buffers = tensors_of(a.model)
    rates = tuple(s.rates if isinstance(s.rates, float) else tuple(s.row_by_row(s.part.updated)) for s in a.stretches)
    return (
        what,
        a.plan.program,
        tuple((s.part, s.steps) for s in a.stretches),
        rates,
        a.loss,
        tuple((t.shape, t.dtype, t.device) for t in inputs),
        tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (*parameters.values(), *buffers.values())),
        cuda_graph.conditions(),
    )
