"""Many tasks: in batches that fit a CPU's cache or a GPU's memory, each adapted and classified at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lambda_kernels import cuda_graph
from lambda_kernels.program import flatten

from . import chain, recorded
from .adaptation import Adaptation
from .loop import classify, descend, outcome

__all__ = ["adapt_and_classify", "stacked", "task"]


def adapt_and_classify(a: Adaptation, xs: Any, ys: Any, xq: Any) -> Any:
    """The query results of T tasks, with T in front of every tensor."""
    inputs = flatten(xs)[0]
    tasks = inputs[0].shape[0]
    at_once = max(1, tasks * _values_at_once(inputs[0].device) // max(1, sum(t.numel() for t in inputs)))
    if at_once < tasks and not torch.is_grad_enabled() and _is_one_call(a, xs, ys, xq):
        at_once = tasks
    if at_once >= tasks:
        return _adapt_batch(a, xs, ys, xq)
    results = []
    for begin in range(0, tasks, at_once):
        results.append(_adapt_batch(a, *(task(value, slice(begin, begin + at_once)) for value in (xs, ys, xq))))
    return _together(torch.cat, results)


def task(values: Any, which: int | slice) -> Any:
    """One task's values out of those of many, or some tasks'."""
    return _each(values, lambda t: t[which])


def stacked(results: Sequence[Any]) -> Any:
    """The results of single tasks as one structure, with T in front of every tensor."""
    return _together(torch.stack, results)


def _adapt_batch(a: Adaptation, xs: Any, ys: Any, xq: Any) -> Any:
    """The query results of a batch of tasks."""
    tasks = flatten(xs)[0][0].shape[0]
    support = a.support(xs, ys, tasks)
    gradients = torch.is_grad_enabled()
    state = None
    if gradients:
        state = recorded.adapted(a, support)
    elif (logits := recorded.classified(a, support, xq)) is not None:
        return logits
    if state is None:
        support = a.check_labels(support)
        fits = not gradients and isinstance(xs, Tensor) and isinstance(xq, Tensor) and xq.shape[2:] == xs.shape[2:]
        fits = fits and xq.numel() > 0 and a.same_chain(xq, tasks)
        result = descend(a, support, xq if fits else None)
        a.check_finite(result.verdict.tolist(), xs)
        if result.logits is not None:
            return result.logits
        state = result.state
    return classify(a, outcome(a, state, tasks).state, xq, tasks)


def _is_one_call(a: Adaptation, xs: Any, ys: Any, xq: Any) -> bool:
    """Whether one call of a backend's inner loop adapts and classifies all tasks, spreading them itself."""
    if not isinstance(xs, Tensor) or not isinstance(xq, Tensor) or len(a.stretches) != 1:
        return False
    whole = a.stretches[0].part.whole
    support = a.support(xs, ys, xs.shape[0])
    graph = cuda_graph.refusal(xs.device) is None
    return not graph and whole is not None and not chain.refusals(a, a.stretches[0], whole, xs, support)


def _values_at_once(device: torch.device) -> int:
    """Values of the support inputs of one batch of tasks.

    On a CPU, with more of them the activations fall out of the cache. On a GPU, a block of 64 channels makes about 300
    bytes per value of 3-channel images, of which several are held at a time: they shall fit in its memory.
    """
    if device.type != "cuda":
        return 1 << 16
    return int(torch.cuda.get_device_properties(device).total_memory) // 2048


def _each(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    tensors, rebuild = flatten(values)
    return rebuild([function(t) for t in tensors])


def _together(join: Callable[[list[Tensor]], Tensor], results: Sequence[Any]) -> Any:
    parts = [flatten(result) for result in results]
    return parts[0][1]([join(list(tensors)) for tensors in zip(*(tensors for tensors, _ in parts), strict=True)])
