"""What a rule, a part or a loss was made with, as JSON has it: two runs that differ in it are two runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .inner.rates import Rates

__all__ = ["fingerprint"]

_FEW = 100  # so many numbers of a tensor are told as they are
_DEEP = 8


def fingerprint(value: Any, deep: int = 0) -> Any:
    """A value by its settings; parameters, which training moves, by their shapes.

    >>> fingerprint(partial(F.cross_entropy, label_smoothing=0.1))
    {'call': 'cross_entropy', 'args': [], 'with': {'label_smoothing': 0.1}}

    A part of the package is what it was made with. Of somebody else's function the name is told, and the numbers and
    texts that it closes over; of somebody else's module its repr and its children.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if deep > _DEEP:
        return type(value).__qualname__
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, Mapping):
        return {str(name): fingerprint(v, deep + 1) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(v, deep + 1) for v in value]
    if isinstance(value, Rates):
        return fingerprint(value.value, deep + 1)
    if isinstance(value, partial):
        own = {"args": value.args, "with": value.keywords}
        return {"call": fingerprint(value.func, deep + 1), **fingerprint(own, deep + 1)}
    if isinstance(value, FunctionType):
        return _of_function(value, deep)
    if isinstance(value, nn.Module):
        return _of_module(value, deep)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _of_tensor(value: Tensor) -> Any:
    if value.requires_grad:
        return f"learned {list(value.shape)}"
    held = value.detach().cpu()
    if held.numel() <= _FEW and held.dtype.is_floating_point:
        return fingerprint(held.double().tolist())
    digest = hashlib.sha256(held.contiguous().flatten().numpy(force=True).tobytes()).hexdigest()
    return f"{held.dtype} {list(held.shape)} {digest[:16]}"


def _of_function(value: Any, deep: int) -> Any:
    closed = {}
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
        try:
            held = cell.cell_contents
        except ValueError:  # nothing is bound to the name yet
            continue
        if isinstance(held, (float, str)):  # whole numbers may be counters, which a run moves
            closed[name] = held
    name = str(value.__qualname__)
    own = not value.__module__.startswith("torch.")  # whose defaults another version of torch may have more of
    given = {
        "defaults": value.__defaults__ if own else None,
        "keywords": value.__kwdefaults__ if own else None,
        "closes over": closed,
    }
    told = {what: fingerprint(v, deep + 1) for what, v in given.items() if v}
    return {"function": name, **told} if told else name


def _of_module(value: nn.Module, deep: int) -> Any:
    name = type(value).__qualname__
    if (made_from := value.__dict__.get("made_from")) is not None:
        return {"part": name, "with": made_from}
    told: dict[str, Any] = {"class": name}
    own = {k: v for k, v in vars(value).items() if k[0] != "_" and k != "training"}
    if isinstance(value, _Loss):
        own |= dict(value.named_buffers())
    else:  # what else it holds may be what it came to, not what it was made with
        own = {k: v for k, v in own.items() if isinstance(v, (Rates, FunctionType, partial))}
        if type(value).__repr__ is not object.__repr__:
            told["told"] = " ".join(repr(value).split())
    told |= fingerprint(own, deep + 1)
    children = {n: fingerprint(child, deep + 1) for n, child in value.named_children()}
    return {**told, **({"children": children} if children else {})}
