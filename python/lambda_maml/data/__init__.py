"""Few-shot image sets and the episode sampler."""

from __future__ import annotations

import os
from pathlib import Path

from . import glyphs, omniglot, pickled_sets
from .augment import Augment
from .episodes import Task, sample_tasks
from .imageset import SPLITS, ImageSet, with_rotations

__all__ = ["NAMES", "Augment", "ImageSet", "Task", "load", "sample_tasks"]

NAMES = ("glyphs", "omniglot", "cifar_fs", "fc100", "mini_imagenet", "tiered_imagenet")


def load(
    name: str, root: str | os.PathLike[str] | None = None, split: str = "train", rotations: bool | None = None
) -> ImageSet:
    """One split of an image set.

    Args:
        name: one of `NAMES`, with dashes or underscores.
        root: the folder that holds the set, or its parent; `glyphs` needs none.
        split: train, val or test.
        rotations: turn each class by 90, 180 and 270 degrees into three more classes. Default: for Omniglot's train
            split, as usual in MAML's protocol, or as its split file lists them, and for nothing else.

    >>> data.load("glyphs", split="val").num_classes              # no files are needed
    169

    Raises:
        ValueError: unknown name or split, `root` not given, or files of another content than expected.
        FileNotFoundError: a file is missing; the message shows the expected layout and what was found.
    """
    key = name.replace("-", "_").lower()
    if key not in NAMES:
        raise ValueError(f"unknown image set {name!r}: choose from {', '.join(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    folder = None if root is None else Path(root).expanduser()
    if folder is None and key != "glyphs":
        layout = omniglot.LAYOUT if key == "omniglot" else pickled_sets.layout(key)
        raise ValueError(f"{key}: root is not given. Expected under it: {layout}")
    if key == "omniglot" and folder is not None:
        return omniglot.load(split, folder, rotations)
    dataset = glyphs.load(split) if folder is None or key == "glyphs" else pickled_sets.load(key, split, folder)
    return with_rotations(dataset) if rotations else dataset
