"""The sets that users keep as pickles: CIFAR-FS, FC100 and mini-ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import pickles
from .imageset import ImageSet
from .layout import find, listing


class _Set(NamedTuple):
    folders: tuple[str, ...]  # names under root, besides root itself
    file: str  # with {split}
    size: int  # pixels a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Statistics: of the training images of CIFAR-100, and of ImageNet, as commonly used with these sets.
_CIFAR = (32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_IMAGENET = (84, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SETS = {
    "cifar_fs": _Set(("cifar-fs", "cifar_fs", "cifarfs", "CIFAR-FS"), "CIFAR_FS_{split}.pickle", *_CIFAR),
    "fc100": _Set(("fc100", "FC100"), "FC100_{split}.pickle", *_CIFAR),
    "mini_imagenet": _Set(
        ("mini-imagenet", "mini_imagenet", "miniimagenet"), "mini-imagenet-cache-{split}.pkl", *_IMAGENET
    ),
}


def layout(name: str) -> str:
    """The files of a set, for messages."""
    kind = _SETS[name]
    return f"{kind.file.format(split='{train,val,test}')}, in root itself or in a folder {kind.folders[0]}/"


def load(name: str, split: str, root: Path) -> ImageSet:
    """One split from its pickle.

    The pickle is a dict with `data` [N, S, S, 3] and `labels` [N], or with `image_data` [N, S, S, 3] and `class_dict`
    (name: indices). Pixels are uint8, or floats in 0..1 or 0..255. S is 32, for mini-ImageNet 84.

    Raises:
        FileNotFoundError: no such file; the message shows the expected layout and what was found.
        ValueError: the content is not of that form, or not a pickle of arrays and plain containers.
    """
    kind = _SETS[name]
    files = [kind.file.format(split=s) for s in ((split, "validation") if split == "val" else (split,))]
    path = find(root, kind.folders, files)
    if path is None:
        raise FileNotFoundError(
            f"{name}: no {files[0]}. Expected under root: {layout(name)}. Found: {listing(root, kind.folders)}"
        )
    content = pickles.load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict")
    content = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    if {"image_data", "class_dict"} <= content.keys():
        pixels = _pixels(content["image_data"], kind.size, path)
        groups = _groups_of_dict(content["class_dict"], len(pixels), path)
    elif {"data", "labels"} <= content.keys():
        pixels = _pixels(content["data"], kind.size, path)
        groups = _groups_of_labels(content["labels"], len(pixels), path)
    else:
        raise ValueError(
            f"{path}: has the keys {sorted(map(str, content))}, expected data and labels, or image_data and class_dict"
        )
    if not groups:
        raise ValueError(f"{path}: holds no image")
    order = np.concatenate(list(groups.values()))
    counts = tuple(len(index) for index in groups.values())
    if not np.array_equal(order, np.arange(len(pixels))):
        pixels = pixels[order]
    return ImageSet(name, split, pixels, counts, tuple(groups), kind.mean, kind.std)


def _pixels(data: Any, size: int, path: Path) -> NDArray[np.uint8]:
    if not isinstance(data, np.ndarray) or data.shape[1:] != (size, size, 3) or data.dtype.kind not in "uif":
        got = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: images are {got}, expected uint8 or float [N, {size}, {size}, 3]")
    if data.dtype == np.uint8 or not len(data):
        return np.ascontiguousarray(data, dtype=np.uint8)
    low, high = float(data.min()), float(data.max())
    if not (low >= 0 and high <= 255):  # false for NaN too
        raise ValueError(f"{path}: pixels range from {low} to {high}, expected 0..255 or 0..1")
    scale = 255 if data.dtype.kind == "f" and high <= 1 else 1
    return np.concatenate(
        [np.rint(part * scale).astype(np.uint8) for part in np.array_split(data, len(data) // 1024 + 1)]
    )


def _groups_of_labels(labels: Any, count: int, path: Path) -> dict[str, NDArray[np.int64]]:
    """Class name: indices of its images, classes in the order of their labels."""
    values = np.asarray(labels)
    if values.shape != (count,) or values.dtype.kind not in "iuSU":
        raise ValueError(f"{path}: labels are {values.dtype} {list(values.shape)}, expected {count} numbers or names")
    names, inverse = np.unique(values, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(inverse, minlength=len(names)))[:-1]) if count else []
    return {_text(name): part for name, part in zip(names.tolist(), parts)}


def _groups_of_dict(classes: Any, count: int, path: Path) -> dict[str, NDArray[np.int64]]:
    if not isinstance(classes, dict):
        raise ValueError(f"{path}: class_dict is a {type(classes).__name__}, expected a dict of index lists")
    groups: dict[str, NDArray[np.int64]] = {}
    seen = np.zeros(count, dtype=np.int64)
    for name, members in classes.items():
        index = np.asarray(members)
        if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
            raise ValueError(
                f"{path}: class {_text(name)} has {index.dtype} {list(index.shape)}, expected a list of indices"
            )
        if index.min() < 0 or index.max() >= count:
            raise ValueError(
                f"{path}: class {_text(name)} has indices {index.min()}..{index.max()}, but there are {count} images"
            )
        groups[_text(name)] = index.astype(np.int64)
        np.add.at(seen, index, 1)
    if (seen > 1).any():
        raise ValueError(f"{path}: image {int(np.argmax(seen > 1))} is listed {int(seen.max())} times in class_dict")
    return groups


def _text(name: Any) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)
