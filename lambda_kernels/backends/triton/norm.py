"""Batch-statistics norm, ReLU and max-pool of z [T, N, C, H, W], and its gradient.

Statistics are merged from the mean and the sum of squares about it of each tile of pixels (Chan, Golub & LeVeque 1983),
so that they do not cancel far from zero. Every sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...spec import ConvSpec, output_size
from .launch import INTERPRETED, LARGEST_COUNT, blocks, launch, power
from .norm_kernels import dense_gradient, finish_sums, gradient_sums, merge, merge_groups, moments, normalise
from .outputs import grad_outputs, pooled_outputs, statistics
from .products import conv2d_extremes, conv2d_moments

# Values that a program holds of one tensor, and the most channels among them.
TILE = 8192 if INTERPRETED else 1024
CHANNELS_ABREAST = 128
# The most pixels whose moments are exact where all are equal; see tile_moments.
MOMENT_PIXELS = 256
# Tiles whose moments are merged at a time, x channels. A program merges at most MERGE_ROUNDS such blocks, one after the
# other: of more tiles, each block is merged by a program of its own first.
MERGE_TILES, MERGE_CHANNELS = 64, 16
MERGE_ROUNDS = 3
# Programs among which the pixels of the gradient's sums are split.
SPLIT_PROGRAMS = 1024


def conv_block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, spec: ConvSpec, eps: float, pool: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `Reference.conv_block`: the statistics come out of the convolution."""
    tasks = max(t.shape[0] for t in (x, weight, gamma, beta))
    z, partial, pixels = conv2d_moments(x, weight, tasks, spec)
    return z, *_finish(z, partial, pixels, gamma, beta, eps, pool)


def block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, spec: ConvSpec, eps: float, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Reference.block`. Of a window the convolution keeps one value alone, the one that is the largest behind the
    norm: z is not stored, nor the maxima's places, and the norm and the ReLU go over the windows in place."""
    tasks = max(t.shape[0] for t in (x, weight, gamma, beta))
    y, partial, pixels = conv2d_extremes(x, weight, gamma, tasks, spec, pool)
    height, width = output_size(x.shape, weight.shape, spec)
    mean, rstd = _merged(y, partial, pixels, y.shape[1] * height * width, eps)
    _normalise(y, gamma, beta, mean, rstd, y, None, 1)
    return y, mean, rstd


def norm_relu_pool(
    z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `Reference.norm_relu_pool`."""
    tasks, images, channels, height, width = z.shape
    pixels = images * height * width
    _count(pixels)
    abreast = min(power(channels), CHANNELS_ABREAST)
    tile = min(TILE // abreast, MOMENT_PIXELS)
    tiles = blocks(pixels, tile)
    partial = z.new_empty((tasks, tiles, 2, channels), dtype=torch.promote_types(z.dtype, torch.float32))
    launch(
        moments, tasks * tiles * blocks(channels, abreast), z,
        z, partial, height, width, channels, pixels, tiles, *z.stride(), _triton(partial.dtype), tile, abreast,
    )  # fmt: skip
    return _finish(z, partial, tile, gamma, beta, eps, pool)


def _finish(
    z: Tensor, partial: Tensor, tile: int, gamma: Tensor, beta: Tensor, eps: float, pool: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, index, mean and rstd from z and the moments of its tiles of `tile` pixels."""
    y, index = pooled_outputs(z, pool)
    mean, rstd = _merged(z, partial, tile, z.shape[1] * z.shape[3] * z.shape[4], eps)
    _normalise(z, gamma, beta, mean, rstd, y, index, pool)
    return y, index, mean, rstd


def _merged(like: Tensor, partial: Tensor, tile: int, values: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd [T, C] of a task's `values` from the moments of its tiles of `tile` values."""
    tasks, channels = partial.shape[0], partial.shape[3]
    mean, rstd = statistics(like, tasks, channels)
    abreast = blocks(channels, MERGE_CHANNELS)
    while partial.shape[1] > MERGE_ROUNDS * MERGE_TILES:
        tiles, groups = partial.shape[1], blocks(partial.shape[1], MERGE_TILES)
        each, partial = partial, partial.new_empty((tasks, groups, 2, channels))
        launch(
            merge_groups, tasks * groups * abreast, like,
            each, partial, channels, values, tiles, groups, tile, MERGE_TILES, MERGE_CHANNELS,
        )  # fmt: skip
        tile *= MERGE_TILES
    launch(
        merge, tasks * abreast, like, partial, mean, rstd, channels, values, partial.shape[1],
        tile, eps, min(MERGE_TILES, max(2, power(partial.shape[1]))), MERGE_CHANNELS,
    )  # fmt: skip
    return mean, rstd


def _normalise(
    z: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, y: Tensor, index: Tensor | None, pool: int
) -> None:
    """Fill y, and index where there is one; y may be z where nothing is pooled."""
    tasks, images, channels, height, width = y.shape
    gamma, beta = gamma.contiguous(), beta.contiguous()
    pixels = images * height * width
    if not pixels:
        return
    abreast = min(power(channels), CHANNELS_ABREAST)
    tiles = blocks(pixels, TILE // abreast)
    launch(
        normalise, tasks * tiles * blocks(channels, abreast), z,
        z, gamma, beta, mean, rstd, y, y if index is None else index, height, width, channels, pixels, tiles,
        *z.stride(), _own(gamma), _own(beta), pool, index is not None, TILE // abreast, abreast,
    )  # fmt: skip


def norm_relu_pool_grad(
    gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Reference.norm_relu_pool_grad`, with an empty dz unless need_z."""
    tasks, images, channels, height, width = z.shape
    y_height, y_width = index.shape[-2:]
    dz, dgamma, dbeta = grad_outputs(z, gamma, need_z)
    gamma, mean, rstd = gamma.contiguous(), mean.contiguous(), rstd.contiguous()
    abreast = min(power(channels), CHANNELS_ABREAST)
    tile, channel_tiles = TILE // abreast, blocks(channels, abreast)
    pixels = images * y_height * y_width
    _count(images * height * width)
    splits = max(1, min(SPLIT_PROGRAMS // (tasks * channel_tiles), blocks(pixels, tile)))
    chunk = blocks(blocks(pixels, splits), tile) * tile
    splits = max(1, blocks(pixels, max(chunk, 1)))
    partial = mean.new_empty((2, tasks, splits, channels))
    launch(
        gradient_sums, tasks * splits * channel_tiles, z,
        gy, z, index, mean, rstd, partial, y_height, y_width, channels, pixels, chunk, splits,
        *gy.stride(), *z.stride(), *index.stride(), pool, tile, abreast,
    )  # fmt: skip
    sums = mean.new_empty((2, tasks, channels))
    launch(
        finish_sums, 2 * tasks * blocks(channels, MERGE_CHANNELS), z,
        partial, sums, dgamma, dbeta, tasks, channels, splits, min(MERGE_TILES, max(2, power(splits))), MERGE_CHANNELS,
    )  # fmt: skip
    if need_z:
        windows = images * blocks(height, pool) * blocks(width, pool)
        tiles = blocks(windows, tile)
        launch(
            dense_gradient, tasks * tiles * channel_tiles, z,
            gy, z, gamma, index, mean, rstd, sums, dz, tasks, images, height, width, y_height, y_width, channels,
            windows, tiles, *gy.stride(), *z.stride(), _own(gamma), *index.stride(), pool, tile, abreast,
        )  # fmt: skip
    return dz, dgamma, dbeta


def _own(vector: Tensor) -> int:
    """The task stride of a contiguous [1|T, C]."""
    return 0 if vector.shape[0] == 1 else vector.shape[1]


def _triton(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _count(pixels: int) -> None:
    if pixels > LARGEST_COUNT:
        raise ValueError(f"triton: {pixels} pixels are more than its kernels count; split the batch")
