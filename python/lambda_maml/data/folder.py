"""Pictures of one's own: a folder with one sub-folder per class."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..progress import Progress
from .division import SHARES, Shares, check_shares, divided
from .imageset import SPLITS, ImageSet, statistics
from .layout import class_folders, image_files, listing, subfolders
from .pictures import is_grey, read_pixels
from .room import check_room, size_text

__all__ = ["Folder", "from_folder"]

LAYOUT = "one sub-folder of pictures per class, or folders train/, val/ and test/ of such sub-folders"
SIZES = {1: 28, 3: 84}  # by channels, where no size is given: Omniglot's and mini-ImageNet's
_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

Size = int | Sequence[int]

_log = logging.getLogger(__name__)


class Folder:
    """The three sets of a folder, of which each is read when it is first asked for; `from_folder` makes it."""

    def __init__(
        self, root: Path, image_size: Size | None, channels: int | None, seed: int, shares: Shares, invert: bool | None,
        mean: Sequence[float] | None, std: Sequence[float] | None,
    ) -> None:  # fmt: skip
        check_shares(shares)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels is {channels}, expected 1 (grey) or 3 (RGB)")
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size or ())
        if image_size is not None and (len(sides) != 2 or min(sides) < 1):
            raise ValueError(f"image_size is {image_size}, expected pixels per side, or height and width")
        if (mean is None) != (std is None):
            raise ValueError(f"mean is {mean} and std {std}: give both or none")
        self.root = root
        self.files, self._divided = _found(root, seed, shares)
        pictures = [file for part in self.files.values() for files in part.values() for file in files]
        self.channels = (1 if all(map(is_grey, pictures)) else 3) if channels is None else channels
        height, width = sides or (SIZES[self.channels],) * 2
        self.image_size = height, width
        self.invert = self.channels == 1 if invert is None else invert
        self._given = None if mean is None or std is None else (tuple(mean), tuple(std))
        self._how = {"invert": self.invert, "split_seed": seed, "shares": list(shares)}
        self._read: dict[str, ImageSet] = {}
        default = "" if image_size is not None else f" (no image size is given, so it is {SIZES[self.channels]})"
        _log.info("%s%s", self, default)

    def __repr__(self) -> str:
        counts = {split: sum(map(len, part.values())) for split, part in self.files.items()}
        told = ", ".join(f"{split} {len(part)} classes, {counts[split]:,} pictures" for split, part in
                         self.files.items())  # fmt: skip
        return f"Folder({self.root}: {told}; {size_text(sum(counts.values()), self.image_size, self.channels)})"

    @property
    def train(self) -> ImageSet:
        """The set to train on."""
        return self.read("train")

    @property
    def val(self) -> ImageSet:
        """The set to choose by."""
        return self.read("val")

    @property
    def test(self) -> ImageSet:
        """The set to report on."""
        return self.read("test")

    def read(self, split: str, progress: Progress | None = None) -> ImageSet:
        """One of the sets, read once.

        Raises:
            ValueError: unknown split, one without a class, or a picture that is unreadable, which is named.
            FileNotFoundError: there is no folder for the split.
            RuntimeError: it does not fit in memory.
        """
        if split not in self._read:
            self.check((split,))
            classes = self.files[split]
            files = [file for part in classes.values() for file in part]
            if self._given is None and self.channels == 3 and split != "train":
                train = self.read("train", progress)
                self._given = train.mean, train.std
            check_room(f"{self.root} {split}", len(files), self.image_size, self.channels)
            pixels = read_pixels(files, self.image_size, self.channels, invert=self.invert, progress=progress)
            mean, std = self._given or statistics(pixels)
            self._read[split] = ImageSet(
                "folder", split, pixels, tuple(map(len, classes.values())), tuple(classes), mean, std,
                {**self._how, "classes": list(classes)},
            )  # fmt: skip
        return self._read[split]

    def check(self, splits: Sequence[str], ways: int = 1, images: int = 1) -> None:
        """That each of the splits has at least `ways` classes, and each of their classes `images` pictures.

        Raises:
            ValueError: it has not; says which, and what helps.
            FileNotFoundError: there is no folder for a split.
        """
        for split in splits:
            if split not in SPLITS:
                raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
            if split not in self.files:
                raise FileNotFoundError(f"{self.root}: no folder {split}/ beside {', '.join(self.files)}: make one")
            if len(self.files[split]) < ways:
                self._too_few(split, ways)
            files = min(self.files[split].values(), key=len)
            if len(files) < images:
                raise ValueError(
                    f"{files[0].parent}: this class has {len(files)} pictures, but a task takes {images} of each class "
                    "(shots and query): add pictures, take fewer, or remove the folder"
                )

    def _too_few(self, split: str, ways: int) -> None:
        counts = {name: len(part) for name, part in self.files.items()}
        if not self._divided:
            raise ValueError(
                f"{self.root}: split {split} has {counts[split]} classes, but a task takes {ways}: add class folders "
                "or take fewer ways"
            )
        told = ", ".join(f"{count} for {name}" for name, count in counts.items())
        raise ValueError(
            f"{self.root}: {sum(counts.values())} class folders are divided into {told}, but a task takes {ways} "
            f"classes of {split}: add class folders, take fewer ways or other shares, or divide them yourself into "
            "folders train/, val/ and test/"
        )


def from_folder(
    root: str | os.PathLike[str], image_size: Size | None = None, channels: int | None = None, seed: int = 0, *,
    shares: Shares = SHARES, invert: bool | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Folder:  # fmt: skip
    """Pictures in class folders as image sets: `.train`, `.val`, `.test`, each read when it is first asked for.

    A class is a sub-folder, its images the pictures in it, of any size, depth and EXIF orientation
    (`data.pictures.read_picture`); hidden files and what systems leave behind are not looked at. Folders root/train,
    root/val and root/test of class folders are the splits as they are; else the classes are divided by seed and name
    (`data.divided`). Pictures are squeezed into that size with Lanczos, as `lambda-maml adapt` does with others.

    >>> folder = data.from_folder("pictures", image_size=28)        # 20 classes of grey pictures
    >>> folder.train.num_classes, folder.val.num_classes, folder.test.image_shape
    (13, 3, (1, 28, 28))

    Args:
        image_size: pixels per side, or (height, width). Default: 28 for grey, 84 for RGB pictures; the log says so.
        channels: 1 or 3. Default: 1 where all pictures are grey by their headers, else 3.
        seed: of the division into splits.
        shares: of the classes for train, val and test.
        invert: turn light paper dark, so that ink is high as in the grey sets. Default: for grey pictures.
        mean, std: one value per channel, as in `ImageSet`. Default: 0 and 1 for grey, those of the train split for RGB.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has no class folder, a class folder has no picture, or an argument is out of range.
    """
    return Folder(Path(root).expanduser(), image_size, channels, seed, shares, invert, mean, std)


def _found(root: Path, seed: int, shares: Shares) -> tuple[dict[str, dict[str, list[Path]]], bool]:
    """The files of each class of each split, and whether the classes were divided here."""
    if not root.is_dir():
        raise FileNotFoundError(f"{listing(root, ())}; expected a folder with {LAYOUT}")
    own = _split_folders(root)
    if own:
        parts = {split: class_folders(own[split]) for split in SPLITS if split in own}
        _warn_of_shared(parts)
        return parts, False
    if not subfolders(root):
        raise ValueError(f"{listing(root, ())}, but no class folder; expected {LAYOUT}")
    classes = class_folders(root)
    return {s: {n: classes[n] for n in names} for s, names in divided(list(classes), seed, shares).items()}, True


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders that are splits: named so, with sub-folders and no picture of their own."""
    found: dict[str, Path] = {}
    for folder in subfolders(root):
        split = _SPLIT_NAMES.get(folder.name.lower())
        if split is None or image_files(folder) or not subfolders(folder):
            continue
        if split in found:
            raise ValueError(f"{folder} and {found[split].name}/ are both split {split}: keep one of them")
        found[split] = folder
    return found


def _warn_of_shared(parts: dict[str, dict[str, list[Path]]]) -> None:
    """A few-shot network is judged on classes that it was not trained on."""
    for split, classes in parts.items():
        shared = sorted(set(classes) & set(parts.get("train", {})))
        if split != "train" and shared:
            warnings.warn(
                f"{len(shared)} classes of {split}/ are in train/ too, {shared[0]} among them: accuracies are then not "
                "of new classes",
                stacklevel=4,
            )
