"""How much memory a set of images takes, said before it is taken."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

_log = logging.getLogger(__name__)
_MEMORY = Path("/proc/meminfo")


def size_text(images: int, size: tuple[int, int], channels: int) -> str:
    """The memory of so many images, in words.

    >>> size_text(1200, (84, 84), 3)
    '1,200 images of 84x84x3, 24.2 MiB'
    """
    mebibytes = images * math.prod(size) * channels / 2**20
    told = f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
    return f"{images:,} images of {size[0]}x{size[1]}x{channels}, {told}"


def check_room(what: str, images: int, size: tuple[int, int], channels: int, copies: int = 1) -> None:
    """Say in the log what `images` take as uint8.

    copies: how often they are in memory at the worst.

    Raises:
        RuntimeError: the machine has less than that free.
    """
    told = size_text(images, size, channels)
    _log.info("%s: reading %s", what, told)
    free, needed = _free(), copies * images * math.prod(size) * channels
    if free is not None and needed > free:
        held = "" if copies == 1 else f", held {copies} times"
        raise RuntimeError(
            f"{what}: {told}{held}, but {free / 2**30:.1f} GiB of memory are free: take a smaller image size or fewer "
            "pictures"
        )


def _free() -> int | None:
    """Bytes that programs can still take, as Linux says it; None elsewhere."""
    found = re.search(r"^MemAvailable: +(\d+) kB", _MEMORY.read_text(), re.M) if _MEMORY.exists() else None
    return None if found is None else 1024 * int(found[1])
