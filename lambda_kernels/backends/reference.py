"""The reference backend: ATen on any device and dtype. Every other backend is compared with it in float64.

Operands carry a task axis of size 1 (shared) or T, as `spec` says; a shared operand is never copied T times where
folding the tasks into the batch does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import BlockSpec, ConvSpec, output_size
from .descent import descend


class InnerLoop(NamedTuple):
    """What K steps of gradient descent give."""

    rows: Tensor  # [steps + 1, T]: the losses, then 0 where a task's updated parameters are finite, else NaN
    updated: list[Tensor]  # the updated parameters' new values
    logits: Tensor | None  # of the query images [T, Q, ways]


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


class Reference:
    """The operations that a backend must have, in ATen; other backends override what they do better."""

    name = "reference"

    @property
    def linear_is_torchs(self) -> bool:
        """Whether `linear` is ATen's: then torch's own function does the same with less around it."""
        return getattr(self.linear, "__func__", None) is Reference.linear

    def reasons(self) -> list[str]:
        """Why this backend cannot run on this machine; empty when it can."""
        return []

    def refusals(self, op: str, device: torch.device, dtype: torch.dtype, pool: int) -> list[str]:
        """Why this backend cannot run this call; empty when it can."""
        return []

    def layout(self, x: Tensor) -> Tensor:
        """x [1|T, N, C, H, W] in the memory layout in which this backend's fused block reads it."""
        return x

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        """x [1|T, N, C, H, W], weight [1|T, O, C/g, kh, kw], bias [1|T, O] -> [T, N, O, H', W']."""

        def one(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return torch.convolution(
                x, weight, bias, spec.stride, spec.padding, spec.dilation, False, (0, 0), spec.groups
            )

        if weight.shape[0] == 1 and (bias is None or bias.shape[0] == 1):
            return one(x.flatten(0, 1), weight[0], None if bias is None else bias[0]).unflatten(0, x.shape[:2])
        return per_task(one, x, weight) if bias is None else per_task(one, x, weight, bias)

    def conv2d_input_grad(self, gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec) -> Tensor:
        """gy [1|T, N, O, H', W'], weight [1|T, ...] -> the gradient of x, summed over tasks where x is shared."""
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
        """gy [1|T, N, O, H', W'], x [1|T, N, C, H, W] -> the gradient of weight, summed over tasks that share it."""

        def one(gy: Tensor, x: Tensor) -> Tensor:
            weight = torch.empty(weight_shape[1:], dtype=gy.dtype, device=gy.device)
            return _backward(gy, x, weight, spec, 1)

        if weight_shape[0] == 1:
            tasks = max(gy.shape[0], x.shape[0])
            folded = (t.expand(tasks, *t.shape[1:]).flatten(0, 1) for t in (gy, x))
            return one(*folded).unsqueeze(0)
        return per_task(one, gy, x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1|T, M, in], weight [1|T, out, in], bias [1|T, out] -> [T, M, out]."""
        if weight.shape[0] == 1 and (bias is None or bias.shape[0] == 1):
            return F.linear(x, weight[0], None if bias is None else bias[0])
        y = torch.matmul(x, weight.mT)
        return y if bias is None else y + bias.unsqueeze(1)

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch-statistics norm, ReLU and max-pool: z [T, N, C, H, W], gamma and beta [1|T, C].

        Returns y, index (uint8: the maximum's place in its window, pool * pool where the ReLU is shut), and each
        task's mean and rstd [T, C]. Half-precision input is computed in float32.
        """
        wide = torch.promote_types(z.dtype, torch.float32)
        a = z.to(wide)
        variance, mean = torch.var_mean(a, (1, 3, 4), correction=0)
        rstd = torch.rsqrt(variance + eps)
        a = (a - over_pixels(mean)) * over_pixels(gamma * rstd) + over_pixels(beta.to(wide))
        y, index = _relu_pool(a, pool)
        return y.to(z.dtype), index, mean, rstd

    def conv_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, spec: ConvSpec, eps: float, pool: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A convolution and `norm_relu_pool` behind it: z [T, N, O, H', W'], y, index, mean, rstd."""
        z = self.conv2d(x, weight, None, spec)
        z = z.expand(max(z.shape[0], gamma.shape[0], beta.shape[0]), *z.shape[1:])
        return z, *self.norm_relu_pool(z, gamma, beta, eps, pool)

    def block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, spec: ConvSpec, eps: float, pool: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`conv_block` where nothing is kept for a gradient: y, mean, rstd."""
        _, y, _, mean, rstd = self.conv_block(x, weight, gamma, beta, spec, eps, pool)
        return y, mean, rstd

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of `norm_relu_pool`: of z (None unless need_z), and of gamma and beta a task, [T, C]."""
        wide = mean.dtype
        g = scatter_windows(gy.to(wide), index, pool, z.shape[-2], z.shape[-1])
        xhat = (z.to(wide) - over_pixels(mean)) * over_pixels(rstd)
        dbeta, dgamma = g.sum((1, 3, 4)), (g * xhat).sum((1, 3, 4))
        dz = None
        if need_z:
            share = 1.0 / (z.numel() // (z.shape[0] * z.shape[2]))
            dz = over_pixels(gamma * rstd) * (g - over_pixels(dbeta * share) - xhat * over_pixels(dgamma * share))
            dz = dz.to(z.dtype)
        return dz, dgamma.to(gamma.dtype), dbeta.to(gamma.dtype)

    def norm_relu_pool_grad_grad(
        self,
        gy: Tensor,
        z: Tensor,
        gamma: Tensor,
        index: Tensor,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        pool: int,
        v: Tensor | None,
        v_gamma: Tensor,
        v_beta: Tensor,
        need_z: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The gradients of <dz, v> + <dgamma, v_gamma> + <dbeta, v_beta>, of `norm_relu_pool_grad`'s results.

        v is like z or None for zeros, v_gamma and v_beta are [T, C]. Returns those of gy, of z (None unless need_z)
        and of gamma a task, [T, C]. They are made of differentiable operations, with mean and rstd taken from z anew.
        """
        # With P(u) = u - mean(u) - xhat mean(u xhat): dz = gamma rstd P(g), dgamma = sum(g xhat), dbeta = sum(g), and
        # xhat moves with z as rstd P, rstd as -rstd^2 xhat / M. g is gy, scattered to the maxima.
        pixels = (1, 3, 4)
        wide = mean.dtype
        variance, average_z = torch.var_mean(z.to(wide), pixels, correction=0, keepdim=True)
        r = torch.rsqrt(variance + eps)
        xhat = (z.to(wide) - average_z) * r
        scale = over_pixels(gamma.to(wide)) * r

        def average(u: Tensor) -> Tensor:
            return u.mean(pixels, keepdim=True)

        def project(u: Tensor) -> Tensor:
            return u - average(u) - xhat * average(u * xhat)

        g = scatter_windows(gy.to(wide), index, pool, z.shape[-2], z.shape[-1])
        along = over_pixels(v_gamma) * xhat + over_pixels(v_beta)
        u = over_pixels(v_gamma) * g
        d_gamma, turn = torch.zeros_like(mean), None
        if v is not None:
            v = v.to(wide)
            pv = project(v)
            along = along + scale * pv
            u = u - scale * (v * average(g * xhat) + g * average(v * xhat))
            d_gamma = (r * (pv * g).sum(pixels, keepdim=True)).flatten(1)
            turn = scale * r * xhat * average(pv * g)
        d_gy = gather_windows(along, index, pool).to(gy.dtype)
        d_z = None
        if need_z:
            d_z = (r * project(u) - (0 if turn is None else turn)).to(z.dtype)
        return d_gy, d_z, d_gamma.to(gamma.dtype)

    # The first block, whose input are the images themselves: K = C kh kw is small, x is the same in every step, and
    # nobody wants its gradient. With p the patches of x [M, K], z = p w^T: all sums over z at full resolution are sums
    # over the moments p^T p, which are taken once for all steps, and z itself need not be kept.

    def image_refusals(self, x: Tensor, weight: Tensor, spec: ConvSpec, pool: int) -> list[str]:
        """Why `image_moments`, `image_block` and `image_block_grad` are not for this block; empty when they are."""
        return ["it has no kernel that takes a block's statistics from its patches"]

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        """x [1|T, N, C, H, W] -> the second moments [1|T, K + 1, K + 1], float64, of its patches with a 1 behind them.

        K = C kh kw in the order of a weight's [C, kh, kw]. With M patches: [:K, :K] = p^T p, [:K, K] = sum p,
        [K, K] = M.
        """
        patches = _patches(x, kernel, spec).double()
        patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1)
        return patches.mT @ patches

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, spec: ConvSpec, eps: float,
        pool: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """`conv_block` without z: y, index, mean, rstd, with the statistics taken from `image_moments`.

        mean = w sum(p) / M, variance = w (p^T p / M - mean(p) mean(p)^T) w^T.
        """
        w = weight.flatten(2).double()
        average = moments[:, :-1, -1] / moments[:, -1:, -1]
        covariance = moments[:, :-1, :-1] / moments[:, -1:, -1:] - average.unsqueeze(2) * average.unsqueeze(1)
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = torch.matmul(w, average.unsqueeze(2)).squeeze(2)
        rstd = ((torch.matmul(w, covariance) * w).sum(2).clamp_min(0) + eps).rsqrt().to(wide)
        z = self.conv2d(x, weight, None, spec)
        a = (z.to(wide) - over_pixels(mean.to(wide))) * over_pixels(gamma * rstd) + over_pixels(beta.to(wide))
        y, index = _relu_pool(a, pool)
        tasks = max(t.shape[0] for t in (y, mean))
        return y.to(x.dtype), index, mean.to(wide).expand(tasks, -1), rstd.expand(tasks, -1)

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, spec: ConvSpec, pool: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of `image_block`: of weight [T, O, C, kh, kw], gamma and beta [T, O], each a task.

        With g = gy at the maxima, A = g^T p [O, K] is the one sum over pixels, of the pooled size. Then
        dbeta = sum(g), dgamma = rstd (<w, A> - mean dbeta), and
        dw = gamma rstd (A - dbeta / M sum(p) - dgamma / M rstd (w p^T p - mean sum(p))).
        """
        height, width = output_size(x.shape, weight.shape, spec)
        g = scatter_windows(gy.double(), index, pool, height, width).movedim(2, -1).flatten(1, 3)  # [T, M, O]
        patches = _patches(x, (weight.shape[-2], weight.shape[-1]), spec).double()
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
        """Each task's mean cross-entropy and its gradient: logits [T, N, ways], labels [1|T, N] int64 -> [T] in at
        least float32, [T, N, ways] in the logits' dtype. A label outside 0..ways-1 gives NaN for its task's loss."""
        tasks, images, ways = logits.shape
        labels = labels.expand(tasks, images)
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        known = (labels >= 0) & (labels < ways)
        own = log_p.gather(2, labels.clamp(0, ways - 1).unsqueeze(2)).squeeze(2)
        loss = -torch.where(known, own, torch.nan).mean(1)
        target = labels.unsqueeze(2) == torch.arange(ways, device=logits.device)
        return loss, ((log_p.exp() - target.to(log_p.dtype)) / images).to(logits.dtype)

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        """parameter <- parameter - lr gradient, in place, for every pair of equal shapes and dtypes."""
        if parameters:
            torch._foreach_add_(parameters, gradients, alpha=-lr)

    def inner_loop_refusals(self, dtype: torch.dtype) -> list[str]:
        """Why `inner_loop` is not for a chain of this dtype; empty when it is. With the reference alone, autograd is
        the truth that the inner loops are compared with."""
        return ["the reference adapts through autograd"] if type(self) is Reference else []

    def inner_loop(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        steps: int, rates: Sequence[float], query: Tensor | None = None,
    ) -> InnerLoop:  # fmt: skip
        """K steps of gradient descent on a chain of blocks and a linear layer, of parameters that are left as they are,
        each with or without a task axis; see `descent.descend`.

        rates: one number for all, or one per step and updated parameter, step by step.

        Returns:
            The losses, the updated parameters' new values, [T, ...], without the axis where T is 1 and the parameter
            came without, and the logits [T, Q, ways] of query images [T, Q, ...].
        """
        if len(set(rates)) > 1:
            raise NotImplementedError("the reference takes one rate for all parameters and steps")
        tasks = labels.shape[0]
        axes = [4 + 1, 1 + 1, 1 + 1] * len(blocks) + [2 + 1, 1 + 1]  # with a task axis
        whole = [p if p.dim() == n else p.unsqueeze(0) for p, n in zip(parameters, axes)]
        own = [
            p.expand(tasks, *p.shape[1:]).clone(memory_format=torch.contiguous_format) if u else p
            for p, u in zip(whole, updated)
        ]
        rows = descend(self, x, labels, own, updated, blocks, steps, rates[0] if rates else 0.0)
        pairs = zip(parameters, own, updated)
        new = [o[0] if tasks == 1 and o.dim() > p.dim() else o for p, o, u in pairs if u]
        if query is None:
            return InnerLoop(rows, new, None)
        a = self.layout(query) if blocks else query
        for i, (conv, eps, pool) in enumerate(blocks):
            weight, gamma, beta = own[3 * i : 3 * i + 3]
            a = self.block(a, weight, gamma, beta, conv, eps, pool)[0]
        logits = self.linear(a.flatten(2), own[-2], own[-1])
        return InnerLoop(rows, new, logits)

    def prepared(
        self, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec]
    ) -> Callable[..., list[Tensor] | None] | None:
        """`inner_loop` of one task for given parameters as a function of (x [N, ...], labels [N], steps, rates), which
        has little to do but to compute. It gives the new values, or None where anything is not as it should be: wrong
        labels, infinite results. None where there is no such function."""
        return None


def _patches(x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
    """x [1|T, N, C, H, W] -> what a convolution multiplies its weight with, [1|T, N H' W', C kh kw]."""
    columns = F.unfold(x.flatten(0, 1), kernel, spec.dilation, spec.padding, spec.stride)
    return columns.mT.unflatten(0, x.shape[:2]).flatten(1, 2)


def _relu_pool(a: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """ReLU and max-pool of a [T, N, C, H, W], and the maximum's place in its window as `norm_relu_pool` gives it."""
    best, at = F.max_pool2d(a.flatten(0, 1), pool, return_indices=True)
    row, column = at // a.shape[-1], at % a.shape[-1]
    index = torch.where(best <= 0, pool * pool, row % pool * pool + column % pool).to(torch.uint8)
    return F.relu(best).unflatten(0, a.shape[:2]), index.unflatten(0, a.shape[:2])


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _backward(gy: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec, which: int) -> Tensor:
    """The gradient of x (which = 0) or of weight (1) alone."""
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(
        gy, x, weight, None, spec.stride, spec.padding, spec.dilation, False, (0, 0), spec.groups, mask
    )[which]
