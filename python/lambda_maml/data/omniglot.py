"""Omniglot (Lake, Salakhutdinov and Tenenbaum 2015) from its image folders."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .imageset import ImageSet, chosen, with_rotations
from .layout import find, homes, listing, subfolders, visible
from .pictures import read_picture

SIZE = 28
FOLDERS = ("omniglot-py", "omniglot")
BACKGROUND, EVALUATION, TOGETHER = "images_background", "images_evaluation", "data"
LAYOUT = (
    "images_background/<Alphabet>/characterNN/*.png, images_evaluation/<Alphabet>/characterNN/*.png and, for the split "
    "of Vinyals et al., splits/vinyals/{train,val,test}.txt; or data/<Alphabet>/characterNN/*.png with these split "
    "files; all in root itself or in a folder omniglot-py/"
)
_BYTE_ORDERS = (b"\xff\xfe", b"\xfe\xff")  # with which Windows begins UTF-16


def load(split: str, root: Path, rotations: bool | None = None) -> ImageSet:
    """One split at 28x28: 255 minus the image as 8-bit grey resized with Pillow's LANCZOS filter, so that ink is high.

    The split is that of Vinyals et al. 2016 where `splits/vinyals/{split}.txt` lists the classes, one
    `<Alphabet>/characterNN` per line. The part's folder may stand before it and `rotRRR` after it, RRR being 000, 090,
    180 or 270: then the line is that class turned counter-clockwise. Without the file the evaluation folder is test,
    and of the background classes, in the order of the SHA-256 of `<Alphabet>/characterNN`, the first seventh is val and
    the rest train.

    rotations: turn each class by 90, 180 and 270 degrees into three more classes. Default: for the train split, and as
    listed where the lines name rotations.

    Raises:
        FileNotFoundError: a folder is missing; the message shows the expected layout and what was found.
        ValueError: an image is unreadable, a class or the split has no image, or a line of the list is not understood.
    """
    home = next((h for h in homes(root, FOLDERS) if _parts(h)), None)
    if home is None:
        raise FileNotFoundError(
            f"omniglot: no {BACKGROUND} or {EVALUATION}. Expected under root: {LAYOUT}. Found: {listing(root, FOLDERS)}"
        )
    table = find(home, (), [f"splits/vinyals/{split}.txt"])
    turns: dict[str, list[int]] = {}
    names = _divided(home, split) if table is None else _listed(home, table, turns)
    if not names:
        raise ValueError(f"omniglot: split {split!r} under {home} has no class. Expected: {LAYOUT}")
    images: list[NDArray[np.uint8]] = []
    counts = []
    for name in names:
        files = [path for path in visible(home / name) if path.suffix.lower() == ".png"]
        if not files:
            raise ValueError(f"omniglot: no PNG in {home / name}: copy its pictures there or remove the folder")
        images.extend(map(_decode, files))
        counts.append(len(files))
    upright = ImageSet("omniglot", split, np.stack(images)[..., None], tuple(counts), tuple(names))
    if rotations is None and any(turns.values()):
        listed = [k * len(names) + i for k in range(4) for i, name in enumerate(names) if 90 * k in turns[name]]
        turned = with_rotations(upright)
        return turned if len(listed) == turned.num_classes else chosen(turned, listed)
    return with_rotations(upright) if (split == "train" if rotations is None else rotations) else upright


def _parts(home: Path) -> list[str]:
    """Those folders in `home` that hold alphabets, relative to it."""
    parts = [name for name in (BACKGROUND, EVALUATION) if (home / name).is_dir()]
    if not parts and next((home / TOGETHER).glob("*/character*"), None) is not None:
        parts = [TOGETHER]
    return parts


def _listed(home: Path, table: Path, turns: dict[str, list[int]]) -> list[str]:
    """The class folders that a split file lists, each once, relative to `home`; fills `turns` with their rotations."""
    raw = table.read_bytes()
    lines = raw.decode("utf-16" if raw.startswith(_BYTE_ORDERS) else "utf-8-sig").splitlines()
    missing = []
    for line in filter(None, (line.strip().strip("\"'") for line in lines)):
        *folders, last = [part.strip() for part in re.split(r"[/\\,;\t]", line) if part.strip() not in ("", ".")]
        turn = re.fullmatch(r"rot(\d+)", last)
        if turn is None:
            folders.append(last)
        if len(folders) < 2 or (turn and int(turn[1]) not in (0, 90, 180, 270)):
            raise ValueError(f"omniglot: {table} has the line {line!r}, expected <Alphabet>/characterNN[/rotRRR]")
        name = _folder(home, folders)
        if name is None:
            missing.append("/".join(folders))
            continue
        angles = turns.setdefault(name, [])
        if turn:
            angles.append(int(turn[1]))
    if missing:
        raise FileNotFoundError(
            f"omniglot: {table} lists {len(missing) + len(turns)} classes, of which {len(missing)} have no folder, "
            f"the first {home / missing[0]}. Expected: {LAYOUT}"
        )
    if any(turns.values()):
        for angles in turns.values():
            angles.extend([] if angles else [0])  # a line without rotation beside lines with one
    return list(turns)


def _folder(home: Path, parts: list[str]) -> str | None:
    """The folder that a line means: as it stands, or its last two parts in one of the folders with alphabets."""
    alphabet, character = parts[-2:]
    candidates = ["/".join(parts), *(f"{part}/{alphabet}/{character}" for part in _parts(home))]
    if len(parts) > 2 and parts[-3] in (BACKGROUND, EVALUATION) and (home / parts[-3]).is_dir():
        candidates = [f"{parts[-3]}/{alphabet}/{character}"]
    return next((name for name in candidates if (home / name).is_dir()), None)


def _divided(home: Path, split: str) -> list[str]:
    """The class folders of a split without a split file, relative to `home`."""
    part = EVALUATION if split == "test" else BACKGROUND
    if _parts(home) == [TOGETHER]:
        raise FileNotFoundError(
            f"omniglot: {home / TOGETHER} holds all alphabets together, so split {split!r} needs the list "
            f"splits/vinyals/{split}.txt beside it. Expected: {LAYOUT}"
        )
    if not (home / part).is_dir():
        raise FileNotFoundError(
            f"omniglot: no {part} for split {split!r}. Expected: {LAYOUT}. Found: {listing(home, ())}"
        )
    found = [
        f"{alphabet.name}/{character.name}"
        for alphabet in subfolders(home / part)
        for character in subfolders(alphabet)
    ]
    found.sort()
    if split != "test":
        order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
        val = set(order[: round(len(order) / 7)])
        found = [name for name in found if (name in val) == (split == "val")]
    return [f"{part}/{name}" for name in found]


def _decode(path: Path) -> NDArray[np.uint8]:
    try:
        return 255 - read_picture(path, "L", (SIZE, SIZE))
    except ValueError as error:
        raise ValueError(f"omniglot: unreadable image {error}") from error
