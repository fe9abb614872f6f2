"""Builds the extension and, on the cores that it leaves, compiles the Triton kernels of the benchmark's rows.

What is compiled is what the rows will launch: an inner loop is run on the rows' shapes with every launch written down
in place of started. Each process of a pool then calls triton.jit with the same arguments, so that the rows find every
kernel in Triton's cache under the very key that they look for.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from gpu_machine import REAL, TINY, Sizes
from harness import Configuration

from lambda_kernels.backends.reference import Reference
from lambda_kernels.backends.triton import Triton
from lambda_kernels.backends.triton.operators import OPERATORS, kernel
from lambda_kernels.spec import BlockSpec, ConvSpec

ROOT = Path(__file__).resolve().parents[1]
SPEC = BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, 2)
FOR_THE_EXTENSION = 4  # cores


@dataclass(frozen=True)  # no tuple, which triton.jit would take apart
class Pointer:
    """A tensor as triton.jit sees it; `at` is its address within 16 bytes."""

    dtype: torch.dtype
    at: int

    def data_ptr(self) -> int:
        return self.at


class Launch(NamedTuple):
    """A kernel by its module and name, and what triton.jit is called with, but for what it does not look at."""

    module: str
    name: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


def as_seen(value: Any) -> Any:
    """One value for all that triton.jit specialises alike: 1, multiples of 16, other integers, by their size."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16)
    if isinstance(value, tuple):
        return tuple(map(as_seen, value))
    if isinstance(value, float):
        return 0.5
    if type(value) is int and value != 1:
        return (0 if -(2**31) <= value < 2**31 else 2**40) + (16 if value % 16 == 0 else 3)
    return value


class Everything(Triton):
    """Triton, which runs beside each block also the parts of one: "auto" measures both."""

    def conv_block(self, *operands: Any) -> Any:
        Reference.conv_block(self, *operands)
        return super().conv_block(*operands)


@contextmanager
def written_down() -> Iterator[dict[Launch, None]]:
    """What is launched inside, each launch once and none of them started, with every tile that may be chosen."""
    from triton.runtime.jit import JITFunction

    found: dict[Launch, None] = {}

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        fixed = [parameter.is_constexpr for parameter in self.params]
        seen = tuple(value if own else as_seen(value) for value, own in zip(arguments, fixed, strict=True))
        found[Launch(self.fn.__module__, self.fn.__name__, seen, tuple(sorted(options.items())))] = None

    def tile(self: Any, key: Any, tiles: Any, where: Any, run: Any) -> Any:
        for one in reversed(tiles):  # what the last run made goes on: that of the first tile
            run(one)
        return tiles[0]

    launch: Any = importlib.import_module("lambda_kernels.backends.triton.launch")
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(launch.Tuner, "tile", tile):
        yield found


def run_rows(sizes: Sizes, device: torch.device) -> None:
    """An inner loop of every row's shapes, of one task and of many, and the gradients of the blocks by themselves."""
    backend = Everything()
    for tasks, pattern in itertools.product((1, sizes.tasks), ("11111", "00011")):
        descend(backend, sizes.main, tasks, pattern, device)
    c, t = sizes.main, sizes.tasks
    for layer in range(4):
        side, channels = c.image_size >> layer, c.width if layer else c.in_channels
        x = backend.layout(torch.empty(t, c.ways * c.shots, channels, side, side, device=device))
        weight, gamma = torch.empty(t, c.width, channels, 3, 3, device=device), torch.empty(t, c.width, device=device)
        z, y, index, mean, rstd = backend.conv_block(x, weight, gamma, gamma, SPEC)
        gy = torch.empty(y.shape, device=device)  # contiguous, as autograd hands it over
        dz, _, _ = backend.norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, SPEC, True)
        assert dz is not None
        backend.conv2d_weight_grad(dz, x, weight.shape, SPEC.conv)
        if layer:
            backend.conv2d_input_grad(dz, weight, x.shape, SPEC.conv)


def descend(backend: Triton, c: Configuration, tasks: int, pattern: str, device: torch.device) -> None:
    """One step: those after it launch the same."""
    images, parameters = c.ways * c.shots, []
    for layer in range(4):
        parameters.append(torch.empty(c.width, c.width if layer else c.in_channels, 3, 3, device=device))
        parameters += [torch.empty(c.width, device=device) for _ in range(2)]
    features = c.width * (c.image_size >> 4) ** 2
    parameters += [torch.empty(c.ways, features, device=device), torch.empty(c.ways, device=device)]
    updated = [bit == "1" for bit in pattern[:4] for _ in range(3)] + [pattern[4] == "1"] * 2
    x = torch.empty(tasks, images, c.in_channels, c.image_size, c.image_size, device=device)
    labels = torch.zeros(tasks, images, dtype=torch.int64, device=device)
    query = x[:, :1] if tasks > 1 else None
    backend.inner_loop(x, labels, parameters, updated, [SPEC] * 4, 1, [0.01], query)


def launches(sizes: Sizes, device: torch.device) -> list[Launch]:
    for name in [*OPERATORS, "sgd_"]:
        kernel(name)  # its module is imported: what is patched must be there
    with written_down() as found, torch.no_grad():
        run_rows(sizes, device)
    return list(found)


class Driver:
    """A driver that knows its chip, and has none."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def set_driver(architecture: int) -> None:
    from triton.runtime.driver import driver

    driver.set_active(Driver(architecture))


def compile_one(wanted: Launch) -> str:
    """Why it does not compile; "" where it does, or was compiled before."""
    jit = getattr(importlib.import_module(wanted.module), wanted.name)
    try:
        jit.run(*wanted.arguments, grid=(1,), warmup=True, **dict(wanted.options))
    except Exception as error:  # a tile that a chip does not take is for the tuner to leave out
        return f"{wanted.name} {wanted.options}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def compile_all(wanted: list[Launch], architecture: int, processes: int) -> list[str]:
    """What does not compile, and why."""
    pool = ProcessPoolExecutor(processes, get_context("spawn"), set_driver, (architecture,))
    with pool:
        return [why for why in pool.map(compile_one, wanted) if why]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--build-lib", type=Path, help="Where the extension goes. Default: beside the sources.")
    parser.add_argument("--dry-run", action="store_true", help="The first kernels of tiny shapes, for a chip not here.")
    given = parser.parse_args()
    where = ["--inplace"] if given.build_lib is None else ["--build-lib", str(given.build_lib)]
    log = tempfile.TemporaryFile("w+")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *where]
    extension = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    failed = []
    if why := Triton().reasons() if not given.dry_run else []:
        print(f"no Triton kernel is compiled: {'; '.join(why)}", flush=True)
    else:
        start, cores = time.perf_counter(), len(os.sched_getaffinity(0))
        if given.dry_run:
            wanted, architecture = launches(TINY, torch.device("meta"))[:3], 90
        else:
            major, minor = torch.cuda.get_device_capability(0)
            wanted, architecture = launches(REAL, torch.device("cuda", 0)), 10 * major + minor
        failed = compile_all(wanted, architecture, max(1, cores - FOR_THE_EXTENSION))
        took = time.perf_counter() - start
        print(f"{len(wanted)} Triton kernels for sm_{architecture}, {len(failed)} failed, {took:.1f} s", flush=True)
        print("\n".join(failed), flush=True)
    if status := extension.wait():
        log.seek(0)
        print(f"the extension does not build: exit status {status}\n{log.read()}")
    return 1 if failed or status else 0


if __name__ == "__main__":
    sys.exit(main())
