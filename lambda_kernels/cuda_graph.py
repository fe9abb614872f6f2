"""A function of tensors as one CUDA graph: recorded once, replayed on new values in the same buffers.

A replay is one launch, whatever number of kernels the function has. Nothing in the function may wait for the device or
depend on a tensor's values in Python.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import backends
from ._capture import ONE_AT_A_TIME, capture, capturing, own_stream, rehearse
from ._torch import looked_at, switches, transform_active
from .backends.cuda.library import dependent_launches
from .cache import Bounded

__all__ = ["Recording", "Recordings", "conditions", "refusal"]

Results = tuple[Tensor, ...]
Function = Callable[..., Results]
_WARM_UP = 2  # runs ahead of the one under a graph's rules: kernels are compiled and measured, libraries get ready
_FIRST_WAIT = 16  # calls until a recording for which memory did not suffice is tried again; twice as many the next time
_log = logging.getLogger("lambda_kernels")


def refusal(device: torch.device) -> str | None:
    """Why nothing is recorded on this device at the moment; None where it can be."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the network is on {device.type}"
    if os.environ.get("LAMBDA_KERNELS_GRAPHS") == "0":
        return "LAMBDA_KERNELS_GRAPHS=0"
    if (why := transform_active(device.type)) is not None:
        return why
    if looked_at(but_for_a_default_device=True):
        return "a mode of torch looks at its operators"
    return "a graph is being recorded already" if capturing(device) else None


def conditions() -> tuple[Hashable, ...]:
    """What a recording keeps of the switches that stand outside the function: with others, another one is made."""
    return backends.current(), dependent_launches(), *switches()


class Memory:
    """What the recordings of a device share: a pool of memory, the stream on which they are captured, and their turns.

    A recording's intermediates lie where another one's did, so that all of them take what the largest one needs, beside
    their results. Hence only one of them runs at a time. The pool goes with the last recording in it; torch takes none
    that was left by all.

    The stream is this memory's own because of cuBLAS, for which torch keeps a workspace for each stream, made by the
    first product there. With a new stream that is a capture, and the workspace lies in this pool. On a stream that had
    a warm-up it would be ordinary memory, which torch frees when inductor asks for it, and a replay would write into
    what lies there then.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0  # taken by captures
        self.lock = threading.Lock()
        self._place: tuple[torch.cuda.Stream, Any] | None = None
        self._done: torch.cuda.Event | None = None

    def capture(self, function: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
        """Capture a function on the current device, this memory's."""
        if self._place is None:
            self._place = own_stream(), torch.cuda.graph_pool_handle()
        with ONE_AT_A_TIME:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what the warm-up left: torch does not look for it during a capture
            before = torch.cuda.memory_reserved()
            try:
                return capture(function, *self._place)
            finally:
                self.bytes += max(0, torch.cuda.memory_reserved() - before)

    @property
    def is_full(self) -> bool:
        """Whether the captures took more than a quarter of the device's memory."""
        return bool(self.bytes) and self.bytes > torch.cuda.get_device_properties(self.device).total_memory // 4

    @contextmanager
    def turn(self) -> Iterator[torch.cuda.Stream]:
        """Gives the device's current stream, which waits for the turn before, whichever stream that had."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            try:
                yield stream
            finally:
                self._done = stream.record_event()

    def wait(self) -> None:
        """Until the last turn is over."""
        with self.lock:
            if self._done is not None:
                self._done.synchronize()


class Graph:
    """What a CUDA device does in a function of given tensors, recorded on a stream beside the current one."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], memory: Memory) -> None:
        self._inputs, self._memory = inputs, memory
        with torch.cuda.device(memory.device):
            self._made_on = torch.cuda.current_stream()
            for _ in range(_WARM_UP):
                function(*inputs)
            rehearse(lambda: function(*inputs))
            self._graph, self.results = memory.capture(lambda: function(*inputs))

    @contextmanager
    def turn(self) -> Iterator[Callable[[], None]]:
        """Gives `replay`, on the current stream."""
        with self._memory.turn() as stream:
            if stream != self._made_on:
                for t in self._inputs:  # whose memory is not to be given away before this turn is over
                    t.record_stream(stream)
            yield self._graph.replay


class Recording:
    """One function, recorded for inputs of given shapes.

    The function is run several times before it is recorded. What it reads beside its inputs is read, in every replay,
    at the addresses that it had then.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], memory: Memory | None = None) -> None:
        self._memory = Memory(inputs[0].device) if memory is None else memory
        self._inputs = [t.detach().clone() for t in inputs]
        self._graph = Graph(function, self._inputs, self._memory)

    def __call__(self, *inputs: Tensor) -> Results:
        """The function's results for these inputs, in tensors of their own."""
        with self._memory.lock, torch.no_grad(), self._graph.turn() as replay:
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            replay()
            return tuple(t.detach().clone() for t in self._graph.results)


class _Later(NamedTuple):
    """A function that is left to the caller for a number of `calls`, and how many if it cannot be recorded then."""

    calls: int = 0
    then: int = _FIRST_WAIT


class Recordings:
    """Recordings by what they depend on, on each device the `size` last used.

    Recording costs some runs, so the first call of a key is left to the caller and the second one records. What cannot
    be recorded is said once in the log and not tried again. All recordings of a device go where they hold a quarter of
    its memory when another one is to be made, or where there is too little for that one: it is then tried once more,
    and if that fails, after some calls again.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._made: dict[torch.device, Bounded[Recording]] = {}
        self._memory: WeakValueDictionary[torch.device, Memory] = WeakValueDictionary()
        self._others: Bounded[_Later | str] = Bounded(16 * size)  # keys without a recording; a string says why for good
        self._lock = threading.RLock()

    def get(self, key: Hashable, what: str, function: Function, inputs: Sequence[Tensor]) -> Recording | None:
        """The recording of `function` for this key, None where the caller has to run it. `what` names it in the log."""
        device = inputs[0].device
        made = self._made.setdefault(device, Bounded(self.size))
        if (recording := made.get(key)) is not None:
            return recording
        with self._lock:
            if (recording := made.get(key)) is not None:  # another thread's, meanwhile
                return recording
            other = self._others.get(key)
            if not isinstance(other, _Later):
                self._others.put(key, _Later() if other is None else other)
                return None
            if other.calls:
                self._others.put(key, other._replace(calls=other.calls - 1))
                return None
            try:
                recording = self._record(device, function, inputs)
            except torch.OutOfMemoryError as error:
                self._others.put(key, _Later(other.then, 2 * other.then))
                _log.warning(
                    "%s runs without a CUDA graph for the next %d calls, the memory does not suffice: %s",
                    what, other.then, _first_line(error),
                )  # fmt: skip
                return None
            except Exception as error:  # whatever the network's code or CUDA raises; the caller runs it without
                why = f"{type(error).__name__}: {_first_line(error)}"
                self._others.put(key, why)
                _log.warning("%s runs without a CUDA graph: %s", what, why)
                return None
            made.put(key, recording)
            self._others.put(key, _Later(1))
        return recording

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        with self._lock:
            for device in list(self._made):
                self._drop(device)
            self._others.clear()

    def _record(self, device: torch.device, function: Function, inputs: Sequence[Tensor]) -> Recording:
        memory = self._memory.get(device)
        if memory is not None and memory.is_full:
            self._drop(device)
        del memory
        try:
            return Recording(function, inputs, self._memory_of(device))
        except torch.OutOfMemoryError:
            pass  # and, with the error, what its frames hold
        self._drop(device)
        return Recording(function, inputs, self._memory_of(device))

    def _memory_of(self, device: torch.device) -> Memory:
        """That of the device's other recordings; a new one where there are none."""
        memory = self._memory.get(device)
        if memory is None:
            memory = self._memory[device] = Memory(device)
        return memory

    def _drop(self, device: torch.device) -> None:
        if (memory := self._memory.get(device)) is not None:
            memory.wait()  # the driver may take back mapped memory while a replay reads it
        self._made[device].clear()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
