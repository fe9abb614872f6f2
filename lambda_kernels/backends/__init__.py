"""The registry of backends: which there are, why one cannot run, and which one a call gets.

`use_backend(name)` (or the environment variable LAMBDA_KERNELS_BACKEND) names one: it is used or an error says why not.
"auto", the default, takes the first of `names()` that can run the call and logs once why an earlier one could not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .native import Native
from .reference import Reference

__all__ = ["Backend", "BackendError", "choose", "current", "names", "reasons", "use_backend"]

Backend = Reference
_log = logging.getLogger("lambda_kernels")
_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Native(), Reference())}
_wanted: ContextVar[str | None] = ContextVar("lambda_kernels_backend", default=None)
_chosen: dict[tuple[str, str, torch.device, torch.dtype, int], Backend] = {}


class BackendError(RuntimeError):
    """A backend that was asked for by name is unknown or cannot run; the message says why."""


def names() -> list[str]:
    """Every backend of this build, in the order in which "auto" tries them."""
    return list(_BACKENDS)


def reasons(name: str) -> list[str]:
    """Why the backend cannot run on this machine at all; an empty list when it can."""
    return _get(name).reasons()


def current() -> str:
    """The name that calls in this context ask for: a backend's, or "auto"."""
    return _wanted.get() or os.environ.get("LAMBDA_KERNELS_BACKEND") or "auto"


# As torch.compiler.assume_constant_result does, which imports the compiler: a graph keeps the backend it was made with.
current._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the calls inside on the named backend, or "auto".

    Raises:
        BackendError: there is no such backend, or it cannot run on this machine.
    """
    if name != "auto" and (why := reasons(name)):
        raise BackendError(f"backend {name!r} cannot run here: {'; '.join(why)}")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def choose(op: str, x: torch.Tensor, pool: int = 1) -> Backend:
    """The backend for one call of `op` on x; BackendError where a named one cannot run it."""
    key = (current(), op, x.device, x.dtype, pool)
    backend = _chosen.get(key)
    if backend is None:
        backend = _chosen[key] = _search(*key)
    return backend


def _get(name: str) -> Backend:
    if name not in _BACKENDS:
        raise BackendError(f"there is no backend {name!r}: choose from {', '.join([*_BACKENDS, 'auto'])}")
    return _BACKENDS[name]


def _search(wanted: str, op: str, device: torch.device, dtype: torch.dtype, pool: int) -> Backend:
    for backend in _BACKENDS.values() if wanted == "auto" else [_get(wanted)]:
        why = backend.reasons() or backend.refusals(op, device, dtype, pool)
        if not why:
            return backend
        if wanted != "auto":
            raise BackendError(f"backend {wanted!r} cannot run {op} on {device} in {dtype}: {'; '.join(why)}")
        _log.info("backend %s does not run %s on %s in %s: %s", backend.name, op, device, dtype, "; ".join(why))
    raise BackendError(f"no backend runs {op} on {device} in {dtype}")
