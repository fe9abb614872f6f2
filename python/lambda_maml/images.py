"""Folders of images as support and query sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, by name."""
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Class name -> image files, one sub-folder a class, by name. Raises ValueError for a folder without images."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {folder.name: image_files(folder) for folder in folders}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise ValueError(f"{root / empty[0]}: no image in this class folder (known endings: {' '.join(SUFFIXES)})")
    return found


def read_images(files: list[Path], network: Mapping[str, Any], dataset: Mapping[str, Any], *, invert: bool) -> Tensor:
    """Images as float32 [n, C, H, W], resized (Lanczos) to the network's size and normalised as its training set was.

    network: a config with in_channels (1: grey, 3: RGB) and image_size. dataset: mean and std, a value a channel.
    invert: turn light paper dark, since the grey sets have high ink. Raises ValueError that names an unreadable file.
    """
    from PIL import Image, UnidentifiedImageError

    channels, size = network["in_channels"], network["image_size"]
    pixels = np.empty((len(files), size, size, channels), np.uint8)
    for index, file in enumerate(files):
        try:
            with Image.open(file) as image:
                flat = image.convert("RGBA")
                paper = Image.new("RGBA", flat.size, "white")
                paper.alpha_composite(flat)
                picture = paper.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.LANCZOS)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file}: not a readable image ({error})") from error
        pixels[index] = np.asarray(picture).reshape(size, size, channels)
    x = torch.from_numpy(255 - pixels if invert else pixels).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(dataset[key], dtype=torch.float32).view(-1, 1, 1) for key in ("mean", "std"))
    return ((x - mean) / std).contiguous()
