"""Omniglot (Lake, Salakhutdinov and Tenenbaum 2015) from its image folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .imageset import ImageSet
from .layout import find, homes, listing

SIZE = 28
FOLDERS = ("omniglot-py", "omniglot", "Omniglot")
BACKGROUND, EVALUATION = "images_background", "images_evaluation"
LAYOUT = (
    "images_background/<Alphabet>/characterNN/*.png, images_evaluation/<Alphabet>/characterNN/*.png and, for the split "
    "of Vinyals et al., splits/vinyals/{train,val,test}.txt; all in root itself or in a folder omniglot-py/"
)


def load(split: str, root: Path) -> ImageSet:
    """One split at 28x28: 255 minus the image as 8-bit grey resized with Pillow's LANCZOS filter, so that ink is high.

    The split is that of Vinyals et al. 2016 where `splits/vinyals/{split}.txt` lists the classes, one
    `images_background/<Alphabet>/characterNN` a line. Without it the evaluation folder is test, and of the background
    classes, in the order of the SHA-256 of `<Alphabet>/characterNN`, the first seventh is val and the rest train.

    Raises:
        FileNotFoundError: a folder is missing; the message shows the expected layout and what was found.
        ValueError: an image is unreadable, or a class or the split has no image.
    """
    home = next((h for h in homes(root, FOLDERS) if (h / BACKGROUND).is_dir() or (h / EVALUATION).is_dir()), None)
    if home is None:
        raise FileNotFoundError(
            f"omniglot: no {BACKGROUND} or {EVALUATION}. Expected under root: {LAYOUT}. Found: {listing(root, FOLDERS)}"
        )
    names = _classes(home, split)
    if not names:
        raise ValueError(f"omniglot: split {split!r} under {home} has no class. Expected: {LAYOUT}")
    images: list[NDArray[np.uint8]] = []
    counts = []
    for name in names:
        files = sorted(path for path in (home / name).iterdir() if path.suffix.lower() == ".png")
        if not files:
            raise ValueError(f"omniglot: no PNG in {home / name}")
        images.extend(map(_decode, files))
        counts.append(len(files))
    return ImageSet("omniglot", split, np.stack(images)[..., None], tuple(counts), tuple(names))


def _classes(home: Path, split: str) -> list[str]:
    """The class folders of a split, relative to `home`."""
    table = find(home, (), [f"splits/vinyals/{split}.txt"])
    if table is not None:
        names = [line.strip() for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        missing = [name for name in names if not (home / name).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"omniglot: {table} lists {len(names)} classes, of which {len(missing)} have no folder, "
                f"the first {home / missing[0]}. Expected: {LAYOUT}"
            )
        return names
    part = EVALUATION if split == "test" else BACKGROUND
    if not (home / part).is_dir():
        raise FileNotFoundError(
            f"omniglot: no {part} for split {split!r}. Expected: {LAYOUT}. Found: {listing(home, ())}"
        )
    found = sorted(path.relative_to(home / part).as_posix() for path in (home / part).glob("*/*") if path.is_dir())
    if split != "test":
        order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
        val = set(order[: round(len(order) / 7)])
        found = [name for name in found if (name in val) == (split == "val")]
    return [f"{part}/{name}" for name in found]


def _decode(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            grey = image.convert("L")
    except Exception as error:  # decoders raise many kinds
        raise ValueError(f"omniglot: unreadable image {path} ({error}): copy it again or remove it") from error
    return 255 - np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
