"""The CUDA backend: the kernels of csrc/cuda around ATen's convolutions and matrix products, in channels-last.

`_cuda.so` knows neither torch nor Python and is loaded by ctypes when the first call asks for it: each launcher gets a
structure of pointers and sizes and queues its kernels on torch's current stream. Results and scratch memory come from
torch's allocator and nothing waits for the device, so that a CUDA graph can hold every call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...spec import BlockSpec, ConvSpec, output_size
from .. import native  # the schemas of torch.ops.lambda_kernels, where the extension loads
from ..base import Call, InnerLoop
from ..reference import Reference, channels_last, each_rate
from . import last_steps
from .library import (
    DTYPES,
    LIBRARY,
    SGD_TENSORS,
    STRUCTURES,
    CrossEntropy,
    LastSteps,
    Library,
    Limits,
    NormReluPool,
    Sgd,
    covers,
)  # fmt: skip
from .operands import (
    BLOCKS,
    addresses,
    affine,
    allows_tf32,
    fill,
    geometry,
    images_like,
    is_dense,
    named,
    one_dtype,
    parts_of,
    patches_inside,
    share,
    stride,
    wide,
)  # fmt: skip

__all__ = ["STRUCTURES", "Cuda", "Library", "Limits", "covers"]

MOST_TAPS = 32  # of a patch, in the image block
PART_PATCHES = 256
DISTANCE_PATCHES = 2048  # 4 tiles of csrc/cuda/image_distances.cuh


class Cuda(Reference):
    """Fused norm, ReLU and pool, the image block, cross-entropy and SGD on the GPU; convolutions are cuDNN's.

    Args:
        library: the library to load in place of the package's own.
        device: the kind of device that the library's kernels run on (tests run them on the CPU).
        limits: what a launch of all steps may take of the device, in place of what the device has.
    """

    name = "cuda"

    def __init__(self, library: Path | None = None, device: str = "cuda", limits: Limits | None = None):
        self._path, self._device, self._limits = library or LIBRARY, device, limits
        self._by_device: dict[int, Limits] = {}

    @cached_property
    def _library(self) -> Library:
        return Library(self._path)

    def reasons(self) -> list[str]:
        return list(self._reasons)

    @cached_property
    def _reasons(self) -> tuple[str, ...]:
        try:
            architectures = self._library.architectures
        except OSError as error:
            return (str(error),)
        if self._device != "cuda":
            return ()
        if not torch.cuda.is_available():
            built = "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
            return (f"{built}: torch.cuda.is_available() is False",)
        why = [self._misfit(index) for index in range(torch.cuda.device_count())]
        return () if "" in why else (f"{self._path.name} is built for {architectures or 'nothing'}: {'; '.join(why)}",)

    def _misfit(self, index: int) -> str:
        """Why the library has no code for a device; "" where it has."""
        major, minor = torch.cuda.get_device_capability(index)
        if covers(self._library.architectures, (major, minor)):
            return ""
        return (
            f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {major}.{minor}, build "
            f"lambda-kernels again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )

    def refusals(self, call: Call) -> list[str]:
        why, device = super().refusals(call), call.device
        if device.type != self._device:
            why.append(f"it runs on {self._device.upper()} devices, the tensors are on {device}")
        elif device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            why += [misfit for misfit in [self._misfit(index)] if misfit]
        if call.op == "conv_block" and call.dtype not in DTYPES:
            why.append(f"it is built for {', '.join(map(str, DTYPES))}, not {call.dtype}")
        if call.op == "conv_block" and call.pool not in (1, 2):
            why.append(f"it pools by 1 or 2, not {call.pool}")
        return why

    def layout(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def launch(self, name: str, parameters: ctypes.Structure, x: Tensor, what: str) -> None:
        """Queues a launcher's kernels on the current stream of x's device."""
        if x.device.type != "cuda":
            self._library.launch(name, parameters, x.dtype, 0, what)
            return
        index = x.device.index
        with nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index):
            self._library.set_device(index)
            self._library.launch(name, parameters, x.dtype, torch.cuda.current_stream(index).cuda_stream, what)

    def _shared(self, x: Tensor) -> tuple[Tensor, int]:
        """x [T, N, C, H, W] in dense channels-last memory and its task stride, 0 where one task was expanded to T."""
        if x.shape[0] > 1 and x.stride(0) == 0:
            return self.layout(x[:1]), 0
        return self.layout(x), stride(x)

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, eps, pool = block
        if torch.compiler.is_compiling() and one_dtype(z, gamma, beta):
            return torch.ops.lambda_kernels.norm_relu_pool(z, gamma, beta, eps, pool)
        if torch.compiler.is_compiling():
            return super().norm_relu_pool(z, gamma, beta, block)
        tasks, images, channels, height, width = z.shape
        if not z.numel() or min(height, width) < pool:
            return super().norm_relu_pool(z, gamma, beta, block)
        z, z_task = self._shared(z)
        gamma, beta = affine(z, gamma, beta)
        pooled = tasks, images, channels, height // pool, width // pool
        y, index = images_like(z, pooled, z.dtype), images_like(z, pooled, torch.uint8)
        mean, rstd = (torch.empty(tasks, channels, dtype=wide(z), device=z.device) for _ in range(2))
        parts = parts_of(tasks, images * height * width, z.element_size() * channels)
        partial = torch.empty(tasks, parts, 2, channels, dtype=torch.float64, device=z.device)
        parameters = NormReluPool(
            **addresses(z=z, gamma=gamma, beta=beta, mean=mean, rstd=rstd, y=y, index=index, partial=partial),
            tasks=tasks, images=images, channels=channels, height=height, width=width, pool=pool, parts=parts,
            z_task=z_task, gamma_task=stride(gamma), beta_task=stride(beta), wide_parameters=gamma.dtype == wide(z),
            eps=eps,
        )  # fmt: skip
        self.launch("norm_relu_pool", parameters, z, named(z=z, gamma=gamma, beta=beta))
        return y, index, mean, rstd

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        need_z: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
        pool = block.pool
        if torch.compiler.is_compiling() and one_dtype(z, gamma, mean):
            op = torch.ops.lambda_kernels.norm_relu_pool_grad
            dz, dgamma, dbeta = op(gy, z, gamma, index, mean, rstd, pool, need_z)
            return dz if need_z else None, dgamma, dbeta
        tasks, images, channels, height, width = z.shape
        if torch.compiler.is_compiling() or not index.numel():
            return super().norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, block, need_z)
        z, z_task = self._shared(z)
        gy, index = self.layout(gy.expand(index.shape)), self.layout(index)
        (vector,), dtype = affine(z, gamma), gamma.dtype
        mean, rstd = mean.contiguous(), rstd.contiguous()
        dz = images_like(z, (tasks, images, channels, height, width), z.dtype) if need_z else None
        dgamma, dbeta = (torch.empty(tasks, channels, dtype=vector.dtype, device=z.device) for _ in range(2))
        parts = parts_of(tasks, index.numel() // (tasks * channels), 2 * z.element_size() * channels)
        partial = torch.empty(tasks, parts, 2, channels, dtype=torch.float64, device=z.device)
        sums = torch.empty(tasks, 2, channels, dtype=torch.float64, device=z.device)
        parameters = NormReluPool(
            **addresses(z=z, gamma=vector, mean=mean, rstd=rstd, index=index, gy=gy, dgamma=dgamma, dbeta=dbeta, dz=dz,
                         partial=partial, sums=sums),
            tasks=tasks, images=images, channels=channels, height=height, width=width, pool=pool, parts=parts,
            z_task=z_task, gamma_task=stride(vector), wide_parameters=vector.dtype == wide(z),
        )  # fmt: skip
        self.launch("norm_relu_pool_grad", parameters, z, named(gy=gy, z=z, gamma=vector))
        return dz, dgamma.to(dtype), dbeta.to(dtype)

    def image_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        spec, _, pool = block
        why = self.refusals(Call("conv_block", x.device, x.dtype, (x.shape, weight.shape), spec, pool))
        taps = weight[0, 0].numel()
        if spec.groups != 1:
            why.append(f"it has no image block of {spec.groups} groups")
        if taps > MOST_TAPS:
            why.append(f"its image block takes patches of up to {MOST_TAPS} numbers, not {taps}")
        if min(output_size(x.shape, weight.shape, spec)) < pool or not x.shape[1]:
            why.append(f"nothing is left of images {list(x.shape[1:])} after the convolution and the pooling")
        return why

    def block_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        return self.image_refusals(x, weight, block)

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        x = self.layout(x)
        parameters = geometry(x, torch.Size((1, 1, x.shape[2], *kernel)), spec, 1)
        side = x.shape[2] * kernel[0] * kernel[1] + 1
        parameters.tasks, parameters.x_task = x.shape[0], x[0].numel()
        inside = patches_inside(parameters)
        patches = x.shape[1] * (parameters.out_height * parameters.out_width - inside)
        parameters.parts = min(-(-patches // PART_PATCHES), -(-BLOCKS // x.shape[0]))
        moments = torch.empty(x.shape[0], side, side, dtype=torch.float64, device=x.device)
        partial = torch.empty(x.shape[0], parameters.parts, side, side, dtype=torch.float64, device=x.device)
        distances = None
        if inside:
            blocks = x.shape[0] * (2 * kernel[0] - 1)
            parameters.distance_parts = min(-(-x.shape[1] * inside // DISTANCE_PATCHES), -(-BLOCKS // blocks))
            size = (
                x.shape[0],
                parameters.distance_parts,
                (kernel[0] * (2 * kernel[1] - 1) * x.shape[2] + 1) * x.shape[2],
            )
            distances = torch.empty(size, dtype=torch.float64, device=x.device)
        fill(parameters, x=x, moments=moments, partial=partial, distances=distances)
        self.launch("image_moments", parameters, x, f"{named(x=x)}, kernel {kernel}")
        return moments

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, index, mean, rstd = self._over_moments(x, weight, gamma, beta, moments, block, True)
        assert index is not None
        return y, index, mean, rstd

    def block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first block by its patches' moments: neither the convolution's output nor the maxima's places are
        stored."""
        if self.block_refusals(x, weight, block):
            return super().block(x, weight, gamma, beta, block)
        moments = self.image_moments(x, (weight.shape[-2], weight.shape[-1]), block.conv)
        y, _, mean, rstd = self._over_moments(x, weight, gamma, beta, moments, block, False)
        return y, mean, rstd

    def _over_moments(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, block: BlockSpec, places: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """`image_block`; None for its index where the maxima's places are not wanted."""
        spec, eps, pool = block
        tasks = max(t.shape[0] for t in (x, weight, gamma, beta))
        x, weight, moments = self.layout(x), weight.contiguous(), moments.contiguous()
        gamma, beta = affine(x, gamma, beta)
        parameters = geometry(x, weight.shape, spec, pool)
        share(parameters, x=x, weight=weight, gamma=gamma, beta=beta, moments=moments)
        size = tasks, x.shape[1], weight.shape[1], parameters.out_height // pool, parameters.out_width // pool
        y, index = images_like(x, size, x.dtype), images_like(x, size, torch.uint8) if places else None
        mean, rstd = (torch.empty(tasks, weight.shape[1], dtype=wide(x), device=x.device) for _ in range(2))
        parameters.tasks, parameters.parts, parameters.eps = tasks, 1, eps
        parameters.wide_parameters, parameters.tf32 = gamma.dtype == wide(x), allows_tf32(x)
        fill(parameters, x=x, weight=weight, gamma=gamma, beta=beta, moments=moments, mean=mean, rstd=rstd, y=y,
              index=index)  # fmt: skip
        self.launch("image_block", parameters, x, named(x=x, weight=weight, gamma=gamma, beta=beta))
        return y, index, mean, rstd

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, block: BlockSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        spec, _, pool = block
        tasks, outputs, taps = index.shape[0], weight.shape[1], weight[0, 0].numel()
        gy, index = self.layout(gy.expand(index.shape)), self.layout(index)
        x, weight, moments = self.layout(x), weight.contiguous(), moments.contiguous()
        (vector,), dtype = affine(x, gamma), gamma.dtype
        mean, rstd = (t.expand(tasks, outputs).contiguous() for t in (mean, rstd))
        parameters = geometry(x, weight.shape, spec, pool)
        share(parameters, x=x, weight=weight, gamma=vector, moments=moments)
        windows = index.numel() // (tasks * outputs)
        parameters.tasks = tasks
        parameters.parts = min(-(-windows // PART_PATCHES), -(-BLOCKS // tasks))
        parameters.wide_parameters = vector.dtype == wide(x)
        dweight = torch.empty(tasks, *weight.shape[1:], dtype=x.dtype, device=x.device)
        dgamma, dbeta = (torch.empty(tasks, outputs, dtype=vector.dtype, device=x.device) for _ in range(2))
        partial = torch.empty(tasks, parameters.parts, outputs, taps + 1, dtype=torch.float64, device=x.device)
        fill(parameters, gy=gy, x=x, weight=weight, gamma=vector, index=index, mean=mean, rstd=rstd, moments=moments,
              dweight=dweight, dgamma=dgamma, dbeta=dbeta, partial=partial)  # fmt: skip
        self.launch("image_block_grad", parameters, x, named(gy=gy, x=x, weight=weight, gamma=vector))
        return dweight, dgamma.to(dtype), dbeta.to(dtype)

    def cross_entropy_grad(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not logits.numel() or logits.dtype not in DTYPES:
            return super().cross_entropy_grad(logits, labels)
        tasks, images, ways = logits.shape
        logits = (logits[:1] if logits.stride(0) == 0 else logits).contiguous()
        labels = labels.contiguous()
        loss = torch.empty(tasks, dtype=wide(logits), device=logits.device)
        gradient = torch.empty(tasks, images, ways, dtype=logits.dtype, device=logits.device)
        parameters = CrossEntropy(
            **addresses(logits=logits, labels=labels, loss=loss, gradient=gradient),
            tasks=tasks, images=images, ways=ways, logits_task=stride(logits), labels_task=stride(labels),
        )  # fmt: skip
        self.launch("cross_entropy_grad", parameters, logits, named(logits=logits, labels=labels))
        return loss, gradient

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], rates: Sequence[float]) -> None:
        groups: dict[torch.dtype, list[tuple[Tensor, Tensor, float]]] = {}
        for parameter, gradient, rate in zip(parameters, gradients, each_rate(parameters, rates)):
            if not is_dense(parameter) or parameter.dtype != gradient.dtype or parameter.dtype not in DTYPES:
                super().sgd_([parameter], [gradient], [rate])
            elif rate != 0.0:
                if parameter.stride() != gradient.stride():
                    gradient = torch.empty_like(parameter).copy_(gradient)
                groups.setdefault(parameter.dtype, []).append((parameter, gradient, rate))
        for dtype, group in groups.items():
            for first in range(0, len(group), SGD_TENSORS):
                some = group[first : first + SGD_TENSORS]
                table = Sgd(count=len(some))
                for i, (parameter, gradient, rate) in enumerate(some):
                    table.parameters[i], table.gradients[i] = parameter.data_ptr(), gradient.data_ptr()
                    table.sizes[i], table.rates[i] = parameter.numel(), rate
                self.launch("sgd", table, some[0][0], f"{len(some)} tensors of {dtype}")

    @contextmanager
    def dependent_launches(self) -> Iterator[None]:
        """In it, this thread's kernels are placed on the current device while the one before them in the stream ends,
        and wait for that one before they read or write memory; a CUDA graph keeps such edges, and is recorded anew for
        them. Without effect below compute capability 9.0."""
        able = self._device != "cuda" or torch.cuda.get_device_capability() >= (9, 0)
        self._library.set_dependent_launches(able)
        try:
            yield
        finally:
            self._library.set_dependent_launches(False)

    def limits(self, device: torch.device) -> Limits:
        """What a launch whose blocks run together may take of a device."""
        index = device.index or 0
        if self._limits is not None:
            return self._limits
        if index not in self._by_device:
            self._by_device[index] = self._library.limits(index)
        return self._by_device[index]

    def plan(self, steps: LastSteps, dtype: torch.dtype, limits: Limits) -> bool:
        """Spreads the steps over a device; False where they do not fit."""
        return self._library.plan(steps, dtype, limits)

    def inner_loop(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        steps: int, rates: Sequence[float], query: Tensor | None = None,
    ) -> InnerLoop:  # fmt: skip
        """The last block's steps, or the linear layer's, are one launch where there is room for them."""
        plan = last_steps.planned(self, x, labels, parameters, updated, blocks, steps, rates)
        if isinstance(plan, list):
            return super().inner_loop(x, labels, parameters, updated, blocks, steps, rates, query)
        return last_steps.inner_loop(self, self, plan, x, labels, parameters, updated, blocks, steps, rates, query)


_OPERATORS = Cuda()
_NO_CONVOLUTION = ConvSpec((1, 1), (0, 0), (1, 1), 1)  # an operator's call does not say in which block it stands


def _norm_relu_pool(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int) -> tuple[Tensor, ...]:
    return _OPERATORS.norm_relu_pool(z, gamma, beta, BlockSpec(_NO_CONVOLUTION, eps, pool))


def _norm_relu_pool_grad(
    gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    block = BlockSpec(_NO_CONVOLUTION, 0.0, pool)
    dz, dgamma, dbeta = _OPERATORS.norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, block, need_z)
    return z.new_empty(0) if dz is None else dz, dgamma, dbeta


if not native._WHY:
    _IMPLEMENTATIONS = torch.library.Library("lambda_kernels", "IMPL")
    _IMPLEMENTATIONS.impl("norm_relu_pool", _norm_relu_pool, "CUDA")
    _IMPLEMENTATIONS.impl("norm_relu_pool_grad", _norm_relu_pool_grad, "CUDA")
