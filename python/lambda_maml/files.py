"""JSON files, folders that can be written to, and what is said of a file that cannot."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lambda_kernels.files import atomic, remove_leftovers

__all__ = ["atomic", "parse_json", "read_json", "remove_leftovers", "try_folder", "write_json", "written"]


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


def try_folder(*paths: str | Path) -> None:
    """Make the folders of files that will be written and write to each, before the work begins that the files are of.

    Raises:
        OSError: a folder cannot be made or written to, or one of the paths is a folder itself; names it.
    """
    for path in map(Path, paths):
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(None, "it is a folder")
            with tempfile.TemporaryFile(dir=path.parent):
                pass


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN or infinity, which JSON has no word for."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with written(path), atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none, or holds a number that is not finite; names the file and the place of the fault.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a JSON file (byte {error.start} is not UTF-8)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for another text, for numbers that no float holds, and for lists in
    lists in lists without an end."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"it holds {digits[:20]}, which is no finite number")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)
