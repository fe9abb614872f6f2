"""The reference backend: ATen on any device and dtype. Every other backend is compared with it in float64.

Operands carry a task axis of size 1 (shared) or T, as `spec` says; a shared operand is never copied T times where
folding the tasks into the batch does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import BlockSpec, ConvSpec, output_size
from . import outer_step
from .base import Backend, Call, InnerLoop, StepsGrad, Wanted
from .inner_loop import inner_loop

# Operations that a backend may fuse, and what they are made of.
_PARTS = {
    "conv_block": {"conv2d", "norm_relu_pool"},
    "block": {"conv2d", "norm_relu_pool", "conv_block", "image_moments", "image_block"},
    "image_refusals": {"conv2d", "conv2d_weight_grad", "norm_relu_pool", "norm_relu_pool_grad", "conv_block"},
    "inner_loop": {
        "conv2d", "conv2d_input_grad", "conv2d_weight_grad", "linear", "norm_relu_pool", "norm_relu_pool_grad",
        "conv_block", "block", "image_moments", "image_block", "image_block_grad", "cross_entropy_grad", "head_grad",
        "sgd_",
    },
    "head_grad": {"linear", "cross_entropy_grad"},
}  # fmt: skip
_PARTS["block_refusals"] = _PARTS["block"]
_PARTS["prepared"] = {*_PARTS["inner_loop"], "inner_loop"}
_PARTS["logits"] = _PARTS["steps"] = _PARTS["steps_grad"] = {*_PARTS["inner_loop"], "norm_relu_pool_grad_grad"}


def per_task(op: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """op task by task, stacked over the tasks; keeps a channels-last result in that layout."""
    tasks = max(t.shape[0] for t in operands)
    results = [op(*(t[i if t.shape[0] > 1 else 0] for t in operands)) for i in range(tasks)]
    if results[0].dim() == 4 and results[0].is_contiguous(memory_format=torch.channels_last):
        return torch.stack([r.permute(0, 2, 3, 1) for r in results]).permute(0, 1, 4, 2, 3)
    return torch.stack(results)


def windows(x: Tensor, pool: int) -> Tensor:
    """x [..., H, W] as [..., H // pool, W // pool, pool * pool], a window's places in row-major order."""
    h, w = x.shape[-2] // pool, x.shape[-1] // pool
    tiles = x[..., : h * pool, : w * pool].unflatten(-1, (w, pool)).unflatten(-3, (h, pool))
    return tiles.transpose(-3, -2).flatten(-2)


def gather_windows(x: Tensor, index: Tensor, pool: int) -> Tensor:
    """The value of x [..., H, W] at place `index` of every window, zero where the index is pool * pool."""
    places = torch.arange(pool * pool, device=x.device)
    return (windows(x, pool) * (index.unsqueeze(-1) == places)).sum(-1)


def scatter_windows(g: Tensor, index: Tensor, pool: int, height: int, width: int) -> Tensor:
    """The adjoint of `gather_windows`: [..., height, width], zero outside the chosen places."""
    h, w = g.shape[-2:]
    places = torch.arange(pool * pool, device=g.device)
    tiles = (g.unsqueeze(-1) * (index.unsqueeze(-1) == places)).unflatten(-1, (pool, pool))
    full = tiles.transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return F.pad(full, (0, width - w * pool, 0, height - h * pool))


def over_pixels(v: Tensor) -> Tensor:
    """[T, C] as [T, 1, C, 1, 1], to meet [T, N, C, H, W]."""
    return v[:, None, :, None, None]


def channels_last(x: Tensor) -> Tensor:
    """x [1|T, N, C, H, W] with its channels side by side in memory."""
    if x.shape[2] == 1:  # dense either way: name the channel stride 1, by which ATen recognises channels-last
        return x.contiguous().squeeze(2).unsqueeze(-1).movedim(-1, 2)
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _in_order(t: Tensor) -> Tensor:
    """Images or a weight of one channel by the strides of contiguous memory: by those of channels-last, which name the
    same values, ATen gives wrong float32 values for a step of more than 1 to a single column (torch 2.13, oneDNN)."""
    return t.flatten().view(t.shape) if t.shape[1] == 1 and t.is_contiguous() else t


def each_rate(parameters: list[Tensor], rates: Sequence[float]) -> list[float]:
    """One rate per parameter, from that or a single one; ValueError for another number of them."""
    if len(rates) not in (1, len(parameters)):
        raise ValueError(f"sgd_: {len(rates)} rates for {len(parameters)} parameters")
    return list(rates) if len(rates) == len(parameters) else list(rates) * len(parameters)


def by_rate(
    parameters: list[Tensor], gradients: list[Tensor], rates: Sequence[float]
) -> dict[float, list[tuple[Tensor, Tensor]]]:
    """The pairs of parameters and gradients that are to be updated, by their rate; those of rate 0 are left out."""
    groups: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for parameter, gradient, rate in zip(parameters, gradients, each_rate(parameters, rates)):
        if rate != 0.0:
            groups.setdefault(rate, []).append((parameter, gradient))
    return groups


class Reference(Backend):
    """All operations in ATen; other backends override what they do better.

    A class that overrides an operation gets those that are made of it in the reference's way, unless it overrides them
    too: what its parent computes as one would leave its own operation out.
    """

    name = "reference"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for whole, parts in _PARTS.items():
            if whole not in cls.__dict__ and parts & cls.__dict__.keys():
                setattr(cls, whole, getattr(Reference, whole))

    @property
    def linear_is_torchs(self) -> bool:
        return getattr(self.linear, "__func__", None) is Reference.linear

    def refusals(self, call: Call) -> list[str]:
        why = super().refusals(call)
        if call.op == "inner_loop" and type(self) is Reference:
            why.append("the reference adapts through autograd, the truth that inner loops are compared with")
        return why

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        def one(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if weight.shape[1] == 1 and spec.stride[1] > 1:
                x, weight = _in_order(x), _in_order(weight)
            return torch.convolution(
                x, weight, bias, spec.stride, spec.padding, spec.dilation, False, (0, 0), spec.groups
            )

        if weight.shape[0] == 1 and (bias is None or bias.shape[0] == 1):
            y = one(x.flatten(0, 1), weight[0], None if bias is None else bias[0])
            return torch.unflatten(y, 0, x.shape[:2])  # Tensor.unflatten is none of the functions that Dynamo follows
        return per_task(one, x, weight) if bias is None else per_task(one, x, weight, bias)

    def conv2d_input_grad(self, gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec) -> Tensor:
        images, (channels, height, width) = x_shape[1], x_shape[2:]

        def one(gy: Tensor, weight: Tensor) -> Tensor:
            # Only the shape and the layout of x are read.
            layout = torch.channels_last if _is_channels_last(gy) else torch.contiguous_format
            x = torch.empty(
                (gy.shape[0], channels, height, width), dtype=gy.dtype, device=gy.device, memory_format=layout
            )
            return _backward(gy, x, weight, spec, 0)

        if weight.shape[0] == 1:
            gx = one(gy.flatten(0, 1), weight[0]).unflatten(0, (gy.shape[0], images))
        else:
            gx = per_task(one, gy, weight)
        return gx if x_shape[0] == gx.shape[0] else gx.sum(0, keepdim=True)

    def conv2d_weight_grad(self, gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: ConvSpec) -> Tensor:
        def one(gy: Tensor, x: Tensor) -> Tensor:
            weight = torch.empty(weight_shape[1:], dtype=gy.dtype, device=gy.device)
            return _backward(gy, x, weight, spec, 1)

        if weight_shape[0] == 1:
            tasks = max(gy.shape[0], x.shape[0])
            folded = (t.expand(tasks, *t.shape[1:]).flatten(0, 1) for t in (gy, x))
            return one(*folded).unsqueeze(0)
        return per_task(one, gy, x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.shape[0] == 1 and (bias is None or bias.shape[0] == 1):
            return F.linear(x, weight[0], None if bias is None else bias[0])
        y = torch.matmul(x, weight.mT)
        return y if bias is None else y + bias.unsqueeze(1)

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(z.dtype, torch.float32)
        a = z.to(wide)
        variance, mean = torch.var_mean(a, (1, 3, 4), correction=0)
        rstd = torch.rsqrt(variance + block.eps)
        a = (a - over_pixels(mean)) * over_pixels(gamma * rstd) + over_pixels(beta.to(wide))
        y, index = _relu_pool(a, block.pool)
        return y.to(z.dtype), index, mean, rstd

    def conv_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        z = self.conv2d(x, weight, None, block.conv)
        z = z.expand(max(z.shape[0], gamma.shape[0], beta.shape[0]), *z.shape[1:])
        return z, *self.norm_relu_pool(z, gamma, beta, block)

    def block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, y, _, mean, rstd = self.conv_block(x, weight, gamma, beta, block)
        return y, mean, rstd

    def affine_block(self, x: Tensor, weight: Tensor, bias: Tensor, block: BlockSpec) -> Tensor:
        y = self.conv2d(x, weight, bias, block.conv).relu_()
        return y if block.pool == 1 else F.max_pool2d(y.flatten(0, 1), block.pool).unflatten(0, y.shape[:2])

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        need_z: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
        wide = mean.dtype
        g = scatter_windows(gy.to(wide), index, block.pool, z.shape[-2], z.shape[-1])
        xhat = (z.to(wide) - over_pixels(mean)) * over_pixels(rstd)
        dbeta, dgamma = g.sum((1, 3, 4)), (g * xhat).sum((1, 3, 4))
        dz = None
        if need_z:
            share = 1.0 / (z.numel() // (z.shape[0] * z.shape[2]))
            dz = over_pixels(gamma * rstd) * (g - over_pixels(dbeta * share) - xhat * over_pixels(dgamma * share))
            dz = dz.to(z.dtype)
        return dz, dgamma.to(gamma.dtype), dbeta.to(gamma.dtype)

    def norm_relu_pool_grad_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        v: Tensor | None, v_gamma: Tensor, v_beta: Tensor, need_z: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        # It is made of differentiable operations, with mean and rstd taken from z anew.
        # dz = gamma rstd P(g), dgamma = sum(g xhat), dbeta = sum(g), with g = gy, scattered to the maxima, and
        # P(u) = u - mean(u) - xhat mean(u xhat); xhat moves with z as rstd P, rstd as -rstd^2 xhat / M.
        xhat, r = _standardised(z, block.eps)
        wide = mean.dtype
        scale = over_pixels(gamma.to(wide)) * r
        g = scatter_windows(gy.to(wide), index, block.pool, z.shape[-2], z.shape[-1])
        along = over_pixels(v_gamma) * xhat + over_pixels(v_beta)
        u = over_pixels(v_gamma) * g
        d_gamma, turn = torch.zeros_like(mean), None
        if v is not None:
            v = v.to(wide)
            pv = _projected(v, xhat)
            along = along + scale * pv
            u = u - scale * (v * _average(g * xhat) + g * _average(v * xhat))
            d_gamma = (r * (pv * g).sum(_PIXELS, keepdim=True)).flatten(1)
            turn = scale * r * xhat * _average(pv * g)
        d_gy = gather_windows(along, index, block.pool).to(gy.dtype)
        d_z = None
        if need_z:
            d_z = (r * _projected(u, xhat) - (0 if turn is None else turn)).to(z.dtype)
        return d_gy, d_z, d_gamma.to(gamma.dtype)

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        patches = _patches(x, kernel, spec).double()
        patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1)
        return patches.mT @ patches

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w = weight.flatten(2).double()
        average = moments[:, :-1, -1] / moments[:, -1:, -1]
        covariance = moments[:, :-1, :-1] / moments[:, -1:, -1:] - average.unsqueeze(2) * average.unsqueeze(1)
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = torch.matmul(w, average.unsqueeze(2)).squeeze(2)
        rstd = ((torch.matmul(w, covariance) * w).sum(2).clamp_min(0) + block.eps).rsqrt().to(wide)
        z = self.conv2d(x, weight, None, block.conv)
        a = (z.to(wide) - over_pixels(mean.to(wide))) * over_pixels(gamma * rstd) + over_pixels(beta.to(wide))
        y, index = _relu_pool(a, block.pool)
        tasks = max(t.shape[0] for t in (y, mean))
        return y.to(x.dtype), index, mean.to(wide).expand(tasks, -1), rstd.expand(tasks, -1)

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, block: BlockSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        height, width = output_size(x.shape, weight.shape, block.conv)
        g = scatter_windows(gy.double(), index, block.pool, height, width).movedim(2, -1).flatten(1, 3)  # [T, M, O]
        patches = _patches(x, (weight.shape[-2], weight.shape[-1]), block.conv).double()
        w, m, r = weight.flatten(2).double(), mean.double(), rstd.double()
        count, total, second = moments[:, -1:, -1], moments[:, None, :-1, -1], moments[:, :-1, :-1]
        a = torch.matmul(g.mT, patches)
        dbeta = g.sum(1)
        dgamma = r * ((w * a).sum(2) - m * dbeta)
        along = r.unsqueeze(2) * (torch.matmul(w, second) - m.unsqueeze(2) * total)
        dw = a - (dbeta / count).unsqueeze(2) * total - (dgamma / count).unsqueeze(2) * along
        dw = (gamma.double() * r).unsqueeze(2) * dw
        return dw.unflatten(2, weight.shape[2:]).to(weight.dtype), dgamma.to(gamma.dtype), dbeta.to(gamma.dtype)

    def cross_entropy_grad(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        tasks, images, ways = logits.shape
        labels = labels.expand(tasks, images)
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        known = (labels >= 0) & (labels < ways)
        own = log_p.gather(2, labels.clamp(0, ways - 1).unsqueeze(2)).squeeze(2)
        loss = -torch.where(known, own, torch.nan).mean(1)
        target = labels.unsqueeze(2) == torch.arange(ways, device=logits.device)
        return loss, ((log_p.exp() - target.to(log_p.dtype)) / images).to(logits.dtype)

    def head_grad(
        self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        logits = self.linear(x, weight, bias)
        loss, g = self.cross_entropy_grad(logits.expand(labels.shape[0], *logits.shape[1:]), labels)
        need_weight, need_bias, need_x = wanted
        return (
            loss,
            self.linear(g.mT, x.mT, None) if need_weight else None,
            g.sum(1) if need_bias else None,
            self.linear(g, weight.mT, None) if need_x else None,
        )

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], rates: Sequence[float]) -> None:
        for rate, pairs in by_rate(parameters, gradients, rates).items():
            torch._foreach_add_([p for p, _ in pairs], [g for _, g in pairs], alpha=-rate)

    def inner_loop(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        steps: int, rates: Sequence[float], query: Tensor | None = None,
    ) -> InnerLoop:  # fmt: skip
        return inner_loop(self, x, labels, parameters, updated, blocks, steps, rates, query)

    def steps(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        rates: Sequence[Sequence[float]], from_images: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return outer_step.steps(self, x, labels, parameters, updated, blocks, rates)

    def steps_grad(
        self, v: Tensor, x: Tensor, labels: Tensor, parameters: list[Tensor], path: Tensor, updated: list[bool],
        blocks: list[BlockSpec], rates: Sequence[Sequence[float]], from_images: bool, wanted: Wanted,
        second_order: bool,
    ) -> StepsGrad:  # fmt: skip
        return outer_step.steps_grad(self, v, x, labels, parameters, path, updated, blocks, rates, wanted, second_order)


def _patches(x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
    """x [1|T, N, C, H, W] -> what a convolution multiplies its weight with, [1|T, N H' W', C kh kw]."""
    columns = F.unfold(x.flatten(0, 1), kernel, spec.dilation, spec.padding, spec.stride)
    return columns.mT.unflatten(0, x.shape[:2]).flatten(1, 2)


_PIXELS = 1, 3, 4  # the axes of z [T, N, C, H, W] over which a norm takes its statistics


def _average(u: Tensor) -> Tensor:
    return u.mean(_PIXELS, keepdim=True)


def _standardised(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(z - mean) rstd and rstd [T, 1, C, 1, 1], in operations that can be differentiated to any order."""
    a = z.to(torch.promote_types(z.dtype, torch.float32))
    variance, mean = torch.var_mean(a, _PIXELS, correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    return (a - mean) * rstd, rstd


def _projected(u: Tensor, xhat: Tensor) -> Tensor:
    """P(u) = u - mean(u) - xhat mean(u xhat): rstd P is the derivative of xhat by z, and its own adjoint."""
    return u - _average(u) - xhat * _average(u * xhat)


def norm_relu_pool_jvp(
    z: Tensor, gamma: Tensor, index: Tensor, block: BlockSpec, tz: Tensor | None, tgamma: Tensor | None,
    tbeta: Tensor | None,
) -> Tensor:  # fmt: skip
    """The tangent of `norm_relu_pool`'s y, from the tangents of z, gamma and beta; None is zero.

    Operands are those of `Backend.norm_relu_pool`; differentiable to any order.
    """
    xhat, r = _standardised(z, block.eps)
    moved = torch.zeros_like(xhat)
    if tz is not None:
        moved = moved + over_pixels(gamma.to(xhat.dtype)) * r * _projected(tz.to(xhat.dtype), xhat)
    if tgamma is not None:
        moved = moved + over_pixels(tgamma.to(xhat.dtype)) * xhat
    if tbeta is not None:
        moved = moved + over_pixels(tbeta.to(xhat.dtype))
    return gather_windows(moved, index, block.pool).to(z.dtype)


def norm_relu_pool_grad_jvp(
    gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, block: BlockSpec, tgy: Tensor | None, tz: Tensor | None,
    tgamma: Tensor | None, need_z: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The tangents of `norm_relu_pool_grad`'s results, from those of gy, z and gamma; None is zero.

    Operands are those of `Backend.norm_relu_pool_grad`; differentiable to any order.
    """
    xhat, r = _standardised(z, block.eps)
    wide, size = xhat.dtype, z.shape[-2:]
    g = scatter_windows(gy.to(wide), index, block.pool, *size)
    tg = torch.zeros_like(g) if tgy is None else scatter_windows(tgy.to(wide), index, block.pool, *size)
    scale = over_pixels(gamma.to(wide))
    tdbeta, tdgamma = tg.sum(_PIXELS), (tg * xhat).sum(_PIXELS)
    turned = _projected(tg, xhat)  # the tangent of P(g)
    tscale = torch.zeros_like(scale) if tgamma is None else over_pixels(tgamma.to(wide)) * r  # and of gamma rstd
    if tz is not None:
        txhat = r * _projected(tz.to(wide), xhat)
        tdgamma = tdgamma + (g * txhat).sum(_PIXELS)
        turned = turned - txhat * _average(g * xhat) - xhat * _average(g * txhat)
        tscale = tscale - scale * r * r * _average(xhat * tz.to(wide))
    tdz = (scale * r * turned + tscale * _projected(g, xhat)).to(z.dtype) if need_z else None
    return tdz, tdgamma.to(gamma.dtype), tdbeta.to(gamma.dtype)


def _relu_pool(a: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """ReLU and max-pool of a [T, N, C, H, W], and the maximum's place in its window as `norm_relu_pool` gives it."""
    best, at = F.max_pool2d(a.flatten(0, 1), pool, return_indices=True)
    row, column = at // a.shape[-1], at % a.shape[-1]
    index = torch.where(best <= 0, pool * pool, row % pool * pool + column % pool).to(torch.uint8)
    return torch.unflatten(F.relu(best), 0, a.shape[:2]), torch.unflatten(index, 0, a.shape[:2])


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _backward(gy: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec, which: int) -> Tensor:
    """The gradient of x (which = 0) or of weight (1) alone."""
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(
        gy, x, weight, None, spec.stride, spec.padding, spec.dilation, False, (0, 0), spec.groups, mask
    )[which]
