"""What recordings of a device share and depend on: memory, torch's switches and modes.

The devices are those of fake_cuda.py.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from fake_cuda import Cuda, work
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lambda_kernels import _torch, cuda_graph

X = torch.arange(6.0).reshape(2, 3)


# Memory.


def recorded(recordings: cuda_graph.Recordings, key: str, function: Any) -> cuda_graph.Recording | None:
    """What the second call of a key gives."""
    recordings.get(key, key, function, (X,))
    return recordings.get(key, key, function, (X,))


def takes(cuda: Cuda, count: int) -> Any:
    """A function that takes memory in its capture."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        if cuda.graph is not None:
            cuda.reserved[0] += count
        return (x,)

    return function


def test_recordings_are_bounded_in_bytes(cuda: Cuda) -> None:
    recordings = cuda_graph.Recordings(8)
    device = X.device
    for key in "abc":  # 100, 200, 300 of 1000 bytes
        assert recorded(recordings, key, takes(cuda, 100)) is not None
    assert len(recordings._made[device]) == 3 and recordings._memory[device].bytes == 300
    assert recorded(recordings, "d", takes(cuda, 100)) is not None
    assert list(recordings._made[device]) == ["d"] and recordings._memory[device].bytes == 100
    assert len({id(g.pool) for g in cuda.captures[:3]}) == 1 and cuda.captures[3].pool is not cuda.captures[0].pool
    assert cuda.captures[3].stream is not cuda.captures[0].stream


def test_a_pool_that_all_have_left_is_not_used_again(cuda: Cuda) -> None:
    recordings = cuda_graph.Recordings(8)
    first = recorded(recordings, "a", work(cuda))
    recordings.clear()
    del first
    recorded(recordings, "a", work(cuda))
    assert cuda.captures[0].pool is not cuda.captures[1].pool


def fails(cuda: Cuda, times: int) -> Any:
    """A function for whose warm-up or capture memory does not suffice, as often as that."""
    left = [times]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.9 GiB.\nand more")
        return (x,)

    return function


def test_where_memory_does_not_suffice_the_others_go(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    recordings = cuda_graph.Recordings(8)
    for key in "ab":
        recorded(recordings, key, work(cuda))
    one, memory = recordings._made[X.device].get("a"), recordings._memory[X.device]
    assert one is not None
    one(X)
    assert memory._done is not None
    done: Any = memory._done
    del one, memory
    with caplog.at_level(logging.WARNING):
        got = recorded(recordings, "c", fails(cuda, 1))
    assert got is not None and torch.equal(got(X)[0], X)
    assert list(recordings._made[X.device]) == ["c"] and not caplog.records
    assert done.waits == 1  # what may still read the memory that goes is over
    assert cuda.captures[2].pool is not cuda.captures[0].pool


def test_memory_that_does_not_suffice_is_not_for_good(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    recordings = cuda_graph.Recordings(8)
    function = fails(cuda, 4)  # two turns of two attempts
    with caplog.at_level(logging.WARNING):
        got = [recordings.get("key", "mine", function, (X,)) is not None for _ in range(60)]
    first = got.index(True)
    assert first == 1 + 17 + 33  # the second call, 16 calls later, 32 calls later
    assert all(got[first:])
    said = [r.message for r in caplog.records]
    assert len(said) == 2 and "for the next 16 calls, the memory does not suffice: CUDA out of memory" in said[0]
    assert "and more" not in caplog.text


def test_one_devices_memory_leaves_anothers_recordings(cuda: Cuda) -> None:
    recordings = cuda_graph.Recordings(8)
    other = torch.empty(1, device="meta")
    for _ in range(2):
        recordings.get("elsewhere", "mine", lambda x: (x,), (other,))
    assert recorded(recordings, "c", fails(cuda, 1)) is not None
    assert len(recordings._made[other.device]) == 1


def test_two_threads_make_one_recording(cuda: Cuda) -> None:
    recordings = cuda_graph.Recordings(8)
    recordings.get("key", "mine", work(cuda), (X,))
    inside, go = threading.Event(), threading.Event()

    def slow(x: Tensor) -> tuple[Tensor, ...]:
        inside.set()
        go.wait(30)
        return (x,)

    got: list[Any] = [None, None]
    threads = [
        threading.Thread(target=lambda i=i: got.__setitem__(i, recordings.get("key", "mine", slow, (X,))))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    inside.wait(30)
    go.set()
    for thread in threads:
        thread.join(30)
    assert got[0] is got[1] is not None and len(cuda.captures) == 1


# Conditions.

SWITCHES: dict[str, tuple[Any, str, Any]] = {
    "tf32 in products": (torch.backends.cuda.matmul, "allow_tf32", True),
    "tf32 in convolutions": (torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    "no cudnn": (torch.backends.cudnn, "enabled", False),
    "cudnn.benchmark": (torch.backends.cudnn, "benchmark", True),
    "cudnn.deterministic": (torch.backends.cudnn, "deterministic", True),
    "float16 sums": (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    "bfloat16 sums": (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "float16 accumulation": (torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_conditions_of_a_recording(name: str) -> None:
    where, switch, value = SWITCHES[name]
    before, usual = cuda_graph.conditions(), getattr(where, switch)
    assert _torch.unusual_switches() == ""
    setattr(where, switch, value)
    try:
        assert cuda_graph.conditions() != before
        assert _torch.unusual_switches().count("=") == 1
    finally:
        setattr(where, switch, usual)
    assert name == "tf32 in products" or cuda_graph.conditions() == before  # it was "none", and is "ieee" now
    torch.backends.cuda.matmul.fp32_precision = "none"


def test_deterministic_algorithms_are_a_condition(poisoned_memory: None) -> None:
    assert _torch.unusual_switches() == "deterministic=True"


# Modes.


class Looks(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_modes_that_look_at_operators_keep_a_function_from_being_recorded(cuda: Cuda) -> None:
    device = torch.device("cuda:0")
    with Looks():
        assert "a mode of torch" in str(cuda_graph.refusal(device))
    with FlopCounterMode(display=False):
        assert "a mode of torch" in str(cuda_graph.refusal(device))
    with torch.device("cpu"):  # a mode of torch too, which says where new tensors go
        assert cuda_graph.refusal(device) is None
        with Looks():
            assert "a mode of torch" in str(cuda_graph.refusal(device))
    assert cuda_graph.refusal(device) is None
