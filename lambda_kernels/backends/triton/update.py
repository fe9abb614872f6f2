# Kernels are not typed: triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gradient descent in place, all tensors in one launch.

Their addresses are arguments of the launch: nothing is copied to the device, so a CUDA graph holds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, launch

TENSORS = 32  # of one launch
BLOCK = 1024


@triton.jit
def descend(
    parameters,
    gradients,
    sizes,
    rate_high,
    rate_low,
    COUNT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parameter <- parameter - rate gradient for COUNT dense tensors; the rate is the sum of two float32."""
    rate = tl.cast(rate_high, SUM) + tl.cast(rate_low, SUM)
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        own = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < own):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = at < sizes[i]
            p = tl.load(parameters[i] + at, inside, other=0.0).to(SUM)
            g = tl.load(gradients[i] + at, inside, other=0.0).to(SUM)
            tl.store(parameters[i] + at, (p - rate * g).to(parameters[i].dtype.element_ty), mask=inside)
        block -= own


def sgd_(parameters: list[Tensor], gradients: list[Tensor], lr: float) -> None:
    """As `Reference.sgd_`, for dense tensors of one dtype on one device."""
    high = torch.tensor(lr, dtype=torch.float32).item()
    for first in range(0, len(parameters), TENSORS):
        mine, theirs = (tuple(tensors[first : first + TENSORS]) for tensors in (parameters, gradients))
        sizes = tuple(p.numel() for p in mine)
        programs = sum(blocks(size, BLOCK) for size in sizes)
        if programs:
            wide = tl.float64 if mine[0].dtype == torch.float64 else tl.float32
            launch(descend, programs, mine[0], mine, theirs, sizes, high, lr - high, len(mine), wide, BLOCK)
