"""What was measured: for each call of a device its fastest backend, kept in a file from one process to the next."""

from __future__ import annotations

import logging
import os
import re
import threading
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from ..files import atomic, one_at_a_time

__all__ = ["Choice", "Table", "cache_folder", "table_of"]

_log = logging.getLogger("lambda_kernels")


class Choice(msgspec.Struct, frozen=True):
    """Who runs a call, and why: median milliseconds of those that were timed, and what the others said."""

    chosen: str
    milliseconds: dict[str, Annotated[float, msgspec.Meta(gt=0)]]
    excluded: dict[str, str]

    @property
    def reason(self) -> str:
        """One line for people."""
        times = ", ".join(f"{n} {t:.4f} ms" for n, t in sorted(self.milliseconds.items(), key=lambda item: item[1]))
        others = "; ".join(f"{name}: {why}" for name, why in self.excluded.items())
        return f"{times or 'not measured'}{'; ' if others else ''}{others}"


class _Stored(msgspec.Struct):
    """The form of the file."""

    choices: dict[str, Choice]


class Table:
    """The choices of one device, kept in a file; one that cannot be read or written is said once and done without."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.choices: dict[str, Choice] = {}
        self._lock = threading.Lock()
        if path is not None:
            self.choices.update(self._read())

    def _read(self) -> dict[str, Choice]:
        assert self.path is not None
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=_Stored).choices
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            _log.warning("the choices in %s cannot be read (%s): they are measured again", self.path.name, error)
            return {}

    def add(self, key: str, choice: Choice) -> None:
        """Keep a choice, in the file too; other processes' choices that came there in the meantime are kept."""
        with self._lock:
            self.choices[key] = choice
            if self.path is None:
                return
            try:
                with one_at_a_time(self.path):
                    both = _Stored(dict(sorted({**self._read(), **self.choices}.items())))
                    with atomic(self.path) as part:
                        part.write_bytes(msgspec.json.format(msgspec.json.encode(both), indent=1))
            except OSError as error:
                _log.warning("the choices are kept in this process only: %s", error)
                self.path = None


def cache_folder() -> Path:
    """Where the tables lie."""
    if named := os.environ.get("LAMBDA_KERNELS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lambda-kernels"


def table_of(device: torch.device) -> Table:
    """The table of a CUDA device in these versions of torch, triton and this package."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    from .. import __version__  # at the top it would be a circle

    parts = (torch.cuda.get_device_name(device), "torch", torch.__version__, "triton", triton, "lk", __version__)
    return Table(cache_folder() / f"choices-{re.sub(r'[^A-Za-z0-9.]+', '-', '-'.join(parts))}.json")
