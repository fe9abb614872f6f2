"""Few-shot image sets and the episode sampler."""

from __future__ import annotations

import os
from pathlib import Path

from . import glyphs, omniglot, pickled_sets
from .adapters import from_easyfsl, from_learn2learn, from_torchmeta
from .augment import Augment
from .division import Splits, divide, divided
from .episodes import Task, sample_tasks
from .folder import LAYOUT, Folder, from_folder
from .imageset import SPLITS, ImageSet, with_rotations
from .items import from_dataset

__all__ = [
    "NAMES", "Augment", "Folder", "ImageSet", "Splits", "Task", "divide", "divided", "from_dataset", "from_easyfsl",
    "from_folder", "from_learn2learn", "from_torchmeta", "load", "sample_tasks",
]  # fmt: skip

NAMES = ("glyphs", "omniglot", "cifar_fs", "fc100", "mini_imagenet", "tiered_imagenet")


def load(
    name: str, root: str | os.PathLike[str] | None = None, split: str = "train", rotations: bool | None = None, *,
    image_size: int | None = None, channels: int | None = None, seed: int = 0,
) -> ImageSet:  # fmt: skip
    """One split of an image set.

    Args:
        name: one of `NAMES`, with dashes or underscores, or folder: your own pictures, see `from_folder`.
        root: the folder that holds the set, or its parent; `glyphs` needs none.
        split: train, val or test.
        rotations: turn each class by 90, 180 and 270 degrees into three more classes. Default: for Omniglot's train
            split, as usual in MAML's protocol, or as its split file lists them, and for nothing else.
        image_size, channels, seed: of folder alone, as in `from_folder`.

    >>> data.load("glyphs", split="val").num_classes              # no files are needed
    169

    Raises:
        ValueError: unknown name or split, `root` not given, or files of another content than expected.
        FileNotFoundError: a file is missing; the message shows the expected layout and what was found.
    """
    key = name.replace("-", "_").lower()
    if key not in (*NAMES, "folder"):
        raise ValueError(f"unknown image set {name!r}: choose from {', '.join(NAMES)}, folder")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    folder = None if root is None else Path(root).expanduser()
    if key != "folder" and (image_size, channels, seed) != (None, None, 0):
        raise ValueError(f"{key}: image_size, channels and seed are for your own pictures, the set folder")
    if folder is None and key != "glyphs":
        layout = {"omniglot": omniglot.LAYOUT, "folder": LAYOUT}.get(key) or pickled_sets.layout(key)
        raise ValueError(f"{key}: root is not given. Expected under it: {layout}")
    if key == "omniglot" and folder is not None:
        return omniglot.load(split, folder, rotations)
    if key == "folder" and folder is not None:
        dataset = from_folder(folder, image_size, channels, seed).read(split)
    elif key == "glyphs" or folder is None:
        dataset = glyphs.load(split)
    else:
        dataset = pickled_sets.load(key, split, folder)
    return with_rotations(dataset) if rotations else dataset
