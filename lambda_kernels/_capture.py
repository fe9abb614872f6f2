"""One function as one CUDA graph: run under a graph's rules first, then captured on a stream beside the current one.

A capture that fails leaves damage behind: the allocator and the generator of random numbers may believe that it goes
on. So a function that no graph can hold is found before a capture begins, and what is known of the damage is repaired.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._torch import end_allocation

__all__ = ["ONE_AT_A_TIME", "Rules", "capture", "capturing", "capturing_here", "own_stream", "rehearse"]

T = TypeVar("T")
_aten = torch.ops.aten
_WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._unsafe_index_put}
_COPIES = {_aten._to_copy, _aten.copy_, _aten.copy}
ONE_AT_A_TIME = threading.RLock()  # in a process, on whichever device: torch frees no cached memory meanwhile, or fails
_rehearsal = threading.local()


class Rules(TorchDispatchMode):
    """Forbids what no graph can hold: operators that wait for the values of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args, kwargs or {}):
            raise RuntimeError(f"{func} waits for the device, which a recorded function may not")
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator reads values into Python, has as many results as they say, or copies between devices."""
    packet = func.overloadpacket
    if packet in _INDEXING:  # a mask has as many elements as are true; other indices do not wait
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if packet in _COPIES:
        source, other = args[0], args[1] if len(args) > 1 else None
        target = other.device if isinstance(other, Tensor) else kwargs.get("device") or source.device
        return torch.device(target).type != source.device.type
    if packet is _aten.repeat_interleave and kwargs.get("output_size") is not None:
        return False
    return any(tag in func.tags for tag in _WAITS)


def capturing_here() -> bool:
    """Whether the current stream is being captured, or this thread rehearses: nothing may wait or be measured."""
    return getattr(_rehearsal, "on", False) or torch.cuda.is_current_stream_capturing()


def capturing(device: torch.device) -> bool:
    """Whether a graph is being recorded or rehearsed on a device's current stream, or on the current device's."""
    if getattr(_rehearsal, "on", False):
        return True
    if device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    if device.index is None or device.index == torch.cuda.current_device():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def rehearse(function: Callable[[], T]) -> T:
    """Run a function under the rules of a graph, on the current device.

    Raises:
        RuntimeError: it waits for the device.
    """
    with Rules(), _no_waits_in_torch():
        _rehearsal.on = True
        try:
            return function()
        finally:
            _rehearsal.on = False


@contextmanager
def _no_waits_in_torch() -> Iterator[None]:
    """Waits inside of torch's operators, and of others' in C++, are errors too.

    The switch is the whole process's: with another thread beside this one it stays as it is, as that one may wait.
    """
    if not torch.cuda.is_initialized() or threading.active_count() > 1:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            # torch says once that the switch is a prototype; where warnings are errors that one comes behind the change
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(function: Callable[[], T], stream: torch.cuda.Stream, pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """What the current device does in a function, captured on a stream of it, and what the function gives.

    Its memory is the pool's. The stream that was current is so again afterwards, whatever happens; what the function
    raised goes before what the end of the capture has to say of it.
    """
    graph = torch.cuda.CUDAGraph()
    results: list[T] = []
    failure: BaseException | None = None
    with ONE_AT_A_TIME, torch.cuda.stream(stream):
        # Only this thread's calls may not wait: a data loader's thread goes on.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            results.append(function())
        except BaseException as error:
            failure = error
        try:
            graph.capture_end()
        except Exception as error:
            failure = failure or error
            _repair(pool)
    if failure is not None:
        raise failure
    return graph, results[0]


def _repair(pool: Any) -> None:
    """Undo what a capture of the current device that failed at its end leaves behind in torch 2.11."""
    end_allocation(torch.device("cuda", torch.cuda.current_device()), pool)
    # The generator of random numbers believes that it is captured until a capture ends well. This one is empty.
    with suppress(Exception), warnings.catch_warnings(), torch.cuda.stream(torch.cuda.Stream()):
        warnings.simplefilter("ignore")
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        graph.capture_end()


def own_stream() -> torch.cuda.Stream:
    """A stream of the current device on which nothing ran and, but for the caller's work, nothing will.

    Those that torch makes are 32, handed out in turn. This one comes from the driver, and stays.
    """
    made = ctypes.c_void_p()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(made), ctypes.c_uint(1))  # 1: non-blocking
    except OSError:  # the library has another name here
        failed = 1
    return torch.cuda.Stream() if failed or made.value is None else torch.cuda.ExternalStream(made.value)
