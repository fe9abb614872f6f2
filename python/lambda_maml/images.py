"""Folders of images as support and query sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.layout import subfolders, visible
from .data.pictures import read_picture
from .models import image_shape

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, by name, without hidden ones."""
    return [path for path in visible(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Class name -> image files, one sub-folder per class, by name, without hidden ones (`data.layout.visible`).

    >>> class_folders(Path("support"))
    {'alpha': [PosixPath('support/alpha/1.png')], 'beta': [PosixPath('support/beta/1.png')]}

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a class folder has no image.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    found = {folder.name: image_files(folder) for folder in subfolders(root)}
    empty = [name for name, files in found.items() if not files]
    if empty:
        folder = root / empty[0]
        names = ", ".join(path.name for path in visible(folder)[:3]) or "nothing"
        raise ValueError(f"{folder}: no image in this class folder, but {names} (known endings: {' '.join(SUFFIXES)})")
    return found


def query_files(root: Path) -> list[Path]:
    """The image files in a folder itself and then in its sub-folders, by name, without hidden ones.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    files = [path for folder in (root, *subfolders(root)) for path in image_files(folder)]
    if not files:
        raise ValueError(f"{root}: no image in this folder (known endings: {' '.join(SUFFIXES)})")
    return files


def read_images(
    files: Sequence[Path], network: Mapping[str, Any], dataset: Mapping[str, Any], *, invert: bool
) -> Tensor:
    """Images as float32 [n, C, H, W], resized (Lanczos) to the network's size and normalised as its training set was.

    Args:
        files: pictures of any bit depth and EXIF orientation (`data.pictures.read_picture`).
        network: a config, which says in_channels (1: grey, 3: RGB) and image_size.
        dataset: mean and std, one value per channel.
        invert: turn light paper dark, since the grey sets have high ink.

    Raises:
        ValueError: a file is unreadable; the text names it.
    """
    channels, height, width = image_shape(network)
    pixels = np.empty((len(files), height, width, channels), np.uint8)
    for index, file in enumerate(files):
        picture = read_picture(Path(file), "L" if channels == 1 else "RGB", (height, width))
        pixels[index] = picture.reshape(height, width, channels)
    x = torch.from_numpy(255 - pixels if invert else pixels).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(dataset[key], dtype=torch.float32).view(-1, 1, 1) for key in ("mean", "std"))
    return ((x - mean) / std).contiguous()
