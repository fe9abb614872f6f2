"""Any map-style data set of labelled pictures as an `ImageSet`: torch's, torchvision's, Hugging Face's `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..progress import Progress
from .grouping import Groups, by_label
from .imageset import ImageSet, statistics
from .pictures import shown, without_colour
from .room import check_room

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = ["from_dataset"]

IMAGE_COLUMNS = ("image", "img", "images", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")


def from_dataset(
    dataset: Any, labels: Any = None, image_size: int | None = None, channels: int | None = None, *,
    name: str | None = None, split: str = "train", invert: bool = False, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, progress: Progress | None = None,
) -> ImageSet:  # fmt: skip
    """All images of a map-style data set, class by class; `divide` makes train, val and test sets of it.

    An item is (image, label), as torchvision has it, or a dict with both, as Hugging Face's `datasets` have it. An
    image is a picture of Pillow's, or a tensor or array [C, H, W], [H, W, C] or [H, W]: uint8, or floats in 0..1. Give
    the data set without augmentation and without normalisation.

    >>> pairs = [(torch.rand(3, 32, 32), k % 4) for k in range(20)]
    >>> images = data.from_dataset(pairs)
    >>> images.num_classes, images.counts, images.image_shape
    (4, (5, 5, 5, 5), (3, 32, 32))

    Args:
        labels: one per image, numbers or names. Default: the data set's `targets` or `labels`, or its label column,
            which are there without an image being decoded; else the items' own.
        image_size: pixels per side; images are squeezed into this square with Lanczos. Default: that of all images.
        channels: 1 or 3. Default: those of the first image.
        name, split: of the set, for messages and checkpoints. Default of the name: the data set's class.
        invert: turn light paper dark, so that ink is high.
        mean, std: one value per channel, as in `ImageSet`. Default: 0 and 1 for grey, those of the images for RGB; give
            the train set's for val and test sets.

    Raises:
        TypeError: not a map-style data set, or an image of an unknown kind.
        ValueError: an image of another size than the first or with values out of range, labels that do not fit.
        RuntimeError: the images do not fit in memory.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"from_dataset: {type(dataset).__name__} has no len() and no items by number: it is not map-style"
        )
    if channels not in (None, 1, 3):
        raise ValueError(f"from_dataset: channels is {channels}, expected 1 (grey) or 3 (RGB)")
    if (mean is None) != (std is None):
        raise ValueError(f"from_dataset: mean is {mean} and std {std}: give both or none")
    count = len(dataset)
    if not count:
        raise ValueError(f"from_dataset: {type(dataset).__name__} is empty")
    items = _Items(dataset, labels)
    known = items.labels is not None
    # With labels that are known beforehand each image is put in its place; else all are moved once.
    order = _class_major(items.groups(items.labels, count)) if known else np.arange(count)
    form = _Form(_picture(items[int(order[0])][0], f"from_dataset: image {order[0]}"), image_size, channels)
    copies = 1 if known else 2
    check_room(f"from_dataset: {type(dataset).__name__}", count, (form.size, form.size), form.channels, copies)
    pixels: NDArray[np.uint8] = np.empty((count, form.size, form.size, form.channels), np.uint8)
    read = []
    for row, place in enumerate(order.tolist()):
        image, label = items[place]
        pixels[row] = form.pixels(image, f"from_dataset: image {place}")
        read.append(label)
        if progress is not None:
            progress(row + 1, count, "images")
    groups = items.groups(items.labels if known else read, count)
    if not known:
        pixels = pixels[_class_major(groups)]
    if invert:
        np.subtract(255, pixels, out=pixels)
    found = statistics(pixels) if mean is None or std is None else (tuple(mean), tuple(std))
    counts = tuple(len(index) for index in groups.values())
    return ImageSet(name or type(dataset).__name__, split, pixels, counts, tuple(groups), *found)


def _class_major(groups: Groups) -> NDArray[np.int64]:
    return np.concatenate(list(groups.values()))


class _Form:
    """Size and channels of all images: as asked, else the first image's, which all must then have."""

    def __init__(self, first: Picture, image_size: int | None, channels: int | None) -> None:
        self.fixed_size, self.fixed_channels = image_size is None, channels is None
        if image_size is None and first.width != first.height:
            raise ValueError(
                f"from_dataset: the first image is {first.height}x{first.width}, not a square: give image_size"
            )
        self.size = image_size or first.width
        self.channels = channels or (1 if without_colour(first) else 3)

    def pixels(self, image: Any, what: str) -> NDArray[np.uint8]:
        """An image as uint8 [size, size, channels]."""
        picture, size = _picture(image, what), self.size
        if self.fixed_size and picture.size != (size, size):
            raise ValueError(
                f"{what} is {picture.height}x{picture.width}, the first one {size}x{size}: give image_size"
            )
        if self.fixed_channels and self.channels == 1 and not without_colour(picture):
            raise ValueError(f"{what} has colour, the first one has none: give channels")
        return shown(picture, "L" if self.channels == 1 else "RGB", (size, size)).reshape(size, size, self.channels)


class _Items:
    """(image, label) of a data set's items, and what is known of its labels without them."""

    def __init__(self, dataset: Any, labels: Any) -> None:
        self.dataset, self.names = dataset, list(getattr(dataset, "classes", None) or ())
        columns = getattr(dataset, "column_names", None)
        first = None
        if columns is None:
            first = dataset[0]
            columns = list(first) if isinstance(first, Mapping) else None
        self.columns = None if columns is None else self._chosen(columns, labels is None)
        self.given = labels is not None
        self.labels = self._known() if labels is None else labels

    def _chosen(self, columns: list[str], labelled: bool) -> tuple[str, str | None]:
        image, label = (next((c for c in names if c in columns), None) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
        if image is None or (labelled and label is None):
            raise ValueError(
                f"from_dataset: items have {', '.join(map(str, columns))}, expected image and label: rename the columns"
                ", or give labels="
            )
        return image, label

    def _known(self) -> Any:
        """Labels that the data set has beside its items; none where it changes them on the way to an item."""
        if self.columns is not None and hasattr(self.dataset, "features"):  # Hugging Face's
            column = self.columns[1]
            self.names = list(getattr(self.dataset.features[column], "names", None) or ())
            return self.dataset[column][:]
        if getattr(self.dataset, "target_transform", None) is not None:
            return None
        return next((v for k in ("targets", "labels") if (v := getattr(self.dataset, k, None)) is not None), None)

    def groups(self, labels: Any, count: int) -> Groups:
        """Which images belong to which class."""
        plain = [v.item() if isinstance(v, torch.Tensor) else v for v in labels] if isinstance(labels, list) else labels
        try:
            return by_label(plain, count, self.names)
        except ValueError as error:
            raise ValueError(f"from_dataset: {error}") from error

    def __getitem__(self, place: int) -> tuple[Any, Any]:
        item = self.dataset[place]
        if self.columns is not None:
            image, label = self.columns
            return item[image], None if label is None else item.get(label)
        if isinstance(item, (tuple, list)) and len(item) >= 2:
            return item[0], item[1]
        if self.given:
            return (item[0] if isinstance(item, (tuple, list)) else item), None
        raise TypeError(
            f"from_dataset: item {place} is a {type(item).__name__}, expected (image, label) or a dict of both: else "
            "give labels="
        )


def _picture(image: Any, what: str) -> Picture:
    """An image of any known kind as a picture of Pillow's."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (torch.Tensor, np.ndarray)):
        raise TypeError(f"{what} is a {type(image).__name__}, expected a picture of Pillow's, a tensor or an array")
    tensor = isinstance(image, torch.Tensor)
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
        array = np.moveaxis(array, 0, -1) if first and (tensor or not last) else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise ValueError(f"{what} has the shape {list(image.shape)}, expected [C, H, W], [H, W, C] or [H, W]")
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array, what)))


def _eight_bits(array: NDArray[Any], what: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "buif":
        raise ValueError(f"{what} is of {array.dtype}, expected uint8 or floats in 0..1")
    low, high = float(array.min()), float(array.max())
    top = 255 if array.dtype.kind in "ui" else 1
    if not (low >= 0 and high <= top):  # false for NaN too
        raise ValueError(
            f"{what} has values from {low:.3g} to {high:.3g}, expected 0..{top}: give the data set without its "
            "normalisation"
        )
    return np.rint(array.astype(np.float64) * (255 // top)).astype(np.uint8)
