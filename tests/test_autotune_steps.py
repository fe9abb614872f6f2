"""Autotune takes all steps by one launch where that is the faster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import STEPS
from chains import Layer, Network, given, run

from lambda_kernels.backends.autotune import Autotune
from lambda_kernels.backends.cuda import Cuda
from lambda_kernels.backends.reference import Reference
from lambda_kernels.backends.table import Table

NETWORK = Network((2, 8, 9), (Layer(8), Layer(9)), images=4)


@pytest.mark.parametrize("fastest", ["cuda", "steps"])
def test_the_steps_are_measured_against_one_launch(fastest: str, emulated_library: Path) -> None:
    asked: list[list[str]] = []

    def clock(runs: Mapping[str, Any]) -> dict[str, float]:
        asked.append(list(runs))
        return {name: float(name != fastest) for name in runs}

    table = Table(None)
    tuned = Autotune([Cuda(emulated_library, "cpu"), Reference()], lambda device: table, clock)
    for first in range(3):
        task, updated = given(NETWORK), NETWORK.from_layer(first)
        want = run(Reference(), NETWORK, task, updated, 3, [0.1], query=True)
        for _ in range(2):
            torch.testing.assert_close(run(tuned, NETWORK, task, updated, 3, [0.1], query=True), want, **STEPS)
    assert asked.count(["cuda", "steps"]) == 2  # not where the first block moves
