"""Autotune takes all steps by one launch, and a frozen first block by its images, where that is the faster."""

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


@pytest.mark.parametrize("fastest", ["cuda", "parts"])
def test_a_frozen_first_block_is_measured_against_its_parts(
    fastest: str, emulated_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def noted(kind: Any) -> None:
        plain = kind.block

        def block(self: Any, *given: Any) -> Any:
            taken.append(kind.name)
            return plain(self, *given)

        monkeypatch.setattr(kind, "block", block)

    def clock(runs: Mapping[str, Any]) -> dict[str, float]:
        return {name: float(name != fastest) for name in runs}

    def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]

    noted(Cuda)
    noted(Reference)
    table, spec = Table(None), NETWORK.specs[0]
    tuned = Autotune([Cuda(emulated_library, "cpu"), Reference()], lambda device: table, clock)
    images = drawn((1, 4, 2, 8, 9), (1, 8, 2, 3, 3), (1, 8), (1, 8))
    features = drawn((1, 4, 8, 4, 4), (1, 9, 8, 3, 3), (1, 9), (1, 9))  # of too many channels for a first block
    for (x, weight, gamma, beta), name in ((images, fastest), (features, "parts")):
        want = Reference().block(x, weight, gamma, beta, spec)
        tuned.block(x, weight, gamma, beta, spec)  # measures
        taken.clear()
        torch.testing.assert_close(tuned.block(x, weight, gamma, beta, spec), want, **STEPS)
        assert taken[0] == ("cuda" if name == "cuda" else "reference")
