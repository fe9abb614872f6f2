"""Adaptation on a CUDA device as one graph: the prefix, all K steps and, where no gradient is needed, the query
forward. A recording serves every later task, or batch of tasks, of the same shapes under the same pattern."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import cuda_graph
from lambda_kernels.flat import joined, lying, split
from lambda_kernels.program import tensors_of

from ..plan import why_opaque
from ..say import say_once
from . import chain
from .adaptation import Adaptation, Support
from .channels import has_split
from .loop import Result, classify, descend

__all__ = ["RECORDINGS", "adapted", "classified", "moved", "prepared", "refusals"]

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
    """The updated tensors after the last step; None where the caller has to run the adaptation, or to say what is wrong
    with it."""
    results = _replayed(a, support, "adapted", _adapting(a, support), (support.xs, support.ys))
    if results is None:
        return None
    names = moved(a, support)
    new = _apart(results[0], [a.meta[n] for n in names], support.tasks)  # while the device works
    return dict(zip(names, new)) if _is_sound(results[-1], _bound(a, support)) else None


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
        return logits, _judged(a, support, result, ys)

    results = _replayed(a, support, "classified", function, (support.xs, support.ys, xq))
    return results[0] if results is not None and _is_sound(results[-1], _bound(a, support)) else None


def prepared(a: Adaptation, support: Support) -> Callable[[Tensor, Tensor], list[Tensor] | None] | None:
    """`adapted` of one task, by a recording that is there, as a function of (xs, ys) that has little to do but to
    replay it; None where there is no such recording, or the steps are not all on chains.

    The function gives the new values in the order of `moved`, or None where anything is not as it was or should be. It
    keeps neither the recording nor the network.
    """
    if support.tasks is not None or not _on_chains(a, support):
        return None
    inputs, name = (support.xs, support.ys), type(a.model).__name__
    key = _key(a, "adapted", inputs)
    found = RECORDINGS.get(key, name, _adapting(a, support), inputs)
    if found is None:
        return None
    held = weakref.ref(found)
    del found, inputs
    meta = [a.meta[n] for n in moved(a, support)]
    read = [t for tensors in tensors_of(a.model) for t in tensors.values()]
    places, conditions, bound = _places(read), cuda_graph.conditions(), _bound(a, support)

    def run(xs: Tensor, ys: Tensor) -> list[Tensor] | None:
        recording = held()
        if recording is None or _places(read) != places or cuda_graph.conditions() != conditions:
            return None
        if RECORDINGS.get(key, name, _gone, (xs, ys)) is not recording:  # it is used, so that it stays
            return None
        row, rows = recording(xs, ys)
        new = _apart(row, meta, None)  # while the device works
        return new if _is_sound(rows, bound) else None

    return run


def _gone(*_: Tensor) -> tuple[Tensor, ...]:
    raise RuntimeError("a recording was forgotten while it was used")


def moved(a: Adaptation, support: Support) -> list[str]:
    """The names of what the steps change, in the order in which a recording gives it."""
    if len(a.stretches) == 1 and _on_chains(a, support):
        (stretch,) = a.stretches
        assert stretch.part.whole is not None
        return stretch.part.whole.order(stretch.part.updated)
    return list(a.updated)


def _on_chains(a: Adaptation, support: Support) -> bool:
    """Whether chains from the inputs on run all steps."""
    wholes = [(s, s.part.whole) for s in a.stretches]
    return all(w is not None and not chain.refusals(a, s, w, support.xs, support) for s, w in wholes)


def _bound(a: Adaptation, support: Support) -> int | None:
    """The number of classes that labels are held against in a recording. None where there are no labels or they are
    checked beforehand, and where a wrong one makes the loss NaN."""
    if support.labels is None or (_on_chains(a, support) and not chain.label_errors(a, support)):
        return None
    return a.plan.outputs


def _adapting(a: Adaptation, support: Support) -> Callable[..., tuple[Tensor, Tensor]]:
    """From xs and ys to what the steps change, in one row, and how they went."""

    def function(xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        result = descend(a, _within(a, support, xs, ys))
        new = [result.state[n].detach() for n in moved(a, support)]
        row = lying(new)
        return joined(new) if row is None else row, _judged(a, support, result, ys)

    return function


def _apart(row: Tensor, meta: Sequence[Tensor], tasks: int | None) -> list[Tensor]:
    """The tensors in a row, in the dtypes and shapes of the network's own, with T in front."""
    parts = split(row, [p.shape if tasks is None else torch.Size((tasks, *p.shape)) for p in meta])
    return [part if part.dtype == p.dtype else part.to(p.dtype) for part, p in zip(parts, meta)]


def _replayed(
    a: Adaptation, support: Support, what: str, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...]
) -> tuple[Tensor, ...] | None:
    """The results of a recording, whose last one `_is_sound` reads; nothing waits for the device here."""
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
    return None if recording is None else recording(*inputs)


def _is_sound(judged: Tensor, bound: int | None) -> bool:
    """Whether an adaptation went well, by what `_judged` gave: the one wait for the device. Where not, the long way
    tells what is wrong, or leaves labels out."""
    rows = judged.tolist()
    if bound is not None:
        lowest, highest = rows.pop(), rows.pop()
        if min(lowest) < 0 or max(highest) >= bound:
            return False
    return all(math.isfinite(value) for row in rows for value in row)


def _within(a: Adaptation, support: Support, xs: Tensor, ys: Tensor) -> Support:
    """The recording's own support set. Class labels are moved into the outputs' bounds: wrong ones are found by
    `_judged`, not by a fault on the device."""
    if (bound := _bound(a, support)) is not None:
        ys = ys.clamp(0, bound - 1)
    labels = None if support.labels is None else ys.reshape(support.labels.shape)
    return support._replace(xs=xs, ys=ys, labels=labels)


def _judged(a: Adaptation, support: Support, result: Result, ys: Tensor) -> Tensor:
    """The verdict, and below it, where labels are held against a bound, each task's highest and lowest."""
    if _bound(a, support) is None:
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
        _places([*parameters.values(), *buffers.values()]),
        cuda_graph.conditions(),
    )


def _places(tensors: Sequence[Tensor]) -> Hashable:
    """Where tensors lie, and in what form."""
    return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)
