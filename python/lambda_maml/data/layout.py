"""Where a set's files lie under the folder that the user names, and what else lies there that is no part of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..say import say_once

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
"""Endings of the picture files that are read, in lower case."""

_OTHERS = frozenset(".avif .cr2 .dng .heic .heif .ico .jp2 .jxl .nef .pbm .psd .svg .tga .xcf".split())
"""Endings of pictures that are not read."""

LEFTOVERS = frozenset(
    (
        "__macosx", "icon\r",  # macOS
        "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",  # Windows
        "@eadir", "#recycle", "#snapshot",  # Synology
        "lost+found", "__pycache__",
    )
)  # fmt: skip
"""Names, in lower case, that systems leave in folders, beside all that begin with a dot."""


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without hidden files and what macOS, Windows, Synology and Jupyter leave there.

    >>> visible(Path("Greek"))  # holds .DS_Store, .ipynb_checkpoints/, __MACOSX/, Thumbs.db and two characters
    [PosixPath('Greek/character01'), PosixPath('Greek/character02')]
    """
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in LEFTOVERS)


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, by name."""
    return [path for path in visible(folder) if path.is_dir()]


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, by name, without hidden ones. Pictures of a kind that is not read are said once."""
    found = visible(folder)
    files = [path for path in found if path.suffix.lower() in SUFFIXES and path.is_file()]
    if files and (left := [path for path in found if path.suffix.lower() in _OTHERS]):
        kinds = " ".join(SUFFIXES)
        say_once(f"{folder}: left out {len(left)} pictures, such as {left[0].name}: convert them to one of {kinds}")
    return files


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Class name -> image files, one sub-folder per class, by name, without hidden ones (`visible`).

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


def homes(root: Path, names: Sequence[str]) -> list[Path]:
    """`root` itself and the folders in it that bear one of `names`, whatever their case, dashes and underscores."""
    if not root.is_dir():
        return [root]
    wanted = [_plain(name) for name in names]
    found = [path for path in subfolders(root) if _plain(path.name) in wanted]
    return [root, *sorted(found, key=lambda path: wanted.index(_plain(path.name)))]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def find(root: Path, folders: Sequence[str], names: Sequence[str]) -> Path | None:
    """The first of the files or folders `names` that exists in a home."""
    return next((home / name for home in homes(root, folders) for name in names if (home / name).exists()), None)


def listing(root: Path, folders: Sequence[str]) -> str:
    """What lies in `root` and the set's folders in it, for an error message."""
    if not root.exists():
        return f"{root} does not exist"
    if not root.is_dir():
        return f"{root} is not a folder"
    parts = []
    for home in homes(root, folders):
        names = [path.name + ("/" if path.is_dir() else "") for path in visible(home)]
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        parts.append(f"{home} holds {', '.join(names[:12]) or 'nothing'}{more}")
    return "; ".join(parts)
