"""Operands and checks that the tests of the CUDA kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from cases import BlockCase, assert_as_exact
from torch import Tensor

from lambda_kernels.backends.reference import Reference, windows

REFERENCE: Any = Reference()
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RUNNERS = ("emulated", pytest.param("device", marks=pytest.mark.gpu))
T = 3


class Runner(NamedTuple):
    """A backend under test, and the device on which its tensors lie."""

    backend: Any  # Cuda
    device: str


def double(*tensors: Tensor) -> Any:
    """Copies in float64 on the CPU, where the truth is computed."""
    return [t.cpu().double() if t.is_floating_point() else t.cpu() for t in tensors]


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def like_memory_of_others(x: Tensor, how: int) -> Tensor:
    """The same values: channels-last, contiguous, or cut out of a larger tensor at an odd address."""
    if how == 0:
        return channels_last(x)
    if how == 1:
        return x.contiguous()
    larger = x.new_full([n + 1 for n in x.shape], float("nan"))
    larger[tuple(slice(1, None) for _ in x.shape)] = x
    return larger[tuple(slice(1, None) for _ in x.shape)]


def sure_windows(a: Tensor, pool: int, margin: float) -> Tensor:
    """Windows of a [T, N, C, H, W] in which no rounding of relative size `margin` turns the maximum or the ReLU.

    Equal values stay equal: the first one is the maximum for all.
    """
    tiles = windows(a, pool)
    best, margin = tiles.amax(-1), margin * max(1.0, a.abs().max().item())
    gap = best.unsqueeze(-1) - tiles
    return (best.abs() > margin) & ((gap == 0) | (gap > margin)).all(-1)


def check(names: str, got: Any, stock: Any, truth: Any, *, terms: int = 1) -> None:
    for name, mine, theirs, exact in zip(names.split(), got, stock, truth, strict=True):
        if mine.dtype == torch.float64:  # the truth has roundings too
            scale = max(1.0, exact.abs().max().item())
            # sums in another order: roundings grow with the root of their number
            torch.testing.assert_close(mine.cpu(), exact, rtol=0, atol=1e-13 * max(terms, 100) ** 0.5 * scale)
        else:
            assert_as_exact(name, mine.cpu(), theirs.cpu(), exact, terms)


def operands_of_a_norm(case: BlockCase, dtype: torch.dtype, tasks: int, per_task: bool, device: str) -> list[Tensor]:
    z = torch.randn(tasks, case.images, case.width, *case.size) * 2 + 3
    gamma, beta = (torch.randn(tasks if per_task else 1, case.width) for _ in range(2))
    return [t.to(device=device, dtype=dtype) for t in (z, gamma, beta)]
