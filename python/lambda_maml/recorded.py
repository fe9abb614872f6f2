"""Adaptation on a CUDA device as one graph: the prefix, all K steps and, where no gradient is asked for, the query
forward. A recording serves every later task, or batch of tasks, of the same shapes under the same pattern."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import cuda_graph as capture
from lambda_kernels.program import tensors_of

from .plan import say_once

if TYPE_CHECKING:
    from .adapt import Adapted, Loop, Loss

__all__ = ["RECORDINGS", "adapted_by_graph", "classified_by_graph", "refusal"]

RECORDINGS = capture.Recordings(16)
Run = Callable[[Tensor, Tensor], "Adapted"]


def refusal(loop: Loop, loss: Loss) -> str | None:
    """Why the adaptation of this network cannot be one graph, on any device; None where it can."""
    if loop.second_order:
        return "second order differentiates through the steps"
    if loop.plan.program.untraceable is not None:
        return f"torch.fx cannot trace it ({loop.plan.program.untraceable})"
    if loop.plan.why_not_batched is not None:
        return loop.plan.why_not_batched
    if getattr(F, getattr(loss, "__name__", ""), None) is not loss:
        return "the loss is none of torch.nn.functional: a graph would not run its code again"
    return None


def adapted_by_graph(
    loop: Loop, model: nn.Module, loss: Loss, run: Run, xs: Tensor, ys: Tensor, per_task: bool
) -> dict[str, Tensor] | None:
    """The updated tensors after the last step of `run(xs, ys)`; None where the caller has to run it.

    `per_task`: xs [T, N, ...] and ys [T, N] are several tasks'. Raises as `Loop.check_labels` and `Loop.check_finite`.
    """

    def function(xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
        losses, state = run(xs, _within(loop, ys))
        rows = [state[n].detach().reshape((*state[n].shape[: state[n].dim() - p.dim()], -1)) for n, p in own.items()]
        return torch.cat(rows, dim=-1), _verdict(loop, losses, state, ys)

    own = {n: loop.meta[n] for n in loop.updated}
    results = _replayed(loop, model, loss, "adapted", function, (xs, ys), per_task)
    if results is None:
        return None
    parts = results[0].split([p.numel() for p in own.values()], dim=-1)
    return {n: part.reshape((*part.shape[:-1], *p.shape)).to(p.dtype) for (n, p), part in zip(own.items(), parts)}


def classified_by_graph(
    loop: Loop, model: nn.Module, loss: Loss, run: Run, classify: Callable[[dict[str, Tensor], Tensor], Tensor],
    xs: Tensor, ys: Tensor, xq: Tensor,
) -> Tensor | None:  # fmt: skip
    """`classify` of the state after `run(xs, ys)`, and xq: query logits; None where the caller has to run both."""

    def function(xs: Tensor, ys: Tensor, xq: Tensor) -> tuple[Tensor, Tensor]:
        losses, state = run(xs, _within(loop, ys))
        with torch.no_grad():
            logits = classify({n: t.detach() for n, t in state.items()}, xq)
        return logits, _verdict(loop, losses, state, ys)

    results = _replayed(loop, model, loss, "classified", function, (xs, ys, xq), True)
    return None if results is None else results[0]


def _replayed(
    loop: Loop, model: nn.Module, loss: Loss, what: str, function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...], per_task: bool,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    xs, ys = inputs[:2]
    if capture.refusal(xs.device) is not None or not loop.steps:
        return None
    if (why := refusal(loop, loss)) is not None:
        say_once(f"{type(model).__name__} is adapted without a CUDA graph: {why}")
        return None
    labels = ys if per_task else ys.unsqueeze(0)
    if loop.outputs is None:
        loop.check_labels(labels)  # they cannot be moved within unknown bounds
    recording = RECORDINGS.get(_key(loop, model, loss, what, inputs), type(model).__name__, function, inputs)
    if recording is None:
        return None
    results = recording(*inputs)
    rows = results[-1].tolist()  # the one wait for the device
    if not ys.is_floating_point():
        lowest, highest = ([int(v) for v in rows.pop()] for _ in range(2))
        loop.check_labels(labels, lowest, highest)
    loop.check_finite(rows, xs)
    return results


def _within(loop: Loop, ys: Tensor) -> Tensor:
    """Class labels moved into the outputs' bounds: wrong ones are found by `_verdict`, not by a fault on the device."""
    return ys if ys.is_floating_point() or loop.outputs is None else ys.clamp(0, loop.outputs - 1)


def _verdict(loop: Loop, losses: list[Tensor], state: dict[str, Tensor], ys: Tensor) -> Tensor:
    """What `Loop.verdict` gives, and below it, for class labels, each task's highest and lowest."""
    judged = loop.verdict(losses, state)
    if ys.is_floating_point():
        return judged
    low, high = torch.aminmax(ys.reshape(judged.shape[1], -1), dim=1)
    return torch.cat([judged, torch.stack([high, low]).double()])


def _key(loop: Loop, model: nn.Module, loss: Loss, what: str, inputs: tuple[Tensor, ...]) -> Hashable:
    """All that a recording depends on. The model's tensors are read where they lie, so their places belong to it."""
    parameters, buffers = tensors_of(model)
    return (
        what,
        loop.plan.program,
        tuple(loop.parts),
        loop.lr,
        loss,
        tuple((t.shape, t.dtype, t.device) for t in inputs),
        tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (*parameters.values(), *buffers.values())),
        capture.conditions(),
    )
