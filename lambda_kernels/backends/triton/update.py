# Kernels are not typed: triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gradient descent in place, all tensors in one launch.

Their addresses are arguments of the launch: nothing is copied to the device, so a CUDA graph holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, launch

TENSORS = 32  # of one launch
BLOCK = 1024


@triton.jit
def sgd(
    parameters,
    gradients,
    sizes,
    rates_high,
    rates_low,
    COUNT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parameter <- parameter - rate gradient for COUNT dense tensors; each rate is the sum of two float32."""
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        own = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < own):
            rate = tl.cast(rates_high[i], SUM) + tl.cast(rates_low[i], SUM)
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < sizes[i]
            p = tl.load(parameters[i] + at, inside, other=0.0).to(SUM)
            g = tl.load(gradients[i] + at, inside, other=0.0).to(SUM)
            tl.store(parameters[i] + at, (p - rate * g).to(parameters[i].dtype.element_ty), mask=inside)
        block -= own


def sgd_(parameters: Sequence[Tensor], gradients: Sequence[Tensor], rates: Sequence[float]) -> None:
    """As `Backend.sgd_`, for dense tensors of one dtype on one device, with one rate per tensor."""
    high = torch.tensor(rates, dtype=torch.float32, device="cpu").tolist()  # on a default device it would wait for it
    low = [rate - h for rate, h in zip(rates, high)]
    for first in range(0, len(parameters), TENSORS):
        some = slice(first, first + TENSORS)
        mine, theirs = tuple(parameters[some]), tuple(gradients[some])
        sizes = tuple(p.numel() for p in mine)
        programs = sum(blocks(size, BLOCK) for size in sizes)
        if programs:
            sums = tl.float64 if mine[0].dtype == torch.float64 else tl.float32
            split = tuple(high[some]), tuple(low[some])
            launch(sgd, programs, mine[0], mine, theirs, sizes, *split, len(mine), sums, BLOCK)
