"""For all tests: the same seeds and thread count everywhere, and what the markers mean."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# Before torch loads its OpenMP: threads that spin while they wait take the cores from those that they wait for, where
# other processes run too (ten times as long, on two busy cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    # Read when triton is imported, which torch's flop counter does: the kernels run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A test that starts pytest in a process of its own starts a plain one, not a worker of this run's pytest-xdist.
os.environ.pop("PYTEST_XDIST_WORKER", None)

from cuda_checks import RUNNERS, Runner
from cuda_emulator import build
from fake_cuda import Cuda as FakeCuda
from machine import on_threads

from lambda_kernels.backends.cuda import Cuda

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("project")


# Of a minute or more. They begin first, so that no worker of pytest-xdist is left alone with one of them.
SLOWEST = ("test_cuda_build.py", "test_gpu_script.py", "test_fuzz.py", "test_triton_aot.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOWEST)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """What was imported and made for earlier files stays: no collection of garbage, of which each round of a timing has
    one, goes through it. Late in a worker's life that took seconds each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what ends with the process is to be freed


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """Two threads on any machine: parallel code runs as such, and sums are split in one way."""
    torch.set_num_threads(2)


@pytest.fixture
def float32_has_its_digits() -> Iterator[None]:
    """On a device too, whose convolutions round to TF32 as torch's switches stand: tests that try that say so."""
    if not torch.cuda.is_available():
        yield
        return
    backends: Any = torch.backends
    switch = backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    yield
    switch.fp32_precision = before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads wait for each other wherever another process has a core, in each of many small operations."""
    with on_threads(1):
        yield


@pytest.fixture(scope="session")
def emulated_library() -> Path:
    """The CUDA kernels, built to run on the CPU (tests/cuda_emulator)."""
    return build.kept_library()


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Runner:
    if request.param == "device":
        return Runner(Cuda(), "cuda")
    return Runner(Cuda(request.getfixturevalue("emulated_library"), "cpu"), "cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Two CUDA devices that are none, in place of torch.cuda."""
    return FakeCuda(monkeypatch)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What torch.empty gives is NaN, bytes are 255: an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
