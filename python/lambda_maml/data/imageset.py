"""A set of labelled images, and how its pixels become tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[torch.Tensor, int]]):
    """Images of one split, class-major: all images of class 0, then class 1, and so on. Classes may differ in size.

    It is a torch `Dataset` too: item i is the normalised image [C, H, W] and its class number.

    >>> images = ImageSet("dice", "train", np.zeros((6, 8, 8, 1), np.uint8), (4, 2), ("one", "two"))
    >>> image, label = images[4]
    >>> image.shape, images.class_names[label]
    (torch.Size([1, 8, 8]), 'two')

    Args:
        name, split: where the images come from, for messages and reports.
        images: [M, H, W, C] uint8, C = 1 (ink high) or 3 (RGB).
        counts: images of each class, in order; they add up to M.
        class_names: one name per class.
        mean, std: one value per channel. A tensor is `(pixel / 255 - mean) / std`; 0 and 1 leave the range 0..1.
        origin: what a checkpoint has to keep beside these to read pictures in the same way; what JSON can hold.

    Raises:
        ValueError: the parts do not fit together.
    """

    name: str
    split: str
    images: NDArray[np.uint8]
    counts: tuple[int, ...]
    class_names: tuple[str, ...]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    origin: Mapping[str, Any] = field(default_factory=dict)
    starts: NDArray[np.int64] = field(init=False, repr=False)  # [classes + 1]: class k owns starts[k]:starts[k + 1]

    def __post_init__(self) -> None:
        images, channels = self.images, self.images.shape[-1] if self.images.ndim else 0
        where = f"{self.name} {self.split}"
        if images.dtype != np.uint8 or images.ndim != 4 or channels not in (1, 3) or 0 in images.shape[1:]:
            raise ValueError(
                f"{where}: images are {images.dtype} {list(images.shape)}, expected uint8 [M, H, W, 1 or 3]"
            )
        if len(self.counts) != len(self.class_names) or any(n < 1 for n in self.counts):
            raise ValueError(
                f"{where}: {len(self.class_names)} class names for counts of {len(self.counts)} classes, the smallest "
                f"{min(self.counts, default=0)}; expected one name and at least one image per class"
            )
        if sum(self.counts) != len(images):
            raise ValueError(f"{where}: counts add up to {sum(self.counts)}, but there are {len(images)} images")
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise ValueError(f"{where}: mean {self.mean} and std {self.std} need {channels} values each, std above 0")
        object.__setattr__(self, "starts", np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64))

    def __repr__(self) -> str:
        shape = list(self.image_shape)
        return f"ImageSet({self.name} {self.split}: {self.num_classes} classes, {len(self)} images of {shape})"

    @property
    def num_classes(self) -> int:
        """How many classes the split has."""
        return len(self.counts)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        """How many images the split has."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Image `index` as float32 [C, H, W], normalised, and its class number."""
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} images, asked for number {index}")
        return self.tensors(np.array([place]))[0], int(np.searchsorted(self.starts, place, side="right")) - 1

    @property
    def targets(self) -> NDArray[np.int64]:
        """Class numbers of all images, [M]."""
        return np.repeat(np.arange(self.num_classes), self.counts)

    def fingerprint(self) -> str:
        """The set in a few words, by which another one of the same name is told: counts, and hashes of the class names
        and of the pixels of 256 images.

        >>> data.load("glyphs", split="val").fingerprint()
        '169 classes, 3380 images of [1, 28, 28], names ..., pixels ...'
        """
        names = hashlib.sha256(repr((self.class_names, self.counts)).encode()).hexdigest()
        some = self.images[np.linspace(0, len(self) - 1, 256).astype(np.int64)]
        pixels = hashlib.sha256(np.ascontiguousarray(some).tobytes()).hexdigest()
        shape = f"{self.num_classes} classes, {len(self)} images of {list(self.image_shape)}"
        return f"{shape}, names {names[:12]}, pixels {pixels[:12]}"

    def tensors(self, index: NDArray[np.integer[Any]]) -> torch.Tensor:
        """Images `index` [n] as float32 [n, C, H, W], contiguous and normalised.

        >>> data.load("glyphs").tensors(np.array([0, 20])).shape
        torch.Size([2, 1, 28, 28])
        """
        return self.normalised(self.images[index])

    def normalised(self, pixels: NDArray[Any]) -> torch.Tensor:
        """Pixels [n, H, W, C] from 0 to 255 as float32 [n, C, H, W], contiguous and normalised as the set's."""
        x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
        x /= 255
        if any(self.mean):
            x -= np.array(self.mean, dtype=np.float32)[:, None, None]
        if any(s != 1 for s in self.std):
            x /= np.array(self.std, dtype=np.float32)[:, None, None]
        return torch.from_numpy(x)


def with_rotations(dataset: ImageSet) -> ImageSet:
    """The set with each class turned by 90, 180 and 270 degrees as three more classes (Santoro et al. 2016).

    Raises ValueError for images that are not square, and for a set that has its rotations.
    """
    if any(f"{name}@90" in dataset.class_names for name in dataset.class_names):
        raise ValueError(f"{dataset.name} {dataset.split} has the rotations of its classes already")
    _, height, width = dataset.image_shape
    if height != width:
        raise ValueError(f"{dataset.name}: rotations need square images, these are {height}x{width}")
    turned = [np.rot90(dataset.images, k, axes=(1, 2)) for k in range(4)]
    names = dataset.class_names + tuple(f"{name}@{90 * k}" for k in (1, 2, 3) for name in dataset.class_names)
    images = np.ascontiguousarray(np.concatenate(turned))
    return replace(dataset, images=images, counts=dataset.counts * 4, class_names=names)


def chosen(dataset: ImageSet, classes: Sequence[int], split: str | None = None) -> ImageSet:
    """The set with the classes `classes` alone, in that order; as `split`, if it is given."""
    rows = [np.arange(dataset.starts[k], dataset.starts[k + 1]) for k in classes]
    return replace(
        dataset,
        split=split or dataset.split,
        images=dataset.images[np.concatenate(rows)],
        counts=tuple(dataset.counts[k] for k in classes),
        class_names=tuple(dataset.class_names[k] for k in classes),
    )


def statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images [M, H, W, C], as fractions of 255, to four decimals.

    Grey images are left as they are, 0 and 1: ink is high, paper is zero.
    """
    channels = images.shape[-1]
    if channels == 1:
        return (0.0,), (1.0,)
    counts = np.zeros((channels, 256), np.int64)
    for part in np.array_split(images, len(images) // 256 + 1):
        counts += [np.bincount(part[..., c].reshape(-1), minlength=256) for c in range(channels)]
    shares, levels = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ levels
    std = np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0))
    return tuple(mean.round(4).tolist()), tuple(np.maximum(std, 1 / 255).round(4).tolist())
