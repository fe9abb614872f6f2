"""torch's private names, each with the reason why no public one serves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

# The way in which autograd.Function.apply itself enters a transform: our Functions come here without the checks that
# `apply` repeats in each call.
from torch._functorch.autograd_function import custom_function_call

# A call's form is looked at outside of the transforms of torch.func that are on; torch.func has no way out of them.
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

# Which modes see the functions of torch: there is no public list. A default device is one of them.
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = [
    "being_traced",
    "custom_function_call",
    "end_allocation",
    "for_good",
    "forward_mode",
    "functorch_active",
    "is_functorch_wrapped_tensor",
    "is_old_batch",
    "looked_at",
    "mode_active",
    "primals_of",
    "saving_by_hooks",
    "stand_ins_made",
    "switches",
    "temporarily_clear_interpreter_stack",
    "transform_active",
    "unusual_switches",
    "will_engine_run",
    "with_forward_mode",
    "without_old_batches",
]

T = TypeVar("T")

# Whether grad, vmap or jvp of torch.func is on. torch.func has no such question.
functorch_active = torch._C._are_functorch_transforms_active
is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor
# Whether the backward pass that runs now will come to a node: else it would compute a gradient that nothing uses.
will_engine_run = torch._C._will_engine_execute_node
# Whether a tensor is mapped by the vmap before torch.func's, which torch.autograd still uses for batched gradients.
is_old_batch = torch._C._functorch.is_legacy_batchedtensor
# torch switches forward mode off while a Function's jvp runs; the context switch is public for backward mode only.
with_forward_mode = forward_ad._set_fwd_grad_enabled
# How many modes see every operator, or every function of torch, that is called. There is no public count.
_watching_operators = torch._C._len_torch_dispatch_stack
_watching_functions = torch._C._len_torch_function_stack
# By name: the getter behind a switch, and how torch sets it. The public properties take 2 us each, in every call.
_SWITCHES: dict[str, tuple[Callable[[], Hashable], Hashable]] = {
    "matmul": (partial(torch._C._get_fp32_precision_getter, "cuda", "matmul"), "none"),
    "conv": (partial(torch._C._get_fp32_precision_getter, "cuda", "conv"), "tf32"),
    "cudnn": (torch._C._get_cudnn_enabled, True),
    "cudnn.benchmark": (torch._C._get_cudnn_benchmark, False),
    "cudnn.deterministic": (torch._C._get_cudnn_deterministic, False),
    "deterministic": (torch.are_deterministic_algorithms_enabled, False),
    "float16-sums": (torch._C._get_cublas_allow_fp16_reduced_precision_reduction, (True, True)),
    "bfloat16-sums": (torch._C._get_cublas_allow_bf16_reduced_precision_reduction, (True, True)),
    "float16-accumulation": (torch._C._get_cublas_allow_fp16_accumulation, False),
    "blas": (torch._C._get_blas_preferred_backend, torch._C._BlasBackend.Cublas),
}
# Whether torch.jit.trace is on: torch.jit.is_tracing, which torch's own types do not know.
_tracing = torch._C._is_tracing


def being_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace makes a graph of what is called now."""
    return torch.compiler.is_compiling() or _tracing()


def saving_by_hooks() -> bool:
    """Whether what autograd saves now goes through hooks: a checkpoint's, which compute it anew, or others."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def looked_at(but_for_a_default_device: bool = False) -> bool:
    """Whether a mode of torch sees every operator, or every function of torch, that is called.

    A default device (torch.set_default_device, `with torch.device(...)`) is such a mode; it only says where new tensors
    go.
    """
    if not (_watching_operators() or _watching_functions()):
        return False
    return not (
        but_for_a_default_device
        and not _watching_operators()
        and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def switches() -> tuple[Hashable, ...]:
    """Where torch's switches stand that change what a kernel of its computes, or which one it is."""
    return tuple(ask() for ask, _ in _SWITCHES.values())


def unusual_switches() -> str:
    """The switches that do not stand as torch sets them, as words: "matmul=tf32 cudnn.benchmark=True"."""
    asked = ((name, ask(), usual) for name, (ask, usual) in _SWITCHES.items())
    return " ".join(f"{name}={value}" for name, value, usual in asked if value != usual)


def end_allocation(device: torch.device, pool: Any) -> None:
    """Give no more memory of a graph's pool to what the device allocates.

    torch 2.11 goes on with it where the end of a capture fails (pytorch pull request 180395).
    """
    with suppress(RuntimeError):  # it has ended
        torch._C._cuda_endAllocateToPool(device.index, pool)


def forward_mode() -> bool:
    """Whether derivatives are taken in forward mode now, by torch.func.jvp or in a level of torch.autograd.forward_ad.

    torch has no such question: a tensor can be asked for its tangent, which is slow.
    """
    return forward_ad._current_level >= 0


def primals_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The tensors without their tangents."""
    return tuple(None if t is None else forward_ad.unpack_dual(t).primal for t in tensors)


def without_old_batches(
    function: Callable[..., Tensor | tuple[Tensor | None, ...]], given: Sequence[Tensor | None]
) -> Any:
    """function(*given), where some of the tensors are mapped by the older vmap: computed by torch.func's vmap.

    The older vmap knows few operators. What it maps is taken off, becomes leading axes, and is put back at the end.
    """
    plain, levels = zip(*(_without_old_batch(t) for t in given))
    every = sorted({level for own in levels for level in own})
    there: list[bool] = []
    single = False

    def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        nonlocal single
        results = function(*tensors)
        single = isinstance(results, Tensor)
        flat = (results,) if isinstance(results, Tensor) else results
        there[:] = [r is not None for r in flat]
        return tuple(r for r in flat if r is not None)

    mapped: Callable[..., tuple[Tensor, ...]] = present
    for level in every:
        mapped = torch.func.vmap(mapped, tuple(0 if level in own else None for own in levels))
    results = iter(_with_old_batch(r, every) for r in mapped(*plain))
    full = tuple(next(results) if is_there else None for is_there in there)
    return full[0] if single else full


def _without_old_batch(tensor: Tensor | None) -> tuple[Tensor | None, list[int]]:
    """The tensor with an axis in front for each level of the older vmap that maps it, the last level first."""
    levels: list[int] = []
    level = 0
    while tensor is not None and is_old_batch(tensor):
        level += 1
        without = torch._remove_batch_dim(tensor, level, 0, 0)  # a level that does not map it: an axis of size 0
        if without.shape[0]:
            tensor = without
            levels.append(level)
    return tensor, levels


def _with_old_batch(tensor: Tensor, levels: list[int]) -> Tensor:
    for i, level in enumerate(levels):
        tensor = torch._add_batch_dim(tensor, len(levels) - 1 - i, level)
    return tensor


def transform_active(device_type: str) -> str | None:
    """What makes torch's operators compute something else than their names say on such a device; None without it."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing the call"
    if functorch_active():
        return "a transform of torch.func is active"
    if forward_mode():
        return "forward-mode differentiation is on"
    return "autocast is on" if torch.is_autocast_enabled(device_type) else None


def mode_active(device_type: str = "cpu") -> str | None:
    """What changes torch's operators on such a device, or looks at them; None without it.

    Where it is None, a call that goes past the operators cannot be told from one that uses them:

        if mode_active(x.device.type) is None:
            ...
    """
    if (why := transform_active(device_type)) is not None:
        return why
    if torch.is_inference_mode_enabled():
        return "inference mode is on"
    if looked_at():
        return "a mode of torch looks at its operators"
    return None


def stand_ins_made() -> bool:
    """Whether an operator may now give what means nothing later: a FakeTensor, a wrapper of torch.func, a tracer's
    value. Such must not be kept."""
    return bool(_watching_operators() or functorch_active() or being_traced())


def for_good(make: Callable[[], T]) -> T:
    """What `make` makes of plain tensors, made of plain tensors also where a mode or a transform of torch is on.

    A thread has its own of them, and begins with none.
    """
    if not stand_ins_made():
        return make()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()
