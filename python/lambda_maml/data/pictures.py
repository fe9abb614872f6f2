"""Picture files as 8-bit pixels: any bit depth, upright, transparent parts white."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ..progress import Progress
from .mistaken import mistaken

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageFile import ImageFile

_ORIENTATION = 0x0112  # EXIF and TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF; 0: white is zero
# What Pillow may take a file for, by its ending: it hands some other formats to programs, as PostScript to Ghostscript.
_FORMATS = {
    ".png": ("PNG",), ".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".jfif": ("JPEG",), ".bmp": ("BMP", "DIB"),
    ".gif": ("GIF",), ".tif": ("TIFF",), ".tiff": ("TIFF",), ".webp": ("WEBP",), ".pgm": ("PPM",), ".ppm": ("PPM",),
}  # fmt: skip
_MOST_PIXELS = 89_478_485  # from there on Pillow speaks of decompression bombs
_IN_A_PICKLE = ("PNG", "JPEG")
# How a picture that was stored under EXIF's orientation 2..8 gets upright: names of PIL.Image.Transpose.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


Mode = Literal["L", "RGB"]


def read_picture(source: Path | bytes, mode: Mode, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """A picture as uint8 [H, W] (L, grey) or [H, W, 3] (RGB), as a viewer shows it, resized to `size` = (H, W) with
    Lanczos.

    It is turned upright by its EXIF orientation; transparent parts are white. Palettes, CMYK and the like become grey
    or RGB. Samples of more than 8 bits are scaled: 16 bits by 255 / 65535, 12 bits by 255 / 4095. 32-bit whole numbers
    and floats count as 0..1 (floats only), 0..255, 0..65535 or, whole numbers only, 0..2^31 - 1, the smallest of these
    that holds the picture's largest value.

    A file is opened as what its ending names, and not at all if that is no format of pictures that is read here; bytes
    are PNG or JPEG.

    >>> read_picture(Path("greek/alpha.png"), "L", (28, 28)).shape
    (28, 28)

    Raises:
        ValueError: not a readable picture of its ending's format, one of more than 89 million pixels, no file
            but a pipe or a device, or samples that are negative, NaN or too large; the text says
            what the file is if its first bytes tell.
    """
    with _opened(source) as picture:
        if size is not None:
            # A large JPEG is decoded at half its size and less, still of twice `size`: as Pillow's own thumbnails are.
            picture.draft(None, (2 * max(size), 2 * max(size)))  # it may lie on a side
        picture.load()
        return shown(picture, mode, size)


def read_pixels(
    files: Sequence[Path], size: tuple[int, int], channels: int, *, invert: bool, progress: Progress | None = None
) -> NDArray[np.uint8]:
    """Pictures as uint8 [n, H, W, channels], `size` being (H, W); with `invert` 255 minus that: dark ink is high.

    Raises:
        ValueError: a file is unreadable; the text names it.
    """
    pixels = np.empty((len(files), *size, channels), np.uint8)
    for index, file in enumerate(files):
        picture = read_picture(Path(file), "L" if channels == 1 else "RGB", size)
        pixels[index] = picture.reshape(*size, channels)
        if progress is not None:
            progress(index + 1, len(files), "pictures")
    return np.subtract(255, pixels, out=pixels) if invert else pixels


def is_grey(source: Path) -> bool:
    """Whether a picture file has no colour by its header: one channel, or a palette of greys.

    Raises ValueError for a file that is no picture.
    """
    with _opened(source) as picture:
        return without_colour(picture)


def without_colour(picture: Picture) -> bool:
    """Whether a picture has one channel, transparency aside, or a palette of greys."""
    if picture.mode == "P":
        palette = np.array(picture.getpalette(), np.uint8).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return picture.mode in ("1", "L", "LA", "La", "F") or picture.mode.startswith("I")


def shown(picture: Picture, mode: Mode, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """A picture of Pillow's, as `read_picture` has it.

    Raises:
        ValueError: its samples are negative, NaN or too large.
    """
    from PIL import Image

    eight = _eight_bits(picture) if picture.mode[0] in "IF" else picture
    upright = eight if picture.format == "TIFF" else _upright(eight)  # Pillow turns TIFFs itself
    flat = _on_white(upright).convert(mode)
    if size is not None:
        flat = flat.resize(size[::-1], Image.Resampling.LANCZOS)
    return np.asarray(flat)


@contextmanager
def _opened(source: Path | bytes) -> Iterator[ImageFile]:
    """The picture; whatever goes wrong with it inside is a ValueError that names it."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(source, bytes) and source.exists() and not source.is_file():
        what = "a directory" if source.is_dir() else "a pipe or a device"
        raise ValueError(f"{source}: not a readable image: it is {what}")
    try:
        formats = _IN_A_PICKLE if isinstance(source, bytes) else _FORMATS.get(source.suffix.lower(), ())
        # Given a path, Pillow maps uncompressed TIFFs and then mixes up their height and width if they lie on a side.
        with (
            io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file,
            Image.open(file, formats=formats) as opened,
        ):
            if opened.width * opened.height > _MOST_PIXELS:
                raise ValueError(f"it has {opened.width}x{opened.height} pixels, more than {_MOST_PIXELS}")
            yield opened
    except Exception as error:  # decoders raise many kinds
        if isinstance(error, FileNotFoundError) and not isinstance(source, bytes):
            raise ValueError(f"{source}: no such file") from error
        # The text of the first names an object of Python; Pillow 13 raises the second for what is no JPEG.
        unknown = isinstance(error, (UnidentifiedImageError, KeyError))
        name, what = "", f"{'its format is unknown' if unknown else error}; copy it again or remove it"
        if not isinstance(source, bytes):
            opens = not (isinstance(error, OSError) and error.errno)
            name, what = f"{source}: ", (mistaken(source, picture=True) if opens else None) or what
        if isinstance(error, _Samples):
            what = str(error)
        raise ValueError(f"{name}not a readable image: {what}") from error


class _Samples(ValueError):
    """Samples that are no brightness."""


def _upright(picture: Picture) -> Picture:
    from PIL import Image

    try:
        way = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF: viewers show the picture as it lies
        way = None
    return picture if way is None else picture.transpose(Image.Transpose[way])


def _on_white(picture: Picture) -> Picture:
    """The picture without its transparency."""
    from PIL import Image

    if picture.mode in ("1", "L", "RGB") and "transparency" not in picture.info:
        return picture
    flat = picture.convert("RGBA")
    paper = Image.new("RGBA", flat.size, "white")
    paper.alpha_composite(flat)
    return paper


def _eight_bits(picture: Picture) -> Picture:
    """A one-channel picture of 16-bit, 32-bit or float samples as 8-bit grey, with alpha where it is transparent."""
    from PIL import Image, ImageChops

    samples = np.asarray(picture)
    low, high = (float(samples.min()), float(samples.max())) if samples.size else (0.0, 0.0)
    whole = samples.dtype.kind != "f"
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    if picture.mode.startswith("I;16") or (whole and picture.format in ("PNG", "PPM")):  # these have no 32-bit samples
        top: float = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    else:
        tops = (255, 65535, 2**31 - 1) if whole else (1, 255, 65535)
        top = next((t for t in tops if high <= t), 0)
    if not (low >= 0 and high <= top):  # false for NaN too
        raise _Samples(
            f"its samples range from {low:g} to {high:g}; save it with samples of 8 or 16 bits, or floats in 0..1"
        )
    grey: Picture = Image.fromarray(np.rint(samples * (255.0 / top)).astype(np.uint8))
    if picture.mode == "I;16" and tags.get(_PHOTOMETRIC) == 0:  # Pillow does so for fewer bits only
        grey = ImageChops.invert(grey)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
    grey.getexif().update(picture.getexif())
    return grey
