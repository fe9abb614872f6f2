"""The image sets of the commands: their options, and reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_types import PLACE
from .console import bar, options, say

if TYPE_CHECKING:
    from .data import ImageSet
    from .ranks import Ranks

__all__ = ["FOLDER_KEYS", "SETS", "checkpoint_sets", "folder_options", "image_sets", "root_option", "split_options"]

SETS = "glyphs (built in), omniglot, cifar_fs, fc100, mini_imagenet, tiered_imagenet, or folder (your own pictures)."

root_option = click.option(
    "--root", type=PLACE,
    help="Folder in which the set lies (glyphs needs none); for folder one with a sub-folder of pictures per class, or "
    "with train/, val/ and test/ of such.",
)  # fmt: skip
folder_options = options(
    click.option(
        "--image-size", type=click.IntRange(1),
        help="Pixels per side to which pictures of --dataset folder are resized.  [default: the checkpoint's, else 28 "
        "for grey and 84 for RGB]",
    ),
    click.option(
        "--channels", type=int,
        help="Read them as grey (1) or RGB (3).  [default: the checkpoint's, else 1 where all pictures are grey]",
    ),
)  # fmt: skip
split_options = options(
    click.option(
        "--shares", type=(float, float, float), metavar="TRAIN VAL TEST",
        help="Shares of the classes of --dataset folder, which are divided by name.  [default: 0.64 0.16 0.2]",
    ),
    click.option("--split-seed", type=int, help="Seed of this division.  [default: 0]"),
    click.option(
        "--invert/--no-invert", default=None,
        help="Dark ink on light paper becomes high (--dataset folder).  [default: --invert for grey pictures]",
    ),
)  # fmt: skip


FOLDER_KEYS = ("image_size", "channels", "shares", "split_seed", "invert")
"""The arguments that `folder_options` and `split_options` give a command."""


def image_sets(
    name: str, root: Path | None, splits: Sequence[str], episode: Mapping[str, int], given: Mapping[str, Any],
    ranks: Ranks,
) -> list[ImageSet]:  # fmt: skip
    """Splits of the set of that name. given: what `data.from_folder` takes, None for what was not asked for; its seed
    as split_seed.

    Raises ValueError for arguments of a folder with another set, and for a folder that has no task of this episode.
    """
    from . import data

    asked = {key: value for key, value in given.items() if value is not None}
    if name.lower() != "folder":
        if asked:
            option = next(iter(asked)).replace("_", "-")
            raise ValueError(f"--{option} is for --dataset folder: {name} has images and splits of its own")
        return [data.load(name, root=root, split=split) for split in splits]
    if root is None:
        raise ValueError("--dataset folder: --root is missing, the folder with one sub-folder of pictures per class")
    folder = data.from_folder(root, seed=asked.pop("split_seed", 0), **asked)
    folder.check(splits, episode["ways"], episode["shots"] + episode["query"])
    if ranks.rank == 0:
        say(f"{folder!r}{'' if 'image_size' in asked else '; another size: --image-size'}")
    with bar("reading", ranks) as progress:
        return [folder.read(split, progress) for split in splits]


def checkpoint_sets(
    meta: Mapping[str, Any], name: str | None, root: Path | None, splits: Sequence[str], given: Mapping[str, Any],
    ranks: Ranks,
) -> list[ImageSet]:  # fmt: skip
    """Splits of the set that is named, or of the checkpoint's; pictures in a folder are read as those of training were.

    Raises ValueError for images that do not fit the network.
    """
    from .models import image_shape

    known, fits = meta["dataset"], image_shape(meta["network"])
    name = name or known["name"]
    if name.lower() == "folder":
        own = {"image_size": fits[1:], "channels": fits[0], **known}
        own = {key: own.get(key) for key in (*FOLDER_KEYS, "mean", "std")}
        given = {**own, **{key: value for key, value in given.items() if value is not None}}
    found = image_sets(name, root, splits, meta["settings"], given, ranks)
    for images in found:
        if tuple(images.image_shape) != fits:
            raise ValueError(
                f"{images.name} has images {list(images.image_shape)}, the checkpoint's network takes {list(fits)}"
            )
        seen = sorted(set(images.class_names) & set(known.get("classes", ())))
        if seen and images.split != "train":
            say(
                f"warning: {len(seen)} classes of split {images.split} bear names of classes that the network was "
                f"trained on, {seen[0]} among them: the folder is another one, or changed since"
            )
    return found
