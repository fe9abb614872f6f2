"""What a call is: frozen specs, and the checks of shapes, dtypes and devices with every error text.

Inside the package every operand carries a task axis of size 1 (shared by all tasks) or T (one value per task):
x [1|T, N, C, H, W], weight [1|T, O, C/groups, kh, kw], bias, gamma and beta [1|T, O].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


class _ConvSpec(NamedTuple):
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class ConvSpec(_ConvSpec):
    """The constants of a convolution, as (vertical, horizontal) pairs."""

    # torch.func takes every named tuple among a Function's arguments apart, in each call: by this it is none to torch.
    _asdict = None  # type: ignore[assignment]


class _BlockSpec(NamedTuple):
    conv: ConvSpec
    eps: float
    pool: int


class BlockSpec(_BlockSpec):
    """The constants of a fused block: its convolution, the norm's eps, the pooling window (1 for none)."""

    _asdict = None  # type: ignore[assignment]


def conv_spec(
    op: str,
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
    kernel: tuple[int, ...],
) -> ConvSpec:
    """The spec of a convolution with a kernel (kh, kw), from torch's arguments; ValueError where one is out of range.

    A kernel side of 1 is not dilated: its dilation changes nothing, and oneDNN faults on it in channels-last memory
    (images one pixel wide, dilation 2, stride 2).
    """
    down, across = pair(f"{op}: dilation", dilation, 1)
    if len(kernel) == 2:  # else the weight is none, which is said where the shapes are checked
        down, across = 1 if kernel[0] == 1 else down, 1 if kernel[1] == 1 else across
    return ConvSpec(pair(f"{op}: stride", stride, 1), pair(f"{op}: padding", padding, 0), (down, across), groups)


def output_size(size: torch.Size, kernel: torch.Size, spec: ConvSpec) -> Pair:
    """(H', W') of a convolution of images [..., H, W] with a weight [..., kh, kw]."""
    height, width = (
        (size[a] + 2 * spec.padding[a] - spec.dilation[a] * (kernel[a] - 1) - 1) // spec.stride[a] + 1 for a in (-2, -1)
    )
    return height, width


def pair(name: str, value: int | tuple[int, ...], least: int) -> Pair:
    """(vertical, horizontal) from an int, a 1-tuple or a 2-tuple; ValueError below `least`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) == 1:
        values = values * 2
    if len(values) != 2 or any(isinstance(v, (float, str)) or v is None or int(v) < least for v in values):
        raise ValueError(f"{name} must be an int of at least {least} or a pair of them, got {value!r}")
    return int(values[0]), int(values[1])


def same_padding(weight: torch.Size, stride: Pair, dilation: Pair) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) for padding="same": the surplus pixel of an even kernel goes right and below."""
    if stride != (1, 1):
        raise ValueError(f"conv2d: padding='same' needs stride 1, got {stride}")
    vertical, horizontal = (d * (k - 1) for d, k in zip(dilation, weight[-2:]))
    return horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2


def _list(shape: torch.Size) -> list[int]:
    return list(shape)


def _remembered(check: Callable[..., int]) -> Callable[..., int]:
    """The check, made once for the same shapes; torch.compile traces it itself and warns of the cache."""
    cached = lru_cache(maxsize=4096, typed=True)(check)

    @wraps(check)
    def checked(*shapes: object) -> int:
        return check(*shapes) if torch.compiler.is_compiling() else cached(*shapes)

    return checked


def _tasks(op: str, named: tuple[tuple[str, torch.Size | None, int], ...]) -> int:
    """The number of tasks T, on which every operand with a task axis (a dimension more than its `rank`) agrees."""
    tasks, owner = 1, ""
    for name, shape, rank in named:
        if shape is None or len(shape) == rank:
            continue
        if owner and shape[0] != tasks:
            raise ValueError(
                f"{op}: {name} has {shape[0]} tasks, {owner} has {tasks}: give all of them the same number, "
                "or leave the task axis out of a shared parameter"
            )
        tasks, owner = shape[0], name
    return tasks


def _vector(op: str, name: str, shape: torch.Size | None, size: int, meaning: str) -> None:
    if shape is not None and (len(shape) not in (1, 2) or shape[-1] != size):
        raise ValueError(f"{op}: {name} must be [{size}] or [tasks, {size}] ({meaning}), got {_list(shape)}")


@_remembered
def check_conv2d(op: str, x: torch.Size, weight: torch.Size, bias: torch.Size | None, spec: ConvSpec) -> int:
    """Number of tasks of a convolution; ValueError where the shapes do not fit."""
    if len(x) not in (4, 5):
        raise ValueError(f"{op}: x must be [N, C, H, W] or [tasks, N, C, H, W], got {_list(x)}")
    if len(weight) not in (4, 5):
        raise ValueError(
            f"{op}: weight must be [O, C/groups, kh, kw], or that with a leading task axis, got {_list(weight)}"
        )
    out, per_group, *kernel = weight[-4:]
    if spec.groups < 1 or out % spec.groups:
        raise ValueError(f"{op}: {out} output channels cannot be split into groups={spec.groups}")
    if x[-3] % spec.groups or per_group != x[-3] // spec.groups:
        raise ValueError(
            f"{op}: weight has {per_group} channels per group, expected {x[-3]}/{spec.groups} "
            f"(x {_list(x)}, weight {_list(weight)}, groups={spec.groups})"
        )
    _vector(op, "bias", bias, out, "one value per output channel")
    for axis in (0, 1):
        padded = x[-2 + axis] + 2 * spec.padding[axis]
        reach = spec.dilation[axis] * (kernel[axis] - 1) + 1
        if padded < reach:
            raise ValueError(
                f"{op}: the kernel reaches over {reach} pixels, the padded image has {padded} "
                f"(x {_list(x)}, weight {_list(weight)}, padding={spec.padding}, dilation={spec.dilation})"
            )
    return _tasks(op, (("x", x, 4), ("weight", weight, 4), ("bias", bias, 1)))


@_remembered
def check_conv_block(
    x: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    gamma: torch.Size | None,
    beta: torch.Size | None,
    spec: ConvSpec,
    pool: int,
    normalises: bool = True,
) -> int:
    """Number of tasks of a fused block; ValueError where the shapes do not fit, or it normalises by the batch and a
    channel has one value only."""
    op = "conv_block" if normalises else "affine_block"
    tasks = check_conv2d(op, x, weight, bias, spec)
    for name, shape in (("gamma", gamma), ("beta", beta)):
        _vector(op, name, shape, weight[-4], "one value per output channel")
    if not isinstance(pool, int) or pool < 1:
        raise ValueError(f"{op}: pool must be a whole number of at least 1 (1 = no pooling), got {pool!r}")
    size = output_size(x, weight, spec)
    if normalises and x[-4] * size[0] * size[1] == 1:  # of no image there is nothing to normalise, as torch has it
        raise ValueError(
            f"{op}: batch statistics need more than one value per channel, got N={x[-4]} images of "
            f"{size[0]}x{size[1]} (x {_list(x)})"
        )
    if min(size) < pool:
        raise ValueError(
            f"{op}: the convolution's output of {size[0]}x{size[1]} is smaller than the {pool}x{pool} "
            f"pooling window (x {_list(x)})"
        )
    affine = (("bias", bias, 1), ("gamma", gamma, 1), ("beta", beta, 1))
    return max(tasks, _tasks(op, (("x", x, 4), ("weight", weight, 4), *affine)))


@_remembered
def check_linear(x: torch.Size, weight: torch.Size, bias: torch.Size | None) -> int:
    """Number of tasks of a linear layer; ValueError where the shapes do not fit."""
    op = "linear"
    if len(weight) not in (2, 3):
        raise ValueError(f"{op}: weight must be [out, in], or that with a leading task axis, got {_list(weight)}")
    if len(x) < 1 or x[-1] != weight[-1]:
        raise ValueError(
            f"{op}: x has {x[-1] if len(x) else 'no'} features, weight takes {weight[-1]} "
            f"(x {_list(x)}, weight {_list(weight)})"
        )
    _vector(op, "bias", bias, weight[-2], "one value per output feature")
    tasks = _tasks(op, (("weight", weight, 2), ("bias", bias, 1)))
    per_task = len(weight) == 3 or (bias is not None and len(bias) == 2)
    if per_task and (len(x) < 2 or x[0] != tasks):
        raise ValueError(
            f"{op}: the parameters have {tasks} tasks, x must be [{tasks}, ..., {weight[-1]}], got {_list(x)}"
        )
    return tasks


def check_affine(op: str, x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> None:
    """As `check_same`, but float32 gamma and beta may scale a half-precision x, as in torch's batch norm."""
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in (("gamma", gamma), ("beta", beta)):
        if not (isinstance(tensor, Tensor) and tensor.dtype == wide and tensor.device == x.device):
            check_same(op, x, (name, tensor))


def check_same(op: str, x: Tensor, *others: tuple[str, Tensor | None]) -> None:
    """TypeError or ValueError unless every operand is a floating-point tensor with the dtype and device of x."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: x must be a floating-point tensor, got {got}; convert it with x.float()")
    for name, tensor in others:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, x is {x.dtype}: convert one of them with .to(dtype)")
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, x is on {x.device}: move one of them with .to(device)"
            )
