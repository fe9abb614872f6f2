"""Folders of images as support and query sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.layout import SUFFIXES, class_folders, image_files, subfolders
from .data.pictures import read_pixels
from .models import image_shape

__all__ = ["class_folders", "image_files", "inverted", "query_files", "read_images"]


def query_files(root: Path) -> list[Path]:
    """The image files in a folder itself and then in its sub-folders, by name, without hidden ones.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: {'is a file: give its folder' if root.is_file() else 'no such folder'}")
    files = [path for folder in (root, *subfolders(root)) for path in image_files(folder)]
    if not files:
        raise ValueError(f"{root}: no image in this folder (known endings: {' '.join(SUFFIXES)})")
    return files


def inverted(shape: Sequence[int], dataset: Mapping[str, Any]) -> bool:
    """Whether pictures are turned, light paper dark, to be like those of training: as the checkpoint's folder of
    pictures was, else for grey images, shape [1, H, W], since the grey sets have high ink."""
    return bool(dataset.get("invert", shape[0] == 1))


def read_images(
    files: Sequence[Path], shape: Sequence[int] | Mapping[str, Any], dataset: Mapping[str, Any], *, invert: bool
) -> Tensor:
    """Images as float32 [n, C, H, W], resized (Lanczos) to a network's size and normalised as its training set was.

    Args:
        files: pictures of any bit depth and EXIF orientation (`data.pictures.read_picture`).
        shape: [C, H, W] of the images that the network takes, C is 1 for grey, 3 for RGB; or the network's settings
            (`models.config_of`), which say it.
        dataset: mean and std, one value per channel.
        invert: turn light paper dark, see `inverted`.

    Raises:
        ValueError: a file is unreadable; the text names it.
    """
    channels, height, width = image_shape(shape) if isinstance(shape, Mapping) else shape
    pixels = read_pixels(files, (height, width), channels, invert=invert)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(dataset[key], dtype=torch.float32).view(-1, 1, 1) for key in ("mean", "std"))
    return ((x - mean) / std).contiguous()
