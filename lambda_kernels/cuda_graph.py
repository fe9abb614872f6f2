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

import torch
from torch import Tensor

from . import backends
from ._torch import transform_active
from .cache import Bounded

__all__ = ["Recording", "Recordings", "conditions", "refusal"]

Results = tuple[Tensor, ...]
_WARM_UP = 3  # runs: kernels are compiled, tuned and measured, libraries make their handles
_log = logging.getLogger("lambda_kernels")


def refusal(device: torch.device) -> str | None:
    """Why nothing is recorded on this device at the moment; None where it can be."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the network is on {device.type}"
    if os.environ.get("LAMBDA_KERNELS_GRAPHS") == "0":
        return "LAMBDA_KERNELS_GRAPHS=0"
    if (why := transform_active(device.type)) is not None:
        return why
    return "a graph is being recorded already" if torch.cuda.is_current_stream_capturing() else None


def conditions() -> tuple[Hashable, ...]:
    """What a recording keeps of the switches that stand outside the function: with others, another one is made."""
    return (
        backends.current(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )


class Graph:
    """What a CUDA device does in a function, recorded on a stream beside the current one."""

    def __init__(self, function: Callable[[], Results], device: torch.device) -> None:
        self.device = device
        self._graph = torch.cuda.CUDAGraph()
        self._done: torch.cuda.Event | None = None
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    function()
            current.wait_stream(side)
            # Only this thread's calls may not wait: a data loader's thread goes on.
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self.results = function()

    @contextmanager
    def turn(self) -> Iterator[Callable[[], None]]:
        """Gives `replay`, on the current stream. Two streams' turns follow each other: their buffers are the same."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._done is not None:
                stream.wait_event(self._done)
            yield self._graph.replay
            self._done = stream.record_event()


class Recording:
    """One function, recorded for inputs of given shapes.

    The function is run several times before it is recorded. What it reads beside its inputs is read, in every replay,
    at the addresses that it had then.
    """

    def __init__(self, function: Callable[..., Results], inputs: Sequence[Tensor]) -> None:
        self._inputs = [t.detach().clone() for t in inputs]
        self._graph = Graph(lambda: function(*self._inputs), inputs[0].device)
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Results:
        """The function's results for these inputs, in tensors of their own."""
        with self._lock, torch.no_grad(), self._graph.turn() as replay:
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            replay()
            return tuple(t.detach().clone() for t in self._graph.results)


class Recordings:
    """Recordings by what they depend on, the `size` last used; each holds the memory of its function's intermediates.

    Recording costs some runs, so the first call of a key is left to the caller and the second one records. What cannot
    be recorded is said once in the log and not tried again.
    """

    def __init__(self, size: int) -> None:
        self._known: Bounded[Recording | str] = Bounded(size)  # "": left to the caller once
        self._lock = threading.RLock()

    def get(
        self, key: Hashable, what: str, function: Callable[..., Results], inputs: Sequence[Tensor]
    ) -> Recording | None:
        """The recording of `function` for this key, None where the caller has to run it. `what` names it in the log."""
        with self._lock:
            entry = self._known.get(key)
            if entry == "":
                try:
                    entry = Recording(function, inputs)
                except Exception as error:  # whatever the network's code or CUDA raises; the caller runs it without
                    entry = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    _log.warning("%s runs without a CUDA graph: %s", what, entry)
            self._known.put(key, "" if entry is None else entry)
        return entry if isinstance(entry, Recording) else None

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        self._known.clear()
