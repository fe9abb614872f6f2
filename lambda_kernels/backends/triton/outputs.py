"""The tensors that the kernels fill: one place for the real ones and for those that torch.compile imagines."""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import ConvSpec, output_size


def is_channels_last(x: Tensor) -> bool:
    """Do the channels of x [T, N, C, H, W] lie side by side, and its pixels at least C apart?"""
    return x.stride(2) == 1 and x.stride(4) >= x.shape[2]


def images(like: Tensor, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An empty [T, N, C, H, W] in one of the two layouts."""
    if not channels_last:
        return like.new_empty(shape, dtype=dtype)
    tasks, count, channels, height, width = shape
    return like.new_empty((tasks, count, height, width, channels), dtype=dtype).permute(0, 1, 4, 2, 3)


def conv2d_output(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, tasks: int = 1) -> Tensor:
    """An empty y [T, N, O, H', W'] in the layout of x; at least `tasks` tasks."""
    tasks = max(tasks, x.shape[0], weight.shape[0], 1 if bias is None else bias.shape[0])
    shape = (tasks, x.shape[1], weight.shape[1], *output_size(x.shape, weight.shape, spec))
    return images(x, shape, is_channels_last(x))


def input_grad_output(gy: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
    """An empty gradient of x in the layout of gy."""
    tasks = max(gy.shape[0], weight.shape[0]) if x_shape[0] != 1 else 1
    return images(gy, (tasks, *x_shape[1:]), is_channels_last(gy))


def weight_grad_output(gy: Tensor, x: Tensor, weight_shape: torch.Size) -> Tensor:
    """An empty gradient of weight, one per task unless the tasks share it; where x is channels-last, as
    `inner_loop.laid_out` lays out a weight."""
    tasks = max(gy.shape[0], x.shape[0]) if weight_shape[0] != 1 else 1
    wide = weight_shape[2] >= 8 and weight_shape[3] * weight_shape[4] > 1
    return images(gy, (tasks, *weight_shape[1:]), is_channels_last(x) and wide)


def linear_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An empty y [T, M, out]."""
    tasks = max(x.shape[0], weight.shape[0], 1 if bias is None else bias.shape[0])
    return x.new_empty((tasks, x.shape[1], weight.shape[1]))


def pooled_outputs(z: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Empty y and index, channels-last."""
    tasks, count, channels, height, width = z.shape
    shape = (tasks, count, channels, height // pool, width // pool)
    return images(z, shape, True), images(z, shape, True, torch.uint8)


def block_output(x: Tensor, weight: Tensor, spec: ConvSpec, pool: int, tasks: int) -> Tensor:
    """An empty y, channels-last, of a convolution and pooling; at least `tasks` tasks."""
    tasks = max(tasks, x.shape[0], weight.shape[0])
    height, width = output_size(x.shape, weight.shape, spec)
    return images(x, (tasks, x.shape[1], weight.shape[1], height // pool, width // pool), True)


def statistics(like: Tensor, tasks: int, channels: int) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd [T, C]."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_empty((tasks, channels), dtype=dtype), like.new_empty((tasks, channels), dtype=dtype)


def grad_outputs(z: Tensor, gamma: Tensor, need_z: bool) -> tuple[Tensor, Tensor, Tensor]:
    """An empty dz, channels-last (no elements unless need_z), dgamma and dbeta [T, C]."""
    dz = images(z, tuple(z.shape), True) if need_z else z.new_empty(0)
    dgamma, dbeta = (gamma.new_empty((z.shape[0], z.shape[2])) for _ in range(2))
    return dz, dgamma, dbeta


def loss_outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """An empty loss [T] and gradient [T, N, ways]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape[:1], dtype=wide), logits.new_empty(logits.shape)
