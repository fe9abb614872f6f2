"""The Triton backend: kernels for NVIDIA GPUs of compute capability 8.0 on, or interpreted on the CPU for tests.

Nothing of triton is imported before the first call. Sums have a fixed order, so results repeat to the bit on one
machine; tile sizes are measured at the first call of a size and remembered on disk, so a run of every size must precede
the capture of a CUDA graph.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...spec import BlockSpec, ConvSpec, output_size
from ..base import Call
from ..reference import Reference, channels_last, each_rate
from .operators import call, kernel

__all__ = ["Triton"]

OLDEST = (3, 6)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LARGEST_POOL = 8
MOST_WAYS = 32  # of a linear layer whose loss and gradients are two launches


def interpreting() -> bool:
    """Are kernels run by Triton's interpreter, on CPU tensors? Settled when the first kernel is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def _reasons(interpreting: bool) -> tuple[str, ...]:
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed: `pip install triton`, or a torch for CUDA, which brings it along",)
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ("the triton found here has no version: install it with `pip install triton`",)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return (f"it needs triton {'.'.join(map(str, OLDEST))} or newer, this is {version}",)
    if interpreting:
        return ()
    if not torch.cuda.is_available():
        return ("torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, very slowly)",)
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return (f"it needs a GPU of compute capability 8.0 or newer, this one has {capability[0]}.{capability[1]}",)
    return ()


class Triton(Reference):
    """Implicit matrix products with a task axis, a fused block of three launches, all updates in one."""

    name = "triton"

    def reasons(self) -> list[str]:
        return list(_reasons(interpreting()))

    def refusals(self, call: Call) -> list[str]:
        why, device = super().refusals(call), call.device
        if interpreting() and device.type != "cpu":
            why.append(f"TRITON_INTERPRET is set, so it runs on the CPU, the tensors are on {device}")
        if not interpreting() and device.type != "cuda":
            why.append(f"it runs on CUDA devices, the tensors are on {device}")
        if call.dtype not in DTYPES:
            why.append(f"it is built for {', '.join(map(str, DTYPES))}, not {call.dtype}")
        if call.op == "conv_block" and call.pool > LARGEST_POOL:
            why.append(f"it pools by at most {LARGEST_POOL}, not {call.pool}")
        return why

    def layout(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        return call("conv2d", x, weight, bias, spec)

    def conv2d_input_grad(self, gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec) -> Tensor:
        return call("conv2d_input_grad", gy, weight, x_shape, spec)

    def conv2d_weight_grad(self, gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: ConvSpec) -> Tensor:
        return call("conv2d_weight_grad", gy, x, weight_shape, spec)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return call("linear", x, weight, bias)

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return call("norm_relu_pool", z, gamma, beta, block.eps, block.pool)

    def conv_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return call("conv_block", x, weight, gamma, beta, *block)

    def block_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        spec, _, pool = block
        why = self.refusals(Call("conv_block", x.device, x.dtype, (x.shape, weight.shape), spec, pool))
        if pool not in (1, 2, 4):
            why.append(f"its pass over a block pools by 1, 2 or 4, not {pool}")
        if min(output_size(x.shape, weight.shape, spec)) < pool or not x.shape[1]:
            why.append(f"nothing is left of images {list(x.shape[1:])} after the convolution and the pooling")
        return why

    def block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.block_refusals(x, weight, block):
            return super().block(x, weight, gamma, beta, block)
        return call("block", x, weight, gamma, beta, *block)

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        need_z: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
        dz, dgamma, dbeta = call("norm_relu_pool_grad", gy, z, gamma, index, mean, rstd, block.pool, need_z)
        return dz if need_z else None, dgamma, dbeta

    def cross_entropy_grad(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return call("cross_entropy_grad", logits, labels)

    def head_grad(
        self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        if weight.shape[1] > MOST_WAYS or not x.shape[1] or not x.shape[2]:
            return super().head_grad(x, weight, bias, labels, wanted)
        found: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] = kernel("head_grad")(
            x, weight, bias, labels, wanted
        )
        return found

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], rates: Sequence[float]) -> None:
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) == 1 and all(p.is_contiguous() for p in parameters):
            moving = [
                (p, g.contiguous(), r) for p, g, r in zip(parameters, gradients, each_rate(parameters, rates)) if r != 0
            ]
            if moving:
                kernel("sgd_")(*zip(*moving))
        else:
            super().sgd_(parameters, gradients, rates)
