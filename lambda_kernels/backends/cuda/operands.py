"""Operands as the CUDA kernels take them: dtypes, strides, empty results, and the structures' fields."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...spec import ConvSpec, output_size
from .library import ImageBlock

# About so many blocks fill any device. A reduction's parts depend on the shapes alone: sums are split in one way.
BLOCKS = 4096
PART_BYTES = 65536
MOST_RELATIVE = 2**30  # places that a kernel counts in 32 bits: kMostRelative in csrc/cuda


def wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def allows_tf32(x: Tensor) -> bool:
    """Whether convolutions of x may multiply numbers rounded to TF32: the device can, and for float32 torch's switches
    allow it; half precision has no more digits."""
    switch: Any = torch.backends.cudnn
    wished = x.dtype != torch.float64 and (x.dtype != torch.float32 or switch.conv.fp32_precision == "tf32")
    return wished and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


def one_dtype(z: Tensor, *others: Tensor) -> bool:
    """Is all of it float32 or float64? The operators of torch.ops have one dtype; in a graph the rest is ATen's."""
    return z.dtype in (torch.float32, torch.float64) and all(t.dtype == z.dtype for t in others)


def stride(x: Tensor) -> int:
    """The task stride, in elements, of dense memory [1|T, ...]: 0 where the tasks share it."""
    return 0 if x.shape[0] == 1 else x[0].numel()


def is_dense(x: Tensor) -> bool:
    """Do the elements fill their memory without gaps?"""
    return x.numel() > 0 and 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) == x.numel()


def images_like(like: Tensor, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> Tensor:
    """An empty channels-last [T, N, C, H, W] beside `like`."""
    tasks, images, channels, height, width = size
    memory = torch.empty(tasks, images, height, width, channels, dtype=dtype, device=like.device)
    return memory.permute(0, 1, 4, 2, 3)


def affine(x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """gamma and beta [1|T, C] as the kernels read them: dense, and all as x is stored or all wide."""
    dtype = x.dtype if all(v.dtype == x.dtype for v in vectors) else wide(x)
    return tuple(v.to(dtype).contiguous() for v in vectors)


def parts_of(tasks: int, items: int, item_bytes: int) -> int:
    """In how many parts a task's `items` (pixels or windows) are reduced."""
    return min(items, -(-items * item_bytes // PART_BYTES), -(-BLOCKS // tasks))


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in tensors.items() if t is not None}


def fill(parameters: ctypes.Structure, **tensors: Tensor | None) -> None:
    for name, address in addresses(**tensors).items():
        setattr(parameters, name, address)


def share(parameters: ctypes.Structure, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        setattr(parameters, f"{name}_task", stride(t))


def geometry(x: Tensor, weight: torch.Size, spec: ConvSpec, pool: int) -> ImageBlock:
    """The sizes of a block of images x [1|T, N, C, H, W] and a weight [1|T, O, C, kh, kw]."""
    height, width = output_size(x.shape, weight, spec)
    return ImageBlock(
        images=x.shape[1], inputs=x.shape[2], height=x.shape[3], width=x.shape[4], outputs=weight[1],
        kernel_height=weight[3], kernel_width=weight[4], stride_y=spec.stride[0], stride_x=spec.stride[1],
        padding_y=spec.padding[0], padding_x=spec.padding[1], dilation_y=spec.dilation[0], dilation_x=spec.dilation[1],
        out_height=height, out_width=width, pool=pool,
    )  # fmt: skip


def patches_inside(p: ImageBlock) -> int:
    """How many patches of an image lie in its core (csrc/cuda/image_distances.cuh), where these are at least half of
    them and there is a kernel that multiplies their taps by distance; else 0."""
    plain = (p.stride_y, p.stride_x, p.dilation_y, p.dilation_x) == (1, 1, 1, 1)
    if not plain or p.kernel_width != 3 or p.kernel_height == 1 or p.inputs not in (1, 3):
        return 0
    if p.images * p.height * p.width >= MOST_RELATIVE:
        return 0
    rows = min(p.out_height - p.padding_y, p.height) - max(p.kernel_height - 1 - p.padding_y, 0) - p.kernel_height + 1
    columns = min(p.out_width - p.padding_x, p.width) - max(p.kernel_width - 1 - p.padding_x, 0) - p.kernel_width + 1
    inside = max(rows, 0) * max(columns, 0)
    return inside if 2 * inside >= p.out_height * p.out_width else 0


def named(**tensors: Tensor) -> str:
    """The shapes for an error's text."""
    first = next(iter(tensors.values()))
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
    return f"{shapes} in {first.dtype} on {first.device}"
