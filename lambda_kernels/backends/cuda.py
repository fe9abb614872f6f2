"""The CUDA backend: the kernels of csrc/cuda around ATen's convolutions and matrix products, in channels-last.

`_cuda.so` knows neither torch nor Python and is loaded by ctypes when the first call asks for it: each launcher gets a
structure of pointers and sizes and queues its kernels on torch's current stream. Results and scratch memory come from
torch's allocator and nothing waits for the device, so that a CUDA graph can hold every call.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..spec import ConvSpec, output_size
from . import native  # the schemas of torch.ops.lambda_kernels, where the extension loads
from .reference import Reference, channels_last

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # lk::Dtype
MOST_TAPS = 32  # of a patch, in the image block
SGD_TENSORS = 96  # of one launch
# About so many blocks fill any device. A reduction's parts depend on the shapes alone: sums are split in one way.
BLOCKS = 4096
PART_BYTES = 65536
PART_PATCHES = 256


def _fields(pointers: str, sizes: str, doubles: str = "") -> list[tuple[str, Any]]:
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (doubles, ctypes.c_double))
    return [(name, kind) for names, kind in kinds for name in names.split()]


# As csrc/cuda/parameters.h has them.


class NormReluPool(ctypes.Structure):
    _fields_ = _fields(
        "z gamma beta mean rstd y index gy dgamma dbeta dz partial sums",
        "tasks images channels height width pool parts z_task gamma_task beta_task wide_parameters",
        "eps",
    )


class ImageBlock(ctypes.Structure):
    _fields_ = _fields(
        "x weight gamma beta moments mean rstd y index gy dweight dgamma dbeta partial",
        "tasks images inputs height width outputs kernel_height kernel_width stride_y stride_x padding_y padding_x "
        "dilation_y dilation_x out_height out_width pool parts x_task weight_task gamma_task beta_task moments_task "
        "wide_parameters",
        "eps",
    )


class CrossEntropy(ctypes.Structure):
    _fields_ = _fields("logits labels loss gradient", "tasks images ways logits_task labels_task")


class Sgd(ctypes.Structure):
    _fields_ = [
        ("parameters", ctypes.c_void_p * SGD_TENSORS),
        ("gradients", ctypes.c_void_p * SGD_TENSORS),
        ("sizes", ctypes.c_int64 * SGD_TENSORS),
        ("count", ctypes.c_int64),
        ("lr", ctypes.c_double),
    ]


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "norm_relu_pool": NormReluPool, "image_block": ImageBlock, "cross_entropy": CrossEntropy, "sgd": Sgd,
}  # fmt: skip
LAUNCHERS = (
    "norm_relu_pool", "norm_relu_pool_grad", "image_moments", "image_block", "image_block_grad", "cross_entropy_grad",
    "sgd",
)  # fmt: skip


class Library:
    """The loaded library.

    Raises:
        OSError: it is not there, does not load, or was built from other sources; the message says what to do.
    """

    def __init__(self, path: Path):
        if not path.exists():
            raise OSError(
                f"the CUDA kernels are not built (there is no {path.name}): install lambda-kernels again with nvcc on "
                "the PATH, or CUDA_HOME set, and LAMBDA_KERNELS_CUDA=1"
            )
        try:
            self._code = ctypes.CDLL(str(path))
            for name, structure in STRUCTURES.items():
                there, here = self._call(f"lk_sizeof_{name}", ctypes.c_int64)(), ctypes.sizeof(structure)
                if there != here:
                    raise OSError(f"{structure.__name__} has {there} bytes there, {here} here")
            self._call("lk_error_string", ctypes.c_char_p, ctypes.c_int)
            self._call("lk_set_device", ctypes.c_int, ctypes.c_int)
            for name in LAUNCHERS:
                self._call(f"lk_{name}", ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
            self.architectures: str = self._call("lk_architectures", ctypes.c_char_p)().decode()
        except (OSError, AttributeError) as error:
            raise OSError(f"{path.name} is of no use ({error}): build lambda-kernels again") from None

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._code, name)
        function.restype, function.argtypes = result, list(arguments)
        return function

    def set_device(self, index: int) -> None:
        self._check("lk_set_device", self._code.lk_set_device(index), f"device {index}")

    def launch(self, name: str, parameters: ctypes.Structure, dtype: torch.dtype, stream: int, what: str) -> None:
        """RuntimeError, with CUDA's words and `what`, where the launch fails."""
        function = getattr(self._code, f"lk_{name}")
        self._check(f"lk_{name}", function(ctypes.byref(parameters), DTYPES[dtype], stream), what)

    def _check(self, name: str, status: int, what: str) -> None:
        if status:
            words = self._code.lk_error_string(status).decode()
            raise RuntimeError(f"{name} failed with CUDA error {status} ({words}) for {what}")


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Can code built for `architectures`, such as "8.0 9.0a 10.0+PTX", run on a device of this compute capability?"""
    for item in architectures.split():
        number, _, ptx = item.partition("+")
        own = number.endswith(("a", "f"))
        major, minor = (int(n) for n in number.rstrip("af").split("."))
        same = capability == (major, minor) if own else capability[0] == major and capability[1] >= minor
        if same or (ptx and not own and capability >= (major, minor)):
            return True
    return False


class Cuda(Reference):
    """Fused norm, ReLU and pool, the image block, cross-entropy and SGD on the GPU; convolutions are cuDNN's.

    Args:
        library: the library to load in place of the package's own.
        device: the kind of device that the library's kernels run on (tests run them on the CPU).
    """

    name = "cuda"

    def __init__(self, library: Path | None = None, device: str = "cuda"):
        self._path, self._device = library or LIBRARY, device

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

    def refusals(self, op: str, device: torch.device, dtype: torch.dtype, pool: int) -> list[str]:
        why = []
        if device.type != self._device:
            why.append(f"it runs on {self._device.upper()} devices, the tensors are on {device}")
        elif device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            why += [misfit for misfit in [self._misfit(index)] if misfit]
        if op == "conv_block" and dtype not in DTYPES:
            why.append(f"it is built for {', '.join(map(str, DTYPES))}, not {dtype}")
        if op == "conv_block" and pool not in (1, 2):
            why.append(f"it pools by 1 or 2, not {pool}")
        return why

    def layout(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def _launch(self, name: str, parameters: ctypes.Structure, x: Tensor, what: str) -> None:
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
        return self.layout(x), _stride(x)

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling() and _one_dtype(z, gamma, beta):
            return torch.ops.lambda_kernels.norm_relu_pool(z, gamma, beta, eps, pool)
        if torch.compiler.is_compiling():
            return super().norm_relu_pool(z, gamma, beta, eps, pool)
        tasks, images, channels, height, width = z.shape
        if not z.numel() or min(height, width) < pool:
            return super().norm_relu_pool(z, gamma, beta, eps, pool)
        z, z_task = self._shared(z)
        gamma, beta = _parameters(z, gamma, beta)
        pooled = tasks, images, channels, height // pool, width // pool
        y, index = _images(z, pooled, z.dtype), _images(z, pooled, torch.uint8)
        mean, rstd = (torch.empty(tasks, channels, dtype=_wide(z), device=z.device) for _ in range(2))
        parts = _parts(tasks, images * height * width, z.element_size() * channels)
        partial = torch.empty(tasks, parts, 2, channels, dtype=torch.float64, device=z.device)
        parameters = NormReluPool(
            **_addresses(z=z, gamma=gamma, beta=beta, mean=mean, rstd=rstd, y=y, index=index, partial=partial),
            tasks=tasks, images=images, channels=channels, height=height, width=width, pool=pool, parts=parts,
            z_task=z_task, gamma_task=_stride(gamma), beta_task=_stride(beta), wide_parameters=gamma.dtype == _wide(z),
            eps=eps,
        )  # fmt: skip
        self._launch("norm_relu_pool", parameters, z, _named(z=z, gamma=gamma, beta=beta))
        return y, index, mean, rstd

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        if torch.compiler.is_compiling() and _one_dtype(z, gamma, mean):
            op = torch.ops.lambda_kernels.norm_relu_pool_grad
            dz, dgamma, dbeta = op(gy, z, gamma, index, mean, rstd, pool, need_z)
            return dz if need_z else None, dgamma, dbeta
        tasks, images, channels, height, width = z.shape
        if torch.compiler.is_compiling() or not index.numel():
            return super().norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, pool, need_z)
        z, z_task = self._shared(z)
        gy, index = self.layout(gy.expand(index.shape)), self.layout(index)
        (wanted,), dtype = _parameters(z, gamma), gamma.dtype
        mean, rstd = mean.contiguous(), rstd.contiguous()
        dz = _images(z, (tasks, images, channels, height, width), z.dtype) if need_z else None
        dgamma, dbeta = (torch.empty(tasks, channels, dtype=wanted.dtype, device=z.device) for _ in range(2))
        parts = _parts(tasks, index.numel() // (tasks * channels), 2 * z.element_size() * channels)
        partial = torch.empty(tasks, parts, 2, channels, dtype=torch.float64, device=z.device)
        sums = torch.empty(tasks, 2, channels, dtype=torch.float64, device=z.device)
        parameters = NormReluPool(
            **_addresses(z=z, gamma=wanted, mean=mean, rstd=rstd, index=index, gy=gy, dgamma=dgamma, dbeta=dbeta, dz=dz,
                         partial=partial, sums=sums),
            tasks=tasks, images=images, channels=channels, height=height, width=width, pool=pool, parts=parts,
            z_task=z_task, gamma_task=_stride(wanted), wide_parameters=wanted.dtype == _wide(z),
        )  # fmt: skip
        self._launch("norm_relu_pool_grad", parameters, z, _named(gy=gy, z=z, gamma=wanted))
        return dz, dgamma.to(dtype), dbeta.to(dtype)

    def image_refusals(self, x: Tensor, weight: Tensor, spec: ConvSpec, pool: int) -> list[str]:
        why = self.refusals("conv_block", x.device, x.dtype, pool)
        taps = weight[0, 0].numel()
        if spec.groups != 1:
            why.append(f"it has no image block of {spec.groups} groups")
        if taps > MOST_TAPS:
            why.append(f"its image block takes patches of up to {MOST_TAPS} numbers, not {taps}")
        if min(output_size(x.shape, weight.shape, spec)) < pool or not x.shape[1]:
            why.append(f"nothing is left of images {list(x.shape[1:])} after the convolution and the pooling")
        return why

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        x = self.layout(x)
        parameters = _geometry(x, torch.Size((1, 1, x.shape[2], *kernel)), spec, 1)
        side = x.shape[2] * kernel[0] * kernel[1] + 1
        parameters.tasks, parameters.x_task = x.shape[0], x[0].numel()
        patches = x.shape[1] * parameters.out_height * parameters.out_width
        parameters.parts = min(-(-patches // PART_PATCHES), -(-BLOCKS // x.shape[0]))
        moments = torch.empty(x.shape[0], side, side, dtype=torch.float64, device=x.device)
        partial = torch.empty(x.shape[0], parameters.parts, side, side, dtype=torch.float64, device=x.device)
        _fill(parameters, x=x, moments=moments, partial=partial)
        self._launch("image_moments", parameters, x, f"{_named(x=x)}, kernel {kernel}")
        return moments

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, spec: ConvSpec, eps: float,
        pool: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        tasks = max(t.shape[0] for t in (x, weight, gamma, beta))
        x, weight, moments = self.layout(x), weight.contiguous(), moments.contiguous()
        gamma, beta = _parameters(x, gamma, beta)
        parameters = _geometry(x, weight.shape, spec, pool)
        _share(parameters, x=x, weight=weight, gamma=gamma, beta=beta, moments=moments)
        size = tasks, x.shape[1], weight.shape[1], parameters.out_height // pool, parameters.out_width // pool
        y, index = _images(x, size, x.dtype), _images(x, size, torch.uint8)
        mean, rstd = (torch.empty(tasks, weight.shape[1], dtype=_wide(x), device=x.device) for _ in range(2))
        parameters.tasks, parameters.parts, parameters.eps = tasks, 1, eps
        parameters.wide_parameters = gamma.dtype == _wide(x)
        _fill(parameters, x=x, weight=weight, gamma=gamma, beta=beta, moments=moments, mean=mean, rstd=rstd, y=y,
              index=index)  # fmt: skip
        self._launch("image_block", parameters, x, _named(x=x, weight=weight, gamma=gamma, beta=beta))
        return y, index, mean, rstd

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, spec: ConvSpec, pool: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        tasks, outputs, taps = index.shape[0], weight.shape[1], weight[0, 0].numel()
        gy, index = self.layout(gy.expand(index.shape)), self.layout(index)
        x, weight, moments = self.layout(x), weight.contiguous(), moments.contiguous()
        (wanted,), dtype = _parameters(x, gamma), gamma.dtype
        mean, rstd = (t.expand(tasks, outputs).contiguous() for t in (mean, rstd))
        parameters = _geometry(x, weight.shape, spec, pool)
        _share(parameters, x=x, weight=weight, gamma=wanted, moments=moments)
        windows = index.numel() // (tasks * outputs)
        parameters.tasks = tasks
        parameters.parts = min(-(-windows // PART_PATCHES), -(-BLOCKS // tasks))
        parameters.wide_parameters = wanted.dtype == _wide(x)
        dweight = torch.empty(tasks, *weight.shape[1:], dtype=x.dtype, device=x.device)
        dgamma, dbeta = (torch.empty(tasks, outputs, dtype=wanted.dtype, device=x.device) for _ in range(2))
        partial = torch.empty(tasks, parameters.parts, outputs, taps + 1, dtype=torch.float64, device=x.device)
        _fill(parameters, gy=gy, x=x, weight=weight, gamma=wanted, index=index, mean=mean, rstd=rstd, moments=moments,
              dweight=dweight, dgamma=dgamma, dbeta=dbeta, partial=partial)  # fmt: skip
        self._launch("image_block_grad", parameters, x, _named(gy=gy, x=x, weight=weight, gamma=wanted))
        return dweight, dgamma.to(dtype), dbeta.to(dtype)

    def cross_entropy_grad(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not logits.numel() or logits.dtype not in DTYPES:
            return super().cross_entropy_grad(logits, labels)
        tasks, images, ways = logits.shape
        logits = (logits[:1] if logits.stride(0) == 0 else logits).contiguous()
        labels = labels.contiguous()
        loss = torch.empty(tasks, dtype=_wide(logits), device=logits.device)
        gradient = torch.empty(tasks, images, ways, dtype=logits.dtype, device=logits.device)
        parameters = CrossEntropy(
            **_addresses(logits=logits, labels=labels, loss=loss, gradient=gradient),
            tasks=tasks, images=images, ways=ways, logits_task=_stride(logits), labels_task=_stride(labels),
        )  # fmt: skip
        self._launch("cross_entropy_grad", parameters, logits, _named(logits=logits, labels=labels))
        return loss, gradient

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        groups: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for parameter, gradient in zip(parameters, gradients):
            if not _is_dense(parameter) or parameter.dtype != gradient.dtype or parameter.dtype not in DTYPES:
                super().sgd_([parameter], [gradient], lr)
                continue
            if parameter.stride() != gradient.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            groups.setdefault(parameter.dtype, []).append((parameter, gradient))
        for pairs in groups.values():
            for first in range(0, len(pairs), SGD_TENSORS):
                table = Sgd(lr=lr)
                some = pairs[first : first + SGD_TENSORS]
                table.count = len(some)
                for i, (parameter, gradient) in enumerate(some):
                    table.parameters[i], table.gradients[i] = parameter.data_ptr(), gradient.data_ptr()
                    table.sizes[i] = parameter.numel()
                self._launch("sgd", table, some[0][0], f"{len(some)} tensors of {some[0][0].dtype}")


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.promote_types(x.dtype, torch.float32)


def _one_dtype(z: Tensor, *others: Tensor) -> bool:
    """Is all of it float32 or float64? The operators of torch.ops have one dtype; in a graph the rest is ATen's."""
    return z.dtype in (torch.float32, torch.float64) and all(t.dtype == z.dtype for t in others)


def _stride(x: Tensor) -> int:
    """The task stride, in elements, of dense memory [1|T, ...]: 0 where the tasks share it."""
    return 0 if x.shape[0] == 1 else x[0].numel()


def _is_dense(x: Tensor) -> bool:
    """Do the elements fill their memory without gaps?"""
    return x.numel() > 0 and 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) == x.numel()


def _images(like: Tensor, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> Tensor:
    """An empty channels-last [T, N, C, H, W] beside `like`."""
    tasks, images, channels, height, width = size
    memory = torch.empty(tasks, images, height, width, channels, dtype=dtype, device=like.device)
    return memory.permute(0, 1, 4, 2, 3)


def _parameters(x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """gamma and beta [1|T, C] as the kernels read them: dense, and all as x is stored or all wide."""
    dtype = x.dtype if all(v.dtype == x.dtype for v in vectors) else _wide(x)
    return tuple(v.to(dtype).contiguous() for v in vectors)


def _parts(tasks: int, items: int, item_bytes: int) -> int:
    """In how many parts a task's `items` (pixels or windows) are reduced."""
    return min(items, -(-items * item_bytes // PART_BYTES), -(-BLOCKS // tasks))


def _addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: t.data_ptr() for name, t in tensors.items() if t is not None}


def _fill(parameters: ctypes.Structure, **tensors: Tensor) -> None:
    for name, address in _addresses(**tensors).items():
        setattr(parameters, name, address)


def _share(parameters: ctypes.Structure, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        setattr(parameters, f"{name}_task", _stride(t))


def _geometry(x: Tensor, weight: torch.Size, spec: ConvSpec, pool: int) -> ImageBlock:
    """The sizes of a block of images x [1|T, N, C, H, W] and a weight [1|T, O, C, kh, kw]."""
    height, width = output_size(x.shape, weight, spec)
    return ImageBlock(
        images=x.shape[1], inputs=x.shape[2], height=x.shape[3], width=x.shape[4], outputs=weight[1],
        kernel_height=weight[3], kernel_width=weight[4], stride_y=spec.stride[0], stride_x=spec.stride[1],
        padding_y=spec.padding[0], padding_x=spec.padding[1], dilation_y=spec.dilation[0], dilation_x=spec.dilation[1],
        out_height=height, out_width=width, pool=pool,
    )  # fmt: skip


def _named(**tensors: Tensor) -> str:
    """The shapes for an error's text."""
    first = next(iter(tensors.values()))
    shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
    return f"{shapes} in {first.dtype} on {first.device}"


_OPERATORS = Cuda()


def _norm_relu_pool_grad(
    gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dz, dgamma, dbeta = _OPERATORS.norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, pool, need_z)
    return z.new_empty(0) if dz is None else dz, dgamma, dbeta


if not native._WHY:
    _IMPLEMENTATIONS = torch.library.Library("lambda_kernels", "IMPL")
    _IMPLEMENTATIONS.impl("norm_relu_pool", _OPERATORS.norm_relu_pool, "CUDA")
    _IMPLEMENTATIONS.impl("norm_relu_pool_grad", _norm_relu_pool_grad, "CUDA")
