# Kernels are not typed: triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernels of the norm, ReLU and max-pool, and of its gradient: see norm.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .product_kernels import tile_moments


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
def merge_block(partial, tile, tiles, channel, channels, pixels, origin, PIXELS: tl.constexpr):
    """count, shift, squares of a block of tiles: the mean from `origin` on [C] and the sum of squares about it."""
    SUM: tl.constexpr = partial.dtype.element_ty
    inside = (tile < tiles)[:, None] & (channel < channels)[None, :]
    at = (tile.to(tl.int64) * 2 * channels)[:, None] + channel[None, :]
    own = tl.where(tile < tiles, tl.minimum(pixels - tile * PIXELS, PIXELS), 0).to(SUM)[:, None]
    d = tl.where(inside, tl.load(partial + at, inside, other=0.0) - origin[None, :], 0.0)
    own_squares = tl.load(partial + at + channels, inside, other=0.0)
    count = tl.sum(own, 0)
    shift = tl.sum(own * d, 0) / count
    d -= shift[None, :]
    return count, shift, tl.sum(own_squares + own * d * d, 0)


@triton.jit
def merge_groups(
    partial,
    groups,
    channels,
    pixels,
    pixel_tiles,
    group_tiles,
    PIXELS: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """groups [T, group_tiles, 2, C]: the moments of TILES tiles of `partial` as those of one."""
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    channel = pid % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    channel_inside = channel < channels
    group = pid // channel_tiles % group_tiles
    task = (pid // channel_tiles // group_tiles).to(tl.int64)
    partial += task * pixel_tiles * 2 * channels
    tile = group * TILES + tl.arange(0, TILES)
    origin = tl.load(partial + group.to(tl.int64) * TILES * 2 * channels + channel, channel_inside, other=0.0)
    _, shift, squares = merge_block(partial, tile, pixel_tiles, channel, channels, pixels, origin, PIXELS)
    at = (task * group_tiles + group) * 2 * channels + channel
    tl.store(groups + at, origin + shift, mask=channel_inside)
    tl.store(groups + at + channels, squares, mask=channel_inside)


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
        block_count, block_shift, block_squares = merge_block(
            partial, tile, pixel_tiles, channel, channels, pixels, origin, PIXELS
        )
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
    PLACES: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y and, with PLACES, index [T, N, height, width, C], channels innermost: `pixels` windows per task."""
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
    if PLACES:
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
