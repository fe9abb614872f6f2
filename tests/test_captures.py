"""What happens around a CUDA graph: functions that none can hold, captures that fail, streams and devices.

On the CPU the devices are those of fake_cuda.py.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import Cuda, Event, Stream, work
from machine import fresh
from tape import rehearse as rehearse_on_tapes
from torch import Tensor

from lambda_kernels import _capture, _torch, cuda_graph
from lambda_kernels._capture import Rules, capture, capturing, own_stream, rehearse


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other thread lives, as pytest-xdist's does."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


# What no graph can hold is found before a capture.

X = torch.arange(6.0).reshape(2, 3)
MASK = X > 2
WAITING: dict[str, Callable[[], Any]] = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X[0, 0]),
    "branch": lambda: 1 if X.sum() > 0 else 2,
    "nonzero": lambda: X.nonzero(),
    "masked": lambda: X[MASK],
    "masked columns": lambda: X[:, MASK[1]],
    "put by a mask": lambda: X.clone().index_put_((MASK,), torch.ones(3)),
    "select": lambda: X.masked_select(MASK),
    "unique": lambda: X.unique(),
    "repeats": lambda: X.repeat_interleave(torch.tensor([1, 2, 3]), dim=1),
    "to a device": lambda: X.to("meta"),
    "copied to a device": lambda: torch.empty(2, 3, device="meta").copy_(X),
}
FREE: dict[str, Callable[[], Any]] = {
    "indices": lambda: X[:, torch.tensor([0, 2])],
    "indices put": lambda: X.clone().index_put_((torch.tensor([0]),), torch.ones(3)),
    "where": lambda: torch.where(MASK, X, 0.0),
    "masked fill": lambda: X.masked_fill(MASK, 0.0),
    "repeats of known size": lambda: X.repeat_interleave(torch.tensor([1, 2, 3]), dim=1, output_size=6),
    "to a dtype": lambda: X.to(torch.float64),
    "loss": lambda: F.cross_entropy(X, torch.tensor([0, 1])),
}


@pytest.mark.parametrize("name", WAITING)
def test_operators_that_wait_are_found(name: str) -> None:
    with pytest.raises(RuntimeError, match="waits for the device"), Rules():
        WAITING[name]()


@pytest.mark.parametrize("name", FREE)
def test_others_are_not(name: str) -> None:
    with Rules():
        got = FREE[name]()
    assert torch.equal(got, FREE[name]())


def test_torch_tells_of_its_own_waits(cuda: Cuda, alone: None) -> None:
    """As of a linear solver's, which no operator that is called shows."""
    cuda.sync_mode = "warn"
    with pytest.raises(RuntimeError, match="called a synchronizing"):
        rehearse(cuda.wait)
    assert cuda.sync_modes == ["error", "warn"]
    assert not capturing(torch.device("cpu"))


def test_other_threads_may_wait_meanwhile(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    rehearse(cuda.wait)
    assert cuda.sync_modes == []


@pytest.mark.parametrize("waits", [lambda cuda: float(X.sum()), lambda cuda: cuda.wait()], ids=["operator", "torch"])
def test_a_function_that_waits_meets_no_capture(
    cuda: Cuda, alone: None, caplog: pytest.LogCaptureFixture, waits: Any
) -> None:
    recordings = cuda_graph.Recordings(2)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        waits(cuda)
        return (x,)

    with caplog.at_level(logging.WARNING):
        assert [recordings.get("key", "the function", function, (X,)) for _ in range(3)] == [None] * 3
    assert cuda.captures == [] and cuda.sync_mode == 0
    assert len(caplog.records) == 1 and "runs without a CUDA graph: RuntimeError" in caplog.text


# A capture that fails.


def test_a_failing_capture_leaves_all_as_it_was_and_names_its_cause(cuda: Cuda) -> None:
    pool = object()

    def function() -> None:
        torch.cuda.current_stream()
        cuda.wait()

    with torch.cuda.device(1):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            capture(function, Stream(1), pool)  # type: ignore[arg-type]
        assert cuda.streams == cuda.usual and cuda.device == 1
    assert cuda.allocations_ended == [(torch.device("cuda", 1), pool)]
    assert cuda.random_numbers_captured == [False, False]


def test_a_capture_whose_end_alone_fails_says_so(cuda: Cuda) -> None:
    cuda.end_fails = True
    with pytest.raises(RuntimeError, match="invalidated"):
        capture(lambda: cuda.launch(1.0), Stream(0), None)  # type: ignore[arg-type]
    assert cuda.streams == cuda.usual and len(cuda.allocations_ended) == 1


def test_an_error_in_the_function_ends_the_capture(cuda: Cuda) -> None:
    def function() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        capture(function, Stream(0), None)  # type: ignore[arg-type]
    assert cuda.graph is None and cuda.streams == cuda.usual and cuda.allocations_ended == []


def test_an_allocation_that_has_ended_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def end(device: int, pool: Any) -> None:
        asked.append((device, pool))
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    _torch.end_allocation(torch.device("cuda:1"), (0, 1))
    assert asked == [(1, (0, 1))]


# Streams and devices.


def test_capturing_is_asked_of_the_tensors_device(cuda: Cuda) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    seen = []
    with torch.cuda.device(1):
        capture(lambda: seen.append((capturing(first), capturing(second), cuda.device)), Stream(1), None)  # type: ignore[arg-type]
    assert seen == [(True, True, 1)]  # what is current counts too: a warm-up beside a capture would end it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(Stream(1)):  # type: ignore[arg-type]
        graph.capture_begin(capture_error_mode="thread_local")
        with torch.cuda.device(0):
            assert capturing(second) and not capturing(first) and cuda.device == 0
            assert "being recorded already" in str(cuda_graph.refusal(second))
            assert cuda_graph.refusal(first) is None
        graph.capture_end()
    assert not capturing(second)


def test_a_rehearsal_counts_as_a_capture(cuda: Cuda) -> None:
    device = torch.device("cuda:1")
    assert rehearse(lambda: (capturing(device), _capture.capturing_here())) == (True, True)
    assert not capturing(device) and not _capture.capturing_here()


def test_a_recording_lies_on_its_own_device_and_stream(cuda: Cuda) -> None:
    memory = cuda_graph.Memory(torch.device("cuda:1"))
    ran_on = []

    def function(x: Tensor) -> tuple[Tensor, ...]:
        ran_on.append(torch.cuda.current_stream())
        return work(cuda)(x)

    recording = cuda_graph.Recording(function, [X], memory)
    (graph,) = cuda.captures
    assert graph.stream.device == 1 and graph.stream is not cuda.usual[1]
    # The workspace of cuBLAS lies in the graph's pool where nothing but captures ran on the stream.
    assert [stream is graph.stream for stream in ran_on] == [False, False, False, True]
    again = cuda_graph.Recording(work(cuda), [X], memory)
    assert [g.stream is graph.stream and g.pool is graph.pool for g in cuda.captures] == [True, True]
    other = cuda_graph.Recording(work(cuda), [X], cuda_graph.Memory(torch.device("cuda:0")))
    assert cuda.captures[2].stream.device == 0 and cuda.captures[2].pool is not graph.pool
    before = cuda.usual[1].idle_at
    recording(X)
    again(X)
    assert cuda.usual[1].idle_at >= before + 2.0
    other(X)
    assert cuda.device == 0 and cuda.streams == cuda.usual


class Driver:
    """libcuda's one function that is called."""

    def __init__(self, handle: int | None) -> None:
        self.handle, self.flags = handle, -1

    def cuStreamCreate(self, made: Any, flags: Any) -> int:
        self.flags = flags.value
        ctypes.cast(made, ctypes.POINTER(ctypes.c_void_p))[0] = self.handle
        return 0 if self.handle else 201


def test_a_stream_of_ones_own_comes_from_the_driver(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: handle)
    driver = Driver(0x1234)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert own_stream() == 0x1234
    assert driver.flags == 1  # CU_STREAM_NON_BLOCKING: else the default stream would wait for it, and end a capture
    driver.handle = None
    assert isinstance(own_stream(), Stream)

    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert isinstance(own_stream(), Stream)


def test_turns_of_two_streams_follow_each_other(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Stream] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda t, stream: kept.append(stream))
    memory = cuda_graph.Memory(torch.device("cuda:0"))
    first, second = (cuda_graph.Recording(work(cuda, 5.0), [X], memory) for _ in range(2))
    beside = Stream(0)
    first(X)
    assert kept == []
    with torch.cuda.stream(beside):  # type: ignore[arg-type]
        second(X)
    assert beside.idle_at >= cuda.usual[0].idle_at + 5.0
    assert kept == [beside]
    (event,) = beside.waited
    assert isinstance(event, Event) and event.stream is cuda.usual[0]


def test_a_turn_that_fails_is_waited_for_too(cuda: Cuda) -> None:
    memory = cuda_graph.Memory(torch.device("cuda:0"))
    recording = cuda_graph.Recording(work(cuda), [X], memory)
    with pytest.raises(RuntimeError, match="size"):
        recording(torch.ones(7))
    assert memory._done is not None and not memory.lock.locked()
    assert torch.equal(recording(X)[0], X * 2)


@pytest.mark.parametrize("recording", [True, False], ids=["recording", "measuring"])
def test_a_capture_waits_for_another_devices(cuda: Cuda, recording: bool) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow() -> tuple[Tensor, ...]:
        inside.set()
        go.wait(30)
        return (X,)

    def second() -> None:
        if recording:
            cuda_graph.Memory(torch.device("cuda:1")).capture(lambda: (X,))
        else:
            capture(lambda: (X,), Stream(1), None)  # type: ignore[arg-type]

    threads = [threading.Thread(target=capture, args=(slow, Stream(0), None))]
    threads[0].start()
    assert inside.wait(30)
    threads.append(threading.Thread(target=second))
    threads[1].start()
    threads[1].join(0.1)
    waited = len(cuda.captures) == 1
    go.set()
    for thread in threads:
        thread.join(30)
    assert waited and len(cuda.captures) == 2 and cuda.graph is None


# On a device a failing capture may damage the process, so it has one of its own.


def leaves_a_waiting_function_to_the_caller(device: str) -> None:
    recordings = cuda_graph.Recordings(4)
    x = torch.ones(3, device=device)
    said: list[str] = []
    log = logging.getLogger("lambda_kernels")
    log.addFilter(lambda record: said.append(record.getMessage()) or True)  # type: ignore[func-returns-value]

    def by_an_operator(x: Tensor) -> tuple[Tensor, ...]:
        return (x * float(x.sum()),)

    def past_torch(x: Tensor) -> tuple[Tensor, ...]:  # found in the capture alone
        torch.cuda.synchronize()
        return (x * x.sum(),)

    def does_not(x: Tensor) -> tuple[Tensor, ...]:
        return (x * x.sum(),)

    stream = torch.cuda.current_stream() if device == "cuda" else None
    for function in (by_an_operator, past_torch) if device == "cuda" else (by_an_operator,):
        key = function.__name__
        assert [recordings.get(key, key, function, (x,)) for _ in range(4)] == [None] * 4
        assert len([text for text in said if f"{key} runs without a CUDA graph" in text]) == 1, said
        assert device == "cpu" or torch.cuda.current_stream() == stream
        torch.rand(3, device=device)
    assert recordings.get("other", "another", does_not, (x,)) is None
    recording = recordings.get("other", "another", does_not, (x,))
    assert recording is not None, said
    assert torch.equal(recording(x * 2)[0], x * 12)


def test_a_function_that_waits_is_left_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse_on_tapes(monkeypatch)
    leaves_a_waiting_function_to_the_caller("cpu")


@pytest.mark.gpu
def test_a_function_that_waits_is_left_to_the_caller_on_a_device() -> None:
    fresh(
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import test_captures; test_captures.leaves_a_waiting_function_to_the_caller('cuda')"
    )
