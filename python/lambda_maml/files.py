"""Files that are either whole or absent: everything is written beside its place and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` (made if absent); rename it to `path` if the block succeeds.

    The temporary name keeps the suffix of `path`. If the block raises, the temporary file is removed and `path` stays
    as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written(path: str | Path) -> Iterator[None]:
    """Name the file in an OSError of the block that writes it, and say what is left."""
    try:
        yield
    except OSError as error:
        left = "the file as it was before is still there" if Path(path).exists() else "there is no earlier one"
        named = OSError(
            f"{path}: cannot be written ({error.strerror or error}): make room or name another folder; {left}"
        )
        named.errno = error.errno
        raise named from error


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files that killed processes left beside `path`; no other process may be writing it."""
    path = Path(path)
    for part in path.parent.glob(f".{path.stem}.*{path.suffix}"):
        if part.name.removeprefix(f".{path.stem}.").removesuffix(path.suffix).isdigit():
            part.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN or infinity, which JSON has no word for."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with written(path), atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises FileNotFoundError, or ValueError that names the file and the place of the fault."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a JSON file (byte {error.start} is not UTF-8)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file (line {error.lineno}, column {error.colno}: {error.msg})") from error
