"""Peak memory of an adaptation, above parameters and inputs.

On a CPU: the process's resident set as Linux counts it, so that memory beyond torch's allocator is in it too. Each
adaptation has a process of its own, forked from one that has loaded everything and run nothing. On a GPU: what torch's
allocator had given out at most.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapt import adapt
from .models import conv4

__all__ = ["measure_memory"]

Key = TypeVar("Key", bound=Hashable)

# What is freed goes back to the system at once: the resident set is what is in use.
_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
_PEAK = Path("/proc/self/clear_refs")


def measure_memory(
    model: nn.Module, xs: Tensor, ys: Tensor, descents: Mapping[Key, Mapping[str, Any]]
) -> dict[Key, float]:
    """MB (10^6 bytes) that an adaptation to xs [N, ...], ys [N] needs at its peak, its first call of these shapes, with
    as many threads and as much of autograd as here.

    >>> list(measure_memory(model, xs, ys, {"head": {"pattern": "00001", "steps": 5, "lr": 0.1}}))
    ['head']

    descents: the arguments of `adapt`, by any names.

    Raises:
        ValueError: the system is not Linux, or the network, rule or loss cannot be handed to another process.
        RuntimeError: an adaptation failed there; says how.
    """
    if xs.is_cuda:
        return {name: _on_gpu(model, xs, ys, how) for name, how in descents.items()}
    if xs.device.type != "cpu" or not _PEAK.exists():
        raise ValueError(f"memory is measured on Linux and on CUDA devices, not on {sys.platform} on {xs.device}")
    given = (model, xs, ys, [dict(how) for how in descents.values()], torch.get_num_threads(), torch.is_grad_enabled())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given.pt"
        try:
            torch.save(given, file)
        except Exception as error:
            raise ValueError(
                f"memory is measured in a process of its own, to which {type(model).__name__}, its rule and loss are "
                f"handed as a pickle: {error}. Define them in a module, not inside a function"
            ) from error
        environment = {**os.environ, **_SETTINGS, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-m", "lambda_maml.memory", str(file)], env=environment, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"memory: {(done.stderr.strip().splitlines() or ['the process ended'])[-1]}")
    return dict(zip(descents, map(float, done.stdout.split()), strict=True))


def _on_gpu(model: nn.Module, xs: Tensor, ys: Tensor, how: Mapping[str, Any]) -> float:
    gc.collect()
    torch.cuda.synchronize(xs.device)
    torch.cuda.reset_peak_memory_stats(xs.device)
    before = torch.cuda.memory_allocated(xs.device)
    adapt(model, xs, ys, **how)
    torch.cuda.synchronize(xs.device)
    return (torch.cuda.max_memory_allocated(xs.device) - before) / 1e6


def _status(field: str) -> float:
    """MB, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return float(value) * 1024 / 1e6


def _peak(model: nn.Module, xs: Tensor, ys: Tensor, how: Mapping[str, Any]) -> float:
    """In this process, which has run nothing yet. Pages of files, which are code that was not loaded before, are not
    counted."""
    small = conv4(ways=2, in_channels=1, width=4, image_size=16)
    adapt(small, torch.zeros(2, 1, 16, 16), torch.arange(2), pattern="11111", steps=1)  # libraries and threads
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _PEAK.write_text("5", encoding="utf-8")  # 5: VmHWM starts again at VmRSS
    before = _status("RssAnon")
    learner = adapt(model, xs, ys, **how)
    peak = _status("VmHWM") - _status("RssFile") - before
    del learner
    return max(peak, 0.0)


def _in_fork(model: nn.Module, xs: Tensor, ys: Tensor, how: Mapping[str, Any], threads: int, graph: bool) -> str:
    """What `_peak` gives in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(threads)
            torch.set_grad_enabled(graph)
            os.write(writer, repr(_peak(model, xs, ys, how)).encode())
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as found:
        text = found.read().decode()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)
    return text


def _main(path: str) -> None:
    model, xs, ys, descents, threads, graph = torch.load(path, weights_only=False)
    for how in descents:
        print(_in_fork(model, xs, ys, how, threads, graph), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
