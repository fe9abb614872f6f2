# Kernels are not typed: triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Batch-statistics norm, ReLU and max-pool of z [T, N, C, H, W], and its gradient.

Statistics are merged from the mean and the sum of squares about it of each tile of pixels (Chan, Golub & LeVeque 1983),
so that they do not cancel far from zero. Every sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ConvSpec
from .launch import INTERPRETED, LARGEST_COUNT, blocks, launch, power
from .outputs import grad_outputs, pooled_outputs
from .products import conv2d_moments, tile_moments

# Values that a program holds of one tensor, and the most channels among them.
TILE = 8192 if INTERPRETED else 1024
CHANNELS_ABREAST = 128
# The most pixels whose moments are exact where all are equal; see tile_moments.
MOMENT_PIXELS = 256
# Tiles whose moments are merged at a time, x channels.
MERGE_TILES, MERGE_CHANNELS = 64, 16
# Programs among which the pixels of the gradient's sums are split.
SPLIT_PROGRAMS = 1024


@triton.jit
def moments(
    z,
    partial,
    height,
    width,
    channels,
    pixels,
    pixel_tiles,
    z_task,
    z_image,
    z_channel,
    z_row,
    z_column,
    SUM: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """partial [T, pixel_tiles, 2, C]: the mean and the sum of squares about it of PIXELS pixels of a task."""
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    channel = (pid % channel_tiles).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    tile = pid // channel_tiles % pixel_tiles
    task = (pid // channel_tiles // pixel_tiles).to(tl.int64)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    column = (pixel % width).to(tl.int64)
    row = (pixel // width % height).to(tl.int64)
    image = (pixel // width // height).to(tl.int64)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    rows = task * z_task + image * z_image + row * z_row + column * z_column
    v = tl.load(z + (rows[:, None] + (channel * z_channel)[None, :]), inside, other=0.0).to(SUM)
    count = tl.minimum(pixels - tile * PIXELS, PIXELS).to(SUM)
    origin, shift, squares = tile_moments(v, inside, count, PIXELS)
    at = (task * pixel_tiles + tile) * 2 * channels + channel
    tl.store(partial + at, origin + shift, mask=channel < channels)
    tl.store(partial + at + channels, squares, mask=channel < channels)


@triton.jit
def merge(
    partial,
    mean,
    rstd,
    channels,
    pixels,
    pixel_tiles,
    PIXELS: tl.constexpr,
    EPS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """mean and rstd [T, C] of a task's pixels; each tile of `partial` holds PIXELS, the last one the rest."""
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    channel = pid % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    channel_inside = channel < channels
    task = (pid // channel_tiles).to(tl.int64)
    partial += task * pixel_tiles * 2 * channels
    SUM: tl.constexpr = partial.dtype.element_ty
    # All means are taken from the first tile's.
    origin = tl.load(partial + channel, channel_inside, other=0.0)
    count = tl.zeros((CHANNELS,), SUM)
    shift = tl.zeros((CHANNELS,), SUM)
    squares = tl.zeros((CHANNELS,), SUM)
    for first in range(0, pixel_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        inside = (tile < pixel_tiles)[:, None] & channel_inside[None, :]
        at = (tile.to(tl.int64) * 2 * channels)[:, None] + channel[None, :]
        own = tl.where(tile < pixel_tiles, tl.minimum(pixels - tile * PIXELS, PIXELS), 0).to(SUM)[:, None]
        d = tl.where(inside, tl.load(partial + at, inside, other=0.0) - origin[None, :], 0.0)
        own_squares = tl.load(partial + at + channels, inside, other=0.0)
        block_count = tl.sum(own, 0)
        block_shift = tl.sum(own * d, 0) / block_count
        d -= block_shift[None, :]
        block_squares = tl.sum(own_squares + own * d * d, 0)
        total = count + block_count
        apart = block_shift - shift
        shift += apart * (block_count / total)
        squares += block_squares + apart * apart * (count * (block_count / total))
        count = total
    spread = squares / count + EPS
    inverse = 1.0 / (tl.sqrt(spread) if SUM == tl.float64 else tl.sqrt_rn(spread))
    at = task * channels + channel
    tl.store(mean + at, origin + shift, mask=channel_inside)
    tl.store(rstd + at, inverse, mask=channel_inside)


@triton.jit
def normalise(
    z,
    gamma,
    beta,
    mean,
    rstd,
    y,
    index,
    height,
    width,
    channels,
    pixels,
    pixel_tiles,
    z_task,
    z_image,
    z_channel,
    z_row,
    z_column,
    gamma_task,
    beta_task,
    POOL: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y and index [T, N, height, width, C], channels innermost: `pixels` windows per task."""
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    channel = (pid % channel_tiles).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    channel_inside = channel < channels
    tile = pid // channel_tiles % pixel_tiles
    task = (pid // channel_tiles // pixel_tiles).to(tl.int64)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    column = (pixel % width).to(tl.int64)
    row = (pixel // width % height).to(tl.int64)
    image = (pixel // width // height).to(tl.int64)
    inside = (pixel < pixels)[:, None] & channel_inside[None, :]
    SUM: tl.constexpr = mean.dtype.element_ty
    average = tl.load(mean + task * channels + channel, channel_inside, other=0.0)
    scale = tl.load(gamma + task * gamma_task + channel, channel_inside, other=0.0).to(SUM)
    scale *= tl.load(rstd + task * channels + channel, channel_inside, other=0.0)
    offset = tl.load(beta + task * beta_task + channel, channel_inside, other=0.0).to(SUM)

    rows = task * z_task + image * z_image + row * POOL * z_row + column * POOL * z_column
    z += rows[:, None] + (channel * z_channel)[None, :]
    best = tl.full((PIXELS, CHANNELS), float("-inf"), SUM)
    place = tl.zeros((PIXELS, CHANNELS), tl.int32)
    for i in tl.static_range(POOL):
        for j in tl.static_range(POOL):
            v = tl.load(z + (i * tl.cast(z_row, tl.int64) + j * tl.cast(z_column, tl.int64)), inside, other=0.0).to(SUM)
            a = (v - average[None, :]) * scale[None, :] + offset[None, :]
            higher = (a > best) | (a != a)
            best = tl.where(higher, a, best)
            place = tl.where(higher, i * POOL + j, place)
    shut = best <= 0
    at = (task * pixels + pixel)[:, None] * channels + channel[None, :]
    tl.store(y + at, tl.where(shut, 0.0, best).to(y.dtype.element_ty), mask=inside)
    tl.store(index + at, tl.where(shut, POOL * POOL, place).to(tl.uint8), mask=inside)


@triton.jit
def gradient_sums(
    gy,
    z,
    index,
    mean,
    rstd,
    partial,
    height,
    width,
    channels,
    pixels,
    chunk,
    splits,
    g_task,
    g_image,
    g_channel,
    g_row,
    g_column,
    z_task,
    z_image,
    z_channel,
    z_row,
    z_column,
    i_task,
    i_image,
    i_channel,
    i_row,
    i_column,
    POOL: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """partial [2, T, splits, C]: the sums for gamma and beta over `chunk` of a task's `pixels` windows."""
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    channel = (pid % channel_tiles).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    channel_inside = channel < channels
    split = pid // channel_tiles % splits
    task = (pid // channel_tiles // splits).to(tl.int64)
    SUM: tl.constexpr = mean.dtype.element_ty
    average = tl.load(mean + task * channels + channel, channel_inside, other=0.0)
    inverse = tl.load(rstd + task * channels + channel, channel_inside, other=0.0)
    for_gamma = tl.zeros((PIXELS, CHANNELS), SUM)
    for_beta = tl.zeros((PIXELS, CHANNELS), SUM)
    last = tl.minimum((split + 1) * chunk, pixels)
    for first in range(split * chunk, last, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        column = (pixel % width).to(tl.int64)
        row = (pixel // width % height).to(tl.int64)
        image = (pixel // width // height).to(tl.int64)
        inside = (pixel < last)[:, None] & channel_inside[None, :]
        i_rows = task * i_task + image * i_image + row * i_row + column * i_column
        place = tl.load(index + (i_rows[:, None] + (channel * i_channel)[None, :]), inside, other=POOL * POOL)
        place = place.to(tl.int32)
        g_rows = task * g_task + image * g_image + row * g_row + column * g_column
        g = tl.load(gy + (g_rows[:, None] + (channel * g_channel)[None, :]), inside, other=0.0).to(SUM)
        opened = inside & (place < POOL * POOL)
        g = tl.where(opened, g, 0.0)
        z_rows = task * z_task + image * z_image + row * POOL * z_row + column * POOL * z_column
        z_at = z_rows[:, None] + (channel * z_channel)[None, :]
        z_at += (place // POOL).to(tl.int64) * z_row + (place % POOL).to(tl.int64) * z_column
        v = tl.load(z + z_at, opened, other=0.0).to(SUM)
        for_gamma += tl.where(opened, g * ((v - average[None, :]) * inverse[None, :]), 0.0)
        for_beta += g
    at = (task * splits + split) * channels + channel
    tasks = tl.num_programs(0) // splits // channel_tiles
    tl.store(partial + at, tl.sum(for_gamma, 0), mask=channel_inside)
    tl.store(partial + tasks.to(tl.int64) * splits * channels + at, tl.sum(for_beta, 0), mask=channel_inside)


@triton.jit
def finish_sums(partial, sums, dgamma, dbeta, tasks, channels, splits, SPLITS: tl.constexpr, CHANNELS: tl.constexpr):
    """sums [2, T, C] of partial [2, T, splits, C], and the same in the type of gamma: dgamma, dbeta [T, C]."""
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    channel = pid % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    channel_inside = channel < channels
    row = (pid // channel_tiles).to(tl.int64)  # of 2 T
    total = tl.zeros((CHANNELS,), partial.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = (row * splits + split)[:, None] * channels + channel[None, :]
        total += tl.sum(tl.load(partial + at, (split < splits)[:, None] & channel_inside[None, :], other=0.0), 0)
    tl.store(sums + row * channels + channel, total, mask=channel_inside)
    if row < tasks:
        tl.store(dgamma + row * channels + channel, total.to(dgamma.dtype.element_ty), mask=channel_inside)
    else:
        tl.store(dbeta + (row - tasks) * channels + channel, total.to(dbeta.dtype.element_ty), mask=channel_inside)


@triton.jit
def dense_gradient(
    gy,
    z,
    gamma,
    index,
    mean,
    rstd,
    sums,
    dz,
    tasks,
    images,
    height,
    width,
    y_height,
    y_width,
    channels,
    windows,
    window_tiles,
    g_task,
    g_image,
    g_channel,
    g_row,
    g_column,
    z_task,
    z_image,
    z_channel,
    z_row,
    z_column,
    gamma_task,
    i_task,
    i_image,
    i_channel,
    i_row,
    i_column,
    POOL: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dz [T, N, H, W, C], channels innermost, window by window; a window at the border may be cut off.

    `windows` of a task, counted with those that are cut off: these took part in the statistics alone.
    """
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    channel = (pid % channel_tiles).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    channel_inside = channel < channels
    tile = pid // channel_tiles % window_tiles
    task = (pid // channel_tiles // window_tiles).to(tl.int64)
    window = tile * PIXELS + tl.arange(0, PIXELS)
    across = tl.cdiv(width, POOL)
    down = tl.cdiv(height, POOL)
    column = (window % across).to(tl.int64)
    row = (window // across % down).to(tl.int64)
    image = (window // across // down).to(tl.int64)
    window_inside = window < windows
    SUM: tl.constexpr = mean.dtype.element_ty
    own = task * channels + channel
    average = tl.load(mean + own, channel_inside, other=0.0)
    inverse = tl.load(rstd + own, channel_inside, other=0.0)
    scale = tl.load(gamma + task * gamma_task + channel, channel_inside, other=0.0).to(SUM) * inverse
    values = tl.cast(images, SUM) * tl.cast(height, SUM) * tl.cast(width, SUM)  # a size of 1 is a constant
    for_gamma = tl.load(sums + own, channel_inside, other=0.0) / values
    for_beta = tl.load(sums + tl.cast(tasks, tl.int64) * channels + own, channel_inside, other=0.0) / values

    pooled = window_inside & (row < y_height) & (column < y_width)
    pooled = pooled[:, None] & channel_inside[None, :]
    i_rows = task * i_task + image * i_image + row * i_row + column * i_column
    place = tl.load(index + (i_rows[:, None] + (channel * i_channel)[None, :]), pooled, other=POOL * POOL).to(tl.int32)
    g_rows = task * g_task + image * g_image + row * g_row + column * g_column
    g = tl.load(gy + (g_rows[:, None] + (channel * g_channel)[None, :]), pooled, other=0.0).to(SUM)
    z_rows = task * z_task + image * z_image
    dz_rows = (task * images + image) * height
    for i in tl.static_range(POOL):
        for j in tl.static_range(POOL):
            h = row * POOL + i
            w = column * POOL + j
            inside = (window_inside & (h < height) & (w < width))[:, None] & channel_inside[None, :]
            z_at = (z_rows + h * z_row + w * z_column)[:, None] + (channel * z_channel)[None, :]
            v = tl.load(z + z_at, inside, other=0.0).to(SUM)
            xhat = (v - average[None, :]) * inverse[None, :]
            own_g = tl.where(place == i * POOL + j, g, 0.0)
            d = scale[None, :] * (own_g - for_beta[None, :] - xhat * for_gamma[None, :])
            at = ((dz_rows + h) * width + w)[:, None] * channels + channel[None, :]
            tl.store(dz + at, d.to(dz.dtype.element_ty), mask=inside)


def conv_block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, spec: ConvSpec, eps: float, pool: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `Reference.conv_block`: the statistics come out of the convolution."""
    tasks = max(t.shape[0] for t in (x, weight, gamma, beta))
    z, partial, pixels = conv2d_moments(x, weight, tasks, spec)
    return z, *_finish(z, partial, pixels, gamma, beta, eps, pool)


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
    tasks, images, channels, height, width = z.shape
    y, index, mean, rstd = pooled_outputs(z, pool)
    launch(
        merge, tasks * blocks(channels, MERGE_CHANNELS), z,
        partial, mean, rstd, channels, images * height * width, partial.shape[1],
        tile, eps, min(MERGE_TILES, max(2, power(partial.shape[1]))), MERGE_CHANNELS,
    )  # fmt: skip
    gamma, beta = gamma.contiguous(), beta.contiguous()
    pixels = images * y.shape[-2] * y.shape[-1]
    if not pixels:
        return y, index, mean, rstd
    abreast = min(power(channels), CHANNELS_ABREAST)
    tiles = blocks(pixels, TILE // abreast)
    launch(
        normalise, tasks * tiles * blocks(channels, abreast), z,
        z, gamma, beta, mean, rstd, y, index, *y.shape[-2:], channels, pixels, tiles,
        *z.stride(), _own(gamma), _own(beta), pool, TILE // abreast, abreast,
    )  # fmt: skip
    return y, index, mean, rstd


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
