"""Many tasks: in batches that fit a CPU's cache or a GPU's memory, each adapted and classified at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lambda_kernels import cuda_graph
from lambda_kernels.program import flatten
from lambda_kernels.program.structure import opened

from ..data.episodes import as_tasks
from . import chain, outer, recorded
from .adaptation import Adaptation
from .loop import classify, descend, outcome

__all__ = ["Given", "adapt_and_classify", "alike", "listed", "stacked", "stacked_tasks", "task", "unstacked"]


class Given(NamedTuple):
    """What one task is adapted and classified with: inputs, targets, query inputs."""

    xs: Any
    ys: Any
    xq: Any


def listed(xs: Any, ys: Any, xq: Any) -> list[Given] | None:
    """The tasks of three lists, of which `ys` may be None, or of one list of tasks; None for stacked tasks.

    Raises:
        ValueError: the lists are empty, or of unequal length.
        TypeError: a list alone holds something else than tasks.
    """
    if ys is None and xq is None and isinstance(xs, (list, tuple)):
        xs = as_tasks(xs, "adapt_tasks")
        xs, ys, xq = ([getattr(t, name) for t in xs] for name in ("xs", "ys", "xq"))
    if not (isinstance(xs, list) and isinstance(xq, list) and (ys is None or isinstance(ys, list))):
        return None
    counts = {"xs": len(xs), "ys": len(xs) if ys is None else len(ys), "xq": len(xq)}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise ValueError(f"adapt_tasks: lists have one entry per task, got {told}: make them equally long")
    if not xs:
        raise ValueError("adapt_tasks: there are no tasks (the lists are empty)")
    return [Given(*one) for one in zip(xs, [None] * len(xs) if ys is None else ys, xq)]


def alike(tasks: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """The places of tasks that can be stacked, group by group, in the order of each group's first task."""
    groups: dict[Hashable, list[int]] = {}
    for place, given in enumerate(tasks):
        groups.setdefault(tuple(map(_form, given)), []).append(place)
    return list(groups.values())


def stacked_tasks(tasks: Sequence[Given]) -> Given:
    """Tasks of one form as stacked inputs, targets and query inputs."""
    return Given(*(stacked(values) for values in zip(*tasks)))


def unstacked(xs: Any, ys: Any, xq: Any) -> Iterator[Given]:
    """Stacked tasks one after another, in memory of their own: a forward may write into its input, and what autograd
    kept of one task must not seem changed by another's."""
    tasks = range(flatten(xs)[0][0].shape[0])
    return (Given(*(_each(task(value, t), torch.clone) for value in (xs, ys, xq))) for t in tasks)


def _form(value: Any) -> Hashable:
    """What has to be equal for two values to be stacked: the structure, shapes, dtypes, devices, all that is no
    tensor."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype, value.device
    if (found := opened(value)) is not None:
        frame, parts = found
        return repr(frame), tuple(map(_form, parts))
    return (type(value), value) if isinstance(value, Hashable) else id(value)


def adapt_and_classify(a: Adaptation, xs: Any, ys: Any, xq: Any) -> Any:
    """The query results of T tasks, with T in front of every tensor."""
    inputs = flatten(xs)[0]
    tasks = inputs[0].shape[0]
    at_once = max(1, tasks * _values_at_once(inputs[0].device) // max(1, sum(t.numel() for t in inputs)))
    if at_once < tasks and _is_one_call(a, xs, ys, xq):
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
    """Whether a call of a backend's adapts all tasks, and the same or another one classifies them, spreading them
    itself."""
    if not isinstance(xs, Tensor) or not isinstance(xq, Tensor) or len(a.stretches) != 1:
        return False
    (stretch,) = a.stretches
    whole, support = stretch.part.whole, a.support(xs, ys, xs.shape[0])
    if whole is None or cuda_graph.refusal(xs.device) is None:
        return False
    if not chain.refusals(a, stretch, whole, xs, support):
        return True
    # In second order a frozen prefix is one call too; the chain behind it takes whatever `whole` takes.
    return (a.second_order or stretch.part.chain == whole) and not outer.refusals(a, stretch, whole, xs, support)


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
