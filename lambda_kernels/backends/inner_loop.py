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

from ..flat import joined, split
from ..spec import BlockSpec, output_size
from .base import Backend, InnerLoop

__all__ = ["PER_BLOCK", "inner_loop", "laid_out"]

PER_BLOCK = 3  # weight, gamma, beta
_FEW = 8  # channels: so few side by side make no load wider


def laid_out(backend: Backend, weight: Tensor) -> Tensor:
    """A convolution's weight [1|T, O, C, kh, kw] in memory as the backend lays out images, for many calls."""
    return backend.layout(weight) if weight.shape[2] >= _FEW and weight[0, 0, 0].numel() > 1 else weight


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
    rows = _in_rows(own, at, tasks)
    chain = _Chain(backend, own, blocks, at)
    x = chain.frozen(backend.layout(x) if blocks else x)
    chain.lay_out(x)
    losses = []
    for step in range(steps):
        row = [rates[0]] * len(at) if len(rates) == 1 else rates[step * len(at) : (step + 1) * len(at)]
        losses.append(chain.step(x, labels, {i: rate for i, rate in zip(at, row) if rate != 0.0}))
    logits = None
    if query is not None:
        logits = chain.classify(backend.layout(query) if blocks else query)
    chain.put_back()
    dtype = losses[0].dtype if losses else torch.promote_types(own[-1].dtype, torch.float32)
    checked = [torch.linalg.vector_norm(row, torch.inf, dtype=torch.promote_types(row.dtype, dtype)) for row in rows]
    finite = sum(checked[1:], checked[0]) * 0 if checked else torch.zeros((), dtype=dtype, device=x.device)
    new = [own[i][0] if tasks == 1 and own[i].dim() > parameters[i].dim() else own[i] for i in at]
    return InnerLoop(torch.stack([*losses, finite.to(dtype).expand(tasks)]), new, logits)


def _in_rows(own: list[Tensor], at: list[int], tasks: int) -> list[Tensor]:
    """Copies of the updated parameters, [T, ...], in place of those in `own`: one row of memory for each dtype."""
    rows = []
    for dtype in dict.fromkeys(own[i].dtype for i in at):
        places = [i for i in at if own[i].dtype == dtype]
        shapes = [torch.Size((tasks, *own[i].shape[1:])) for i in places]
        rows.append(joined([own[i].expand(shape) for i, shape in zip(places, shapes)]))
        for i, part in zip(places, split(rows[-1], shapes)):
            own[i] = part
    return rows


def _dense(parameter: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the axes in the order in which the parameter lies in memory, which is dense."""
    if parameter.is_contiguous() or parameter.dim() < 5:
        return parameter, gradient
    return parameter.permute(0, 1, 3, 4, 2), gradient.permute(0, 1, 3, 4, 2)


class _Chain:
    """The blocks and the linear layer with the parameters, each with a task axis, that the steps change in place."""

    def __init__(self, backend: Backend, parameters: list[Tensor], blocks: list[BlockSpec], at: list[int]) -> None:
        self.backend, self.parameters, self.blocks, self.at = backend, list(parameters), blocks, at
        self.own = parameters  # as they came; those in `parameters` lie as the steps read them
        self.first = min([i // PER_BLOCK for i in at] + [len(blocks)])  # block with an updated parameter
        self.moments: Tensor | None = None  # of that block's patches, where the backend takes its statistics from them
        self.last: torch.Size | None = None  # [C, H, W] of the features, where the linear layer reads them as [H, W, C]

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

    def lay_out(self, x: Tensor) -> None:
        """Give the weights the memory in which the steps read them, once for all steps; x is what `frozen` gave.

        Where images lie channels-last, the linear layer's weight follows their features, so that to flatten these is no
        copy.
        """
        size = x.shape[2:]
        for block in range(self.first, len(self.blocks)):
            weight, spec = self.of(block)[0], self.blocks[block]
            if block > self.first or self.moments is None:
                self.parameters[PER_BLOCK * block] = laid_out(self.backend, weight)
            height, width = output_size(size, weight.shape, spec.conv)
            size = torch.Size((weight.shape[1], height // spec.pool, width // spec.pool))
        if self.blocks and x.stride(2) == 1 and 1 < size[0] < size.numel():
            self.last = size
            self.parameters[-2] = self.parameters[-2].unflatten(2, size).permute(0, 1, 3, 4, 2).flatten(2)

    def put_back(self) -> None:
        """Copy updated parameters that lie otherwise back to where they came from."""
        head = len(self.parameters) - 2
        for i in self.at:
            mine, theirs = self.parameters[i], self.own[i]
            if i == head and self.last is not None:
                theirs.unflatten(2, self.last).permute(0, 1, 3, 4, 2).copy_(mine.unflatten(2, self._pixels_first))
            elif mine is not theirs and mine.stride() != theirs.stride():
                theirs.copy_(mine)

    @property
    def _pixels_first(self) -> tuple[int, ...]:
        assert self.last is not None
        return *self.last[1:], self.last[0]

    def _flat(self, a: Tensor) -> Tensor:
        """Features [T, N, F] of a [T, N, C, H, W], in the order in which the linear layer reads them."""
        return (a if self.last is None else a.permute(0, 1, 3, 4, 2)).flatten(2)

    def classify(self, x: Tensor) -> Tensor:
        """The logits [T, Q, ways] of images or features."""
        for block, spec in enumerate(self.blocks):
            x = self.backend.block(x, *self.of(block), spec)[0]
        return self.backend.linear(self._flat(x), *self.parameters[-2:])

    def step(self, x: Tensor, labels: Tensor, rates: dict[int, float]) -> Tensor:
        """One step for the parameters that have a rate; x is what `frozen` gave. Returns the losses [T] before it."""
        backend = self.backend
        head, bias = self.parameters[-2:]
        count = len(self.parameters)
        a, kept = x, []
        for block in range(self.first, len(self.blocks)):
            a, saved = self._forward(block, a)
            kept.append(saved)
        lowest = min(rates, default=count) // PER_BLOCK
        wanted = count - 2 in rates, count - 1 in rates, lowest < len(self.blocks)
        loss, *found, ga = backend.head_grad(self._flat(a), head, bias, labels, wanted)
        moved = {count - 2 + i: gradient for i, gradient in enumerate(found) if gradient is not None}
        if ga is not None:
            if self.last is None:
                ga = ga.unflatten(2, a.shape[2:])
            else:
                ga = ga.unflatten(2, self._pixels_first).permute(0, 1, 4, 2, 3)
            for block in reversed(range(lowest, len(self.blocks))):
                ga = self._backward(block, kept[block - self.first], ga, rates, block > lowest, moved)
        pairs = [_dense(self.parameters[i], gradient) for i, gradient in moved.items()]
        backend.sgd_([p for p, _ in pairs], [gradient for _, gradient in pairs], [rates[i] for i in moved])
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
