# Kernels are not typed: triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Convolution, its two gradients and the linear layer, as matrix products with a task axis.

A convolution's sum runs over k = (r, s, c), the channel c fastest. Products of float32 are exact, or TF32 where torch's
own switch for this kind of operation allows it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec import ConvSpec
from .launch import INTERPRETED, LARGEST_COUNT, Tile, Tuner, blocks, bucket, launch
from .outputs import conv2d_output, input_grad_output, linear_output, weight_grad_output

# For tensor cores; the first one is taken where nothing can be measured.
MATRIX_TILES: tuple[Tile, ...] = (
    Tile(128, 64, 32, 8, 3),
    Tile(64, 64, 32, 4, 3),
    Tile(128, 64, 64, 8, 3),
    Tile(128, 128, 32, 8, 3),
    Tile(64, 32, 64, 4, 4),
    Tile(32, 32, 64, 4, 4),
)
WEIGHT_TILES = (
    Tile(64, 64, 32, 4, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 128, 32, 4, 3),
    Tile(32, 64, 32, 4, 3),
)
# For float32 in fused multiply-adds, whose operands lie in registers, and for float64.
SCALAR_TILES = (
    Tile(64, 64, 16, 4, 2),
    Tile(128, 64, 16, 8, 2),
    Tile(32, 64, 16, 4, 2),
    Tile(32, 32, 32, 4, 2),
)
DOUBLE_TILES = (
    Tile(128, 64, 16, 8, 2),
    Tile(32, 32, 32, 4, 2),
)
INTERPRETED_TILES: tuple[Tile, ...] = (Tile(128, 64, 64, 4, 1),)
# Programs among which a weight gradient's pixels are split, and the fewest pixels worth a program.
SPLIT_PROGRAMS = 512
SPLIT_PIXELS = 256
REDUCE_BLOCK = 512


@triton.jit
def tile_moments(v, inside, count, ROWS: tl.constexpr):
    """origin, shift, squares: the mean of v [ROWS, C] down its `count` rows as origin + shift, the squares about it.

    The origin is the first row, of float32 in 8 bits: differences from it are exact, and sums of up to 256 equal ones.
    """
    first = tl.sum(tl.where((tl.arange(0, ROWS) == 0)[:, None], v, 0.0), 0)
    origin = first if v.dtype == tl.float64 else first.to(tl.bfloat16).to(tl.float32)
    d = tl.where(inside, v - origin[None, :], 0.0)
    total = tl.sum(d, 0)
    shift = total / count if v.dtype == tl.float64 else tl.div_rn(total, tl.zeros_like(total) + count)
    d = tl.where(inside, d - shift[None, :], 0.0)
    return origin, shift, tl.sum(d * d, 0)


@triton.jit
def convolve(
    a,
    weight,
    bias,
    y,
    partial,
    images,
    a_height,
    a_width,
    y_height,
    y_width,
    pixels,
    pixel_tiles,
    outs,
    groups,
    a_task,
    a_image,
    a_channel,
    a_row,
    a_column,
    w_task,
    w_group,
    w_out,
    w_in,
    w_row,
    w_column,
    bias_task,
    bias_out,
    y_task,
    y_image,
    y_channel,
    y_row,
    y_column,
    CHANNELS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIASED: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """y = convolution(a, weight) + bias; TRANSPOSED: the gradient of a convolution's input, where a is that of y.

    One program makes ROWS pixels x COLUMNS channels of one group. `pixels` counts those that share a weight, over the
    images of one task or of all. MOMENTS: partial [T, pixel_tiles, 2, groups outs] gets the tile's mean of y and the
    sum of squares about it.
    """
    pid = tl.program_id(0)
    out_tiles = tl.cdiv(outs, COLUMNS)
    out_tile = pid % out_tiles
    tile = pid // out_tiles % pixel_tiles
    group = pid // out_tiles // pixel_tiles % groups
    task = (pid // out_tiles // pixel_tiles // groups).to(tl.int64)

    pixel = tile * ROWS + tl.arange(0, ROWS)
    row_inside = pixel < pixels
    column = pixel % y_width
    row = pixel // y_width % y_height
    image = pixel // y_width // y_height
    own_task = task + image // images
    image = (image % images).to(tl.int64)
    out = out_tile * COLUMNS + tl.arange(0, COLUMNS)
    out_inside = out < outs

    if TRANSPOSED:
        h0 = row + PH
        w0 = column + PW
    else:
        h0 = row * SH - PH
        w0 = column * SW - PW
    DOWN: tl.constexpr = -DH if TRANSPOSED else DH
    RIGHT: tl.constexpr = -DW if TRANSPOSED else DW
    SPREAD: tl.constexpr = TRANSPOSED and (SH > 1 or SW > 1)
    a_base = own_task * a_task + image * a_image
    if not SPREAD:
        a_base += h0.to(tl.int64) * a_row + w0.to(tl.int64) * a_column
    a_first = (group * CHANNELS).to(tl.int64) * a_channel
    w_base = task * w_task + group.to(tl.int64) * w_group + out.to(tl.int64) * w_out

    acc = tl.zeros((ROWS, COLUMNS), SUM)
    for k0 in range(0, CHANNELS * KH * KW, TERMS):
        if CHANNELS % TERMS == 0:  # one tap of the kernel per block: the image's border is a matter of rows alone
            tap = k0 // CHANNELS
            r = tap // KW
            s = tap - r * KW
            channel = (k0 - tap * CHANNELS + tl.arange(0, TERMS)).to(tl.int64)
            h = h0 + r * DOWN
            w = w0 + s * RIGHT
            inside = row_inside
            if SPREAD:
                inside &= (h % SH == 0) & (w % SW == 0)
                h = h // SH
                w = w // SW
                a_rows = a_base + h.to(tl.int64) * a_row + w.to(tl.int64) * a_column
            else:
                a_rows = a_base + tl.cast(r * DOWN, tl.int64) * a_row + tl.cast(s * RIGHT, tl.int64) * a_column
            inside &= (h >= 0) & (h < a_height) & (w >= 0) & (w < a_width)
            a_tile = tl.load(
                a + (a_rows[:, None] + (a_first + channel * a_channel)[None, :]), inside[:, None], other=0.0
            )
            w_terms = channel * w_in + tl.cast(r, tl.int64) * w_row + tl.cast(s, tl.int64) * w_column
            w_tile = tl.load(weight + (w_terms[:, None] + w_base[None, :]), out_inside[None, :], other=0.0)
        else:
            k = k0 + tl.arange(0, TERMS)
            tap = k // CHANNELS
            r = tap // KW
            s = tap - r * KW
            channel = (k - tap * CHANNELS).to(tl.int64)
            term_inside = k < CHANNELS * KH * KW
            h = h0[:, None] + (r * DOWN)[None, :]
            w = w0[:, None] + (s * RIGHT)[None, :]
            inside = row_inside[:, None] & term_inside[None, :]
            a_terms = a_first + channel * a_channel
            if SPREAD:
                inside &= (h % SH == 0) & (w % SW == 0)
                h = h // SH
                w = w // SW
                a_at = a_base[:, None] + a_terms[None, :] + h.to(tl.int64) * a_row + w.to(tl.int64) * a_column
            else:
                a_terms += (r * DOWN).to(tl.int64) * a_row + (s * RIGHT).to(tl.int64) * a_column
                a_at = a_base[:, None] + a_terms[None, :]
            inside &= (h >= 0) & (h < a_height) & (w >= 0) & (w < a_width)
            a_tile = tl.load(a + a_at, inside, other=0.0)
            w_terms = channel * w_in + r.to(tl.int64) * w_row + s.to(tl.int64) * w_column
            w_tile = tl.load(
                weight + (w_terms[:, None] + w_base[None, :]), term_inside[:, None] & out_inside[None, :], other=0.0
            )
        if WIDEN:
            a_tile = a_tile.to(SUM)
            w_tile = w_tile.to(SUM)
        acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION, out_dtype=SUM)

    to = group.to(tl.int64) * outs + out
    if BIASED:
        acc += tl.load(bias + task * bias_task + to * bias_out, out_inside, other=0.0).to(SUM)[None, :]
    z = acc.to(y.dtype.element_ty)
    y_rows = own_task * y_task + image * y_image + row.to(tl.int64) * y_row + column.to(tl.int64) * y_column
    tl.store(y + (y_rows[:, None] + (to * y_channel)[None, :]), z, mask=row_inside[:, None] & out_inside[None, :])
    if MOMENTS:
        # Of the values as stored.
        count = tl.minimum(pixels - tile * ROWS, ROWS).to(SUM)
        origin, shift, squares = tile_moments(z.to(SUM), row_inside[:, None], count, ROWS)
        at = (task * pixel_tiles + tile) * 2 * groups * outs + to
        tl.store(partial + at, origin + shift, mask=out_inside)
        tl.store(partial + at + groups * outs, squares, mask=out_inside)


@triton.jit
def weight_gradient(
    gy,
    x,
    gw,
    images,
    height,
    width,
    y_height,
    y_width,
    pixels,
    chunk,
    splits,
    outs,
    groups,
    g_task,
    g_image,
    g_channel,
    g_row,
    g_column,
    x_task,
    x_image,
    x_channel,
    x_row,
    x_column,
    gw_split,
    gw_task,
    gw_out,
    gw_in,
    gw_row,
    gw_column,
    CHANNELS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """gw [splits, T, O, C / groups, kh, kw]: each split's share of the pixels of the weight gradient.

    One program makes ROWS output channels x COLUMNS of k from `chunk` of the `pixels` that share a weight.
    """
    pid = tl.program_id(0)
    out_tiles = tl.cdiv(outs, ROWS)
    k_tiles = tl.cdiv(CHANNELS * KH * KW, COLUMNS)
    out_tile = pid % out_tiles
    pid = pid // out_tiles
    k_tile = pid % k_tiles
    pid = pid // k_tiles
    split = pid % splits
    group = pid // splits % groups
    task = (pid // splits // groups).to(tl.int64)

    out = out_tile * ROWS + tl.arange(0, ROWS)
    out_inside = out < outs
    to = group.to(tl.int64) * outs + out
    k = k_tile * COLUMNS + tl.arange(0, COLUMNS)
    k_inside = k < CHANNELS * KH * KW
    tap = k // CHANNELS
    channel = (k - tap * CHANNELS).to(tl.int64)
    if CHANNELS % COLUMNS == 0:  # one tap of the kernel per program: the image's border is a matter of rows alone
        tap = k_tile * COLUMNS // CHANNELS
    r = tap // KW
    s = tap - r * KW
    down = r * DH - PH
    right = s * DW - PW
    g_columns = to * g_channel
    x_columns = (group * CHANNELS + channel) * x_channel + down.to(tl.int64) * x_row + right.to(tl.int64) * x_column

    first = split * chunk
    last = tl.minimum(first + chunk, pixels)
    acc = tl.zeros((ROWS, COLUMNS), SUM)
    for p0 in range(first, last, TERMS):
        pixel = p0 + tl.arange(0, TERMS)
        pixel_inside = pixel < last
        column = pixel % y_width
        row = pixel // y_width % y_height
        image = pixel // y_width // y_height
        own_task = task + image // images
        image = (image % images).to(tl.int64)
        g_rows = own_task * g_task + image * g_image + row.to(tl.int64) * g_row + column.to(tl.int64) * g_column
        g_tile = tl.load(
            gy + (g_rows[:, None] + g_columns[None, :]), pixel_inside[:, None] & out_inside[None, :], other=0.0
        )
        x_rows = own_task * x_task + image * x_image
        x_rows += (row * SH).to(tl.int64) * x_row + (column * SW).to(tl.int64) * x_column
        if CHANNELS % COLUMNS == 0:
            h = row * SH + down
            w = column * SW + right
            inside = (pixel_inside & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        else:
            h = (row * SH)[:, None] + down[None, :]
            w = (column * SW)[:, None] + right[None, :]
            inside = pixel_inside[:, None] & k_inside[None, :] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        x_tile = tl.load(x + (x_rows[:, None] + x_columns[None, :]), inside, other=0.0)
        if WIDEN:
            g_tile = g_tile.to(SUM)
            x_tile = x_tile.to(SUM)
        acc = tl.dot(tl.trans(g_tile), x_tile, acc, input_precision=PRECISION, out_dtype=SUM)

    gw_columns = channel * gw_in + r.to(tl.int64) * gw_row + s.to(tl.int64) * gw_column
    gw += split.to(tl.int64) * gw_split + task * gw_task
    tl.store(
        gw + ((to * gw_out)[:, None] + gw_columns[None, :]),
        acc.to(gw.dtype.element_ty),
        mask=out_inside[:, None] & k_inside[None, :],
    )


@triton.jit
def sum_splits(partial, gw, splits, size, CHANNELS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """gw [T O, CHANNELS, TAPS] = the sum of partial [splits, T O, TAPS, CHANNELS], always in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), partial.dtype.element_ty)
    for split in range(0, splits):
        acc += tl.load(partial + tl.cast(split, tl.int64) * size + at, at < size, other=0.0)
    channel = at % CHANNELS
    tap = at // CHANNELS % TAPS
    to = at // CHANNELS // TAPS
    tl.store(gw + (to * CHANNELS + channel) * TAPS + tap, acc.to(gw.dtype.element_ty), mask=at < size)


@triton.jit
def matrix_product(
    x,
    weight,
    bias,
    y,
    rows,
    columns,
    terms,
    x_task,
    x_row,
    x_term,
    w_task,
    w_column,
    w_term,
    bias_task,
    bias_column,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """y [T, rows, columns] = x weight^T + bias, each task's own; y is contiguous."""
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    column = pid // row_tiles % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    task = (pid // row_tiles // column_tiles).to(tl.int64)
    row_inside = row < rows
    column_inside = column < columns
    x_rows = task * x_task + row.to(tl.int64) * x_row
    w_columns = task * w_task + column.to(tl.int64) * w_column
    acc = tl.zeros((ROWS, COLUMNS), SUM)
    for k0 in range(0, terms, TERMS):
        k = k0 + tl.arange(0, TERMS)
        inside = k < terms
        k = k.to(tl.int64)
        x_tile = tl.load(
            x + (x_rows[:, None] + (k * x_term)[None, :]), row_inside[:, None] & inside[None, :], other=0.0
        )
        w_tile = tl.load(
            weight + ((k * w_term)[:, None] + w_columns[None, :]), inside[:, None] & column_inside[None, :], other=0.0
        )
        if WIDEN:
            x_tile = x_tile.to(SUM)
            w_tile = w_tile.to(SUM)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=SUM)
    if BIASED:
        acc += tl.load(bias + task * bias_task + column * bias_column, column_inside, other=0.0).to(SUM)[None, :]
    at = (task * rows + row)[:, None] * columns + column[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


CONVOLVE, WEIGHT_GRADIENT, MATRIX_PRODUCT = Tuner(convolve), Tuner(weight_gradient), Tuner(matrix_product)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """As `Reference.conv2d`."""
    y = conv2d_output(x, weight, bias, spec)
    shared = weight.shape[0] == 1 and (bias is None or bias.shape[0] == 1)
    _convolve(x, weight, bias, y, spec, transposed=False, fold=shared)
    return y


def conv2d_moments(x: Tensor, weight: Tensor, tasks: int, spec: ConvSpec) -> tuple[Tensor, Tensor, int]:
    """z [tasks, N, O, H', W'] of a convolution, with each tile's moments [tasks, tiles, 2, O] and its pixels."""
    z = conv2d_output(x, weight, None, spec, tasks)
    partial, pixels = _convolve(x, weight, None, z, spec, transposed=False, fold=False, moments=True)
    return z, partial, pixels


def conv2d_input_grad(gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec) -> Tensor:
    """As `Reference.conv2d_input_grad`."""
    gx = input_grad_output(gy, weight, x_shape)
    tasks = max(gy.shape[0], weight.shape[0])
    if gx.shape[0] == tasks:
        _convolve(gy, weight, None, gx, spec, transposed=True, fold=weight.shape[0] == 1)
    elif weight.shape[0] == 1:  # linear in gy: the tasks' sum needs one convolution
        _convolve(gy.sum(0, keepdim=True), weight, None, gx, spec, transposed=True, fold=False)
    else:
        each = input_grad_output(gy, weight, torch.Size((tasks, *x_shape[1:])))
        _convolve(gy, weight, None, each, spec, transposed=True, fold=False)
        torch.sum(each, 0, keepdim=True, out=gx)
    return gx


def _convolve(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    spec: ConvSpec,
    *,
    transposed: bool,
    fold: bool,
    moments: bool = False,
) -> tuple[Tensor, int]:
    """Fill y [T, N, ...]; with `fold` all tasks are one batch. Returns the moments of its tiles and a tile's pixels."""
    tasks, images = y.shape[:2]
    outs, channels = y.shape[2] // spec.groups, a.shape[2] // spec.groups
    kernel = weight.shape[-2:]
    weight = _terms_abreast(weight, 1 if transposed else 2)
    w_task, w_o, w_c, w_row, w_column = _strides(weight)
    w_out, w_in = (w_c, w_o) if transposed else (w_o, w_c)
    w_group = w_o * weight.shape[1] // spec.groups
    batch = tasks * images if fold else images
    pixels = batch * y.shape[-2] * y.shape[-1]
    _count(pixels, "pixels")
    width = y.shape[2]
    if not y.numel():
        return y.new_empty(0), 1
    bias_strides = _strides(bias) if bias is not None else [0, 0]
    precision, widen, total = _arithmetic(a, "conv")
    partial = y.new_empty(0)

    def run(tile: Tile) -> None:
        nonlocal partial
        tiles = blocks(pixels, tile.rows)
        if moments:
            partial = y.new_empty((tasks, tiles, 2, width), dtype=_wide(y.dtype))
        launch(
            convolve,
            (1 if fold else tasks) * spec.groups * tiles * blocks(outs, tile.columns),
            y, a, weight, y if bias is None else bias, y, partial,
            images, *a.shape[-2:], *y.shape[-2:], pixels, tiles, outs, spec.groups,
            *_strides(a), w_task, w_group, w_out, w_in, w_row, w_column, *bias_strides, *_strides(y),
            channels, *kernel, *spec.stride, *spec.padding, *spec.dilation,
            transposed, bias is not None, moments, precision, widen, total, tile.rows, tile.columns, tile.terms,
            **tile.options,
        )  # fmt: skip

    shape = bucket(1 if fold else tasks, pixels, outs)
    constants = (channels, spec.groups, *kernel, *spec.stride, transposed, moments, precision, str(a.dtype))
    tiles = _tiles(a, precision, pixels, outs, channels * kernel[0] * kernel[1])
    tile = CONVOLVE.tile((*shape, *constants), tiles, y, run)
    run(tile)
    return partial, tile.rows


def conv2d_weight_grad(gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: ConvSpec) -> Tensor:
    """As `Reference.conv2d_weight_grad`."""
    gw = weight_grad_output(gy, x, weight_shape)
    tasks = gw.shape[0]
    shared = max(gy.shape[0], x.shape[0]) if tasks == 1 else 1  # tasks whose sum one weight gets
    images = x.shape[1]
    _, out, channels, *kernel = weight_shape
    outs, terms = out // spec.groups, channels * kernel[0] * kernel[1]
    pixels = shared * images * gy.shape[-2] * gy.shape[-1]
    _count(pixels, "pixels")
    if not pixels or not gw.numel():
        return gw.zero_()
    precision, widen, total = _arithmetic(x, "conv")
    programs = tasks * spec.groups * blocks(outs, 64) * blocks(terms, 64)
    splits = max(1, min(SPLIT_PROGRAMS // programs, pixels // SPLIT_PIXELS))
    chunk = blocks(blocks(pixels, splits), 64) * 64
    splits = blocks(pixels, chunk)
    parts = gw.unsqueeze(0)
    if splits > 1:
        parts = gw.new_empty((splits, tasks, out, *kernel, channels), dtype=_wide(gw.dtype)).movedim(-1, 3)

    def run(tile: Tile) -> None:
        launch(
            weight_gradient,
            tasks * spec.groups * splits * blocks(outs, tile.rows) * blocks(terms, tile.columns),
            x, gy, x, parts, images, *x.shape[-2:], *gy.shape[-2:], pixels, chunk, splits, outs, spec.groups,
            *_strides(gy), *_strides(x), *parts.stride(),
            channels, *kernel, *spec.stride, *spec.padding, *spec.dilation,
            precision, widen, total, tile.rows, tile.columns, tile.terms,
            **tile.options,
        )  # fmt: skip

    key = (*bucket(tasks, pixels, outs), channels, spec.groups, *kernel, *spec.stride, precision, str(x.dtype))
    run(WEIGHT_GRADIENT.tile(key, _tiles(x, precision, outs, terms, pixels, WEIGHT_TILES), gw, run))
    if splits > 1:
        launch(
            sum_splits,
            blocks(gw.numel(), REDUCE_BLOCK),
            gw,
            parts,
            gw,
            splits,
            gw.numel(),
            channels,
            kernel[0] * kernel[1],
            REDUCE_BLOCK,
        )
    return gw


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `Reference.linear`."""
    y = linear_output(x, weight, bias)
    rows, columns, terms = x.shape[1], weight.shape[1], x.shape[2]
    if weight.shape[0] == 1 and (bias is None or bias.shape[0] == 1):
        x = x.flatten(0, 1).unsqueeze(0)
        rows = x.shape[1]
    tasks = y.shape[0] * y.shape[1] // max(rows, 1)
    _count(max(rows, columns, terms), "rows, columns or terms")
    if not y.numel():
        return y
    bias_strides = _strides(bias) if bias is not None else [0, 0]
    precision, widen, total = _arithmetic(x, "matmul")

    def run(tile: Tile) -> None:
        launch(
            matrix_product,
            tasks * blocks(rows, tile.rows) * blocks(columns, tile.columns),
            y, x, weight, y if bias is None else bias, y, rows, columns, terms,
            *_strides(x), *_strides(weight), *bias_strides,
            bias is not None, precision, widen, total, tile.rows, tile.columns, tile.terms,
            **tile.options,
        )  # fmt: skip

    fast = x.stride(-1) == 1, weight.stride(-1) == 1
    key = (*bucket(tasks, rows, columns, terms), *fast, precision, str(x.dtype))
    run(MATRIX_PRODUCT.tile(key, _tiles(x, precision, rows, columns, terms), y, run))
    return y


def _tiles(
    operand: Tensor, precision: str, rows: int, columns: int, terms: int, matrix: tuple[Tile, ...] = MATRIX_TILES
) -> list[Tile]:
    """The tiles to try for a product of this size, those that are the same for it once."""
    if INTERPRETED:
        tiles = INTERPRETED_TILES
    elif operand.dtype == torch.float64:
        tiles = DOUBLE_TILES
    else:
        tiles = SCALAR_TILES if operand.dtype == torch.float32 and precision == "ieee" else matrix
    return list(dict.fromkeys(tile.within(rows, columns, terms) for tile in tiles))


def _arithmetic(operand: Tensor, kind: str) -> tuple[str, bool, Any]:
    """The precision of float32 products, whether operands are widened first, and the type of the sums."""
    allowed = operand.is_cuda and operand.dtype == torch.float32
    backends: Any = torch.backends
    switch = backends.cudnn.conv if kind == "conv" else backends.cuda.matmul
    precision = "tf32" if allowed and switch.fp32_precision == "tf32" else "ieee"
    # The interpreter holds bfloat16 as integers and cannot multiply it.
    widen = INTERPRETED and operand.dtype == torch.bfloat16
    return precision, widen, tl.float64 if operand.dtype == torch.float64 else tl.float32


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _strides(t: Tensor) -> list[int]:
    """Strides in elements; a shared operand's task stride is 0."""
    return [0 if t.shape[0] == 1 else t.stride(0), *t.stride()[1:]]


def _terms_abreast(weight: Tensor, axis: int) -> Tensor:
    """weight [1|T, O, C, kh, kw] with O (axis 1) or C (2) side by side in memory, where neither is and it pays."""
    small = weight.shape[axis] < 8 or weight.shape[-1] * weight.shape[-2] == 1
    if small or weight.stride(1) == 1 or weight.stride(2) == 1:
        return weight
    return weight.movedim(axis, -1).contiguous().movedim(-1, axis)


def _count(count: int, what: str) -> None:
    if count > LARGEST_COUNT:
        raise ValueError(f"triton: {count} {what} are more than its kernels count; split the batch")
