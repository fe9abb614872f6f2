"""Rates per parameter and step in the inner loops of the CPU; tests/test_cuda.py and test_triton.py have the others."""

from __future__ import annotations

import pytest
import rates
import torch

from lambda_kernels.backends import Backend, Native, Reference, reasons
from lambda_kernels.backends.autotune import Autotune
from lambda_kernels.backends.table import Table

needs_native = pytest.mark.skipif(bool(reasons("native")), reason="; ".join(reasons("native")))


class Composed(Native):
    """The native kernels, one after another."""

    name = "composed"

    def linear(self, *operands: object) -> torch.Tensor:
        return super().linear(*operands)  # type: ignore[arg-type]


def tuned() -> Autotune:
    table = Table(None)
    return Autotune([Composed(), Reference()], lambda device: table, lambda runs: {n: len(n) for n in runs})


@pytest.mark.parametrize(
    "backend",
    [Reference(), *(pytest.param(b, marks=needs_native) for b in (Native(), Composed(), tuned()))],
    ids=lambda backend: backend.name,
)
def test_rates_are_those_of_a_plain_loop(backend: Backend) -> None:
    rates.check(backend)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rates.check_sgd(backend, dtype=dtype)


def test_one_task_has_no_axis() -> None:
    task = rates.given(1)
    found = rates.run(Reference(), task, [True] * 8, rates.drawn([True] * 8))
    assert [p.shape for p in found.updated] == [p.shape for p in task.parameters]


def test_without_steps_the_query_is_classified_as_it_is() -> None:
    task = rates.given()
    found = Reference().inner_loop(task.x, task.labels, task.parameters, [True] * 8, rates.BLOCKS, 0, [0.1], task.query)
    want = rates.plain(task, [True] * 8, [0.1], steps=0)
    assert found.rows.shape == (1, rates.TASKS) and bool((found.rows == 0).all())
    assert found.logits is not None and want.logits is not None
    torch.testing.assert_close(found.logits, want.logits)


def test_a_wrong_number_of_rates_is_an_error_with_the_numbers() -> None:
    task = rates.given()
    with pytest.raises(ValueError, match="inner_loop: 7 rates for 3 steps of 8 parameters: .* or 3 x 8"):
        rates.run(Reference(), task, [True] * 8, [0.1] * 7)
    with pytest.raises(ValueError, match="sgd_: 3 rates for 2 parameters"):
        Reference().sgd_([torch.ones(1)] * 2, [torch.ones(1)] * 2, [0.1] * 3)
