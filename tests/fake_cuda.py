"""CUDA devices that are none: streams, events and graphs that know their device and keep a simulated time, and what
torch.cuda does to the current stream. Functions under test launch work by `Cuda.launch`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lambda_kernels import _capture, cuda_graph
from lambda_kernels.backends import clock


class Stream:
    def __init__(self, device: int) -> None:
        self.device = device
        self.idle_at = 0.0  # ms
        self.waited: list[Any] = []

    def wait_stream(self, other: Stream) -> None:
        assert other.device == self.device, "a stream waits for one of another device"
        self.idle_at = max(self.idle_at, other.idle_at)

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)
        self.idle_at = max(self.idle_at, event.at)

    def record_event(self) -> Event:
        return Event(None, self)


class Event:
    """A time on the stream that was current when it was recorded."""

    def __init__(self, cuda: Cuda | None, stream: Stream | None = None) -> None:
        self.cuda, self.stream = cuda, stream
        self.at = 0.0 if stream is None else stream.idle_at
        self.waits = 0

    def record(self) -> None:
        assert self.cuda is not None
        self.stream = self.cuda.streams[self.cuda.device]
        self.at = max(self.stream.idle_at, self.cuda.host)

    def synchronize(self) -> None:
        self.waits += 1
        if self.cuda is not None:
            self.cuda.host = max(self.cuda.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert self.stream is not None and end.stream is not None
        assert self.stream.device == end.stream.device, "events of two devices have no time between them"
        return end.at - self.at


class Cuda:
    """Two devices, in place of torch.cuda while a test runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.host = 0.0  # ms: when Python launches what comes next
        self.device = 0
        self.usual = [Stream(0), Stream(1)]
        self.streams = list(self.usual)  # the current one of each device
        self.graph: Any = None  # that is being captured
        self.captures: list[Any] = []
        self.allocations_ended: list[Any] = []
        self.reserved = [0, 0]
        self.total = 1000
        self.sync_mode: Any = 0
        self.sync_modes: list[Any] = []
        self.end_fails = False
        self.random_numbers_captured = [False, False]  # what each device's generator believes
        for name, value in {
            "device": self._on,
            "stream": self._with,
            "current_device": lambda: self.device,
            "current_stream": lambda: self.streams[self.device],
            "Stream": lambda: Stream(self.device),
            "Event": lambda **_: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "graph_pool_handle": object,
            "is_initialized": lambda: True,
            "is_current_stream_capturing": self._is_capturing,
            "synchronize": lambda: None,
            "empty_cache": self._empty,
            "memory_reserved": lambda: self.reserved[self.device],
            "get_device_properties": lambda _: SimpleNamespace(total_memory=self.total),
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": self._set_sync_mode,
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(cuda_graph, "own_stream", lambda: Stream(self.device))
        patch.setattr(_capture, "end_allocation", lambda device, pool: self.allocations_ended.append((device, pool)))
        clock._stream.cache_clear()

    def launch(self, ms: float, host: float = 0.0, device: int | None = None) -> None:
        """A kernel of `ms`, for which Python needs `host`, on a device's current stream."""
        device = self.device if device is None else device
        self.host += host
        stream = self.streams[device]
        if self.graph is not None and self.graph.stream is stream:
            self.graph.work.append(ms)
        else:
            stream.idle_at = max(stream.idle_at, self.host) + ms

    def wait(self) -> None:
        """What torch does where an operator of its own waits."""
        if self.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self._is_capturing():
            self.graph.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def _is_capturing(self) -> bool:
        return self.graph is not None and self.graph.stream is self.streams[self.device]

    def _set_sync_mode(self, mode: Any) -> None:
        self.sync_modes.append(mode)
        self.sync_mode = mode
        if len(self.sync_modes) == 1:  # as torch does, once in a process and behind the change
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)

    def _empty(self) -> None:
        assert self.graph is None, "captures_underway.empty() INTERNAL ASSERT FAILED"

    @contextmanager
    def _on(self, device: Any) -> Iterator[None]:
        index = getattr(device, "index", device)
        before, self.device = self.device, self.device if index is None else index
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def _with(self, stream: Stream) -> Iterator[None]:
        before = self.device, self.streams[stream.device]
        self.device = stream.device
        self.streams[stream.device] = stream
        try:
            yield
        finally:
            self.device, self.streams[stream.device] = before


class Graph:
    """torch.cuda.CUDAGraph: what is launched on the stream of the capture is work of each replay."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.work: list[float] = []
        self.invalid = False
        self.stream: Stream | None = None
        self.pool: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        cuda = self.cuda
        assert cuda.graph is None, "two captures at a time"
        assert cuda.streams[cuda.device] is not cuda.usual[cuda.device], "the default stream cannot be captured"
        assert capture_error_mode == "thread_local"
        self.stream, self.pool, cuda.graph = cuda.streams[cuda.device], pool, self
        cuda.captures.append(self)
        cuda.random_numbers_captured[cuda.device] = True

    def capture_end(self) -> None:
        cuda = self.cuda
        cuda.graph = None
        if self.invalid or cuda.end_fails:
            cuda.end_fails = False
            raise RuntimeError("the capture was invalidated")
        cuda.random_numbers_captured[cuda.device] = False

    def replay(self) -> None:
        assert self.stream is not None
        stream = self.cuda.streams[self.stream.device]
        self.cuda.host += 0.005
        stream.idle_at = max(stream.idle_at, self.cuda.host) + sum(self.work)


def kernels(cuda: Cuda, **of: tuple[float, float]) -> dict[str, Callable[[], None]]:
    """Runs by name, of one kernel each: its ms and those of Python."""
    return {name: partial(cuda.launch, ms, host) for name, (ms, host) in of.items()}


def work(cuda: Cuda, ms: float = 1.0) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function to record, of one kernel."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        cuda.launch(ms)
        return (x * 2,)

    return function
