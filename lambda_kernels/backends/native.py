"""The native backend: the C++ kernels of csrc/cpu around ATen's convolutions, in channels-last."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _build
from .._say import say_once
from ..spec import BlockSpec, ConvSpec
from .base import Call, InnerLoop, StepsGrad, Wanted
from .reference import Reference, channels_last

_WHY = _build.mismatch()
_extension: Any = None
if not _WHY:
    try:
        # Registers the operators of torch.ops.lambda_kernels. isa() throws where LAMBDA_KERNELS_ISA cannot be had.
        _extension = importlib.import_module("lambda_kernels._C")
        _extension.isa()
    except ModuleNotFoundError as error:
        _WHY = _build.not_built(error)
    except RuntimeError as error:
        _WHY = str(error)
    except ImportError as error:
        _WHY = f"the extension lambda_kernels._C does not load ({error}): build it with `pip install .`"
if _WHY:
    say_once(f"CPUs compute by backend `reference`, several times slower than by `native`: {_WHY}")

MOST_TAPS = 32  # numbers of a patch that the kernels of the first block take


class Native(Reference):
    """Fused norm, ReLU and pool on the CPU; convolutions are ATen's, at the machine's limit in channels-last."""

    name = "native"
    reasons_are_said = True
    label_errors = True

    def reasons(self) -> list[str]:
        return [_WHY] if _WHY else []

    def refusals(self, call: Call) -> list[str]:
        return super().refusals(call) + _refusals(call.op, call.device, call.dtype, call.pool)

    def layout(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        if not (_is_dense(x) and _filters(x.shape, weight.shape, spec, x.dtype)):
            return super().conv2d(x, weight, bias, spec)
        y = torch.ops.lambda_kernels.winograd(x, weight, spec.padding)
        return y if bias is None else y + bias[:, None, :, None, None]

    def conv2d_input_grad(self, gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec) -> Tensor:
        if not (_is_dense(gy) and _filters(x_shape, weight.shape, spec, gy.dtype)):
            return super().conv2d_input_grad(gy, weight, x_shape, spec)
        gx = torch.ops.lambda_kernels.winograd_input_grad(gy, weight, x_shape, spec.padding)
        return gx if x_shape[0] == gx.shape[0] else gx.sum(0, keepdim=True)

    def conv2d_weight_grad(self, gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: ConvSpec) -> Tensor:
        if not (_is_dense(gy) and _is_dense(x) and _filters(x.shape, weight_shape, spec, gy.dtype)):
            return super().conv2d_weight_grad(gy, x, weight_shape, spec)
        return torch.ops.lambda_kernels.winograd_weight_grad(gy, x, weight_shape, spec.padding)

    def block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.block_refusals(x, weight, block):
            return super().block(x, weight, gamma, beta, block)
        return torch.ops.lambda_kernels.frozen_block(x, weight, gamma, beta, _geometry(block), block.eps)

    def block_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        filters = block.pool == 2 and _filters(x.shape, weight.shape, block.conv, x.dtype)
        return [] if filters else self.image_refusals(x, weight, block)

    def affine_block(self, x: Tensor, weight: Tensor, bias: Tensor, block: BlockSpec) -> Tensor:
        if not self.takes_affine(x.shape, weight.shape, x.dtype, block):
            return super().affine_block(x, weight, bias, block)
        return torch.ops.lambda_kernels.affine_block(x, weight, bias, _geometry(block))

    def affine_chain(
        self, x: Tensor, parameters: Sequence[Tensor], geometry: Sequence[int], ready: Sequence[Tensor] = ()
    ) -> Tensor:
        """The logits of images [N, C, H, W] by blocks as in `affine_block`, each of which `takes_affine`, and a linear
        layer. parameters: weight and bias of each; geometry: stride, padding, dilation and pool per block; ready: what
        `prepare_affine_chain` made of these, which each call makes anew without."""
        logits: Tensor = torch.ops.lambda_kernels.affine_chain(x, parameters, geometry, ready)
        return logits

    def prepare_affine_chain(
        self, parameters: Sequence[Tensor], geometry: Sequence[int], size: Sequence[int]
    ) -> list[Tensor]:
        """What `affine_chain` reads in place of the weights, for images of one size [C, H, W]."""
        made: list[Tensor] = torch.ops.lambda_kernels.affine_chain_prepare(parameters, geometry, size)
        return made

    def takes_affine(self, x: torch.Size, weight: torch.Size, dtype: torch.dtype, block: BlockSpec) -> bool:
        """Whether there is a kernel for `affine_block`: an answer that holds for any number of images."""
        one = torch.Size((x[0], 1, *x[2:]))
        by_patches = block.conv.groups == 1 and weight[2:].numel() <= MOST_TAPS and block.pool in (1, 2)
        filters = block.pool == 2 and _filters(one, weight, block.conv, dtype)
        return dtype in (torch.float32, torch.float64) and x.numel() > 0 and (by_patches or filters)

    def image_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        why = _refusals("conv_block", x.device, x.dtype, block.pool)
        if block.conv.groups != 1 or weight[0, 0].numel() > MOST_TAPS:
            why.append(f"its patches have at most {MOST_TAPS} numbers, of one group, not {weight[0, 0].numel()}")
        return why

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        return torch.ops.lambda_kernels.image_moments(x, kernel, [*spec.stride, *spec.padding, *spec.dilation, 1])

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.lambda_kernels.image_block(x, weight, gamma, beta, moments, _geometry(block), block.eps)

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, block: BlockSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return torch.ops.lambda_kernels.image_block_grad(gy, x, weight, gamma, index, rstd, moments, _geometry(block))

    def inner_loop(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        steps: int, rates: Sequence[float], query: Tensor | None = None,
    ) -> InnerLoop:  # fmt: skip
        """As the reference's, by one operator that spreads the tasks over the threads; the rows are float64."""
        flags, *constants = _constants(updated, blocks)
        rows, new, logits = torch.ops.lambda_kernels.inner_loop(
            x, labels, parameters, flags, *constants, steps, rates, query
        )
        return InnerLoop(rows, new, None if query is None else logits)

    def prepared(
        self, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec]
    ) -> Callable[..., list[Tensor] | None]:
        call: Callable[..., list[Tensor] | None] = _extension.PreparedCall(parameters, *_constants(updated, blocks))
        return call

    def steps(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        rates: Sequence[Sequence[float]], from_images: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if not _backs(blocks):
            return super().steps(x, labels, parameters, updated, blocks, rates, from_images)
        flags, geometry, eps = _constants(updated, blocks)
        losses, path = torch.ops.lambda_kernels.chain_steps(
            x, labels, parameters, flags, geometry, eps, len(rates), _flat(rates), from_images
        )
        return losses, path

    def steps_grad(
        self, v: Tensor, x: Tensor, labels: Tensor, parameters: list[Tensor], path: Tensor, updated: list[bool],
        blocks: list[BlockSpec], rates: Sequence[Sequence[float]], from_images: bool, wanted: Wanted,
        second_order: bool,
    ) -> StepsGrad:  # fmt: skip
        if not _backs(blocks):
            return super().steps_grad(
                v, x, labels, parameters, path, updated, blocks, rates, from_images, wanted, second_order
            )
        flags, geometry, eps = _constants(updated, blocks)
        done, others, gx, of_rates = torch.ops.lambda_kernels.chain_steps_grad(
            v, x, labels, parameters, path, flags, geometry, eps, len(rates), _flat(rates),
            list(map(int, wanted.parameters)), from_images, wanted.x, wanted.rates, second_order,
        )  # fmt: skip
        left = iter(others)
        own = [next(left) if flag and not moves else None for flag, moves in zip(wanted.parameters, updated)]
        return StepsGrad(done, own, gx if wanted.x else None, of_rates if wanted.rates else None)

    def logits(
        self, x: Tensor, parameters: list[Tensor], blocks: list[BlockSpec], from_images: bool
    ) -> tuple[Tensor, Tensor] | None:
        if not _backs(blocks):
            return None
        _, geometry, eps = _constants([], blocks)
        logits, kept = torch.ops.lambda_kernels.chain_logits(x, parameters, geometry, eps, from_images)
        return logits, kept

    def logits_grad(
        self, g: Tensor, x: Tensor, parameters: list[Tensor], kept: Tensor, blocks: list[BlockSpec],
        wanted: Sequence[bool], from_images: bool, want_x: bool,
    ) -> tuple[list[Tensor | None], Tensor | None]:  # fmt: skip
        _, geometry, eps = _constants([], blocks)
        found, gx = torch.ops.lambda_kernels.chain_logits_grad(
            g, x, parameters, kept, geometry, eps, list(map(int, wanted)), from_images, want_x
        )
        left = iter(found)
        return [next(left) if flag else None for flag in wanted], gx if want_x else None

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.lambda_kernels.norm_relu_pool(z, gamma, beta, block.eps, block.pool)

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        need_z: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
        op = torch.ops.lambda_kernels.norm_relu_pool_grad
        dz, dgamma, dbeta = op(gy, z, gamma, index, mean, rstd, block.pool, need_z)
        return dz if need_z else None, dgamma, dbeta

    def norm_relu_pool_grad_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        v: Tensor | None, v_gamma: Tensor, v_beta: Tensor, need_z: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        op = torch.ops.lambda_kernels.norm_relu_pool_grad_grad
        d_gy, d_z, d_gamma = op(gy, z, gamma, index, mean, rstd, block.pool, v, v_gamma, v_beta, need_z)
        return d_gy, d_z if need_z else None, d_gamma


def _refusals(op: str, device: torch.device, dtype: torch.dtype, pool: int) -> list[str]:
    why = []
    if device.type != "cpu":
        why.append(f"it runs on the CPU, the tensors are on {device}")
    if op in ("conv_block", "inner_loop") and dtype not in (torch.float32, torch.float64):
        why.append(f"it is built for float32 and float64, not {dtype}")
    if op == "conv_block" and pool not in (1, 2):
        why.append(f"it pools by 1 or 2, not {pool}")
    return why


def _filters(x: torch.Size, weight: torch.Size, spec: ConvSpec, dtype: torch.dtype) -> bool:
    """Whether Winograd's algorithm takes a task's convolution: as WinogradConvolution::takes in csrc/winograd.h."""
    rows, columns = (x[3 + axis] + 2 * spec.padding[axis] - 2 for axis in (0, 1))
    many = min(weight[1:3]) >= 16 and weight[1] * weight[2] >= 1024
    few = min(weight[1:3]) >= 8 and x[1] * rows * columns <= 1024
    return (
        dtype in (torch.float32, torch.float64)
        and weight[-2:] == (3, 3)
        and (spec.stride, spec.dilation, spec.groups) == ((1, 1), (1, 1), 1)
        and max(spec.padding) <= 2
        and (many or few)
        and x.numel() > 0
        and 16 * ((rows + 1) // 2) * ((columns + 1) // 2) < 9 * rows * columns
    )


def _is_dense(x: Tensor) -> bool:
    """Whether images [1|T, N, C, H, W] lie channels-last and not also in order, as images of one pixel do, whose
    results have to be in order too. From another layout ATen is faster than a copy and this."""
    return x.permute(0, 1, 3, 4, 2).is_contiguous() and not x.is_contiguous()


def _constants(updated: list[bool], blocks: list[BlockSpec]) -> tuple[list[int], list[int], list[float]]:
    """The flags, the geometry and the eps of an inner loop as its operator takes them."""
    geometry = [n for (stride, padding, dilation, groups), _, pool in blocks
                for n in (*stride, *padding, *dilation, groups, pool)]  # fmt: skip
    return list(map(int, updated)), geometry, [b.eps for b in blocks]


def _flat(rates: Sequence[Sequence[float]]) -> list[float]:
    return [rate for row in rates for rate in row]


def _backs(blocks: list[BlockSpec]) -> bool:
    """Whether the operators of the outer gradient take the blocks."""
    return all(block.pool in (1, 2) for block in blocks)


def _geometry(block: BlockSpec) -> list[int]:
    (stride, padding, dilation, _), _, pool = block
    return [*stride, *padding, *dilation, pool]
