"""torch's private names, each with the reason why no public one serves."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

# The way in which autograd.Function.apply itself enters a transform: our Functions come here without the checks that
# `apply` repeats in each call.
from torch._functorch.autograd_function import custom_function_call

# A call's form is looked at outside of the transforms of torch.func that are on; torch.func has no way out of them.
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

__all__ = [
    "custom_function_call",
    "for_good",
    "functorch_active",
    "is_functorch_wrapped_tensor",
    "looked_at",
    "mode_active",
    "stand_ins_made",
    "temporarily_clear_interpreter_stack",
    "transform_active",
    "will_engine_run",
]

T = TypeVar("T")

# Whether grad, vmap or jvp of torch.func is on. torch.func has no such question.
functorch_active = torch._C._are_functorch_transforms_active
is_functorch_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor
# Whether the backward pass that runs now will come to a node: else it would compute a gradient that nothing uses.
will_engine_run = torch._C._will_engine_execute_node
# How many modes see every operator, or every function of torch, that is called. There is no public count.
_watching_operators = torch._C._len_torch_dispatch_stack
_watching_functions = torch._C._len_torch_function_stack
# Whether torch.jit.trace is on: torch.jit.is_tracing, which torch's own types do not know.
_tracing = torch._C._is_tracing


def looked_at() -> bool:
    """Whether a mode of torch sees every operator, or every function of torch, that is called."""
    return bool(_watching_operators() or _watching_functions())


def transform_active(device_type: str) -> str | None:
    """What makes torch's operators compute something else than their names say on such a device; None without it."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing the call"
    if functorch_active():
        return "a transform of torch.func is active"
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
    return bool(_watching_operators() or functorch_active() or _tracing() or torch.compiler.is_compiling())


def for_good(make: Callable[[], T]) -> T:
    """What `make` makes of plain tensors, made of plain tensors also where a mode or a transform of torch is on.

    A thread has its own of them, and begins with none.
    """
    if not stand_ins_made():
        return make()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()
