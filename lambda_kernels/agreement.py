"""When a result is right: one rule and one table of tolerances, for backends, `select`, the benchmarks and the tests.

The rule: a result's error against the same computation in float64 is at most twice the error of stock PyTorch in the
result's own dtype, plus a small term per dtype. The small term is there because stock PyTorch may be exact by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DRAWS",
    "FACTOR",
    "TOLERANCES",
    "Errors",
    "Tolerance",
    "apart",
    "distance",
    "element_errors",
    "errors",
    "tolerance",
    "within",
]

FACTOR = 2.0  # an error may be this many times that of stock PyTorch
ROUNDINGS = 8  # the small term of one operation, in roundings of the largest value
# Where rounding turns the choice between two pixels of a pooling window, or the sign before a ReLU, two right results
# in low precision part by more than their digits, in stock PyTorch too. Such inputs are rare and a wrong kernel fails
# on all inputs: a result is wrong when it is wrong on so many of them.
DRAWS = 3


class Tolerance(NamedTuple):
    """What one dtype allows. `loop` is a term of the rule; the others are for two results with no truth beside them."""

    loop: float  # an inner loop of some steps: Euclidean, in units of the length that is compared
    pair: float  # one operation by two backends: Euclidean, in units of the second result's length
    operation: float  # one operation, element by element: relative, and absolute beside values of about 1
    gradient: float  # gradients of a block, through batch statistics, element by element
    steps: float  # an inner loop of some steps, element by element


# `pair` is above what TF32 and a half-precision sum in another order do, and far below what a wrong kernel does.
TOLERANCES = {
    torch.float64: Tolerance(loop=1e-9, pair=1e-9, operation=1e-10, gradient=1e-8, steps=1e-9),
    torch.float32: Tolerance(loop=1e-3, pair=1e-2, operation=1e-5, gradient=1e-4, steps=1e-3),
    torch.float16: Tolerance(loop=4e-3, pair=2e-2, operation=2e-2, gradient=3e-2, steps=5e-2),
    torch.bfloat16: Tolerance(loop=3e-2, pair=5e-2, operation=3e-2, gradient=5e-2, steps=1e-1),
}


class Errors(NamedTuple):
    """Distances from the float64 result: of the result in question, of stock PyTorch, and what the rule allows."""

    mine: float
    stock: float
    limit: float

    @property
    def agree(self) -> bool:
        """Does the rule hold? A result that is not a number never agrees."""
        return self.mine <= self.limit


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The table's row of a dtype; of a complex one, that of its parts. TypeError where there is none."""
    row = TOLERANCES.get(dtype.to_real())
    if row is None:
        raise TypeError(f"agreement: {dtype} has no tolerance, expected one of {', '.join(map(str, TOLERANCES))}")
    return row


def within(dtype: torch.dtype, what: str = "operation") -> dict[str, Any]:
    """rtol and atol for `torch.testing.assert_close`; `what` is "operation", "gradient" or "steps"."""
    allowed = getattr(tolerance(dtype), what)
    return {"rtol": allowed, "atol": allowed}


def distance(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Euclidean, over all values of all tensors, in float64.

    >>> distance([torch.tensor([3.0, 0.0])], [torch.tensor([0.0, 4.0])])
    5.0
    """
    return float(sum((_double(f) - _double(t)).abs().square().sum() for f, t in zip(found, truth, strict=True))) ** 0.5


def errors(
    found: Sequence[Tensor], stock: Sequence[Tensor], truth: Sequence[Tensor], length: float | None = None
) -> Errors:
    """The rule for an inner loop or several results: Euclidean distances over all tensors, in units of `length`.

    found, stock: results in one dtype, of the same shapes; truth: in float64. `length`: by default that of the truth.

    >>> truth = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    >>> errors([truth[0].float()], [truth[0].float()], truth).agree
    True
    """
    unit = (distance(truth, [torch.zeros_like(t) for t in truth]) if length is None else length) or 1.0
    theirs = distance(stock, truth) / unit
    allowed = max((tolerance(f.dtype).loop for f in found), default=0.0)
    return Errors(distance(found, truth) / unit, theirs, FACTOR * theirs + allowed)


def element_errors(found: Tensor, stock: Tensor, truth: Tensor, terms: int = 1) -> Errors:
    """The rule for one operation, by the largest error of an element; all of one shape, found and stock of one dtype.

    `terms`: length of a convolution's sums, which ATen takes in another order in channels-last.
    """
    truth = truth.detach()
    mine, theirs = (float((_double(t) - truth).abs().max()) for t in (found, stock))
    rounding = torch.finfo(found.dtype).eps * max(float(truth.abs().max()), 1e-30)
    return Errors(mine, theirs, FACTOR * theirs + max(ROUNDINGS, terms**0.5) * rounding)


def apart(found: Tensor, other: Tensor) -> float | None:
    """How far two results of one operation in one dtype are apart, in units of the other's length; None where that is
    no more than rounding, or where the other is not a number itself."""
    length = float(torch.linalg.vector_norm(other, dtype=_wide(other)))
    off = float(torch.linalg.vector_norm(found - other, dtype=_wide(other)))
    if length != length or off <= tolerance(other.dtype).pair * length + 1e-30:
        return None
    return off / max(length, 1e-30)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide(tensor))
