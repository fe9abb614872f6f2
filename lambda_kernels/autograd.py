"""torch.autograd.Functions: which gradients are computed, what is saved for them, vmap, and derivatives of any order.

Every operand carries a task axis of size 1 or T (see `spec`), so a vmap over tasks moves the mapped axis there and
calls again. {convolution, its input gradient, its weight gradient} and {matrix product} are closed under
differentiation: each one's backward calls the others. Only the norm needs a second-derivative formula of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch import (
    custom_function_call,
    forward_mode,
    functorch_active,
    is_old_batch,
    primals_of,
    will_engine_run,
    with_forward_mode,
    without_old_batches,
)
from .backends import Backend, Reference
from .backends.reference import norm_relu_pool_grad_jvp, norm_relu_pool_jvp
from .spec import BlockSpec, ConvSpec

_REFERENCE = Reference()


class Function:
    """A function with rules for its derivatives and for vmap, as torch.autograd.Function has them as static methods.

    The backend is its last argument. A graph that others than autograd look into (a transform of torch.func within
    torch.compile, an exported program) is made of torch's own operators, by the reference.
    """

    forward: Callable[..., Any]
    autograd: type[torch.autograd.Function]
    compiled: type[torch.autograd.Function]  # the same without jvp: torch.compile takes no Function that has one
    recorded: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        rules = {name: rule for name, rule in vars(cls).items() if isinstance(rule, staticmethod)}
        cls.autograd = type(cls.__name__, (torch.autograd.Function,), rules)
        cls.compiled = type(cls.__name__, (torch.autograd.Function,), {k: r for k, r in rules.items() if k != "jvp"})
        # torch's own `apply` does this, and inspects the signature of forward anew in every call.
        cls.recorded = super(torch.autograd.Function, cls.autograd).apply  # type: ignore[misc]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            if functorch_active() or torch.compiler.is_exporting():
                return cls.forward(*args[:-1], _REFERENCE)
            return cls.compiled.apply(*args)
        if functorch_active():
            return custom_function_call(cls.autograd, *args)
        if not (torch.is_grad_enabled() or forward_mode()):
            return cls.forward(*args)
        return cls.recorded(*args)


def backward_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of a Function, which torch's older vmap (is_grads_batched, vectorize=True) may call as well."""

    @wraps(rule)
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.compiler.is_compiling() or not _any_old_batch(gradients):
            return rule(ctx, *gradients)
        return without_old_batches(lambda *g: rule(ctx, *g), gradients)

    return backward


def forward_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The jvp of a Function, from rule(ctx, kept, *tangents) with the tensors that `_keep` kept.

    torch switches forward mode off around a jvp: a nested jvp would lose its tangents in silence. It is on in here, and
    the kept tensors come without their own tangents of this level.
    """

    @wraps(rule)
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        with with_forward_mode(True):
            kept = primals_of(ctx.saved_tensors)
            if _any_old_batch(tangents):
                return without_old_batches(lambda *t: rule(ctx, kept, *t), tangents)
            return rule(ctx, kept, *tangents)

    return jvp


def _any_old_batch(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(t is not None and is_old_batch(t) for t in tensors)


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Keep what the jvp reads, where there may be one."""
    if not torch.compiler.is_compiling() and forward_mode():
        ctx.save_for_forward(*tensors)


def _keep_factors(ctx: Any, a: Tensor, b: Tensor) -> None:
    """Keep the two operands, the first of its inputs, that a result is linear in: each for the other's gradient."""
    need_a, need_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if need_b else None, b if need_a else None)
    _keep(ctx, a, b)
    ctx.set_materialize_grads(False)


def _total(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """The sum of a result's tangents, in its shape."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.expand(shape)


def asked(ctx: Any) -> tuple[bool, ...]:
    """For each tensor input: does the backward pass that is running now need its gradient?

    `needs_input_grad` was fixed in the forward pass. In second-order MAML a frozen weight needs a gradient in the
    outer pass but not in the inner one, so the engine is asked whether it will go on to that input's node.
    """
    if torch.compiler.is_compiling():
        return ctx.needs_input_grad
    edges = iter(ctx.next_functions)  # one per tensor input, none for None
    nodes = [next(edges)[0] if present else None for present in ctx.present]
    return tuple(needed and _will_run(node) for needed, node in zip(ctx.needs_input_grad, nodes))


def _will_run(node: Any) -> bool:
    try:
        return bool(will_engine_run(node))
    except RuntimeError:  # the engine's answer for a leaf that torch.autograd.grad was called with
        return True


def _note_inputs(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.present = [t is not None for t in tensors]


def _sum_to(g: Tensor, tasks: int) -> Tensor:
    """Per-task gradients [T, ...], or those [1, ...] of all tasks, of an operand with `tasks` (1 or T) tasks."""
    if g.shape[0] == tasks:
        return g
    return g.sum(0, keepdim=True) if tasks == 1 else _expand(g, tasks)


def _expand(t: Tensor | None, tasks: int) -> Tensor:
    """A shared operand [1, ...] as [tasks, ...], without a copy."""
    assert t is not None
    return t.expand(tasks, *t.shape[1:])


def _own(result: Tensor) -> Tensor:
    """The result, not marked as a view: of a view that is made in here autograd refuses in-place steps outside."""
    return torch.ops.aten._unsafe_view(result, result.shape)


def _of_images(result: Tensor) -> Tensor:
    """A convolution's result [T, N, C, H, W]; that of one image is in order. Of a channels-last one, views that take
    its axes apart give strides with which ATen's backward of a norm is wrong."""
    return result.contiguous() if result.shape[1] == 1 else result


class _Merged(NamedTuple):
    """Operands whose mapped axis V has been merged with their task axis, and the way back."""

    operands: list[Tensor | None]
    sizes: tuple[int, int]

    def split(self, result: Tensor, tasks: int | None = None) -> Tensor:
        """[V * T, ...] as [V, T, ...]; summed to [V, 1, ...] where the operand was shared by its tasks."""
        result = result.unflatten(0, self.sizes)
        return result.sum(1, keepdim=True) if tasks is not None and tasks < self.sizes[1] else result


def _merge(batch: int, dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> _Merged:
    moved = [t if t is None or d is None else t.movedim(d, 0) for t, d in zip(tensors, dims)]
    tasks = max(t.shape[0 if d is None else 1] for t, d in zip(moved, dims) if t is not None)
    merged: list[Tensor | None] = []
    for t, d in zip(moved, dims):
        if t is None or (d is None and t.shape[0] == 1):
            merged.append(t)
        else:
            t = t.unsqueeze(0) if d is None else t
            merged.append(t.expand(batch, tasks, *t.shape[2:]).flatten(0, 1))
    return _Merged(merged, (batch, tasks))


class Laid(Function):
    """Contiguous images in the layout in which a backend's fused block reads them; their gradient is contiguous again.

    ATen's batch norm computes a wrong gradient on the CPU where its input lies otherwise than what flows back.
    """

    @staticmethod
    def forward(x: Tensor, backend: Backend) -> Tensor:
        return _own(backend.layout(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Backend], output: Tensor) -> None:
        ctx.backend = inputs[1]

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, kept: tuple[Tensor, ...], tangent: Tensor, *_: None) -> Tensor:
        return Laid.apply(tangent, ctx.backend)

    @staticmethod
    @backward_rule
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.contiguous(), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, backend: Any) -> Any:
        merged = _merge(info.batch_size, in_dims[:1], (x,))
        return merged.split(Laid.apply(*merged.operands, backend)), 0


class Conv2d(Function):
    """y = convolution(x, weight) + bias; x is kept only for a gradient of weight, weight only for one of x."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, backend: Backend) -> Tensor:
        return _own(_of_images(backend.conv2d(x, weight, bias, spec)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.spec, ctx.backend = inputs
        _note_inputs(ctx, x, weight, bias)
        _keep_factors(ctx, x, weight)
        ctx.x_shape, ctx.weight_shape, ctx.y_shape = x.shape, weight.shape, output.shape
        ctx.contiguous = x.is_contiguous()
        ctx.bias_tasks = None if bias is None else bias.shape[0]

    @staticmethod
    @forward_rule
    def jvp(
        ctx: Any, kept: tuple[Tensor, ...], tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None
    ) -> Tensor:
        x, weight = kept
        parts = [] if tx is None else [Conv2d.apply(tx, weight, None, ctx.spec, ctx.backend)]
        parts += [] if tw is None else [Conv2d.apply(x, tw, None, ctx.spec, ctx.backend)]
        parts += [] if tb is None else [tb[:, None, :, None, None]]
        return _total(parts, ctx.y_shape)

    @staticmethod
    @backward_rule
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Tensor | None, ...]:
        if gy is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = asked(ctx)[:3]
        gx = Conv2dInputGrad.apply(gy, weight, ctx.x_shape, ctx.spec, ctx.backend) if need_x else None
        gx = gx.contiguous() if gx is not None and ctx.contiguous else gx  # see Laid
        gw = Conv2dWeightGrad.apply(gy, x, ctx.weight_shape, ctx.spec, ctx.backend) if need_weight else None
        gb = _sum_to(gy.sum((1, 3, 4)), ctx.bias_tasks) if need_bias else None
        return gx, gw, gb, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: Any, backend: Any) -> Any:
        merged = _merge(info.batch_size, in_dims, (x, weight, bias))
        return merged.split(Conv2d.apply(*merged.operands, spec, backend)), 0


class Conv2dInputGrad(Function):
    """The gradient of a convolution's x from gy and weight; linear in both."""

    @staticmethod
    def forward(gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec, backend: Backend) -> Tensor:
        return _of_images(backend.conv2d_input_grad(gy, weight, x_shape, spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gy, weight, _, ctx.spec, ctx.backend = inputs
        _note_inputs(ctx, gy, weight)
        _keep_factors(ctx, gy, weight)
        ctx.gy_tasks, ctx.weight_shape, ctx.x_shape = gy.shape[0], weight.shape, output.shape

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, kept: tuple[Tensor, ...], tgy: Tensor | None, tw: Tensor | None, *_: None) -> Tensor:
        gy, weight = kept
        parts = [] if tgy is None else [Conv2dInputGrad.apply(tgy, weight, ctx.x_shape, ctx.spec, ctx.backend)]
        parts += [] if tw is None else [Conv2dInputGrad.apply(gy, tw, ctx.x_shape, ctx.spec, ctx.backend)]
        return _total(parts, ctx.x_shape)

    @staticmethod
    @backward_rule
    def backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:
        if v is None:
            return (None,) * 5
        gy, weight = ctx.saved_tensors
        need_gy, need_weight = asked(ctx)[:2]
        ggy = _sum_to(Conv2d.apply(v, weight, None, ctx.spec, ctx.backend), ctx.gy_tasks) if need_gy else None
        gw = Conv2dWeightGrad.apply(gy, v, ctx.weight_shape, ctx.spec, ctx.backend) if need_weight else None
        return ggy, gw, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: Any, backend: Any) -> Any:
        merged = _merge(info.batch_size, in_dims[:2], (gy, weight))
        full = torch.Size((merged.sizes[0] * merged.sizes[1], *x_shape[1:]))
        return merged.split(Conv2dInputGrad.apply(*merged.operands, full, spec, backend), x_shape[0]), 0


class Conv2dWeightGrad(Function):
    """The gradient of a convolution's weight from gy and x; linear in both."""

    @staticmethod
    def forward(gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: ConvSpec, backend: Backend) -> Tensor:
        return backend.conv2d_weight_grad(gy, x, weight_shape, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gy, x, _, ctx.spec, ctx.backend = inputs
        _note_inputs(ctx, gy, x)
        _keep_factors(ctx, gy, x)
        ctx.gy_tasks, ctx.x_shape, ctx.weight_shape = gy.shape[0], x.shape, output.shape

    @staticmethod
    @forward_rule
    def jvp(ctx: Any, kept: tuple[Tensor, ...], tgy: Tensor | None, tx: Tensor | None, *_: None) -> Tensor:
        gy, x = kept
        parts = [] if tgy is None else [Conv2dWeightGrad.apply(tgy, x, ctx.weight_shape, ctx.spec, ctx.backend)]
        parts += [] if tx is None else [Conv2dWeightGrad.apply(gy, tx, ctx.weight_shape, ctx.spec, ctx.backend)]
        return _total(parts, ctx.weight_shape)

    @staticmethod
    @backward_rule
    def backward(ctx: Any, v: Tensor | None) -> tuple[Tensor | None, ...]:
        if v is None:
            return (None,) * 5
        gy, x = ctx.saved_tensors
        need_gy, need_x = asked(ctx)[:2]
        ggy = _sum_to(Conv2d.apply(x, v, None, ctx.spec, ctx.backend), ctx.gy_tasks) if need_gy else None
        gx = Conv2dInputGrad.apply(gy, v, ctx.x_shape, ctx.spec, ctx.backend) if need_x else None
        return ggy, gx, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: Any, backend: Any) -> Any:
        merged = _merge(info.batch_size, in_dims[:2], (gy, x))
        full = torch.Size((merged.sizes[0] * merged.sizes[1], *weight_shape[1:]))
        return merged.split(Conv2dWeightGrad.apply(*merged.operands, full, spec, backend), weight_shape[0]), 0


class Linear(Function):
    """y = x weight^T + bias for x [1|T, M, in], weight [1|T, out, in], bias [1|T, out]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: Backend) -> Tensor:
        return _own(backend.linear(x, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.backend = inputs
        _note_inputs(ctx, x, weight, bias)
        _keep_factors(ctx, x, weight)
        ctx.tasks = x.shape[0], weight.shape[0], None if bias is None else bias.shape[0]
        ctx.y_shape = output.shape

    @staticmethod
    @forward_rule
    def jvp(
        ctx: Any, kept: tuple[Tensor, ...], tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, *_: None
    ) -> Tensor:
        x, weight = kept
        parts = [] if tx is None else [Linear.apply(tx, weight, None, ctx.backend)]
        parts += [] if tw is None else [Linear.apply(x, tw, None, ctx.backend)]
        parts += [] if tb is None else [tb.unsqueeze(1)]
        return _total(parts, ctx.y_shape)

    @staticmethod
    @backward_rule
    def backward(ctx: Any, gy: Tensor | None) -> tuple[Tensor | None, ...]:
        if gy is None:
            return (None,) * 4
        x, weight = ctx.saved_tensors
        x_tasks, weight_tasks, bias_tasks = ctx.tasks
        need_x, need_weight, need_bias = asked(ctx)[:3]
        gx = gw = gb = None
        if need_x:
            gx = _sum_to(Linear.apply(gy, weight.mT, None, ctx.backend), x_tasks)
        if need_weight and weight_tasks == 1 and x.shape[0] == gy.shape[0]:  # tasks and rows are one sum
            gw = Linear.apply(gy.flatten(0, 1).mT.unsqueeze(0), x.flatten(0, 1).mT.unsqueeze(0), None, ctx.backend)
        elif need_weight:
            gw = _sum_to(Linear.apply(gy.mT, x.mT, None, ctx.backend), weight_tasks)
        if need_bias:
            gb = _sum_to(gy.sum(1), bias_tasks)
        return gx, gw, gb, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backend: Any) -> Any:
        merged = _merge(info.batch_size, in_dims, (x, weight, bias))
        return merged.split(Linear.apply(*merged.operands, backend)), 0


class Block(Function):
    """A fused block where no gradient is needed: y [T, N, O, H', W'], mean and rstd [T, O]."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = backend.block(x, weight, gamma, beta, block)
        return _own(y), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, *constants: Any) -> Any:
        merged = _merge(info.batch_size, in_dims[:4], (x, weight, gamma, beta))
        return tuple(merged.split(r) for r in Block.apply(*merged.operands, *constants)), (0, 0, 0)


class ImageBlock(Function):
    """A fused block over images that need no gradient, without the convolution's output: as `NormReluPool` behind
    `Conv2d`, with the statistics and the gradients from the moments of the images' patches.

    A gradient that may be differentiated again is made of those two functions: the output is computed then.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None, block: BlockSpec, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        moments = backend.image_moments(x, (weight.shape[-2], weight.shape[-1]), block.conv)
        y, index, mean, rstd = backend.image_block(x, weight, gamma, beta, moments, block)
        return _own(y), index, mean, rstd, moments

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, gamma, beta, bias, ctx.block, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _note_inputs(ctx, x, weight, gamma, beta, bias)
        ctx.beta_tasks = beta.shape[0]
        ctx.bias_shape = None if bias is None else bias.shape
        if any(ctx.needs_input_grad[:4]):
            ctx.save_for_backward(x, weight, gamma, *output[1:])

    @staticmethod
    @backward_rule
    def backward(ctx: Any, gy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gy is None:
            return (None,) * 7
        need_weight, need_gamma, need_beta, need_bias = asked(ctx)[1:5]
        d_weight = d_gamma = d_beta = None
        if need_weight or need_gamma or need_beta:
            x, weight, gamma, index, mean, rstd, moments = ctx.saved_tensors
            block, backend = ctx.block, ctx.backend
            if torch.is_grad_enabled() or functorch_active() or forward_mode():
                z = _expand(Conv2d.apply(x, weight, None, block.conv, backend), index.shape[0])
                d_z, d_gamma, d_beta = NormReluPoolGrad.apply(
                    gy, z, gamma, index, mean, rstd, block, need_weight, backend
                )
                if need_weight:
                    d_weight = Conv2dWeightGrad.apply(d_z, x, weight.shape, block.conv, backend)
            else:
                d_weight, d_gamma, d_beta = backend.image_block_grad(
                    gy, x, weight, gamma, index, mean, rstd, moments, block
                )
            d_weight = _sum_to(d_weight, weight.shape[0]) if d_weight is not None and need_weight else None
            d_gamma = _sum_to(d_gamma, gamma.shape[0]) if need_gamma else None
            d_beta = _sum_to(d_beta, ctx.beta_tasks) if need_beta else None
        d_bias = gy.new_zeros(ctx.bias_shape) if need_bias else None
        return None, d_weight, d_gamma, d_beta, d_bias, None, None


class NormReluPool(Function):
    """Batch-statistics norm, ReLU and max-pool of z [T, N, C, H, W]; returns y, index, mean, rstd as the backend does.

    `bias`, of the convolution in front, cancels in the norm: it is an input only to be given its gradient, zero.
    """

    @staticmethod
    def forward(
        z: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None, block: BlockSpec, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, index, mean, rstd = backend.norm_relu_pool(z, gamma, beta, block)
        return _own(y), index, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, gamma, beta, bias, ctx.block, ctx.backend = inputs
        _, index, mean, rstd = output
        ctx.mark_non_differentiable(index, mean, rstd)
        ctx.set_materialize_grads(False)
        _note_inputs(ctx, z, gamma, beta, bias)
        ctx.affine_tasks = gamma.shape[0], beta.shape[0]
        ctx.bias_shape = None if bias is None else bias.shape
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(z, gamma, index, mean, rstd)
        _keep(ctx, z, gamma, index)

    @staticmethod
    @forward_rule
    def jvp(
        ctx: Any, kept: tuple[Tensor, ...], tz: Tensor | None, tgamma: Tensor | None, tbeta: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        z, gamma, index = kept
        return norm_relu_pool_jvp(z, gamma, index, ctx.block, tz, tgamma, tbeta), None, None, None

    @staticmethod
    @backward_rule
    def backward(ctx: Any, gy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gy is None:
            return (None,) * 6
        need_z, need_gamma, need_beta, need_bias = asked(ctx)[:4]
        d_z = d_gamma = d_beta = None
        if need_z or need_gamma or need_beta:
            d_z, d_gamma, d_beta = NormReluPoolGrad.apply(gy, *ctx.saved_tensors, ctx.block, need_z, ctx.backend)
            d_z = d_z if need_z else None
            d_gamma = _sum_to(d_gamma, ctx.affine_tasks[0]) if need_gamma else None
            d_beta = _sum_to(d_beta, ctx.affine_tasks[1]) if need_beta else None
        return d_z, d_gamma, d_beta, gy.new_zeros(ctx.bias_shape) if need_bias else None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, z: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None, *constants: Any
    ) -> Any:
        merged = _merge(info.batch_size, in_dims[:4], (z, gamma, beta, bias))
        tasks = merged.sizes[0] * merged.sizes[1]
        results = NormReluPool.apply(_expand(merged.operands[0], tasks), *merged.operands[1:], *constants)
        return tuple(merged.split(r) for r in results), (0, 0, 0, 0)


class NormReluPoolGrad(Function):
    """The gradients of NormReluPool: dz (an empty tensor unless need_z), and dgamma, dbeta [T, C].

    Its own backward is the backend's; where a further derivative may follow, it is the reference's, which takes the
    statistics from z in differentiable operations and so is right to any order.
    """

    @staticmethod
    def forward(
        gy: Tensor,
        z: Tensor,
        gamma: Tensor,
        index: Tensor,
        mean: Tensor,
        rstd: Tensor,
        block: BlockSpec,
        need_z: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dz, dgamma, dbeta = backend.norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, block, need_z)
        dz = z.new_empty(z.shape[0], 0) if dz is None else dz
        return (_own(dz), _own(dgamma), _own(dbeta)) if forward_mode() else (dz, dgamma, dbeta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.block, ctx.need_z, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        _note_inputs(ctx, *tensors)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(*tensors)
        _keep(ctx, *tensors[:4])

    @staticmethod
    @forward_rule
    def jvp(
        ctx: Any, kept: tuple[Tensor, ...], tgy: Tensor | None, tz: Tensor | None, tgamma: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        gy, z, gamma, index = kept
        tdz, tdgamma, tdbeta = norm_relu_pool_grad_jvp(gy, z, gamma, index, ctx.block, tgy, tz, tgamma, ctx.need_z)
        return z.new_empty(z.shape[0], 0) if tdz is None else tdz, tdgamma, tdbeta

    @staticmethod
    @backward_rule
    def backward(
        ctx: Any, v: Tensor | None, v_gamma: Tensor | None, v_beta: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gy, z, gamma, index, mean, rstd = ctx.saved_tensors
        _, need_z, need_gamma = asked(ctx)[:3]
        v = v if ctx.need_z else None
        if v is None and v_gamma is None and v_beta is None:
            return (None,) * 9
        v_gamma = torch.zeros_like(mean) if v_gamma is None else v_gamma
        v_beta = torch.zeros_like(mean) if v_beta is None else v_beta
        # Only the reference can be differentiated once more: it takes the statistics from z.
        again = torch.is_grad_enabled() or functorch_active() or forward_mode()
        d_gy, d_z, d_gamma = (_REFERENCE if again else ctx.backend).norm_relu_pool_grad_grad(
            gy, z, gamma, index, mean, rstd, ctx.block, v, v_gamma, v_beta, need_z
        )
        d_gamma = _sum_to(d_gamma, gamma.shape[0]) if need_gamma else None
        return d_gy, d_z, d_gamma, None, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        gy: Tensor,
        z: Tensor,
        gamma: Tensor,
        index: Tensor,
        mean: Tensor,
        rstd: Tensor,
        *constants: Any,
    ) -> Any:
        merged = _merge(info.batch_size, in_dims[:6], (gy, z, gamma, index, mean, rstd))
        own = merged.operands.pop(2)
        wide = [_expand(t, merged.sizes[0] * merged.sizes[1]) for t in merged.operands]
        results = NormReluPoolGrad.apply(*wide[:2], own, *wide[2:], *constants)
        return tuple(merged.split(r) for r in results), (0, 0, 0)
