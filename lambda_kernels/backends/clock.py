"""Times of calls on a CUDA device as a recorded inner loop makes them: from graphs, without what Python needs."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from .._capture import capture, rehearse
from .._say import say_once

__all__ = ["cuda_clock", "say_measuring", "unmeasured"]

_log = logging.getLogger("lambda_kernels")
Run = Callable[[], Any]


def unmeasured() -> bool:
    """Whether the first of several ways is to be taken, with the same result on every machine or without the time."""
    return torch.are_deterministic_algorithms_enabled() or os.environ.get("LAMBDA_KERNELS_MEASURE") == "0"


def say_measuring(device: torch.device) -> None:
    """Say once for a device why its first calls are slow."""
    say_once(
        f"{device}: the first calls of each shape are slow, as kernels are compiled and timed; what was found is kept "
        "on disk (LAMBDA_KERNELS_MEASURE=0 times none)"
    )


def cuda_clock(runs: Mapping[str, Run], budget: float = 100.0) -> dict[str, float]:
    """Median milliseconds of a call of each run on the current device.

    Each is recorded, several calls in a row if they are short, and the recordings are replayed in turn, 3 to 11 times,
    about `budget` ms in all. Where one of them cannot be recorded, all are timed by launches.
    """
    device, current = torch.cuda.current_device(), torch.cuda.current_stream()
    beside = _stream(device)
    beside.wait_stream(current)
    try:
        with torch.cuda.stream(beside):
            longest = max(min(_elapsed(run) for _ in range(2)) for run in runs.values())
            calls = max(1, min(10, int(1.0 / max(longest, 1e-3))))
            plays = {name: _several(run, calls) for name, run in runs.items()}
            plays = _recorded(plays) or plays
            once = sum(_elapsed(play) for play in plays.values())  # a graph's first replay brings it to the device
            once = sum(_elapsed(play) for play in plays.values())
            times: dict[str, list[float]] = {name: [] for name in plays}
            for _ in range(max(3, min(11, int(budget / max(once, 1e-3))))):
                for name, play in plays.items():
                    times[name].append(_elapsed(play) / calls)
    finally:
        current.wait_stream(beside)
    return {name: statistics.median(values) for name, values in times.items()}


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream on which a device is measured, always the same: torch keeps a workspace for each one."""
    return torch.cuda.Stream()


def _several(run: Run, calls: int) -> Run:
    def several() -> None:
        for _ in range(calls):
            run()

    return several


def _elapsed(run: Run) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _recorded(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Replays of the runs; none where one of them cannot be recorded."""
    stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    replays: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            rehearse(run)
            replays[name] = capture(run, stream, pool)[0].replay
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a backend or CUDA raises: it is timed another way
            _log.info("%s is timed without a CUDA graph: %s", name, str(error).partition("\n")[0])
            return {}
    return replays
