"""All checks of an adaptation, and their texts."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import ConvBlock
from lambda_kernels._torch import functorch_active
from lambda_kernels.program import flatten

from ..plan import Plan
from ..say import say_once

__all__ = [
    "LEFT_OUT",
    "Loss",
    "check_device",
    "check_gradients",
    "check_images",
    "check_labels",
    "check_loss",
    "check_mode",
    "check_norm",
    "check_one_input",
    "check_query",
    "check_steps",
    "check_support",
    "check_tasks",
    "class_numbers",
    "diverged",
    "ignored_label",
    "lacks_memory",
    "scalar",
    "told_of",
]

Loss = Callable[[Any, Any], Tensor]


def check_norm(norm: str) -> None:
    if norm not in ("follow", "never"):
        raise ValueError(f"norm must be 'follow' or 'never', got {norm!r}")


def check_loss(loss: Any) -> None:
    """TypeError where a loss cannot be called with the network's result and the targets."""
    if isinstance(loss, type) or not callable(loss):
        given = f"the class {loss.__name__}: make one, {loss.__name__}()" if isinstance(loss, type) else repr(loss)
        raise TypeError(f"loss must be a function of the network's result and ys, as F.cross_entropy is, got {given}")


def check_steps(steps: Any) -> int:
    """The number of steps, of Python or NumPy, as an int."""
    try:
        count = operator.index(steps)
    except TypeError:
        count = -1
    if count < 0 or isinstance(steps, bool):
        raise ValueError(f"steps must be a whole number of at least 0, got {steps!r}")
    return count


def check_mode() -> None:
    """RuntimeError where torch is in a mode in which no inner loop can run."""
    if functorch_active():
        raise RuntimeError(
            "adaptation steps by torch.autograd, which no transform of torch.func can see through: adapt outside of "
            "grad, vmap and jvp, with second_order=True where a gradient shall go through the steps, and by "
            "adapt_tasks for many tasks"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adaptation needs gradients: call it under torch.no_grad() instead of torch.inference_mode(), or inside "
            "torch.inference_mode(False)"
        )


def check_one_input(model: nn.Module) -> None:
    """ValueError where a network's forward has several inputs of its own."""
    try:
        needed = [
            p for p in inspect.signature(model.forward).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]  # fmt: skip
    except (TypeError, ValueError):  # a forward without a signature
        return
    if len(needed) > 1:
        raise ValueError(
            f"{type(model).__name__}.forward takes {len(needed)} inputs; adapt calls a network with xs alone: "
            "let it take them as one tuple or dict, or use LambdaMAML, whose clones are called as the network is"
        )


def check_images(model: nn.Module, xs: Any) -> None:
    """ValueError where a row of layers that begins with a 2-d convolution gets more than [N, C, H, W]: our layers would
    take the first axis for tasks, each with statistics of its own."""
    first: nn.Module = model
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    if isinstance(first, (nn.Conv2d, ConvBlock)) and isinstance(xs, Tensor) and xs.dim() > 4:
        raise ValueError(
            f"support set: xs is {list(xs.shape)}, expected images [N, C, H, W]: adapt_tasks takes [T, N, C, H, W]"
        )


def check_device(parameters: Mapping[str, Tensor]) -> None:
    """ValueError where a network has no values."""
    for name, p in parameters.items():
        if p.is_meta:
            raise ValueError(
                f"the network's {name} is on the meta device, which holds shapes and no values: give it values first, "
                'with to_empty(device="cpu") and load_state_dict, or load_state_dict(state, assign=True)'
            )


def check_support(parameters: Mapping[str, Tensor], xs: Any, ys: Any, tasks: int | None = None) -> None:
    """ValueError or TypeError for a support set that a network cannot be adapted to.

    xs and ys are tensors, or tuples, lists and dicts of them, with T in front where `tasks` is given; ys may be None.
    """
    inputs, targets = flatten(xs)[0], flatten(ys)[0]
    for name, value, found in (("xs", xs, inputs), ("ys", ys, targets)):
        if not found and (name == "xs" or isinstance(value, (tuple, list, dict))):
            raise TypeError(
                f"support set: {name} must be a tensor, or hold tensors, got {type(value).__name__}: "
                f"torch.as_tensor({name}) makes one of numbers"
            )
    if (odd := next((t for t in inputs if t.layout is not torch.strided), None)) is not None:
        raise TypeError(f"support set: xs has the layout {odd.layout}: convert it with .to_dense()")
    own = 0 if tasks is None else 1  # axes in front of a task's own
    if isinstance(xs, Tensor) and (xs.dim() <= own or xs.shape[own] == 0):
        raise ValueError(f"support set: xs [N, ...] with N of at least 1 expected, got {list(xs.shape[own:])}")
    check_device(parameters)
    first = next(iter(parameters.values()))
    places = {t.device for t in (first, *inputs, *targets)}
    if len(places) > 1:
        where = ", ".join(f"{n} on {t.device}" for n, ts in (("xs", inputs), ("ys", targets)) for t in ts[:1])
        raise ValueError(f"support set: {where}, the network on {first.device}: move them together with .to(device)")
    if isinstance(xs, Tensor) and xs.is_floating_point() and not torch.is_autocast_enabled(xs.device.type):
        known = {p.dtype for p in parameters.values() if p.is_floating_point() or p.is_complex()}
        if xs.dtype not in known and not any(dtype.is_complex for dtype in known):
            raise TypeError(
                f"support set: xs is {xs.dtype}, the network {first.dtype}: convert xs with .to({first.dtype})"
            )


def check_query(xs: Any, xq: Any) -> None:
    """ValueError or TypeError where query inputs are of another kind than those of the support set."""
    support, query = flatten(xs)[0], flatten(xq)[0]
    if not query:
        raise TypeError(f"adapt_tasks: xq must be a tensor, or hold tensors, got {type(xq).__name__}")
    for x, q in zip(support, query):
        if q.dtype != x.dtype or q.device != x.device:
            raise TypeError(
                f"adapt_tasks: xq is {q.dtype} on {q.device}, xs {x.dtype} on {x.device}: convert xq with .to(xs)"
            )


def check_tasks(xs: Any, ys: Any, xq: Any) -> int:
    """The number of tasks T that xs, ys and xq, or the tensors in them, have in front."""
    found: dict[str, list[Tensor]] = {}
    for name, value in (("xs", xs), ("ys", ys), ("xq", xq)):
        found[name] = flatten(value)[0]
        if not found[name] and not (name == "ys" and value is None):
            raise TypeError(f"adapt_tasks: {name} must be a tensor, or hold tensors, got {type(value).__name__}")
    shapes = {name: [list(t.shape) for t in tensors] for name, tensors in found.items()}
    fronts = {t.shape[0] if t.dim() else None for tensors in found.values() for t in tensors}
    if len(fronts) != 1 or None in fronts:
        told = ", ".join(f"{name} {', '.join(map(str, s))}" for name, s in shapes.items())
        raise ValueError(f"adapt_tasks: xs [T, N, ...], ys [T, N] and xq [T, Q, ...] must agree on T, got {told}")
    tasks = found["xs"][0].shape[0]
    if tasks == 0:
        raise ValueError("adapt_tasks: there are no tasks (T = 0)")
    return tasks


@contextmanager
def told_of(places: Sequence[int]) -> Iterator[None]:
    """What is raised inside names the tasks of a list that it is about."""
    try:
        yield
    except (ValueError, TypeError, FloatingPointError) as error:
        if type(error) not in (ValueError, TypeError, FloatingPointError):
            raise
        few = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
        which = f"one of the tasks {few}" if len(places) > 1 else f"task {few}"
        raise type(error)(f"{error} ({which} of the list, counted from 0)") from error


LEFT_OUT = -100  # the class number that torch.nn.functional.cross_entropy leaves out


def ignored_label(loss: Loss) -> int | None:
    """The class number that a cross-entropy leaves out, None for another loss."""
    if loss is F.cross_entropy:
        return LEFT_OUT
    return loss.ignore_index if type(loss) is nn.CrossEntropyLoss else None


def class_numbers(loss: Loss, ys: Any) -> Tensor | None:
    """The labels as int64 where they are class numbers of a cross-entropy, [N] or [N, ...]; else None.

    Raises:
        TypeError: cross-entropy does not take such labels.
    """
    if ignored_label(loss) is None:
        return None
    if not isinstance(ys, Tensor):
        raise TypeError(
            f"support set: ys must be a tensor of class numbers, got {type(ys).__name__}: make it by "
            "torch.as_tensor(ys), or give a loss that takes what it is"
        )
    if ys.is_floating_point():
        return None  # a probability per class
    if ys.dtype == torch.bool or ys.is_complex():
        raise TypeError(
            f"support set: ys is {ys.dtype}: convert class numbers with .long(), a probability per class with .float()"
        )
    return ys.long()


def check_labels(
    plan: Plan, loss: Loss, labels: Tensor, lowest: list[int] | None = None, highest: list[int] | None = None
) -> bool:
    """Whether cross-entropy leaves out some class numbers [T, N, ...]; says once where a task has one class only.

    `lowest` and `highest` are each task's, where they are known.

    Raises:
        ValueError: a class number lies beyond the network's outputs.
    """
    # A label per image is one of the last layer's outputs; of labels per pixel or word, the classes are another axis.
    outputs, some = plan.outputs if labels.dim() == 2 else None, 0
    ignored = ignored_label(loss)
    if lowest is None or highest is None:
        rows = labels.flatten(1)
        lowest, highest = torch.stack(torch.aminmax(rows, dim=1)).tolist()
        if ignored is not None and (min(lowest) < 0 or (outputs is not None and max(highest) >= outputs)):
            # What the loss leaves out does not count.
            left_out, limits = rows.eq(ignored), torch.iinfo(rows.dtype)
            low, high = rows.masked_fill(left_out, limits.max).amin(1), rows.masked_fill(left_out, limits.min).amax(1)
            lowest, highest, (some, *_) = torch.stack([low, high, left_out.sum().expand(len(rows))]).tolist()
    for low, high in zip(lowest, highest):
        if low > high or low == high == ignored:  # all are left out
            if getattr(loss, "reduction", "mean") == "mean":
                raise ValueError(f"support set: all labels are {ignored}, which the cross-entropy leaves out: no mean")
            continue
        if low < 0 or (outputs is not None and high >= outputs):
            raise ValueError(
                f"support set: labels run from {low} to {high}, the network's outputs from 0 to "
                f"{'ways-1' if outputs is None else outputs - 1}: renumber them or build it with more ways"
            )
        if low == high:
            say_once(
                "a support set is of one class only: adapting to it makes the network predict this class more often"
            )
    return some > 0


def check_gradients(pattern: object, names: tuple[str, ...], losses: Tensor, found: list[Tensor | None]) -> None:
    """ValueError where a loss has no gradient with respect to any of the parameters that a step updates."""
    if any(g is not None for g in found):
        return
    why = ""
    if not losses.requires_grad:
        why = " (it has no graph: it was detached, or computed under torch.no_grad() or torch.inference_mode())"
        if torch.is_inference_mode_enabled():
            why += ". Inside inference mode, call the clone and take the loss under torch.inference_mode(False)"
        elif not torch.is_grad_enabled():
            why += ". Inside torch.no_grad(), call the clone and take the loss under torch.enable_grad()"
    raise ValueError(
        f"pattern {str(pattern)!r}: the loss does not depend on the parameters that it updates ({', '.join(names)}), "
        f"so there is no gradient{why}: compute the loss from this network's result, with gradients on"
    )


def scalar(value: Any) -> Tensor:
    """The loss of one task, a tensor of one number."""
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss must be a tensor of one number, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(
            f"the loss must be one number per task, got {list(value.shape)}: take the mean over the support set"
        )
    if value.is_complex():
        raise ValueError(f"the loss must be a real number, got {value.dtype}: take its abs() or .real")
    return value


def diverged(pattern: object, rule: Any, rows: list[list[float]], xs: Any) -> str | None:
    """What to say of a verdict (see `state.verdict`) that holds an infinite number or NaN; None for a sound one."""
    if all(math.isfinite(value) for row in rows for value in row):
        return None
    *losses, _ = rows
    wrong = [(k, value) for k, row in enumerate(losses) for value in row if not math.isfinite(value)]
    step, value = wrong[0] if wrong else (len(losses) - 1, losses[-1][0])
    images = sum(int((~torch.isfinite(x)).sum()) for x in flatten(xs)[0])
    why = (
        f"the support images hold {images} NaN or infinite values"
        if images
        else "lower lr or look at the images' scale"
    )
    where = f"in step {step + 1} of {len(losses)}, support loss {value}"
    return f"adaptation under {pattern} with {rule!r} diverged {where}: {why}"


def lacks_memory(error: Exception) -> bool:
    """Whether torch, on a GPU or the CPU, or NumPy could not allocate."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error).lower() for w in words)
