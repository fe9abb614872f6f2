"""The registry of backends: which there are, why one cannot run, and which one a call gets.

`use_backend(name)` (or the environment variable LAMBDA_KERNELS_BACKEND) names one: it is used or an error says why not.
"auto", the default, takes the first backend of the tensors' device that can run the call and logs once why an earlier
one could not; on a CUDA device, where several can, it takes the one that was measured fastest for the call's shapes
(`autotune`). `register_backend` adds one of your own; README.md beside this file says how to write it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..spec import ConvSpec
from . import native_fakes  # noqa: F401  # registers what the operators return without data
from .autotune import Autotune, Table
from .base import Backend, Call, InnerLoop
from .cuda import Cuda
from .native import Native
from .reference import Reference
from .triton import Triton

__all__ = [
    "Backend", "BackendError", "Call", "Cuda", "InnerLoop", "Native", "Reference", "Triton", "choices", "choose",
    "current", "names", "reasons", "register_backend", "use_backend",
]  # fmt: skip

Given = ParamSpec("Given")
Found = TypeVar("Found")
_log = logging.getLogger("lambda_kernels")
_REFERENCE = Reference()
_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Native(), Cuda(), Triton(), _REFERENCE)}
_wanted: ContextVar[str | None] = ContextVar("lambda_kernels_backend", default=None)
_MOST_CHOSEN = 4096
_PLAIN = "batch", 0.0  # norm and slope of a call that names none
_chosen: dict[tuple[Any, ...], Backend] = {}  # by the name that the context asks for and the fields of a call
_said: set[str] = set()  # what the log holds already
_autotune: Autotune | None = None


class BackendError(RuntimeError):
    """A backend that was asked for by name is unknown or cannot run; the message says why."""


def names() -> list[str]:
    """Every backend."""
    return list(_BACKENDS)


def reasons(name: str) -> list[str]:
    """Why the backend cannot run on this machine at all; an empty list when it can."""
    return _get(name).reasons()


def current() -> str:
    """The name that calls in this context ask for: a backend's, or "auto"."""
    return _wanted.get() or os.environ.get("LAMBDA_KERNELS_BACKEND") or "auto"


# As torch.compiler.assume_constant_result does, which imports the compiler: a graph keeps the backend it was made with.
current._dynamo_marked_constant = True  # type: ignore[attr-defined]


class use_backend:
    """Run what follows on the named backend, or "auto": until the block ends, or, as a plain call, from here on.

    >>> with use_backend("auto"):
    ...     chosen = use_backend("reference")
    ...     print(current())
    reference

    It holds in the thread, or asyncio task, that calls it; LAMBDA_KERNELS_BACKEND is for a whole process. A decorator
    holds in its function alone.

    Raises:
        BackendError: there is no such backend, or it cannot run on this machine. What was chosen before stays.
        TypeError: the name is no text.
    """

    def __init__(self, name: str) -> None:
        given: object = name
        if not isinstance(given, str):
            raise TypeError(f"use_backend takes the name of a backend, got {type(given).__name__}")
        if name != "auto" and (why := reasons(name)):
            raise BackendError(f"backend {name!r} cannot run here: {'; '.join(why)}")
        self.name, self._before = name, _wanted.get()
        _wanted.set(name)

    def __enter__(self) -> None:
        _wanted.set(self.name)

    def __exit__(self, *error: object) -> None:
        _wanted.set(self._before)

    def __call__(self, function: Callable[Given, Found]) -> Callable[Given, Found]:
        _wanted.set(self._before)
        name = self.name

        @functools.wraps(function)
        def inside(*args: Given.args, **kwargs: Given.kwargs) -> Found:
            with use_backend(name):
                return function(*args, **kwargs)

        return inside

    def __repr__(self) -> str:
        return f"use_backend({self.name!r})"


def register_backend(backend: Backend) -> None:
    """Make a backend of your own known, under its `name`, to `use_backend`. "auto" never takes it.

    >>> class Mine(Reference):
    ...     name = "mine"
    >>> register_backend(Mine())

    Raises:
        TypeError: it is no instance of a class that derives from Backend.
        ValueError: its class has no name, or there is a backend of that name already.
    """
    given: object = backend
    if not isinstance(given, Backend):
        got = f"the class {given.__name__}: call it" if isinstance(given, type) else type(given).__name__
        raise TypeError(f"register_backend takes an instance of a class that derives from Backend, got {got}")
    name, kind = backend.name, type(backend).__name__
    if not name or not isinstance(name, str):
        raise ValueError(f"{kind} has no name: give the class one, such as name = {kind.lower()!r}")
    if name == "auto" or name in _BACKENDS:
        inherited = "name" not in vars(type(backend)) and "name" not in vars(backend)
        of = f", which {kind} has from its parent class" if inherited else ""
        raise ValueError(f"there is a backend {name!r} already{of}: give {kind} a name of its own")
    _BACKENDS[name] = backend


def choose(op: str, x: Tensor, weight: Tensor | None = None, spec: ConvSpec | None = None, pool: int = 1) -> Backend:
    """The backend for one call of `op` (see `Call`) on x; BackendError where a named one cannot run it."""
    wanted = current()
    if torch.compiler.is_compiling():
        return _BACKENDS[_compiled(wanted, op, x.device, x.dtype, spec, pool)]
    shapes = () if weight is None else (x.shape, weight.shape)
    key = (wanted, op, x.device, x.dtype, shapes, spec, pool, *_PLAIN)
    return _chosen.get(key) or _first_choice(key)


def choose_for(call: Call) -> Backend:
    """The backend for a call; BackendError where a named one cannot run it."""
    key = current(), *call
    return _chosen.get(key) or _first_choice(key)


def _first_choice(key: tuple[Any, ...]) -> Backend:
    """The backend for a key of `_chosen`: the name that is asked for, and the fields of a call."""
    wanted, call = key[0], Call(*key[1:])
    if len(_chosen) >= _MOST_CHOSEN:
        _chosen.clear()
    backend = _chosen[key] = _autotuned(_search(wanted, call), wanted, call)
    return backend


def choices(device: torch.device) -> Table:
    """What was measured on a CUDA device, in this process and in earlier ones."""
    return _the_autotune().table(device)


def _get(name: str) -> Backend:
    if name not in _BACKENDS:
        raise BackendError(f"there is no backend {name!r}: choose from {', '.join([*_BACKENDS, 'auto'])}")
    return _BACKENDS[name]


def _search(wanted: str, call: Call) -> str:
    """The name of the first backend that runs a call."""
    whys = {}
    for backend in _candidates(call.device) if wanted == "auto" else [_get(wanted)]:
        why = backend.refusals(call) or backend.reasons()  # the latter may look for a device
        if not why:
            return backend.name
        whys[backend.name] = "; ".join(why)
        if wanted == "auto":
            _say_once(f"{backend.name} does not run {call.op} on {call.device} in {call.dtype}: {whys[backend.name]}")
    if wanted != "auto":
        raise BackendError(f"backend {wanted!r} cannot run {call}: {whys[wanted]}")
    listed = "".join(f"\n  {name}: {why}" for name, why in whys.items())
    raise BackendError(f"no backend runs {call}:{listed}")


def _say_once(what: str) -> None:
    if what not in _said:
        _said.add(what)
        _log.info("backend %s", what)


def _candidates(device: torch.device) -> list[Backend]:
    """What "auto" tries for tensors of a device, in this order. Kernels that are interpreted have to be named."""
    return [_BACKENDS[name] for name in (("cuda", "triton") if device.type == "cuda" else ("native",))] + [_REFERENCE]


def _compiled(wanted: str, op: str, device: torch.device, dtype: torch.dtype, spec: ConvSpec | None, pool: int) -> str:
    """The backend's name for a call in a graph of torch.compile, whose shapes may be symbols."""
    return _search(wanted, Call(op, device, dtype, (), spec, pool))


# A graph of torch.compile keeps the backend that its first trace found: nothing is measured in it.
_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _autotuned(first: str, wanted: str, call: Call) -> Backend:
    """Where "auto" has a choice on a CUDA device, the backend that measures; else `first`."""
    if wanted != "auto" or call.device.type != "cuda" or first == "reference":
        return _BACKENDS[first]
    return _the_autotune()


def _the_autotune() -> Autotune:
    global _autotune
    if _autotune is None:
        _autotune = Autotune([b for b in _candidates(torch.device("cuda")) if not b.reasons()])
    return _autotune
