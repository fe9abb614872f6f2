"""Classes divided into train, val and test."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from .imageset import SPLITS, ImageSet, chosen

Shares = tuple[float, float, float]
SHARES: Shares = (0.64, 0.16, 0.20)
"""Of the classes for train, val and test: those of mini-ImageNet's split (64, 16 and 20 of 100)."""


class Splits(NamedTuple):
    """The three parts of a set; no class is in two of them."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


def check_shares(shares: Sequence[float]) -> None:
    """ValueError for anything but three shares that make a whole."""
    if len(shares) != 3 or not all(0 <= s <= 1 for s in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"shares are {tuple(shares)}, expected those of train, val and test, which add up to 1")


def divided(names: Sequence[str], seed: int = 0, shares: Shares = SHARES) -> dict[str, list[str]]:
    """The class names of each split, in the order of `names`.

    In the order of SHA-256 of seed and name the first classes are train, the next ones val, the others test. So a name
    has its place whatever the others are: a class more moves few of them, those at the borders.

    >>> {split: len(part) for split, part in divided([f"bird {k}" for k in range(50)]).items()}
    {'train': 32, 'val': 8, 'test': 10}

    Raises:
        ValueError: the shares do not make a whole.
    """
    check_shares(shares)

    def place(name: str) -> bytes:
        # macOS stores accents as characters of their own: the name is the same.
        return hashlib.sha256(f"{seed}:{unicodedata.normalize('NFC', name)}".encode()).digest()

    order = sorted(names, key=place)
    train, val = round(len(order) * shares[0]), round(len(order) * (shares[0] + shares[1]))
    parts = (set(order[:train]), set(order[train:val]), set(order[val:]))
    return {split: [name for name in names if name in part] for split, part in zip(SPLITS, parts)}


def divide(images: ImageSet, seed: int = 0, shares: Shares = SHARES) -> Splits:
    """A set's classes as three sets, train, val and test, of about 64, 16 and 20 % of them; see `divided`.

    mean and std stay those of the whole set.

    >>> [part.num_classes for part in data.divide(data.load("glyphs"), seed=1)]
    [432, 108, 135]

    Raises:
        ValueError: the shares do not make a whole, or leave a split without a class.
    """
    where = {name: k for k, name in enumerate(images.class_names)}
    parts = divided(images.class_names, seed, shares)
    empty = [split for split, names in parts.items() if not names]
    if empty:
        raise ValueError(
            f"divide: {images.num_classes} classes in shares of {tuple(shares)} leave none for {empty[0]}: take other "
            "shares or more classes"
        )
    return Splits(*(chosen(images, [where[n] for n in names], split) for split, names in parts.items()))
