"""Tensors one behind another in one row of memory, each from a multiple of 64 bytes on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["joined", "lying", "split"]

_BYTES = 64  # a place is as aligned as the widest loads of a CPU or GPU ask for


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """A new row [numbers] with the values of tensors, whose dtypes are promoted to one.

    What lies between two tensors repeats the first value of the one before it.
    """
    dtype = tensors[0].dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    pieces = []
    for t in tensors:
        own = t.reshape(-1)
        gap = _taken(own.numel(), _BYTES // dtype.itemsize) - own.numel()
        pieces += [own, own[:1].expand(gap)] if gap else [own]
    return torch.cat(pieces)


def split(row: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors of these shapes in a row, as views of it."""
    begin = row.storage_offset()
    places = _places(tuple(shapes), _BYTES // row.itemsize)
    return [row.as_strided(shape, strides, begin + at) for shape, strides, at in places]


def lying(tensors: Sequence[Tensor]) -> Tensor | None:
    """The row in which tensors lie as in one that `joined` gives; None where they lie otherwise."""
    first = tensors[0]
    begin = at = first.storage_offset()
    storage = first.untyped_storage()
    for t in tensors:
        same = t.dtype == first.dtype and t.untyped_storage()._cdata == storage._cdata
        if not same or not t.is_contiguous() or t.storage_offset() != at:
            return None
        at += _taken(t.numel(), _BYTES // t.itemsize)
    if at * first.itemsize > storage.nbytes():
        return None
    return first.detach().as_strided((at - begin,), (1,), begin)


@lru_cache(1024)
def _places(shapes: tuple[torch.Size, ...], unit: int) -> list[tuple[torch.Size, tuple[int, ...], int]]:
    """Each tensor's shape, strides and place in a row whose numbers are aligned by `unit`; slices would be slow."""
    found, at = [], 0
    for shape in shapes:
        strides = [1]
        for n in reversed(shape[1:]):
            strides.append(strides[-1] * max(n, 1))
        found.append((shape, tuple(reversed(strides[: len(shape)])), at))
        at += _taken(shape.numel(), unit)
    return found


def _taken(count: int, unit: int) -> int:
    """The numbers up to the next multiple of `unit`."""
    return count + -count % unit
