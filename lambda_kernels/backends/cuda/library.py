"""The library of CUDA kernels as ctypes sees it: the structures that its launchers take, and how it is loaded."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "DTYPES", "LIBRARY", "MOST_STEPS", "MOVED", "SGD_TENSORS", "STRUCTURES", "CrossEntropy", "ImageBlock", "LastSteps",
    "Library", "Limits", "NormReluPool", "Sgd", "covers", "dependent_launches",
]  # fmt: skip

_placing = threading.local()

LIBRARY = Path(__file__).parents[2] / "_cuda.so"
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # lk::Dtype
SGD_TENSORS = 96  # of one launch
MOST_STEPS = 32  # of one launch of all steps
MOVED = 5  # parameters of the last block and the linear layer: weight, gamma, beta, head, bias


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
        "x weight gamma beta moments mean rstd y index gy dweight dgamma dbeta partial distances",
        "tasks images inputs height width outputs kernel_height kernel_width stride_y stride_x padding_y padding_x "
        "dilation_y dilation_x out_height out_width pool parts distance_parts x_task weight_task gamma_task beta_task "
        "moments_task wide_parameters tf32",
        "eps",
    )


class CrossEntropy(ctypes.Structure):
    _fields_ = _fields("logits labels loss gradient", "tasks images ways logits_task labels_task")


class Sgd(ctypes.Structure):
    _fields_ = [
        ("parameters", ctypes.c_void_p * SGD_TENSORS),
        ("gradients", ctypes.c_void_p * SGD_TENSORS),
        ("sizes", ctypes.c_int64 * SGD_TENSORS),
        ("rates", ctypes.c_double * SGD_TENSORS),
        ("count", ctypes.c_int64),
    ]


class LastSteps(ctypes.Structure):
    _fields_ = [
        *_fields("x labels", ""),
        ("from_", ctypes.c_void_p * MOVED),
        ("to", ctypes.c_void_p * MOVED),
        *_fields(
            "rows scratch counters",
            "tasks images inputs height width outputs kernel_height kernel_width stride_y stride_x padding_y padding_x "
            "dilation_y dilation_x out_height out_width pool ways features steps x_task labels_task",
        ),
        ("from_task", ctypes.c_int64 * MOVED),
        *_fields(
            "",
            "tf32 channels groups parts images_at_once keeps_z keeps_y shared_bytes scratch_bytes tasks_at_once",
            "eps",
        ),
        ("rates", ctypes.c_double * MOVED * MOST_STEPS),
    ]


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "norm_relu_pool": NormReluPool, "image_block": ImageBlock, "cross_entropy": CrossEntropy, "sgd": Sgd,
    "last_steps": LastSteps,
}  # fmt: skip
LAUNCHERS = (
    "norm_relu_pool", "norm_relu_pool_grad", "image_moments", "image_block", "image_block_grad", "cross_entropy_grad",
    "sgd", "last_steps",
)  # fmt: skip


class Limits(NamedTuple):
    """What a device has for blocks of threads that run together."""

    processors: int
    shared: int  # bytes of shared memory that one block may have


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
            self._call(
                "lk_last_steps_plan", ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
            )
            self._call("lk_limits", ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
            self._call("lk_set_dependent_launches", None, ctypes.c_int)
            self.architectures: str = self._call("lk_architectures", ctypes.c_char_p)().decode()
        except (OSError, AttributeError) as error:
            raise OSError(f"{path.name} is of no use ({error}): build lambda-kernels again") from None

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._code, name)
        function.restype, function.argtypes = result, list(arguments)
        return function

    def set_device(self, index: int) -> None:
        self._check("lk_set_device", self._code.lk_set_device(index), f"device {index}")

    def set_dependent_launches(self, allowed: bool) -> None:
        """For this thread's launches: whether one may be placed on the device while the one before it ends."""
        self._code.lk_set_dependent_launches(allowed)
        _placing.allowed = allowed

    def limits(self, index: int) -> Limits:
        """Of a device."""
        found = (ctypes.c_int64 * 2)()
        self._check("lk_limits", self._code.lk_limits(index, found), f"device {index}")
        return Limits(*found)

    def plan(self, parameters: LastSteps, dtype: torch.dtype, limits: Limits) -> bool:
        """Spreads the last block's steps over a device; False where they do not fit."""
        return self._code.lk_last_steps_plan(ctypes.byref(parameters), DTYPES[dtype], *limits) == 0

    def launch(self, name: str, parameters: ctypes.Structure, dtype: torch.dtype, stream: int, what: str) -> None:
        """RuntimeError, with CUDA's words and `what`, where the launch fails."""
        function = getattr(self._code, f"lk_{name}")
        self._check(f"lk_{name}", function(ctypes.byref(parameters), DTYPES[dtype], stream), what)

    def _check(self, name: str, status: int, what: str) -> None:
        if status:
            words = self._code.lk_error_string(status).decode()
            raise RuntimeError(f"{name} failed with CUDA error {status} ({words}) for {what}")


def dependent_launches() -> bool:
    """Whether this thread's launches may be placed on the device while the one before them ends."""
    return getattr(_placing, "allowed", False)


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
