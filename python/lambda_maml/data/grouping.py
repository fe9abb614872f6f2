"""Which images belong to which class, from labels or from lists of indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Groups = dict[str, NDArray[np.int64]]
"""Class name: indices of its images."""


def by_label(labels: Any, count: int, names: Sequence[str] = ()) -> Groups:
    """Groups of `count` labels, whole numbers (floats too) or texts, [N] or [N, 1]; classes in the order of the labels.

    names: class k's name, where the labels are numbers below their count; else the label itself is the name.

    >>> by_label([9, 4, 9], 3)
    {'4': array([1]), '9': array([0, 2])}

    Raises ValueError for labels of another kind or number.
    """
    values = _flat(labels)
    if values.dtype.kind == "f" and np.array_equal(values, np.rint(values)):
        values = values.astype(np.int64)
    if values.shape != (count,) or values.dtype.kind not in "iuSU":
        raise ValueError(
            f"labels are {values.dtype} {list(values.shape)}, expected {count} whole numbers or names, one per image"
        )
    found, inverse = np.unique(values, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(inverse, minlength=len(found)))[:-1]) if count else []
    if values.dtype.kind in "iu" and count and 0 <= found[0] and found[-1] < len(names):
        found = np.array([text(names[k]) for k in found])
        if len(set(found.tolist())) < len(found):  # ImageNet has two classes "crane" and two "maillot"
            found = np.array([f"{name} ({k})" for name, k in zip(found, np.unique(values))])
    return {text(name): part for name, part in zip(found.tolist(), parts)}


def by_index(classes: Any, count: int) -> Groups:
    """Groups from a dict of index lists, ranges or arrays into `count` images; no image may be in two classes.

    >>> by_index({"n01": range(2), "n02": [3, 2]}, 4)
    {'n01': array([0, 1]), 'n02': array([3, 2])}

    Raises ValueError for another form or an index out of range.
    """
    if not isinstance(classes, Mapping):
        raise ValueError(f"class_dict is a {type(classes).__name__}, expected a dict of index lists")
    groups: Groups = {}
    seen = np.zeros(count, dtype=np.int64)
    for name, members in classes.items():
        if isinstance(members, range) and len(members) > count:
            raise ValueError(f"class {text(name)} has {len(members)} indices, but there are {count} images")
        index = _flat(sorted(members) if isinstance(members, (set, frozenset)) else members)
        if index.dtype.kind == "f" and np.array_equal(index, np.rint(index)):
            index = index.astype(np.int64)
        if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
            raise ValueError(f"class {text(name)} has {index.dtype} {list(index.shape)}, expected a list of indices")
        if index.min() < 0 or index.max() >= count:
            raise ValueError(
                f"class {text(name)} has indices {index.min()}..{index.max()}, but there are {count} images"
            )
        if text(name) in groups:
            raise ValueError(f"class {text(name)} is listed twice, as text and as bytes")
        groups[text(name)] = index.astype(np.int64)
        np.add.at(seen, groups[text(name)], 1)
    if (seen > 1).any():
        raise ValueError(
            f"image {int(np.argmax(seen > 1))} is listed {int(seen.max())} times in class_dict, expected once"
        )
    return groups


def _flat(values: Any) -> NDArray[Any]:
    """An array; [N, 1] and [1, N] become [N]."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"labels or indices are not one list ({error})") from error
    return array.reshape(-1) if array.ndim == 2 and 1 in array.shape else array


def text(name: Any) -> str:
    """A class name as text."""
    return name.decode("latin1") if isinstance(name, bytes) else str(name)
