"""Adaptations that were made before, ready to be made again on a CPU: what depends only on the network, the pattern and
the shapes is kept with the network, for as long as it stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lambda_kernels import capture
from lambda_kernels.chain import backend_in_force
from lambda_kernels.graph import memo_of

from .outcome import Outcome
from .patterns import Pattern

if TYPE_CHECKING:
    from .adapt import Loop

__all__ = ["again", "keep"]

_MOST = 64  # of a network's


class _Ready(NamedTuple):
    run: Callable[..., list[Tensor] | None]
    meta: dict[str, Tensor]  # the network's own parameters
    moved: tuple[str, ...]  # the names of what `run` gives
    updated: tuple[str, ...]


def again(
    model: nn.Module, xs: Tensor, ys: Tensor, pattern: str | Pattern, steps: int, lr: float, norm: str
) -> Outcome | None:
    """The outcome of a first-order adaptation like an earlier one; None where it has to go, or fail, the long way."""
    plain = type(xs) is type(ys) is Tensor and type(steps) is int and isinstance(pattern, (str, Pattern))
    if not plain or type(lr) is not float or not 0.0 < lr < float("inf"):
        return None
    memo = memo_of(model)
    found: _Ready | None = memo.get(_key(xs, ys, pattern, steps, norm)) if memo else None
    if found is None or _watched(xs.device):
        return None
    new = found.run(xs, ys, steps, [lr])
    if new is None:
        return None
    return Outcome(found.meta, dict(zip(found.moved, new)), found.updated, {})


def keep(loop: Loop, model: nn.Module, xs: Tensor, ys: Tensor, pattern: str | Pattern, norm: str) -> None:
    """Make an adaptation that went well ready, where one native operator made it."""
    memo = memo_of(model)
    if memo is None or len(loop.parts) != 1 or type(xs) is not Tensor or type(ys) is not Tensor or _watched(xs.device):
        return
    part = loop.parts[0][0]
    buffers = next(model.buffers(), None) is not None  # each learner has copies of its own
    if part.whole is None or buffers or loop.second_order:
        return
    run = part.whole.prepare(loop.meta, part.updated, xs.unsqueeze(0), ys.unsqueeze(0))
    if run is None:
        return
    if len(memo) >= _MOST:
        memo.clear()
    moved = tuple(part.whole.order(part.updated))
    memo[_key(xs, ys, pattern, loop.steps, norm)] = _Ready(run, loop.meta, moved, loop.updated)


def _key(xs: Tensor, ys: Tensor, pattern: str | Pattern, steps: int, norm: str) -> Hashable:
    return pattern, steps, norm, xs.shape, xs.dtype, xs.device, ys.shape, ys.dtype, ys.device, backend_in_force()


def _watched(device: torch.device) -> Any:
    """Whether something looks at, or changes, what torch's operators do, or records them: the short way calls none."""
    return (
        capture.refusal(device) is None
        or torch.is_autocast_enabled("cpu")
        or torch.is_inference_mode_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )
