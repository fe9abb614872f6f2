"""The machine that the tests run on: what they may expect of it, which is nothing of its speed; threads, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lambda_kernels.backends import reasons

# Seconds after which a process counts as hung. No test may fail on a slow or busy machine: this is far beyond what any
# of them takes, and is there so that a hang ends.
PATIENCE = 3600.0

needs_native = pytest.mark.skipif(bool(reasons("native")), reason="; ".join(reasons("native")))


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fresh(code: str, *arguments: str, **environment: str) -> str:
    """What a new interpreter prints; a skip where the processor lacks the instructions of LAMBDA_KERNELS_ISA."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    if done.returncode != 0 and "LAMBDA_KERNELS_ISA" in environment and "this machine runs" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done.stdout
