"""What the sizes of a network and of its images may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["check_counts", "sides_of"]


def check_counts(network: str, **numbers: Any) -> None:
    """Raises ValueError for a number that is no whole one of at least 1; names it."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{network}: {name} must be a whole number of at least 1, got {value!r}")


def sides_of(network: str, image_size: int | Sequence[int], poolings: int) -> tuple[int, int]:
    """Height and width, in pixels, of images of a size: one number, or two.

    Raises:
        ValueError: it is something else, or nothing would be left of such images after so many poolings by 2.
    """
    height: Any = image_size
    width: Any = image_size
    if isinstance(image_size, (list, tuple)) and len(image_size) == 2:
        height, width = image_size
    for side in (height, width):
        check_counts(network, image_size=side)
        if side < 2**poolings:
            raise ValueError(
                f"{network}: {poolings} poolings need images of {2**poolings} pixels per side or more, got {side}"
            )
    return height, width
