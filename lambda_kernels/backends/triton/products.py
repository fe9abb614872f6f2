"""Convolution, its two gradients and the linear layer, as matrix products with a task axis.

A convolution's sum runs over k = (r, s, c), the channel c fastest. Products of float32 are TF32 where torch's switch
for this kind of operation allows it. Else they are as exact as float32: fused multiply-adds, or sums of products of the
operands' parts, which tensor cores take (tests/test_triton_parts.py). Every sum has a fixed order for a tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...spec import ConvSpec, output_size
from .launch import INTERPRETED, LARGEST_COUNT, Tile, Tuner, blocks, bucket, launch
from .outputs import block_output, conv2d_output, input_grad_output, linear_output, weight_grad_output
from .product_kernels import convolve, matrix_product, sum_splits, weight_gradient

# For tensor cores; the first one is taken where nothing can be measured.
MATRIX_TILES: tuple[Tile, ...] = (
    Tile(128, 64, 32, 8, 3),
    Tile(64, 64, 32, 4, 3),
    Tile(128, 128, 32, 8, 3),
    Tile(64, 32, 64, 4, 4),
    Tile(32, 32, 64, 4, 4),
)
# Beside them where a block of the sum is one tap of the kernel: pixels as columns, see _swapped.
TAP_TILES = (
    Tile(128, 64, 32, 4, 3),
    Tile(256, 64, 32, 8, 3),
)
WEIGHT_TILES = (
    Tile(64, 64, 32, 4, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 128, 32, 4, 3),
    Tile(32, 64, 32, 4, 3),
)
# Of float32, whose pixels would have to lie abreast for a tensor core: as sums of products of bfloat16, which need not,
# closer than TF32; read 16 bytes at a time, as no copy runs ahead that would turn them.
PARTED_WEIGHT_TILES = (
    Tile(64, 64, 32, 4, 1),
    Tile(64, 64, 64, 4, 1),
    Tile(64, 128, 32, 4, 1),
)
# For float32 in fused multiply-adds, whose operands lie in registers, and for float64.
SCALAR_TILES = (
    Tile(64, 64, 16, 4, 2),
    Tile(128, 64, 16, 8, 2),
    Tile(32, 64, 16, 4, 2),
    Tile(32, 32, 32, 4, 2),
)
# For float32 by tensor cores where TF32 is off: products of the operands' parts, the sums of blocks added outside.
EXACT_TILES = (
    Tile(64, 64, 32, 4, 3),
    Tile(128, 64, 32, 8, 3),
)
DOUBLE_TILES = (
    Tile(128, 64, 16, 8, 2),
    Tile(32, 32, 32, 4, 2),
)
INTERPRETED_TILES: tuple[Tile, ...] = (Tile(128, 64, 64, 4, 1),)
# Programs among which a weight gradient's pixels are split, and the fewest pixels worth a program.
SPLIT_PROGRAMS = 512
SPLIT_PIXELS = 256
# The same for the terms of a matrix product.
SPLIT_PRODUCTS = 128
SPLIT_TERMS = 256
REDUCE_BLOCK = 512

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


def conv2d_extremes(
    x: Tensor, weight: Tensor, gamma: Tensor, tasks: int, spec: ConvSpec, pool: int
) -> tuple[Tensor, Tensor, int]:
    """As `conv2d_moments`, with each pooling window's extreme alone, channels-last: the largest value, or the least
    where gamma [1|T, O] is negative. Windows have a power of two of places, 16 at most."""
    y = block_output(x, weight, spec, pool, tasks)
    kind = {"transposed": False, "fold": False, "moments": True}
    partial, pixels = _convolve(x, weight, None, y, spec, **kind, pool=pool, gamma=gamma.contiguous())
    return y, partial, pixels


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
    pool: int = 1,
    gamma: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Fill y [T, N, ...], with `pool` > 1 the extremes of its windows by the sign of gamma; with `fold` all tasks are
    one batch. Returns the moments of its tiles and a tile's pixels."""
    tasks, images = y.shape[:2]
    size = y.shape[-2:] if pool == 1 else output_size(a.shape, weight.shape, spec)
    outs, channels = y.shape[2] // spec.groups, a.shape[2] // spec.groups
    kernel = weight.shape[-2:]
    weight = _terms_abreast(weight, 1 if transposed else 2)
    w_task, w_o, w_c, w_row, w_column = _strides(weight)
    w_out, w_in = (w_c, w_o) if transposed else (w_o, w_c)
    w_group = w_o * weight.shape[1] // spec.groups
    batch = tasks * images if fold else images
    pixels = batch * size[0] * size[1]
    _count(pixels, "pixels")
    width = y.shape[2]
    if not y.numel():
        return y.new_empty(0), 1
    bias_strides = _strides(bias) if bias is not None else [0, 0]
    gamma_task = _strides(gamma)[0] if gamma is not None else 0
    precision, widen, total = _arithmetic(a, "conv")
    partial = y.new_empty(0)
    for_cores = (*MATRIX_TILES, *(TAP_TILES if channels % TAP_TILES[0].terms == 0 else ()))
    matrix, exact = dict.fromkeys(for_cores, precision), dict.fromkeys(EXACT_TILES, "tf32x3")
    ways = _ways(a, precision, pixels, outs, channels * kernel[0] * kernel[1], matrix, exact)

    def run(tile: Tile) -> None:
        nonlocal partial
        tiles = blocks(pixels, tile.rows)
        if moments:
            partial = y.new_empty((tasks, tiles, 2, width), dtype=_wide(y.dtype))
        launch(
            convolve,
            (1 if fold else tasks) * spec.groups * tiles * blocks(outs, tile.columns),
            y, a, weight, y if bias is None else bias, y if gamma is None else gamma, y, partial,
            images, *a.shape[-2:], *size, pixels, tiles, outs, spec.groups,
            *_strides(a), w_task, w_group, w_out, w_in, w_row, w_column, *bias_strides, gamma_task, *_strides(y),
            channels, *kernel, *spec.stride, *spec.padding, *spec.dilation,
            transposed, bias is not None, moments, pool, _swapped(tile), ways[tile], widen, total,
            tile.rows, tile.columns, tile.terms,
            **tile.options,
        )  # fmt: skip

    shape = bucket(1 if fold else tasks, pixels, outs)
    constants = (channels, spec.groups, *kernel, *spec.stride, transposed, moments, pool, precision, str(a.dtype))
    tile = CONVOLVE.tile((*shape, *constants), list(ways), y, run)
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
    parted = dict.fromkeys(PARTED_WEIGHT_TILES, "bf16x3")
    matrix = parted if precision == "tf32" else dict.fromkeys(WEIGHT_TILES, precision)
    ways = _ways(x, precision, outs, terms, pixels, matrix, {PARTED_WEIGHT_TILES[0]: "bf16x6"})

    def run(tile: Tile) -> None:
        programs = tasks * spec.groups * blocks(outs, tile.rows) * blocks(terms, tile.columns)
        chunk, splits = _split(pixels, SPLIT_PROGRAMS // programs, SPLIT_PIXELS, tile)
        parts = gw.unsqueeze(0)
        if splits > 1:
            parts = gw.new_empty((splits, tasks, out, *kernel, channels), dtype=_wide(gw.dtype)).movedim(-1, 3)
        launch(
            weight_gradient, programs * splits, x,
            gy, x, parts, images, *x.shape[-2:], *gy.shape[-2:], pixels, chunk, splits, outs, spec.groups,
            *_strides(gy), *_strides(x), *parts.stride(),
            channels, *kernel, *spec.stride, *spec.padding, *spec.dilation,
            ways[tile], widen, total, tile.rows, tile.columns, tile.terms,
            **tile.options,
        )  # fmt: skip
        taps = kernel[0] * kernel[1]
        _sum(parts, gw, *((channels, taps) if gw.is_contiguous() else (1, channels * taps)))

    key = (*bucket(tasks, pixels, outs), channels, spec.groups, *kernel, *spec.stride, precision, str(x.dtype))
    run(WEIGHT_GRADIENT.tile(key, list(ways), gw, run))
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
    # With the columns abreast, copies that run ahead would turn float32 4 bytes at a time.
    turned = x.dtype == torch.float32 and weight.stride(-1) != 1
    tiles = [tile._replace(stages=1) if turned else tile for tile in MATRIX_TILES]
    ways = _ways(x, precision, rows, columns, terms, dict.fromkeys(tiles, precision))

    def run(tile: Tile) -> None:
        programs = tasks * blocks(rows, tile.rows) * blocks(columns, tile.columns)
        chunk, splits = _split(terms, SPLIT_PRODUCTS // programs, SPLIT_TERMS, tile)
        parts = y.unsqueeze(0) if splits == 1 else y.new_empty((splits, *y.shape), dtype=_wide(y.dtype))
        launch(
            matrix_product, programs * splits, y,
            x, weight, y if bias is None else bias, parts, rows, columns, terms, chunk, splits,
            *_strides(x), *_strides(weight), *bias_strides, parts.stride(0),
            bias is not None, ways[tile], widen, total, tile.rows, tile.columns, tile.terms,
            **tile.options,
        )  # fmt: skip
        _sum(parts, y, 1, 1)

    fast = x.stride(-1) == 1, weight.stride(-1) == 1
    key = (*bucket(tasks, rows, columns, terms), *fast, precision, str(x.dtype))
    run(MATRIX_PRODUCT.tile(key, list(ways), y, run))
    return y


def _split(count: int, most: int, fewest: int, tile: Tile) -> tuple[int, int]:
    """How many of a sum's `count` terms each split takes, whole blocks of a tile, and how many splits that makes.

    At most `most` splits, of at least about `fewest` terms each.
    """
    splits = max(1, min(most, count // fewest))
    chunk = blocks(blocks(max(count, 1), splits), tile.terms) * tile.terms
    return chunk, max(1, blocks(count, chunk))


def _sum(parts: Tensor, whole: Tensor, channels: int, taps: int) -> None:
    """Fill `whole` [..., channels, taps] with the sum of the splits of `parts`, unless it is the only one itself."""
    if parts.shape[0] > 1:
        launch(
            sum_splits, blocks(whole.numel(), REDUCE_BLOCK), whole,
            parts, whole, parts.shape[0], whole.numel(), channels, taps, REDUCE_BLOCK,
        )  # fmt: skip


def _ways(
    operand: Tensor,
    precision: str,
    rows: int,
    columns: int,
    terms: int,
    matrix: Mapping[Tile, str] | None = None,
    exact: Mapping[Tile, str] | None = None,
) -> dict[Tile, str]:
    """The tiles to try for a product of this size, those that are the same for it once, and how each one multiplies.

    `matrix`: for tensor cores, all of MATRIX_TILES by default; `exact`: beside the tiles of fused multiply-adds.
    """
    ways: Mapping[Tile, str]
    if INTERPRETED:
        ways = dict.fromkeys(INTERPRETED_TILES, precision)
    elif operand.dtype == torch.float64:
        ways = dict.fromkeys(DOUBLE_TILES, precision)
    elif operand.dtype == torch.float32 and precision == "ieee":
        ways = {**dict.fromkeys(SCALAR_TILES, precision), **(exact or {})}
    else:
        ways = dict.fromkeys(MATRIX_TILES, precision) if matrix is None else matrix
    found: dict[Tile, str] = {}
    for tile, way in ways.items():
        found.setdefault(tile.within(rows, columns, terms), way)
    return found


def _swapped(tile: Tile) -> bool:
    """Has each group of four warps more than the 64 rows of one tensor core instruction, and 64 columns for them?"""
    return tile.rows * 4 > 64 * tile.warps and tile.columns % 64 == 0


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
