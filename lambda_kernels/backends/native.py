"""The native backend: the C++ kernels of csrc/cpu around ATen's convolutions, in channels-last."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .. import _build
from ..spec import BlockSpec, ConvSpec
from .reference import Reference, channels_last

_WHY = _build.mismatch()
if not _WHY:
    try:
        # Registers the operators of torch.ops.lambda_kernels. isa() throws where LAMBDA_KERNELS_ISA cannot be had.
        importlib.import_module("lambda_kernels._C").isa()
    except RuntimeError as error:
        _WHY = str(error)
    except ImportError as error:
        _WHY = f"the extension lambda_kernels._C does not load ({error}): build it with `pip install .`"

MOST_TAPS = 32  # numbers of a patch that the kernels of the first block take


class Native(Reference):
    """Fused norm, ReLU and pool on the CPU; convolutions are ATen's, at the machine's limit in channels-last."""

    name = "native"

    def reasons(self) -> list[str]:
        return [_WHY] if _WHY else []

    def refusals(self, op: str, device: torch.device, dtype: torch.dtype, pool: int) -> list[str]:
        why = []
        if device.type != "cpu":
            why.append(f"it runs on the CPU, the tensors are on {device}")
        if op == "conv_block" and dtype not in (torch.float32, torch.float64):
            why.append(f"it is built for float32 and float64, not {dtype}")
        if op == "conv_block" and pool not in (1, 2):
            why.append(f"it pools by 1 or 2, not {pool}")
        return why

    def layout(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, spec: ConvSpec, eps: float, pool: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.image_refusals(x, weight, spec, pool):
            return super().block(x, weight, gamma, beta, spec, eps, pool)
        moments = self.image_moments(x, (weight.shape[-2], weight.shape[-1]), spec)
        y, _, mean, rstd = self.image_block(x, weight, gamma, beta, moments, spec, eps, pool)
        return y, mean, rstd

    def image_refusals(self, x: Tensor, weight: Tensor, spec: ConvSpec, pool: int) -> list[str]:
        why = self.refusals("conv_block", x.device, x.dtype, pool)
        if spec.groups != 1 or weight[0, 0].numel() > MOST_TAPS:
            why.append(f"its patches have at most {MOST_TAPS} numbers, of one group, not {weight[0, 0].numel()}")
        return why

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        return torch.ops.lambda_kernels.image_moments(x, kernel, _geometry(spec, 1))

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, spec: ConvSpec, eps: float,
        pool: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        geometry = _geometry(spec, pool)
        return torch.ops.lambda_kernels.image_block(x, weight, gamma, beta, moments, geometry, eps)

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, spec: ConvSpec, pool: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return torch.ops.lambda_kernels.image_block_grad(
            gy, x, weight, gamma, index, mean, rstd, moments, _geometry(spec, pool)
        )

    def inner_loop_refusals(self, dtype: torch.dtype) -> list[str]:
        built = dtype in (torch.float32, torch.float64)
        return [] if built else [f"it is built for float32 and float64, not {dtype}"]

    def inner_loop(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        steps: int, lr: float,
    ) -> Tensor:  # fmt: skip
        """As the reference's, by one operator that spreads the tasks over the threads; the losses are float64."""
        x = self.layout(x) if blocks else x
        geometry: list[int] = []
        for (stride, padding, dilation, groups), _, pool in blocks:
            geometry += [*stride, *padding, *dilation, groups, pool]
        eps, flags = [b.eps for b in blocks], [int(u) for u in updated]
        return torch.ops.lambda_kernels.inner_loop(x, labels, parameters, flags, geometry, eps, steps, lr)

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.lambda_kernels.norm_relu_pool(z, gamma, beta, eps, pool)

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        dz, dgamma, dbeta = torch.ops.lambda_kernels.norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, pool, need_z)
        return dz if need_z else None, dgamma, dbeta

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
        d_gy, d_z, d_gamma = torch.ops.lambda_kernels.norm_relu_pool_grad_grad(
            gy, z, gamma, index, mean, rstd, pool, v, v_gamma, v_beta, need_z
        )
        return d_gy, d_z if need_z else None, d_gamma


def _geometry(spec: ConvSpec, pool: int) -> list[int]:
    return [*spec.stride, *spec.padding, *spec.dilation, pool]


if not _WHY:

    @torch.library.register_fake("lambda_kernels::norm_relu_pool")
    def _(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tasks, images, channels, height, width = z.shape
        y = _images(z, height // pool, width // pool, z.dtype)
        index = _images(z, height // pool, width // pool, torch.uint8)
        return y, index, z.new_empty(tasks, channels), z.new_empty(tasks, channels)

    @torch.library.register_fake("lambda_kernels::norm_relu_pool_grad")
    def _(
        gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dz = _images(z, z.shape[-2], z.shape[-1], z.dtype) if need_z else z.new_empty(0)
        return dz, torch.empty_like(mean), torch.empty_like(mean)

    @torch.library.register_fake("lambda_kernels::norm_relu_pool_grad_grad")
    def _(
        gy: Tensor,
        z: Tensor,
        gamma: Tensor,
        index: Tensor,
        mean: Tensor,
        rstd: Tensor,
        pool: int,
        v: Tensor | None,
        v_gamma: Tensor,
        v_beta: Tensor,
        need_z: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_z = _images(z, z.shape[-2], z.shape[-1], z.dtype) if need_z else z.new_empty(0)
        return _images(z, gy.shape[-2], gy.shape[-1], z.dtype), d_z, torch.empty_like(mean)

    def _images(z: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """An empty channels-last [tasks, images, channels, height, width]."""
        tasks, images, channels = z.shape[:3]
        return z.new_empty(tasks, images, height, width, channels, dtype=dtype).permute(0, 1, 4, 2, 3)
