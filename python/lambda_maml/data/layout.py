"""Where a set's files lie under the folder that the user names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def homes(root: Path, folders: Iterable[str]) -> list[Path]:
    """`root` itself and those of `folders` that exist in it."""
    return [root, *(root / name for name in folders if (root / name).is_dir())]


def find(root: Path, folders: Iterable[str], names: Sequence[str]) -> Path | None:
    """The first of the files or folders `names` that exists in a home."""
    return next((home / name for home in homes(root, folders) for name in names if (home / name).exists()), None)


def listing(root: Path, folders: Iterable[str]) -> str:
    """What lies in `root` and the set's folders in it, for an error message."""
    if not root.exists():
        return f"{root} does not exist"
    if not root.is_dir():
        return f"{root} is not a folder"
    parts = []
    for home in homes(root, folders):
        names = sorted(path.name + ("/" if path.is_dir() else "") for path in home.iterdir())
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        parts.append(f"{home} holds {', '.join(names[:12]) or 'nothing'}{more}")
    return "; ".join(parts)
