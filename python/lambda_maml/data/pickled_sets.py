"""The sets that users keep as pickles: CIFAR-FS, FC100, mini-ImageNet and tieredImageNet."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import unpickle
from .grouping import Groups, by_index, by_label, text
from .imageset import ImageSet
from .layout import find, listing
from .mistaken import mistaken
from .pictures import read_picture


class _Set(NamedTuple):
    folders: tuple[str, ...]  # names under root, besides root itself; case, dashes and underscores do not matter
    files: tuple[str, ...]  # with {split}; the first that is there
    expected: str  # the same for messages
    size: int  # pixels per side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Statistics: of the training images of CIFAR-100, and of ImageNet, as commonly used with these sets.
_CIFAR = (32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_IMAGENET = (84, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SETS = {
    "cifar_fs": _Set(
        ("cifar-fs", "cifarfs"), ("CIFAR_FS_{split}.pickle",), "CIFAR_FS_{train,val,test}.pickle", *_CIFAR
    ),
    "fc100": _Set(("fc100",), ("FC100_{split}.pickle",), "FC100_{train,val,test}.pickle", *_CIFAR),
    "mini_imagenet": _Set(
        ("mini-imagenet",),
        (
            "mini-imagenet-cache-{split}.pkl",
            "miniImageNet_category_split_train_phase_{split}.pickle",  # train; its val and test are of train classes
            "miniImageNet_category_split_{split}.pickle",
        ),
        "mini-imagenet-cache-{train,val,test}.pkl or miniImageNet_category_split_{train_phase_train,val,test}.pickle",
        *_IMAGENET,
    ),
    "tiered_imagenet": _Set(
        ("tiered-imagenet",),
        ("{split}_images_png.pkl", "{split}_images.npz"),
        "{train,val,test}_images_png.pkl or {train,val,test}_images.npz, with {train,val,test}_labels.pkl",
        *_IMAGENET,
    ),
}
_IMAGE_KEYS = ("image_data", "data")
_MOST_PACKED = 50  # no photograph becomes smaller by as much
_LABEL_KEYS = ("labels", "label", "fine_labels")  # the last: CIFAR-100's own


def layout(name: str) -> str:
    """The files of a set, for messages."""
    kind = _SETS[name]
    return f"{kind.expected}, in root itself or in a folder {kind.folders[0]}/"


def load(name: str, split: str, root: Path) -> ImageSet:
    """One split from its pickle, for tieredImageNet from its images and its labels.

    The pickle is a dict of images and classes, S being 32, for mini-ImageNet and tieredImageNet 84:
        `data` or `image_data`: [N, S, S, 3], a list of [S, S, 3], [N, 3, S, S], or for 32x32 sets [N, 3072] in
            CIFAR-100's own order, that is the red plane row by row, then green, then blue. uint8, or other whole
            numbers in 0..255, or floats in 0..1 or 0..255.
        `labels`, `label` or `fine_labels`: N whole numbers or names; or `class_dict`: indices by class name.

    tieredImageNet's images are PNGs (`*_images_png.pkl`, a list) or an array in OpenCV's channel order, blue first
    (`images` in `*_images.npz`), both as Ren et al. (2018) made them; its labels a dict with `label_specific` and the
    names `label_specific_str`, or with `labels`.

    >>> load("cifar_fs", "val", Path("DATA")).num_classes
    16

    Raises:
        FileNotFoundError: no such file; the message shows the expected layout and what was found.
        ValueError: the content is not of that form, or not a pickle of arrays and plain containers.
    """
    kind = _SETS[name]
    names = [file.format(split=s) for file in kind.files for s in _spellings(file, split)]
    path = find(root, kind.folders, names)
    if path is None:
        raise FileNotFoundError(
            f"{name}: no {names[0]}. Expected under root: {layout(name)}. Found: {listing(root, kind.folders)}"
        )
    if name == "tiered_imagenet":
        pixels, groups = _tiered(path, kind.size)
    else:
        pixels, groups = _together(path, kind.size)
    if not groups:
        raise ValueError(f"{path}: holds no image")
    order = np.concatenate(list(groups.values()))
    counts = tuple(len(index) for index in groups.values())
    return ImageSet(name, split, pixels(order), counts, tuple(groups), kind.mean, kind.std)


def _spellings(file: str, split: str) -> tuple[str, ...]:
    if "train_phase" in file:
        return ("train",) if split == "train" else ()
    return (split, "validation") if split == "val" else (split,)


Pick = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""Images [n, S, S, 3] of the indices [n]."""


def _together(path: Path, size: int) -> tuple[Pick, Groups]:
    """Images and groups of one file."""
    content = _dict(path)
    image_key = next((key for key in _IMAGE_KEYS if key in content), None)
    class_key = next((key for key in ("class_dict", *_LABEL_KEYS) if key in content), None)
    if image_key is None or class_key is None:
        raise ValueError(
            f"{path}: has the keys {sorted(map(str, content))}, expected data and labels, or image_data and class_dict"
        )
    try:
        pixels = _pixels(content[image_key], size)
        group = by_index if class_key == "class_dict" else by_label
        groups = group(content[class_key], len(pixels))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    def pick(order: NDArray[np.int64]) -> NDArray[np.uint8]:
        return pixels if np.array_equal(order, np.arange(len(pixels))) else pixels[order]

    return pick, groups


def _dict(path: Path) -> Mapping[str, Any]:
    content = unpickle.load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict")
    return {text(key): value for key, value in content.items()}


def _pixels(data: Any, size: int) -> NDArray[np.uint8]:
    """Images of any of the admitted forms as uint8 [N, size, size, 3], contiguous."""
    expected = f"expected uint8 or float [N, {size}, {size}, 3]"
    if isinstance(data, (list, tuple)) and all(isinstance(image, np.ndarray) for image in data):
        shapes = {image.shape for image in data}
        if len(shapes) > 1:
            raise ValueError(f"images have the shapes {sorted(map(list, shapes))}, {expected}")
        data = np.stack(data) if data else np.empty((0, size, size, 3), np.uint8)
    if not isinstance(data, np.ndarray):
        raise ValueError(f"images are {type(data).__name__}, {expected}")
    got = f"images are {data.dtype} {list(data.shape)}"
    if data.shape[1:] == (3 * size * size,) and size == 32:
        data = data.reshape(-1, 3, size, size)
    if data.shape[1:] == (3, size, size):
        data = data.transpose(0, 2, 3, 1)
    if data.shape[1:] != (size, size, 3) or data.dtype.kind not in "uif":
        raise ValueError(f"{got}, {expected}")
    if data.dtype == np.uint8 or not len(data):
        return np.ascontiguousarray(data, dtype=np.uint8)
    low, high = float(data.min()), float(data.max())
    if not (low >= 0 and high <= 255):  # false for NaN too
        raise ValueError(f"pixels range from {low} to {high}, expected 0..255 or 0..1")
    scale = 255 if data.dtype.kind == "f" and high <= 1 else 1
    return np.concatenate(
        [np.rint(part * scale).astype(np.uint8) for part in np.array_split(data, len(data) // 1024 + 1)]
    )


def _tiered(path: Path, size: int) -> tuple[Pick, Groups]:
    """Images and groups of tieredImageNet: the images' file and, beside it, the labels'."""
    labels = path.with_name(path.name.partition("_images")[0] + "_labels.pkl")
    if not labels.exists():
        raise FileNotFoundError(
            f"tiered_imagenet: no {labels.name} beside {path}. Expected under root: {layout('tiered_imagenet')}. "
            f"Found: {listing(path.parent, ())}"
        )
    images = _blue_first(path) if path.suffix == ".npz" else unpickle.load(path)
    if not isinstance(images, (list, np.ndarray)):
        raise ValueError(f"{path}: holds a {type(images).__name__}, expected a list of PNGs")
    if isinstance(images, np.ndarray) and images.shape[1:] != (size, size, 3):
        got = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{path}: images are {got}, expected uint8 [N, {size}, {size}, 3]")
    content = _dict(labels)
    key = next((key for key in ("label_specific", *_LABEL_KEYS) if key in content), None)
    if key is None:
        raise ValueError(f"{labels}: has the keys {sorted(map(str, content))}, expected label_specific or labels")
    try:
        names = content.get("label_specific_str", ()) if key == "label_specific" else ()
        groups = by_label(content[key], len(images), names)
    except ValueError as error:
        raise ValueError(f"{labels}: {error}") from error

    def pick(order: NDArray[np.int64]) -> NDArray[np.uint8]:
        pixels = np.empty((len(order), size, size, 3), np.uint8)
        for row, index in enumerate(order.tolist()):
            if isinstance(images, np.ndarray):
                pixels[row] = images[index, :, :, ::-1]
            else:
                pixels[row] = _png(images[index], size, f"{path}: image {index}")
                images[index] = None  # the whole training set is 6 GB as PNGs
        return pixels

    return pick, groups


def _blue_first(path: Path) -> NDArray[Any]:
    """`images` of a .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.file_size > _MOST_PACKED * max(part.compress_size, 2**20) for part in archive.infolist()):
                raise ValueError("it unpacks to far more than pictures do")
        with np.load(path) as file:
            images: NDArray[Any] = file["images"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a NumPy archive with `images`: {mistaken(path) or f'{error}; copy it again'}"
        ) from error
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images are {images.dtype}, expected uint8")
    return images


def _png(stored: Any, size: int, what: str) -> NDArray[np.uint8]:
    """An encoded picture, as bytes, a byte array [n] or [n, 1], or text of Python 2, decoded to [size, size, 3]."""
    if isinstance(stored, str):
        stored = stored.encode("latin1")
    if isinstance(stored, np.ndarray) and stored.dtype == np.uint8:
        stored = stored.tobytes()
    if not isinstance(stored, (bytes, bytearray)):
        raise ValueError(f"{what} is a {type(stored).__name__}, expected an encoded PNG")
    try:
        picture = read_picture(bytes(stored), "RGB")
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    if picture.shape != (size, size, 3):
        raise ValueError(f"{what} is {picture.shape[0]}x{picture.shape[1]}, expected {size}x{size}")
    return picture
