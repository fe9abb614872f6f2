"""The registry of backends: which there are, why one cannot run, and which one a call gets.

`use_backend(name)` (or the environment variable LAMBDA_KERNELS_BACKEND) names one: it is used or an error says why not.
"auto", the default, takes the first backend of the tensors' device that can run the call and logs once why an earlier
one could not; on a CUDA device, where several can, it takes the one that was measured fastest for the call's shapes
(`measured`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .cuda import Cuda
from .measured import Measured, Table
from .native import Native
from .reference import Reference
from .triton import Triton

__all__ = ["Backend", "BackendError", "choices", "choose", "current", "names", "reasons", "use_backend"]

Backend = Reference
_log = logging.getLogger("lambda_kernels")
_REFERENCE = Reference()
_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Native(), Cuda(), Triton(), _REFERENCE)}
_wanted: ContextVar[str | None] = ContextVar("lambda_kernels_backend", default=None)
_Call = tuple[str, str, torch.device, torch.dtype, int]
_chosen: dict[_Call, Backend] = {}
_measured: Measured | None = None


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
    call = (current(), op, x.device, x.dtype, pool)
    if torch.compiler.is_compiling():
        return _BACKENDS[_search(*call)]
    backend = _chosen.get(call)
    if backend is None:
        backend = _chosen[call] = _measuring(_search(*call), *call)
    return backend


def choices(device: torch.device) -> Table:
    """What was measured on a CUDA device, in this process and in earlier ones."""
    return _all_measured().table(device)


def _get(name: str) -> Backend:
    if name not in _BACKENDS:
        raise BackendError(f"there is no backend {name!r}: choose from {', '.join([*_BACKENDS, 'auto'])}")
    return _BACKENDS[name]


def _search(wanted: str, op: str, device: torch.device, dtype: torch.dtype, pool: int) -> str:
    """The name of the first backend that runs a call."""
    for backend in _candidates(device) if wanted == "auto" else [_get(wanted)]:
        why = backend.refusals(op, device, dtype, pool) or backend.reasons()  # the latter may look for a device
        if not why:
            return backend.name
        if wanted != "auto":
            raise BackendError(f"backend {wanted!r} cannot run {op} on {device} in {dtype}: {'; '.join(why)}")
        _log.info("backend %s does not run %s on %s in %s: %s", backend.name, op, device, dtype, "; ".join(why))
    raise BackendError(f"no backend runs {op} on {device} in {dtype}")


def _candidates(device: torch.device) -> list[Backend]:
    """What "auto" tries for tensors of a device, in this order. Kernels that are interpreted have to be named."""
    return [_BACKENDS[name] for name in (("cuda", "triton") if device.type == "cuda" else ("native",))] + [_REFERENCE]


# A graph of torch.compile keeps the backend that its first trace found: nothing is measured in it.
_search._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _measuring(first: str, wanted: str, op: str, device: torch.device, dtype: torch.dtype, pool: int) -> Backend:
    """Where "auto" has a choice on a CUDA device, the backend that measures; else `first`."""
    if wanted != "auto" or device.type != "cuda" or first == "reference":
        return _BACKENDS[first]
    return _all_measured()


def _all_measured() -> Measured:
    global _measured
    if _measured is None:
        _measured = Measured([b for b in _candidates(torch.device("cuda")) if not b.reasons()])
    return _measured
