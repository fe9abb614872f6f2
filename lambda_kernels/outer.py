"""The outer gradient of meta-learning on a chain: K steps of gradient descent as one operation of autograd, and the
query's logits as another.

No graph of the steps is kept: only the parameters before each. The way back goes through the steps by a backend's
`steps_grad`. Where a derivative of the gradient is asked for, or a transform of torch.func is active, the steps are
done once more by autograd, which is right to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd
from ._torch import functorch_active
from .backends import Backend
from .backends.base import Wanted
from .backends.outer_step import apart, side_by_side, step_gradients
from .spec import BlockSpec

__all__ = ["adapted", "apart", "classified", "side_by_side", "slopes"]

_RATE = -(2.0**20)
"""Of one step of descent that a gradient is read off: (theta + 2^20 g) - theta has the digits of g, not of theta, and a
power of two rounds nothing."""


class _Fixed(NamedTuple):
    """What is no tensor in a call."""

    backend: Backend
    blocks: list[BlockSpec]
    updated: list[bool]
    second_order: bool
    from_images: bool  # x requires no gradient

    @property
    def places(self) -> list[int]:
        return [i for i, flag in enumerate(self.updated) if flag]


def adapted(
    backend: Backend, x: Tensor, labels: Tensor, parameters: Sequence[Tensor], updated: Sequence[bool],
    blocks: Sequence[BlockSpec], rates: Tensor, *, second_order: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradient descent on each task's mean cross-entropy, for a chain of fused blocks and a linear layer.

    Gradients of the new values reach x, the rates and all parameters, updated or not; without `second_order` a step's
    gradient counts as a constant.

    >>> rates = torch.full((5, sum(updated)), 0.1, requires_grad=True)
    >>> losses, new = adapted(backend, x, labels, parameters, updated, blocks, rates, second_order=True)
    >>> torch.autograd.grad(outer_loss(new), [*parameters, rates])

    Args:
        x: [T, N, C, H, W], or [T, N, F] where there is no block.
        labels: [T, N] int64, class numbers of the linear layer.
        parameters: weight, gamma, beta per block, then the linear layer's weight [ways, F] and bias [ways]; each
            of them shared by the tasks, or with a leading task axis.
        updated: for each of the parameters, whether it is.
        rates: [steps, number of updated parameters], in floating point; a rate of 0 freezes its parameter in that step.

    Returns:
        The losses [steps, T] before each step, without a gradient, and the updated parameters' new values [T, ...].

    Raises:
        ValueError: nothing is updated, or the rates are not one per step and updated parameter.
    """
    places = [i for i, flag in enumerate(updated) if flag]
    if not places or rates.dim() != 2 or rates.shape[1] != len(places) or rates.shape[0] == 0:
        raise ValueError(
            f"adapted: rates {list(rates.shape)} for {len(places)} updated parameters: give [steps, {len(places)}], "
            "with at least one of each"
        )
    own = _with_task_axis(parameters, len(blocks))
    fixed = _Fixed(backend, list(blocks), list(updated), second_order, not x.requires_grad)
    last, losses, _ = _Steps.apply(fixed, x, labels, rates, *own)
    return losses, apart(last, [own[i] for i in places])


def slopes(
    backend: Backend, x: Tensor, labels: Tensor, row: Tensor, parameters: Sequence[Tensor], updated: Sequence[bool],
    blocks: Sequence[BlockSpec],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The losses [T], without a gradient, and each task's gradients by the updated parameters, side by side [T,
    numbers]. Gradients of these reach x, the row and the frozen parameters.

    >>> losses, found = slopes(backend, x, labels, row, parameters, updated, blocks)
    >>> found.shape == row.shape
    True

    Args:
        row: [T, numbers], the updated parameters' values as `side_by_side` gives them; those among `parameters` are
            read for their shapes alone. What lies behind them in the row has the gradient 0.
        The others as in `adapted`.
    """
    own = _with_task_axis(parameters, len(blocks))
    fixed = _Fixed(backend, list(blocks), list(updated), True, not x.requires_grad)
    shapes = [own[i].shape[1:] for i in fixed.places]
    frozen = [p for p, flag in zip(own, updated) if not flag]
    found, losses, _ = _Slopes.apply(fixed, shapes, x, labels, row, *frozen)
    return losses[0], found


def classified(
    backend: Backend, x: Tensor, parameters: Sequence[Tensor], blocks: Sequence[BlockSpec],
    silent: Sequence[Tensor] = (),
) -> Tensor | None:  # fmt: skip
    """The logits [T, N, ways] of a chain for x [T, N, C, H, W] or [T, N, F]; gradients reach x and the parameters.

    `parameters` are as `adapted` takes them; without the last two of them, those of the linear layer, it gives the last
    block's features [T, N, C', H', W']. The gradient of `silent` tensors (biases that cancel in a norm) is zero.
    None where the backend has no operation for the whole chain.

    >>> classified(backend, x, parameters, blocks).shape
    torch.Size([4, 75, 5])
    """
    own = _with_task_axis(parameters, len(blocks))
    fixed = _Whole(backend, list(blocks), not x.requires_grad, len(own))
    found = _Logits.apply(fixed, x, *own, *silent)
    return None if found is None else found[0]


def _with_task_axis(parameters: Sequence[Tensor], blocks: int) -> list[Tensor]:
    axes = [4 + 1, 1 + 1, 1 + 1] * blocks + [2 + 1, 1 + 1]
    return [p if p.dim() == n else p.unsqueeze(0) for p, n in zip(parameters, axes)]


class _Steps(torch.autograd.Function):
    """The updated parameters after the last step, side by side; the losses; the parameters before each step, too."""

    @staticmethod
    def forward(fixed: _Fixed, x: Tensor, labels: Tensor, rates: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        backend, blocks, updated, _, from_images = fixed
        losses, path = backend.steps(x, labels, list(parameters), updated, blocks, rates.tolist(), from_images)
        return path[:, -1].clone(), losses, path

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fixed, *tensors = inputs
        _, losses, path = output
        ctx.mark_non_differentiable(losses, path)
        ctx.set_materialize_grads(False)
        ctx.present = [False, *(True for _ in tensors)]
        ctx.save_for_backward(path, *tensors)

    @staticmethod
    @autograd.backward_rule
    def backward(ctx: Any, v: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        path, *tensors = ctx.saved_tensors
        if v is None:
            return (None,) * (1 + len(tensors))
        needs = autograd.asked(ctx)[1:]
        if torch.is_grad_enabled() or functorch_active():
            return None, *_gradients_in_graph(lambda *given: _replayed(ctx.fixed, *given), tensors, v, needs)
        return None, *_through_steps(ctx.fixed, tensors, path, v, needs)


def _through_steps(
    fixed: _Fixed, tensors: Sequence[Tensor], path: Tensor, v: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, labels, rates and parameters, from that of the last values side by side."""
    backend, blocks, updated, second_order, from_images = fixed
    x, labels, rates, *parameters = tensors
    wanted = Wanted(list(needs[3:]), needs[0], needs[2])
    done = backend.steps_grad(
        v, x, labels, parameters, path, updated, blocks, rates.tolist(), from_images, wanted, second_order
    )
    found = list(done.others)
    for i, value in zip(fixed.places, apart(done.updated, [parameters[i] for i in fixed.places])):
        found[i] = value
    return [
        done.x,
        None,
        None if done.rates is None else done.rates.sum(0).to(rates),
        *(_like(g, p) if needed and g is not None else None for g, p, needed in zip(found, parameters, needs[3:])),
    ]


class _Slopes(torch.autograd.Function):
    """The updated parameters' gradients side by side; the losses; the parameters around a step, too."""

    @staticmethod
    def forward(
        fixed: _Fixed, shapes: list[torch.Size], x: Tensor, labels: Tensor, row: Tensor, *frozen: Tensor
    ) -> tuple[Tensor, ...]:
        backend, blocks, updated, _, from_images = fixed
        rates = [[_RATE] * len(shapes)]
        own = _among(fixed, shapes, row, frozen)
        losses, path = backend.steps(x, labels, own, updated, blocks, rates, from_images)
        found = torch.empty_like(row)
        torch.sub(path[:, 1], path[:, 0], out=found[:, : path.shape[2]]).mul_(-1 / _RATE)
        found[:, path.shape[2] :] = 0.0
        return found, losses, path

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.fixed, ctx.shapes, *tensors = inputs
        _, losses, path = output
        ctx.mark_non_differentiable(losses, path)
        ctx.set_materialize_grads(False)
        ctx.present = [False, False, *(True for _ in tensors)]
        ctx.save_for_backward(path, *tensors)

    @staticmethod
    @autograd.backward_rule
    def backward(ctx: Any, v: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        path, *tensors = ctx.saved_tensors
        fixed, shapes = ctx.fixed, ctx.shapes
        if v is None:
            return (None,) * (2 + len(tensors))
        needs = autograd.asked(ctx)[2:]
        if torch.is_grad_enabled() or functorch_active():

            def again(x: Tensor, labels: Tensor, row: Tensor, *frozen: Tensor) -> Tensor:
                own = _among(fixed, shapes, row, frozen)
                found = side_by_side(_slopes_in_graph(fixed, x, labels, own), labels.shape[0])
                return F.pad(found, (0, row.shape[1] - found.shape[1]))

            return None, None, *_gradients_in_graph(again, tensors, v, needs)
        x, labels, row, *frozen = tensors
        left = iter(needs[3:])
        wanted = Wanted([flag or next(left) for flag in fixed.updated], needs[0], False)
        u = v[:, : path.shape[2]] / -_RATE  # the way back gives u - rate H u
        done = fixed.backend.steps_grad(
            u, x, labels, _among(fixed, shapes, row, frozen), path, fixed.updated, fixed.blocks,
            [[_RATE] * len(shapes)], fixed.from_images, wanted, True,
        )  # fmt: skip
        others = [g for g, flag in zip(done.others, fixed.updated) if not flag]
        found = [None if g is None else _like(g, p) for g, p in zip(others, frozen)]
        of_row = torch.zeros_like(v)
        torch.sub(done.updated, u, out=of_row[:, : path.shape[2]])
        return None, None, done.x, None, of_row, *found


def _among(fixed: _Fixed, shapes: Sequence[torch.Size], row: Tensor, frozen: Sequence[Tensor]) -> list[Tensor]:
    """All parameters, the updated ones as they lie in a row."""
    sizes = [s.numel() for s in shapes]
    parts = iter(part.unflatten(1, s) for part, s in zip(row[:, : sum(sizes)].split(sizes, 1), shapes))
    left = iter(frozen)
    return [next(parts) if flag else next(left) for flag in fixed.updated]


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Each task's share [1|T, ...], summed where the tasks share the parameter [1, ...]."""
    return gradient if gradient.shape[0] == parameter.shape[0] else gradient.sum(0, keepdim=True)


def _gradients_in_graph(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], g: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of function(*tensors) by autograd, in its graph where gradients are on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, as one input may depend on another: a gradient is by these values alone.
        inputs = [t.view_as(t) if needed else t for t, needed in zip(tensors, needs)]
        result = function(*inputs)
        wanted = [t for t, needed in zip(inputs, needs) if needed]
        got = torch.autograd.grad(result, wanted, g, create_graph=create_graph, allow_unused=True)
    left = iter(got)
    return [next(left) if needed else None for needed in needs]


def _replayed(fixed: _Fixed, x: Tensor, labels: Tensor, rates: Tensor, *parameters: Tensor) -> Tensor:
    """The new values side by side, with all steps in autograd's graph."""
    places, tasks = fixed.places, labels.shape[0]
    own = list(parameters)
    for i in places:
        own[i] = own[i].expand(tasks, *own[i].shape[1:])
    for row in rates:
        if fixed.second_order:
            slopes = list(_slopes_in_graph(fixed, x, labels, own))
        else:
            with torch.no_grad():
                images = fixed.backend.layout(x) if fixed.blocks else x
                none: frozenset[int] = frozenset()
                done = step_gradients(
                    fixed.backend, images, labels, own, fixed.blocks, {}, frozenset(places), none, False
                )
            slopes = [done.slopes[i] for i in places]
        for i, slope, rate in zip(places, slopes, row):
            own[i] = own[i] - rate * slope
    return side_by_side([own[i] for i in places], tasks)


class _Whole(NamedTuple):
    """What is no tensor in a call for logits."""

    backend: Backend
    blocks: list[BlockSpec]
    from_images: bool
    own: int  # the number of parameters; silent ones come behind them


class _Logits(torch.autograd.Function):
    """The logits, and what the way back reads."""

    @staticmethod
    def forward(fixed: _Whole, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor] | None:
        return fixed.backend.logits(x, list(parameters[: fixed.own]), fixed.blocks, fixed.from_images)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor] | None) -> None:
        if output is None:
            return
        ctx.fixed, *tensors = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.present = [False, *(True for _ in tensors)]
        own = 1 + ctx.fixed.own
        ctx.silent = [t.shape for t in tensors[own:]]
        ctx.save_for_backward(output[1], *tensors[:own])

    @staticmethod
    @autograd.backward_rule
    def backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, x, *parameters = ctx.saved_tensors
        if g is None:
            return (None,) * (2 + len(parameters) + len(ctx.silent))
        backend, blocks, from_images, _ = ctx.fixed
        needs = autograd.asked(ctx)[1:]
        needs, silent = needs[: 1 + len(parameters)], needs[1 + len(parameters) :]
        zeros = [g.new_zeros(shape) if needed else None for shape, needed in zip(ctx.silent, silent)]
        if torch.is_grad_enabled() or functorch_active():
            found = _gradients_in_graph(
                lambda x, *own: _logits_in_graph(backend, blocks, x, own), [x, *parameters], g, needs
            )
            return None, *found, *zeros
        grads, gx = backend.logits_grad(g, x, parameters, kept, blocks, needs[1:], from_images, needs[0])
        return None, gx, *(None if d is None else _like(d, p) for d, p in zip(grads, parameters)), *zeros


def _logits_in_graph(backend: Backend, blocks: Sequence[BlockSpec], x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The logits, or the features, by operations of autograd, one per layer."""
    y = x
    for block, spec in enumerate(blocks):
        weight, gamma, beta = parameters[3 * block : 3 * block + 3]
        z = autograd.Conv2d.apply(backend.layout(y) if block == 0 else y, weight, None, spec.conv, backend)
        y = autograd.NormReluPool.apply(z, gamma, beta, None, spec, backend)[0]
    if len(parameters) == 3 * len(blocks) > 0:
        return y
    return autograd.Linear.apply(y.flatten(2), *parameters[-2:], backend)


def _slopes_in_graph(fixed: _Fixed, x: Tensor, labels: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the updated parameters, differentiable."""
    now = [p.view_as(p) for p in parameters]  # by these values, not by what they came from
    own = [now[i] if now[i].requires_grad else now[i].requires_grad_() for i in fixed.places]
    logits = _logits_in_graph(fixed.backend, fixed.blocks, x, now)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]
    return torch.autograd.grad(loss, own, create_graph=True)
