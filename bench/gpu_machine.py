"""The sizes of the GPU's rows, what its machine reaches at best, and the facts that the figures depend on."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import CONFIGURATIONS, Configuration

from lambda_kernels import info

PACKAGES = ("torch", "triton", "numpy", "setuptools", "ninja", "pytest", "pytest-benchmark", "pytest-xdist")


class Sizes(NamedTuple):
    """How large and how long the rows are."""

    main: Configuration
    others: dict[str, Configuration]
    tasks: int
    query: int  # images per task
    stock_tasks: int  # that the eager loop adapts to in a round
    seconds: float  # of a row's timed rounds
    rounds: int
    copy_bytes: int
    matmul: int  # rows and columns


REAL = Sizes(
    CONFIGURATIONS["mini-imagenet-64"],
    {name: CONFIGURATIONS[name] for name in ("omniglot", "cifar", "mini-imagenet")},
    tasks=64, query=75, stock_tasks=4, seconds=2.0, rounds=300, copy_bytes=1 << 31, matmul=8192,
)  # fmt: skip
TINY = Sizes(
    Configuration(16, 3, 4, 3, 2, 2), {"omniglot": Configuration(16, 1, 4, 3, 1, 2)},
    tasks=2, query=3, stock_tasks=2, seconds=0.0, rounds=3, copy_bytes=1 << 16, matmul=32,
)  # fmt: skip


def wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_line(*command: str) -> str:
    """What a program prints, in a line; "" where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join(done.stdout.split())


def ceilings(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """What the device reaches at best: bytes per second, read plus written, of a large copy; operations per second of a
    large matrix product of random numbers."""

    def best(run: Callable[[], object]) -> float:
        """Median seconds."""
        times = []
        for turn in range(-3, 10):
            if device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                took = begin.elapsed_time(end) / 1e3
            else:
                took = wall(run)
            if turn >= 0:
                times.append(took)
        return statistics.median(times)

    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device).random_()
    copy = functools.partial(torch.empty_like(source).copy_, source)
    found = {"copy_bytes_per_s": 2 * sizes.copy_bytes / best(copy)}
    n, before = sizes.matmul, torch.backends.cuda.matmul.fp32_precision
    for name, dtype, tf32 in (
        ("float32", torch.float32, False), ("tf32", torch.float32, True), ("bfloat16", torch.bfloat16, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[f"matmul_{name}_flops"] = 2 * n**3 / best(functools.partial(torch.mm, a, b, out=out))
    torch.backends.cuda.matmul.fp32_precision = before  # allow_tf32 would turn "none" into "ieee"
    return found


def environment(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Facts about the machine that the figures depend on."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    found: dict[str, Any] = {
        "python": platform.python_version(), "packages": versions, "cuda": torch.version.cuda, "device": str(device),
        "cudnn": torch.backends.cudnn.version(), "nvcc": first_line("nvcc", "--version").rpartition("release ")[2],
        "cores": len(os.sched_getaffinity(0)), "processor": info.collect()["cpu"]["model"],
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "ceilings": ceilings(sizes, device),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        line = first_line("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
        found["gpu"] = {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            **dict(zip(fields.split(","), (word.strip() for word in line.split(","))) if line else {}),
        }  # fmt: skip
    return found
