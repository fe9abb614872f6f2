# Kernels are not typed: triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernels of convolution, its two gradients and the linear layer: see products.py."""

from __future__ import annotations

import triton
import triton.language as tl


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
def place_of(at, height, width):
    """image, row and column of places counted in the order of memory, over the images."""
    return at // width // height, at // width % height, at % width


@triton.jit
def window_place(pixel, images, height, width, POOL: tl.constexpr):
    """image, row and column of pixels counted window by window, over the images; what no window holds comes last."""
    PLACES: tl.constexpr = POOL * POOL
    whole_height = height // POOL * POOL
    whole_width = width // POOL * POOL
    place = pixel % PLACES
    image, row, column = place_of(pixel // PLACES, height // POOL, width // POOL)
    row = row * POOL + place // POOL
    column = column * POOL + place % POOL
    below = (height - whole_height) * width
    rest = below + whole_height * (width - whole_width)  # of an image
    if rest > 0:
        after = pixel - images * whole_height * whole_width
        left = after % rest
        beside = tl.maximum(width - whole_width, 1)
        low = left < below
        rest_row = tl.where(low, whole_height + left // width, (left - below) // beside)
        rest_column = tl.where(low, left % width, whole_width + (left - below) % beside)
        column = tl.where(after < 0, column, rest_column)
        row = tl.where(after < 0, row, rest_row)
        image = tl.where(after < 0, image, after // rest)
    return image, row, column


@triton.jit
def convolve(
    a,
    weight,
    bias,
    gamma,
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
    gamma_task,
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
    POOL: tl.constexpr,
    SWAPPED: tl.constexpr,
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
    sum of squares about it. POOL > 1: y [.., y_height / POOL, y_width / POOL] gets each window's extreme alone, the
    least value where gamma [T, groups outs] is negative, so that of a norm's results it is the largest; the moments are
    those of all pixels. SWAPPED: the pixels are the product's columns, of which a tensor core takes up to 256 at a
    time, and only 64 rows.
    """
    pid = tl.program_id(0)
    out_tiles = tl.cdiv(outs, COLUMNS)
    out_tile = pid % out_tiles
    tile = pid // out_tiles % pixel_tiles
    group = pid // out_tiles // pixel_tiles % groups
    task = (pid // out_tiles // pixel_tiles // groups).to(tl.int64)

    pixel = tile * ROWS + tl.arange(0, ROWS)
    row_inside = pixel < pixels
    if POOL == 1:
        image, row, column = place_of(pixel, y_height, y_width)
    else:
        image, row, column = window_place(pixel, images, y_height, y_width, POOL)
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

    acc = tl.zeros((COLUMNS, ROWS) if SWAPPED else (ROWS, COLUMNS), SUM)
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
        if SWAPPED:
            acc = tl.dot(tl.trans(w_tile), tl.trans(a_tile), acc, input_precision=PRECISION, out_dtype=SUM)
        else:
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION, out_dtype=SUM)
    if SWAPPED:
        acc = tl.trans(acc)

    to = group.to(tl.int64) * outs + out
    if BIASED:
        acc += tl.load(bias + task * bias_task + to * bias_out, out_inside, other=0.0).to(SUM)[None, :]
    z = acc.to(y.dtype.element_ty)
    if POOL == 1:
        y_rows = own_task * y_task + image * y_image + row.to(tl.int64) * y_row + column.to(tl.int64) * y_column
        tl.store(y + (y_rows[:, None] + (to * y_channel)[None, :]), z, mask=row_inside[:, None] & out_inside[None, :])
    else:
        WINDOWS: tl.constexpr = ROWS // (POOL * POOL)
        falls = tl.load(gamma + task * gamma_task + to, out_inside, other=0.0) < 0
        best = tl.where(falls[None, :], -z.to(SUM), z.to(SUM))
        best = tl.max(tl.reshape(best, (WINDOWS, POOL * POOL, COLUMNS)), 1)
        best = tl.where(falls[None, :], -best, best).to(y.dtype.element_ty)
        window = tile * WINDOWS + tl.arange(0, WINDOWS)
        image, row, column = place_of(window, y_height // POOL, y_width // POOL)
        y_rows = task * y_task + image.to(tl.int64) * y_image
        y_rows += row.to(tl.int64) * y_row + column.to(tl.int64) * y_column
        at = y_rows[:, None] + (to * y_channel)[None, :]
        tl.store(y + at, best, mask=(image < images)[:, None] & out_inside[None, :])
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
    channel = (k % CHANNELS).to(tl.int64)
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
        image, row, column = place_of(pixel, y_height, y_width)
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
    chunk,
    splits,
    x_task,
    x_row,
    x_term,
    w_task,
    w_column,
    w_term,
    bias_task,
    bias_column,
    y_split,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """y [splits, T, rows, columns]: each split's share, of `chunk` terms, of x weight^T + bias, each task's own.

    y is contiguous in a split; the first one has the bias.
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    row = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    pid = pid // row_tiles
    column = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    pid = pid // column_tiles
    split = pid % splits
    task = (pid // splits).to(tl.int64)
    first = split * chunk
    last = tl.minimum(first + chunk, terms)
    row_inside = row < rows
    column_inside = column < columns
    x_rows = task * x_task + row.to(tl.int64) * x_row
    w_columns = task * w_task + column.to(tl.int64) * w_column
    acc = tl.zeros((ROWS, COLUMNS), SUM)
    for k0 in range(first, last, TERMS):
        k = k0 + tl.arange(0, TERMS)
        inside = k < last
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
        if split == 0:
            acc += tl.load(bias + task * bias_task + column * bias_column, column_inside, other=0.0).to(SUM)[None, :]
    at = (task * rows + row)[:, None] * columns + column[None, :]
    tl.store(
        y + split.to(tl.int64) * y_split + at,
        acc.to(y.dtype.element_ty),
        mask=row_inside[:, None] & column_inside[None, :],
    )
