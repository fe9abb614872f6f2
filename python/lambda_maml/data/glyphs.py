"""Glyphs: a few-shot set of real font outlines, the characters of many scripts, which the package carries.

A class is a character, of which there are 20 images; python/make_glyphs.py draws them from the fonts in matplotlib's
package. Classes are split by character: 64 % train, 16 % val, 20 % test.
"""

from __future__ import annotations

import functools
import hashlib
import io
import lzma
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .imageset import ImageSet

FILE = Path(__file__).with_name("glyphs.npz.xz")
IMAGES = 20  # per class
SIZE = 28  # pixels per side
DIGEST = "f56854910608a4fb07b3a1d68224c59899bf5571ca0f65fa80cc1c3970eaae40"

# Script, first and last code point. Order matters: of two characters that look alike the first one stays.
BLOCKS = (
    ("Latin", 0x0041, 0x005A),
    ("Latin", 0x0061, 0x007A),
    ("Digits", 0x0030, 0x0039),
    ("Greek", 0x0370, 0x03FF),
    ("Cyrillic", 0x0400, 0x052F),
    ("Armenian", 0x0531, 0x0587),
    ("Georgian", 0x10A0, 0x10FC),
    ("Hebrew", 0x05D0, 0x05EA),
    ("Arabic", 0x0621, 0x06D5),
    ("NKo", 0x07C0, 0x07EA),
    ("Lao", 0x0E81, 0x0EDD),
    ("Tifinagh", 0x2D30, 0x2D65),
    ("Canadian_Syllabics", 0x1401, 0x1676),
    ("Lisu", 0xA4D0, 0xA4F7),
    ("Old_Italic", 0x10300, 0x10323),
    ("Latin_Extended", 0x00C0, 0x024F),
    ("IPA", 0x0250, 0x02AF),
    ("Phonetic", 0x1D00, 0x1D7F),
    ("Latin_Extended_C", 0x2C60, 0x2C7F),
    ("Latin_Extended_D", 0xA722, 0xA7FF),
    ("Cyrillic_Extended", 0xA640, 0xA66E),
    ("Georgian_Nuskhuri", 0x2D00, 0x2D25),
    ("Punctuation", 0x0021, 0x002F),
    ("Punctuation", 0x003A, 0x0040),
    ("Punctuation", 0x00A1, 0x00BF),
    ("Punctuation", 0x2010, 0x205E),
    ("Currency", 0x20A0, 0x20BF),
    ("Letterlike", 0x2100, 0x214F),
    ("Arrows", 0x2190, 0x21FF),
    ("Mathematical", 0x2200, 0x22FF),
    ("Technical", 0x2300, 0x2335),
    ("Geometric", 0x25A0, 0x25FF),
    ("Symbols", 0x2600, 0x26FF),
    ("Dingbats", 0x2701, 0x2775),
    ("Mathematical", 0x27C0, 0x27EF),
    ("Arrows", 0x27F0, 0x27FF),
)


def digest(images: NDArray[np.uint8], codes: NDArray[np.int32]) -> str:
    """SHA-256 of the code points (little-endian int32) followed by the pixels."""
    sha = hashlib.sha256(codes.astype("<i4").tobytes())
    sha.update(images.tobytes())
    return sha.hexdigest()


def splits(codes: list[int]) -> list[str]:
    """The split of each character: in the order of their code points' SHA-256, 64 % train, 16 % val, 20 % test."""
    order = sorted(range(len(codes)), key=lambda i: hashlib.sha256(f"U+{codes[i]:04X}".encode()).digest())
    train, val = round(len(codes) * 0.64), round(len(codes) * 0.80)
    out = ["test"] * len(codes)
    for place, i in enumerate(order[:val]):
        out[i] = "train" if place < train else "val"
    return out


@functools.cache
def stored() -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The whole set: images [classes, 20, 28, 28] uint8, ink high, and the code point of each class.

    Raises:
        FileNotFoundError: the file is not there, as in a package that was not installed whole.
        ValueError: the file is damaged.
    """
    remedy = "install the package again (pip install --force-reinstall --no-deps)"
    try:
        with np.load(io.BytesIO(lzma.decompress(FILE.read_bytes())), allow_pickle=False) as file:
            images, codes = file["images"], file["codes"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{FILE}: the glyph set is not there: {remedy}") from None
    except (ValueError, KeyError, EOFError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{FILE}: the glyph set is damaged ({error}): {remedy}") from None
    if digest(images, codes) != DIGEST:
        raise ValueError(f"{FILE}: the glyph set is not the reference set {DIGEST[:12]}: {remedy}")
    for array in (images, codes):
        array.flags.writeable = False
    return images, codes


def load(split: str) -> ImageSet:
    """One split of the set."""
    images, codes = stored()
    chosen = np.flatnonzero(np.array(splits(codes.tolist())) == split)
    return ImageSet(
        "glyphs",
        split,
        images[chosen].reshape(-1, SIZE, SIZE, 1),
        (IMAGES,) * len(chosen),
        tuple(f"{_script(code)}/U+{code:04X}" for code in codes[chosen].tolist()),
    )


def _script(code: int) -> str:
    return next(script for script, first, last in BLOCKS if first <= code <= last)
