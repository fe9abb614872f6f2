"""K steps of gradient descent on a chain in a backend's operations, without autograd.

The gradients of a chain (fused blocks one after another, then a linear layer, under cross-entropy) are known, so a step
is its forward operations, its backward operations and one update of all parameters; the blocks ahead of the first
updated one run once. Tasks share each call: frozen parameters are common to all, updated ones are each task's own.
Nothing waits for the device, so that a CUDA graph can hold all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import BlockSpec
from .base import Backend, InnerLoop

__all__ = ["PER_BLOCK", "inner_loop"]

PER_BLOCK = 3  # weight, gamma, beta


class _Kept(NamedTuple):
    """What a block's backward pass reads of its forward pass; z is None for a block with moments."""

    x: Tensor
    z: Tensor | None
    at: Tensor  # index
    mean: Tensor
    rstd: Tensor


def inner_loop(
    backend: Backend,
    x: Tensor,
    labels: Tensor,
    parameters: list[Tensor],
    updated: list[bool],
    blocks: list[BlockSpec],
    steps: int,
    rates: Sequence[float],
    query: Tensor | None = None,
) -> InnerLoop:
    """As `Backend.inner_loop` says.

    A rate of 0 freezes its parameter in that step: its gradient is not computed.

    Raises:
        ValueError: there is neither one rate nor one per step and updated parameter.
    """
    tasks = labels.shape[0]
    at = [i for i, moves in enumerate(updated) if moves]
    if len(rates) not in (1, steps * len(at)):
        raise ValueError(
            f"inner_loop: {len(rates)} rates for {steps} steps of {len(at)} parameters: give one for all, or "
            f"{steps} x {len(at)}"
        )
    axes = [4 + 1, 1 + 1, 1 + 1] * len(blocks) + [2 + 1, 1 + 1]  # with a task axis
    own = [p if p.dim() == n else p.unsqueeze(0) for p, n in zip(parameters, axes)]
    for i in at:
        own[i] = own[i].expand(tasks, *own[i].shape[1:]).clone(memory_format=torch.contiguous_format)
    chain = _Chain(backend, own, blocks, at)
    x = chain.frozen(backend.layout(x) if blocks else x)
    losses = []
    for step in range(steps):
        row = [rates[0]] * len(at) if len(rates) == 1 else rates[step * len(at) : (step + 1) * len(at)]
        losses.append(chain.step(x, labels, {i: rate for i, rate in zip(at, row) if rate != 0.0}))
    logits = None
    if query is not None:
        logits = chain.classify(backend.layout(query) if blocks else query)
    wide = torch.promote_types(own[-1].dtype, torch.float32)
    finite = torch.zeros(tasks, dtype=own[-1].dtype, device=x.device)
    if at:
        finite = torch.stack([(own[i].flatten(1) * 0).sum(1) for i in at]).sum(0)
    rows = torch.stack([*losses, finite.to(losses[0].dtype if losses else wide)])
    new = [own[i][0] if tasks == 1 and own[i].dim() > parameters[i].dim() else own[i] for i in at]
    return InnerLoop(rows, new, logits)


class _Chain:
    """The blocks and the linear layer with the parameters, each with a task axis, that the steps change in place."""

    def __init__(self, backend: Backend, parameters: list[Tensor], blocks: list[BlockSpec], at: list[int]) -> None:
        self.backend, self.parameters, self.blocks = backend, parameters, blocks
        self.first = min([i // PER_BLOCK for i in at] + [len(blocks)])  # block with an updated parameter
        self.moments: Tensor | None = None  # of that block's patches, where the backend takes its statistics from them

    def of(self, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """weight, gamma, beta [1|T, ...]."""
        weight, gamma, beta = self.parameters[PER_BLOCK * block : PER_BLOCK * (block + 1)]
        return weight, gamma, beta

    def frozen(self, x: Tensor) -> Tensor:
        """What the blocks ahead of the first updated one make of x."""
        for block in range(self.first):
            x = self.backend.block(x, *self.of(block), self.blocks[block])[0]
        if self.first < len(self.blocks):
            weight, spec = self.of(self.first)[0], self.blocks[self.first]
            if not self.backend.image_refusals(x, weight, spec):
                self.moments = self.backend.image_moments(x, (weight.shape[-2], weight.shape[-1]), spec.conv)
        return x

    def classify(self, x: Tensor) -> Tensor:
        """The logits [T, Q, ways] of images or features."""
        for block, spec in enumerate(self.blocks):
            x = self.backend.block(x, *self.of(block), spec)[0]
        return self.backend.linear(x.flatten(2), *self.parameters[-2:])

    def step(self, x: Tensor, labels: Tensor, rates: dict[int, float]) -> Tensor:
        """One step for the parameters that have a rate; x is what `frozen` gave. Returns the losses [T] before it."""
        backend, tasks = self.backend, labels.shape[0]
        head, bias = self.parameters[-2:]
        count = len(self.parameters)
        a, kept = x, []
        for block in range(self.first, len(self.blocks)):
            a, saved = self._forward(block, a)
            kept.append(saved)
        features = a.flatten(2)
        logits = backend.linear(features, head, bias)
        loss, g = backend.cross_entropy_grad(logits.expand(tasks, *logits.shape[1:]), labels)
        moved: dict[int, Tensor] = {}
        if count - 2 in rates:
            moved[count - 2] = backend.linear(g.mT, features.mT, None)
        if count - 1 in rates:
            moved[count - 1] = g.sum(1)
        lowest = min(rates, default=count) // PER_BLOCK
        if lowest < len(self.blocks):
            ga = backend.linear(g, head.mT, None).unflatten(2, a.shape[2:])
            for block in reversed(range(lowest, len(self.blocks))):
                ga = self._backward(block, kept[block - self.first], ga, rates, block > lowest, moved)
        order = list(moved)
        backend.sgd_([self.parameters[i] for i in order], [moved[i] for i in order], [rates[i] for i in order])
        return loss

    def _forward(self, block: int, x: Tensor) -> tuple[Tensor, _Kept]:
        (weight, gamma, beta), spec, z = self.of(block), self.blocks[block], None
        if self.moments is not None and block == self.first:
            y, at, mean, rstd = self.backend.image_block(x, weight, gamma, beta, self.moments, spec)
        else:
            z, y, at, mean, rstd = self.backend.conv_block(x, weight, gamma, beta, spec)
        return y, _Kept(x, z, at, mean, rstd)

    def _backward(
        self, block: int, kept: _Kept, gy: Tensor, rates: dict[int, float], below: bool, moved: dict[int, Tensor]
    ) -> Tensor:
        """The gradient of the block's input where one below is updated; `moved` gets the parameters' gradients."""
        x, z, at, mean, rstd = kept
        weight, gamma, _ = self.of(block)
        spec, first = self.blocks[block], PER_BLOCK * block
        gx = gw = gy
        if z is None:
            assert self.moments is not None
            gw, dgamma, dbeta = self.backend.image_block_grad(gy, x, weight, gamma, at, mean, rstd, self.moments, spec)
        else:
            need_z = first in rates or below
            dz, dgamma, dbeta = self.backend.norm_relu_pool_grad(gy, z, gamma, at, mean, rstd, spec, need_z)
            if dz is not None and first in rates:
                gw = self.backend.conv2d_weight_grad(dz, x, weight.shape, spec.conv)
            if dz is not None and below:
                gx = self.backend.conv2d_input_grad(dz, weight, torch.Size((dz.shape[0], *x.shape[1:])), spec.conv)
        for i, gradient in zip(range(first, first + PER_BLOCK), (gw, dgamma, dbeta)):
            if i in rates:
                moved[i] = gradient
        return gx
