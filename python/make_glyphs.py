"""Draws the glyph set that lambda_maml ships: python python/make_glyphs.py writes lambda_maml/data/glyphs.npz.xz.

A class is a character; its 20 images are drawn in the faces of matplotlib's package that have it (DejaVu Sans, Mono and
Serif, STIX, Computer Modern; upright, bold, oblique), each under a small rotation, scale, shear, bend, shift and change
of stroke. Outlines that coincide in some face (Latin A, Greek Alpha, Cyrillic A) or almost coincide (a letter and the
same letter with a small mark) belong to one class at most.

All arithmetic from outline to pixel is on integers, and random numbers are raw PCG64 words, so the images are the same
on every machine; `glyphs.DIGEST` is their SHA-256 for the fonts named by `FONTS_DIGEST`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import lzma
import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lambda_maml.data.glyphs import BLOCKS, DIGEST, FILE, IMAGES, SIZE, digest

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

SEED = 1
FONTS_DIGEST = "a74cae936ec06b6246f2157e0288120ce27054a2ea8bdb0bdd636e7c66a4185f"

# Faces in which a character may be drawn; all with the repertoire of `BLOCKS` except Computer Modern.
FACES = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneral",
    "DejaVuSans-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSansMono-Bold",
    "STIXGeneralBol",
    "DejaVuSerif-Italic",
    "cmr10",
    "cmss10",
    "cmtt10",
)
_SUB = 4  # samples per pixel and axis
_GRID = SIZE * _SUB  # samples per image side
_UNIT = 256  # fixed-point steps a sample
_HALF = 1 << 13  # half the longer side of a normalised outline
_ONE = 1 << 12  # 1.0 in the matrices and bends
_STEPS = 4  # line segments a quadratic curve
_ALIKE = 0.82  # correlation of two 14x14 bitmaps above which two characters count as one


class Outlines(NamedTuple):
    """Closed outlines as line segments. Outline `k` owns `edges[starts[k]:starts[k + 1]]`."""

    edges: NDArray[np.int64]  # [E, 4]: x0, y0, x1, y1, y downwards, box centred on 0, longer half side `_HALF`
    starts: NDArray[np.int64]  # [n + 1]


def candidates() -> list[int]:
    """Code points of `BLOCKS` that are letters, digits, marks of punctuation or symbols without a decomposition.

    A character with a Unicode decomposition is another one with an accent, or a variant of it (superscript, bold).
    """
    points = (c for _, first, last in BLOCKS for c in range(first, last + 1))
    return [c for c in points if unicodedata.category(chr(c))[0] in "LNSP" and not unicodedata.decomposition(chr(c))]


def font_file(face: str) -> Path:
    """The TrueType file of a face in matplotlib's package.

    Raises FileNotFoundError when the package lacks it.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(f"glyphs: no font file {path}: install matplotlib with its own fonts")
    return path


def read_outlines(font: TTFont, codes: list[int]) -> Outlines:
    """The outlines of `codes` in one font, curves cut into segments, scaled so that the longer side fills the box."""
    glyf, names = font["glyf"], font.getBestCmap()
    points: list[tuple[float, float]] = []
    on_curve: list[int] = []
    next_point: list[int] = []
    per_glyph: list[int] = []
    total = 0
    for code in codes:
        coordinates, ends, flags = glyf[names[code]].getCoordinates(glyf)
        points.extend(coordinates)
        on_curve.extend(flags)
        first = 0
        for end in ends:
            next_point.extend(range(total + first + 1, total + end + 1))
            next_point.append(total + first)
            first = end + 1
        total += len(coordinates)
        per_glyph.append(len(coordinates))

    at = 2 * np.rint(np.array(points, dtype=np.float64)).astype(np.int64)  # doubled: midpoints are whole
    at[:, 1] *= -1
    on = (np.array(on_curve) & 1).astype(bool)
    after = np.array(next_point, dtype=np.int64)
    before = np.empty_like(after)
    before[after] = np.arange(len(after))
    # Between two off-curve points the curve passes through their midpoint.
    start = np.where(on[before][:, None], at[before], (at[before] + at) // 2)
    stop = np.where(on[after][:, None], at[after], (at[after] + at) // 2)
    glyph = np.repeat(np.arange(len(codes)), per_glyph)
    k = np.arange(_STEPS + 1)[:, None, None]
    off = ~on
    curves = (_STEPS - k) ** 2 * start[off] + 2 * k * (_STEPS - k) * at[off] + k**2 * stop[off]
    line = on & on[after]
    lines = np.concatenate([at[line], at[after[line]]], axis=1) * _STEPS**2
    pieces = np.concatenate([curves[:-1], curves[1:]], axis=2).reshape(-1, 4)
    edges = np.concatenate([lines, pieces])
    owner = np.concatenate([glyph[line], np.tile(glyph[off], _STEPS)])
    order = np.argsort(owner, kind="stable")
    edges, owner = edges[order], owner[order]
    starts = np.searchsorted(owner, np.arange(len(codes) + 1))

    ends = edges.reshape(-1, 2, 2)
    low = np.minimum.reduceat(ends.min(1), starts[:-1])
    high = np.maximum.reduceat(ends.max(1), starts[:-1])
    longest = np.maximum((high - low).max(1), 1)[owner]
    centred = 2 * ends - (low + high)[owner][:, None]
    return Outlines((centred * _HALF // longest[:, None, None]).reshape(-1, 4), starts)


def rasterise(
    outlines: Outlines,
    which: NDArray[np.int64],
    matrix: NDArray[np.int64],
    bend: NDArray[np.int64],
    shift: NDArray[np.int64],
    stroke: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """Fill outlines by the nonzero rule: [n, 28, 28], each pixel the number of its 16 samples inside the outline.

    which [n]: the outline of each image; matrix [n, 2, 2] and bend [n, 2]: multiples of 1 / `_ONE`; shift [n, 2]: from
    the image's centre, as a share of the room that is left or of two pixels, in 1 / `_ONE`; stroke [n]: samples by
    which the strokes grow (1, 2) or shrink (-1, unless more than a third of the ink would go).
    """
    count = len(which)
    lengths = outlines.starts[which + 1] - outlines.starts[which]
    image = np.repeat(np.arange(count), lengths)
    first = np.cumsum(lengths) - lengths
    ends = outlines.edges[np.arange(len(image)) + (outlines.starts[which] - first)[image]].reshape(-1, 2, 2)
    x, y = ends[..., 0], ends[..., 1]  # [E, 2]: both ends
    bent_x = x + ((y * y >> 13) * bend[image, None, 0] >> 12)
    bent_y = y + ((x * x >> 13) * bend[image, None, 1] >> 12)
    m = matrix[image][:, None]
    placed = np.stack([m[..., 0, 0] * bent_x + m[..., 0, 1] * bent_y, m[..., 1, 0] * bent_x + m[..., 1, 1] * bent_y], 2)
    placed >>= 12  # [E, 2 ends, xy]
    low, high = np.minimum.reduceat(placed.min(1), first), np.maximum.reduceat(placed.max(1), first)
    side = _GRID * _UNIT
    room = np.clip((side - (high - low)) // 2, 0, 2 * _SUB * _UNIT)  # at most two pixels
    placed += ((side - low - high) // 2 + (room * shift >> 12))[image][:, None]

    x0, y0, x1, y1 = placed.reshape(-1, 4).T
    rows = np.clip((placed[..., 1] + _UNIT // 2 - 1) >> 8, 0, _GRID)  # first sample row at or below each end
    top, bottom = rows.min(1), rows.max(1)
    edge = np.repeat(np.arange(len(top)), bottom - top)
    row = np.arange(len(edge)) + (top - np.cumsum(bottom - top) + (bottom - top))[edge]
    centre = row * _UNIT + _UNIT // 2
    at = x0[edge] + (x1 - x0)[edge] * (centre - y0[edge]) // (y1 - y0)[edge]
    column = np.clip((at + _UNIT // 2 - 1) >> 8, 0, _GRID)
    winds = np.where(y1 > y0, 1, -1)[edge]
    cell = (image[edge] * _GRID + row) * (_GRID + 1) + column
    change = np.bincount(cell, winds, count * _GRID * (_GRID + 1)).astype(np.int8)
    winding = np.cumsum(change, dtype=np.int8)  # closed outlines: every row ends at 0, its last column is spare
    inside = np.ascontiguousarray(winding.reshape(count, _GRID, _GRID + 1)[:, :, :-1] != 0)
    for value in (1, 2):
        chosen = np.flatnonzero(stroke == value)
        for _ in range(value):
            inside[chosen] = _grow(inside[chosen])
    chosen = np.flatnonzero(stroke == -1)
    thinner = ~_grow(~inside[chosen])
    lasting = 3 * thinner.sum((1, 2)) >= 2 * inside[chosen].sum((1, 2))
    inside[chosen[lasting]] = thinner[lasting]
    quads = inside.view(np.uint32).reshape(count, SIZE, _SUB, SIZE).sum(2, dtype=np.uint32)  # four bytes, each 0..4
    pixels: NDArray[np.uint8] = (quads * np.uint32(0x01010101) >> np.uint32(24)).astype(np.uint8)  # their sum
    return pixels


def _grow(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Each sample or one of its four neighbours."""
    out = mask.copy()
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    out[:, :, 1:] |= mask[:, :, :-1]
    out[:, :, :-1] |= mask[:, :, 1:]
    return out


def canonical(outlines: Outlines, which: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Outlines `which` upright and undistorted, the longer side 24 of 28 pixels: [n, 28, 28] counts from 0 to 16."""
    scale = 12 * _SUB * _UNIT * _ONE // _HALF
    parts = []
    for part in np.split(which, range(256, len(which), 256)):
        matrix = np.tile(np.array([[scale, 0], [0, scale]]), (len(part), 1, 1))
        zero = np.zeros((len(part), 2), dtype=np.int64)
        parts.append(rasterise(outlines, part, matrix, zero, zero, zero[:, 0]))
    return np.concatenate(parts)


def distinct(bitmaps: NDArray[np.uint8], owner: NDArray[np.int64]) -> list[int]:
    """Owners, in ascending order, that look like no kept owner before them in any pair of faces.

    bitmaps [n, 28, 28] as `canonical` gives them; owner [n], ascending: the character that bitmap belongs to. Alike
    means that the correlation of the bitmaps at 14x14 is above `_ALIKE`, so identical outlines always are.
    """
    n = len(bitmaps)
    small = bitmaps.reshape(n, 14, 2, 14, 2).sum((2, 4), dtype=np.int64).reshape(n, -1)  # 0..64
    pixels = small.shape[1]
    total = small.sum(1)
    spread = np.sqrt((pixels * (small**2).sum(1) - total**2).astype(np.float64))
    exact = small.astype(np.float32)  # dot products stay below 2**24: exact in any order

    def alike(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
        products = pixels * (exact[a] @ exact[b].T).astype(np.float64) - np.outer(total[a], total[b])
        over: NDArray[np.bool_] = products > np.outer(_ALIKE * spread[a], spread[b])
        return over

    chosen: list[int] = []
    kept: NDArray[np.int64] = np.zeros(0, dtype=np.int64)  # rows of the chosen
    starts: NDArray[np.int64] = np.flatnonzero(np.diff(owner, prepend=-1))
    stops = np.append(starts[1:], n)
    for first in range(0, len(starts), 64):  # few large products
        own, last = starts[first : first + 64], stops[first : first + 64]
        rows = np.arange(own[0], last[-1])
        local = own - own[0]
        clash = np.logical_or.reduceat(alike(rows, kept).any(1), local)
        within = np.logical_or.reduceat(np.logical_or.reduceat(alike(rows, rows), local, axis=0), local, axis=1)
        for i, start in enumerate(own):
            if not clash[i]:
                chosen.append(int(owner[start]))
                kept = np.append(kept, np.arange(start, last[i]))
                clash |= within[i]
    return chosen


def render() -> tuple[NDArray[np.uint8], list[int]]:
    """Draw the whole set: images [classes, 20, 28, 28] uint8, ink high, and the code point of each class."""
    from fontTools.ttLib import TTFont

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # old time stamps in the Computer Modern files
    codes = candidates()
    rank = {code: i for i, code in enumerate(codes)}
    edges, starts = [], [np.zeros(1, dtype=np.int64)]
    owner: list[int] = []
    bold: list[bool] = []
    for face in FACES:
        with TTFont(font_file(face), lazy=True) as font:
            names, glyf = font.getBestCmap(), font["glyf"]
            here = [c for c in codes if c in names and glyf[names[c]].numberOfContours != 0]
            if face.startswith("cm"):  # their other code points hold other characters
                here = [c for c in here if c < 128 and chr(c).isalnum()]
            outlines = read_outlines(font, here)
        edges.append(outlines.edges)
        starts.append(outlines.starts[1:] + starts[-1][-1])
        owner.extend(rank[c] for c in here)
        bold.extend(["Bold" in face or face.endswith("Bol")] * len(here))
    outlines = Outlines(np.concatenate(edges), np.concatenate(starts))
    order = np.argsort(np.array(owner), kind="stable")  # by character, then by face
    owners = np.array(owner)[order]
    faces = np.bincount(owners, minlength=len(codes))
    usable = faces[owners] >= 2
    chosen = distinct(canonical(outlines, order[usable]), owners[usable])

    count = len(chosen) * IMAGES
    words = np.random.PCG64(SEED).random_raw(count * 9).reshape(9, count)
    spare = iter(words)

    def draw(low: int, high: int) -> NDArray[np.int64]:
        return low + ((next(spare) >> np.uint64(32)) % np.uint64(high - low + 1)).astype(np.int64)

    character = np.repeat(np.array(chosen), IMAGES)
    turn = np.tile(np.arange(IMAGES), len(chosen))
    which = order[np.searchsorted(owners, character) + turn % faces[character]]
    half = draw(-_ONE // 10, _ONE // 10)  # tangent of half the angle: 11 degrees either way
    square = _ONE**2 + half**2
    cos, sin = (_ONE**2 - half**2) * _ONE // square, 2 * half * _ONE * _ONE // square
    size = 10 * _SUB * _UNIT * _ONE // _HALF * draw(_ONE * 8 // 10, _ONE * 21 // 20) // _ONE  # 16 to 21 pixels
    width, height = size * draw(_ONE * 9 // 10, _ONE) // _ONE, size * draw(_ONE * 9 // 10, _ONE) // _ONE
    slant = draw(-_ONE // 6, _ONE // 6)
    lean = slant * height // _ONE
    matrix = np.stack(
        [
            cos * width // _ONE,
            (cos * lean - sin * height) // _ONE,
            sin * width // _ONE,
            (sin * lean + cos * height) // _ONE,
        ],
        axis=1,
    ).reshape(-1, 2, 2)
    bend = np.stack([draw(-_ONE // 10, _ONE // 10), draw(-_ONE // 10, _ONE // 10)], axis=1)
    place = draw(0, (1 << 32) - 1)
    shift = np.stack([place % (2 * _ONE + 1), (place >> 16) % (2 * _ONE + 1)], axis=1) - _ONE
    thickness = np.array([[0, 0, 1, 2], [-1, -1, 0, 1]])[np.array(bold)[which].astype(int), draw(0, 3)]
    parts = [
        rasterise(outlines, *(a[i : i + 256] for a in (which, matrix, bend, shift, thickness)))
        for i in range(0, count, 256)
    ]
    samples = np.concatenate(parts).astype(np.uint16)
    images = ((samples * 255 + 8) // 16).astype(np.uint8)
    return images.reshape(len(chosen), IMAGES, SIZE, SIZE), [codes[i] for i in chosen]


def fonts_digest() -> str:
    """SHA-256 of the font files that the set is drawn from."""
    sha = hashlib.sha256()
    for face in FACES:
        sha.update(font_file(face).read_bytes())
    return sha.hexdigest()


def main() -> None:
    """Draw the set, compare it with the reference, and write the file."""
    if fonts_digest() != FONTS_DIGEST:
        raise SystemExit("make_glyphs: matplotlib's fonts are not those of the reference set: install the pinned one")
    images, codes = render()
    points = np.array(codes, dtype=np.int32)
    if digest(images, points) != DIGEST:
        raise SystemExit("make_glyphs: the pixels are not those of the reference set: change DIGEST with them")
    held = io.BytesIO()
    np.savez(held, images=images, codes=points)
    temporary = FILE.with_name(f"{FILE.name}.tmp")
    temporary.write_bytes(lzma.compress(held.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    os.replace(temporary, FILE)


if __name__ == "__main__":
    main()
