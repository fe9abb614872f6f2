"""Steps of gradient descent on a chain, and the way back through them, in a backend's operations, without autograd.

A step takes p to p - rate g(p), g the gradient of the chain's cross-entropy f. With v the gradient with respect to the
step's results, that with respect to what went in is v + H u, u = -rate v, where H u, the derivative of all of f's
gradients along u, comes from a tangent pass over the step's own forward and backward pass: convolutions and products
are bilinear, the norm's second derivative is a backend's operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import BlockSpec
from .base import Backend, StepsGrad, Wanted
from .inner_loop import PER_BLOCK, inner_loop, laid_out

__all__ = ["StepGradients", "apart", "side_by_side", "step_gradients", "steps", "steps_grad"]


class StepGradients(NamedTuple):
    """The gradients of a step's loss, and their derivatives along a direction; parameters by their place."""

    slopes: dict[int, Tensor]  # [T, ...]
    along: dict[int, Tensor]  # [1|T, ...] like the parameters; summed over tasks that share one
    x_along: Tensor | None  # like x


class _Kept(NamedTuple):
    """What a block's backward pass reads of its forward pass; the derivatives along u are None where they are zero."""

    x: Tensor
    x_dot: Tensor | None
    z: Tensor
    z_dot: Tensor | None
    at: Tensor  # index
    mean: Tensor
    rstd: Tensor
    affine_dot: tuple[Tensor, Tensor] | None  # of gamma and beta [T, C]; None where y does not move


def side_by_side(values: Sequence[Tensor], tasks: int) -> Tensor:
    """Parameters [1|T, ...] as one row per task, [T, numbers]."""
    return torch.cat([v.expand(tasks, *v.shape[1:]).flatten(1) for v in values], 1)


def apart(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `side_by_side`, for parameters of these shapes."""
    parts = rows.split([t[0].numel() for t in like], 1)
    return [part.unflatten(1, t.shape[1:]) for part, t in zip(parts, like)]


def steps(
    backend: Backend, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
    rates: Sequence[Sequence[float]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `Backend.steps` says."""
    now, losses = list(parameters), []
    places = [i for i, flag in enumerate(updated) if flag]
    rows = [side_by_side([now[i] for i in places], labels.shape[0])]
    for row in rates:
        done = inner_loop(backend, x, labels, now, updated, blocks, 1, row)
        losses.append(done.rows[0])
        for i, value in zip(places, done.updated):
            now[i] = value
        rows.append(side_by_side(done.updated, labels.shape[0]))
    return torch.stack(losses), torch.stack(rows, 1)


def steps_grad(
    backend: Backend, v: Tensor, x: Tensor, labels: Tensor, parameters: list[Tensor], path: Tensor, updated: list[bool],
    blocks: list[BlockSpec], rates: Sequence[Sequence[float]], wanted: Wanted, second_order: bool,
) -> StepsGrad:  # fmt: skip
    """As `Backend.steps_grad` says; on a CPU task by task, so that a task's activations stay in its cache."""
    if x.is_cuda or labels.shape[0] == 1:
        return _steps_grad(backend, v, x, labels, parameters, path, updated, blocks, rates, wanted, second_order)
    found = []
    for task in range(labels.shape[0]):
        own = slice(task, task + 1)
        mine = [p if p.shape[0] == 1 else p[own] for p in parameters]
        found.append(
            _steps_grad(
                backend,
                v[own],
                x if x.shape[0] == 1 else x[own],
                labels[own],
                mine,
                path[own],
                updated,
                blocks,
                rates,
                wanted,
                second_order,
            )  # fmt: skip
        )
    others = [_stacked([f.others[i] for f in found]) for i in range(len(parameters))]
    return StepsGrad(
        torch.cat([f.updated for f in found]),
        others,
        _stacked([f.x for f in found]),
        _stacked([f.rates for f in found]),
    )


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if any(part is None for part in parts) else torch.cat([part for part in parts if part is not None])


def _steps_grad(
    backend: Backend, v: Tensor, x: Tensor, labels: Tensor, parameters: list[Tensor], path: Tensor, updated: list[bool],
    blocks: list[BlockSpec], rates: Sequence[Sequence[float]], wanted: Wanted, second_order: bool,
) -> StepsGrad:  # fmt: skip
    x = backend.layout(x) if blocks else x
    places = [i for i, flag in enumerate(updated) if flag]
    first = min(places, default=len(parameters)) // PER_BLOCK
    convolutions = range(PER_BLOCK * first, PER_BLOCK * len(blocks), PER_BLOCK)
    turned = {i: vi for i, vi in zip(places, apart(v, [parameters[i] for i in places]))}
    others: dict[int, Tensor] = {}
    gx = None
    of_rates = []
    asked = (
        frozenset(i for i, flag in enumerate(wanted.parameters) if flag or updated[i]) if second_order else frozenset()
    )
    slopes_of = frozenset(places) if wanted.rates else frozenset()
    for step in reversed(range(len(rates))):
        now = list(parameters)
        for i, value in zip(places, apart(path[:, step], [parameters[i] for i in places])):
            now[i] = value
        for i in convolutions:  # as the steps read them
            now[i] = laid_out(backend, now[i])
        u = {i: -rate * turned[i] for i, rate in zip(places, rates[step]) if second_order and rate != 0.0}
        done = step_gradients(backend, x, labels, now, blocks, u, slopes_of, asked, wanted.x)
        if wanted.rates:
            terms = [-(turned[i].double() * done.slopes[i].double()).flatten(1).sum(1) for i in places]
            of_rates.append(torch.stack(terms, 1))
        if done.x_along is not None:
            gx = done.x_along if gx is None else gx + done.x_along
        for i, term in done.along.items():
            if i in turned:
                turned[i] = turned[i] + term
            else:
                others[i] = others[i] + term if i in others else term
    if wanted.x and gx is None:
        gx = torch.zeros_like(x)
    return StepsGrad(
        side_by_side([turned[i] for i in places], labels.shape[0]),
        [
            others.get(i, torch.zeros_like(p)) if flag and not updated[i] else None
            for i, (p, flag) in enumerate(zip(parameters, wanted.parameters))
        ],
        gx,
        torch.stack(of_rates[::-1], 1) if wanted.rates else None,
    )


def step_gradients(
    backend: Backend, x: Tensor, labels: Tensor, parameters: Sequence[Tensor], blocks: Sequence[BlockSpec],
    u: Mapping[int, Tensor], slopes_of: frozenset[int], along_of: frozenset[int], need_x: bool,
) -> StepGradients:  # fmt: skip
    """The gradients of each task's mean cross-entropy at these parameters, and their derivatives along u.

    Args:
        x: [T, N, C, H, W], or [T, N, F] where there is no block, in the backend's layout.
        labels: [T, N] int64, all of them known classes.
        parameters: weight, gamma, beta per block, then the linear layer's weight and bias, each [1|T, ...].
        u: the direction by place, [T, ...]; zero for the others.
        slopes_of: the places whose gradients are wanted, which must be the tasks' own.
        along_of: the places whose gradients' derivatives along u are wanted.
        need_x: whether the derivative along u of the gradient of x is.
    """
    slopes: dict[int, Tensor] = {}
    along: dict[int, Tensor] = {}
    if not u:
        along_of, need_x = frozenset(), False
    kept: list[_Kept] = []
    y, y_dot = x, None
    for block in range(len(blocks)):
        y, y_dot = _forward(backend, block, y, y_dot, parameters, blocks, u, kept)

    last = len(parameters) - 2
    head, bias = parameters[last:]
    features, f_dot = y.flatten(2), None if y_dot is None else y_dot.flatten(2)
    logits = backend.linear(features, head, bias)
    g = backend.cross_entropy_grad(logits, labels)[1]
    logits_dot = None if f_dot is None else backend.linear(f_dot, head, None)
    if last in u:
        logits_dot = _sum(logits_dot, backend.linear(features, u[last], None))
    if last + 1 in u:
        logits_dot = _sum(logits_dot, u[last + 1].unsqueeze(1).expand_as(logits))
    g_dot = None
    if logits_dot is not None:  # g = (p - target) / N, and p moves with the logits as p (l - <p, l>)
        p = torch.softmax(logits, 2)
        g_dot = p * (logits_dot - (p * logits_dot).sum(2, keepdim=True)) / labels.shape[1]
    if last in slopes_of:
        slopes[last] = backend.linear(g.mT, features.mT, None)
    if last + 1 in slopes_of:
        slopes[last + 1] = g.sum(1)
    if g_dot is not None and last in along_of:
        turn = None if f_dot is None else backend.linear(g.mT, f_dot.mT, None)
        along[last] = _like(_sum(turn, backend.linear(g_dot.mT, features.mT, None)), head)
    if g_dot is not None and last + 1 in along_of:
        along[last + 1] = _like(g_dot.sum(1), bias)

    lowest = 0 if need_x else min(slopes_of | along_of, default=last) // PER_BLOCK
    if lowest == len(blocks) and not need_x:
        return StepGradients(slopes, along, None)
    gy = backend.linear(g, head.mT, None).unflatten(2, y.shape[2:])
    gy_dot = None
    if g_dot is not None:
        gy_dot = backend.linear(g_dot, head.mT, None)
        if last in u:
            gy_dot += backend.linear(g, u[last].mT, None)
        gy_dot = gy_dot.unflatten(2, y.shape[2:])
    for block in reversed(range(lowest, len(blocks))):
        first, spec = PER_BLOCK * block, blocks[block]
        weight, gamma, beta = parameters[first : first + PER_BLOCK]
        x_in, x_dot, z, z_dot, at, mean, rstd, affine_dot = kept[block]
        below = block > lowest or need_x
        dz, dgamma, dbeta = backend.norm_relu_pool_grad(gy, z, gamma, at, mean, rstd, spec, True)
        assert dz is not None
        own = range(first, first + PER_BLOCK)
        if first in slopes_of:
            shape = torch.Size((labels.shape[0], *weight.shape[1:]))
            slopes[first] = backend.conv2d_weight_grad(dz, x_in, shape, spec.conv)
        slopes.update({i: d for i, d in zip(own[1:], (dgamma, dbeta)) if i in slopes_of})
        dz_dot = None
        if gy_dot is not None:
            dz_dot, dgamma_dot, dbeta_dot = backend.norm_relu_pool_grad(gy_dot, z, gamma, at, mean, rstd, spec, True)
            assert dz_dot is not None
            if affine_dot is not None:
                _, turn_z, turn_gamma = backend.norm_relu_pool_grad_grad(
                    gy, z, gamma, at, mean, rstd, spec, z_dot, *affine_dot, True
                )
                assert turn_z is not None
                dz_dot += turn_z
                dgamma_dot += turn_gamma
            if first in along_of:
                moved = backend.conv2d_weight_grad(dz_dot, x_in, weight.shape, spec.conv)
                turn = None if x_dot is None else backend.conv2d_weight_grad(dz, x_dot, weight.shape, spec.conv)
                along[first] = _sum(turn, moved)
            if first + 1 in along_of:
                along[first + 1] = _like(dgamma_dot, gamma)
            if first + 2 in along_of:
                along[first + 2] = _like(dbeta_dot, beta)
        if not below:
            break
        gy_dot = None
        if dz_dot is not None:
            gy_dot = backend.conv2d_input_grad(dz_dot, weight, x_in.shape, spec.conv)
            if first in u:
                gy_dot += backend.conv2d_input_grad(dz, u[first], x_in.shape, spec.conv)
        if block > 0:
            gy = backend.conv2d_input_grad(dz, weight, x_in.shape, spec.conv)
    return StepGradients(slopes, along, gy_dot if need_x else None)


def _forward(
    backend: Backend, block: int, x: Tensor, x_dot: Tensor | None, parameters: Sequence[Tensor],
    blocks: Sequence[BlockSpec], u: Mapping[int, Tensor], kept: list[_Kept],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """A block's result and its derivative along u; `kept` gets what the way back needs."""
    first, spec = PER_BLOCK * block, blocks[block]
    weight, gamma, beta = parameters[first : first + PER_BLOCK]
    z, y, at, mean, rstd = backend.conv_block(x, weight, gamma, beta, spec)
    z_dot = None if x_dot is None else backend.conv2d(x_dot, weight, None, spec.conv)
    if first in u:
        z_dot = _sum(z_dot, backend.conv2d(x, u[first], None, spec.conv))
    y_dot, affine_dot = None, None
    if z_dot is not None or first + 1 in u or first + 2 in u:
        gamma_dot, beta_dot = (u.get(i, torch.zeros_like(mean)) for i in (first + 1, first + 2))
        affine_dot = gamma_dot, beta_dot
        # With J the derivative of y, <J^T gy, u> changes with gy by J u, whatever gy is.
        y_dot = backend.norm_relu_pool_grad_grad(
            torch.zeros_like(y), z, gamma, at, mean, rstd, spec, z_dot, gamma_dot, beta_dot, False
        )[0]
    kept.append(_Kept(x, x_dot, z, z_dot, at, mean, rstd, affine_dot))
    return y, y_dot


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    """The sum, in the memory of the first."""
    return other if one is None else one.add_(other)


def _like(per_task: Tensor, parameter: Tensor) -> Tensor:
    """Each task's share [T, ...], summed where the tasks share the parameter [1, ...]."""
    return per_task if per_task.shape[0] == parameter.shape[0] else per_task.sum(0, keepdim=True)
