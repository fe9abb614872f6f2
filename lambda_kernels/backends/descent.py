"""The inner loop of first-order adaptation in a backend's operations, without autograd.

The gradients of a chain (fused blocks one after another, then a linear layer, under cross-entropy) are known, so a step
is its forward operations, its backward operations and one update of all parameters; the blocks ahead of the first
updated one run once. Tasks share each call: frozen parameters are common to all, updated ones are each task's own.
Nothing waits for the device, so that a CUDA graph can hold all steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..spec import BlockSpec

if TYPE_CHECKING:
    from .reference import Reference

__all__ = ["PER_BLOCK", "descend"]

PER_BLOCK = 3  # weight, gamma, beta


class _Block(NamedTuple):
    """A block of the chain; which of its parameters are updated, and whether one below it is."""

    spec: BlockSpec
    weight: Tensor  # [1|T, O, C / groups, kh, kw]
    gamma: Tensor  # [1|T, O]
    beta: Tensor
    updated: tuple[bool, bool, bool]
    below: bool
    moments: Tensor | None  # of the first block, where the backend takes its statistics from them


class _Kept(NamedTuple):
    """What a block's backward pass reads of its forward pass; z is None for a block with moments."""

    x: Tensor
    z: Tensor | None
    at: Tensor  # index
    mean: Tensor
    rstd: Tensor


def descend(
    backend: Reference,
    x: Tensor,
    labels: Tensor,
    parameters: list[Tensor],
    updated: list[bool],
    blocks: list[BlockSpec],
    steps: int,
    lr: float,
) -> Tensor:
    """`steps` steps of gradient descent on each task's mean cross-entropy, in place on the updated parameters.

    Args:
        x: [1|T, N, C, H, W], or [1|T, N, F] where there is no block; labels: [T, N] int64.
        parameters: weight, gamma, beta a block, then the linear layer's weight [1|T, ways, F] and bias [1|T, ways];
            updated ones are [T, ...].
        updated: for each of the parameters, whether it is.

    Returns:
        [steps + 1, T], in at least float32: the loss before each step, and 0 where all of a task's updated parameters
        are finite, else NaN.
    """
    tasks = labels.shape[0]
    x = backend.layout(x) if blocks else x
    head, bias = parameters[-2:]
    reaches_blocks = any(updated[:-2])
    frozen = updated.index(True) // PER_BLOCK if reaches_blocks else len(blocks)
    for i, (conv, eps, pool) in enumerate(blocks[:frozen]):
        weight, gamma, beta = parameters[PER_BLOCK * i : PER_BLOCK * (i + 1)]
        x = backend.block(x, weight, gamma, beta, conv, eps, pool)[0]
    first = PER_BLOCK * frozen
    chain = _chain(backend, x, parameters[first:], updated[first:], blocks[frozen:])
    losses = []
    for _ in range(steps):
        a, kept = x, []
        for block in chain:
            a, saved = _forward(backend, block, a)
            kept.append(saved)
        features = a.flatten(2)
        logits = backend.linear(features, head, bias)
        loss, g = backend.cross_entropy_grad(logits.expand(tasks, *logits.shape[1:]), labels)
        losses.append(loss)
        moved: list[tuple[Tensor, Tensor]] = []
        if updated[-2]:
            moved.append((head, backend.linear(g.mT, features.mT, None)))
        if updated[-1]:
            moved.append((bias, g.sum(1)))
        if reaches_blocks:
            ga = backend.linear(g, head.mT, None).unflatten(2, a.shape[2:])
            for block, saved in zip(reversed(chain), reversed(kept)):
                ga = _backward(backend, block, saved, ga, moved)
                if not block.below:
                    break
        backend.sgd_([p for p, _ in moved], [gradient for _, gradient in moved], lr)
    own = [p for p, wanted in zip(parameters, updated) if wanted]
    finite = torch.stack([(p.flatten(1) * 0).sum(1) for p in own]).sum(0)
    return torch.stack([*losses, finite.to(losses[0].dtype if losses else torch.float32)])


def _chain(
    backend: Reference, x: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec]
) -> list[_Block]:
    chain: list[_Block] = []
    below = False
    for i, spec in enumerate(blocks):
        weight, gamma, beta = parameters[PER_BLOCK * i : PER_BLOCK * (i + 1)]
        own = updated[PER_BLOCK * i : PER_BLOCK * (i + 1)]
        moments = None
        if i == 0 and any(own) and not backend.image_refusals(x, weight, spec.conv, spec.pool):
            moments = backend.image_moments(x, (weight.shape[-2], weight.shape[-1]), spec.conv)
        chain.append(_Block(spec, weight, gamma, beta, (own[0], own[1], own[2]), below, moments))
        below = below or any(own)
    return chain


def _forward(backend: Reference, block: _Block, x: Tensor) -> tuple[Tensor, _Kept]:
    (conv, eps, pool), z = block.spec, None
    operands = x, block.weight, block.gamma, block.beta
    if block.moments is not None:
        y, index, mean, rstd = backend.image_block(*operands, block.moments, conv, eps, pool)
    else:
        z, y, index, mean, rstd = backend.conv_block(*operands, conv, eps, pool)
    return y, _Kept(x, z, index, mean, rstd)


def _backward(
    backend: Reference, block: _Block, kept: _Kept, gy: Tensor, moved: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """The gradient of the block's input where a block below wants it; `moved` gets the parameters' gradients."""
    conv, _, pool = block.spec
    x, z, index, mean, rstd = kept
    own = block.updated
    if z is None:
        assert block.moments is not None
        gw, dgamma, dbeta = backend.image_block_grad(
            gy, x, block.weight, block.gamma, index, mean, rstd, block.moments, conv, pool
        )
        gx = gy
    else:
        need_z = own[0] or block.below
        dz, dgamma, dbeta = backend.norm_relu_pool_grad(gy, z, block.gamma, index, mean, rstd, pool, need_z)
        gx, gw = gy, gy
        if dz is not None and own[0]:
            gw = backend.conv2d_weight_grad(dz, x, block.weight.shape, conv)
        if dz is not None and block.below:
            gx = backend.conv2d_input_grad(dz, block.weight, torch.Size((dz.shape[0], *x.shape[1:])), conv)
    for wanted, parameter, gradient in zip(own, (block.weight, block.gamma, block.beta), (gw, dgamma, dbeta)):
        if wanted:
            moved.append((parameter, gradient))
    return gx
