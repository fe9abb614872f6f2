"""The inner loop with a rate per parameter and step is a plain loop with these rates: every backend of the CPU, and
every kind of layer by the native one. tests/test_cuda.py and test_triton.py have the other backends."""

from __future__ import annotations

import pytest
import torch
from chains import (
    FEW,
    LR,
    MIXED,
    SOME_OWN,
    TWO_BLOCKS,
    Network,
    check_rates,
    check_sgd,
    drawn_rates,
    flat,
    given,
    near,
    plain,
    run,
    same,
)
from machine import needs_native

from lambda_kernels.agreement import distance
from lambda_kernels.backends import Backend, Native, Reference
from lambda_kernels.backends.autotune import Autotune
from lambda_kernels.backends.table import Table

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3


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
def test_every_backend_takes_rates_as_a_plain_loop(backend: Backend) -> None:
    check_rates(backend)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check_sgd(backend, dtype=dtype)


def test_one_task_has_no_axis() -> None:
    task, updated = given(TWO_BLOCKS, own=SOME_OWN), [True] * 8
    found = run(Reference(), TWO_BLOCKS, task, updated, STEPS, flat(drawn_rates(updated)))
    assert [p.shape for p in found.updated] == [p.shape for p in task.parameters]


def test_without_steps_the_query_is_classified_as_it_is() -> None:
    task, updated = given(TWO_BLOCKS, tasks=2, own=SOME_OWN), [True] * 8
    found = run(Reference(), TWO_BLOCKS, task, updated, 0, [0.1], query=True)
    want = plain(TWO_BLOCKS, task, updated, torch.empty(0, 8))
    assert found.rows.shape == (1, 2) and bool((found.rows == 0).all())
    assert found.logits is not None and want.logits is not None
    torch.testing.assert_close(found.logits, want.logits)


def test_a_wrong_number_of_rates_is_an_error_with_the_numbers() -> None:
    task = given(TWO_BLOCKS, tasks=2, own=SOME_OWN)
    with pytest.raises(ValueError, match="inner_loop: 7 rates for 3 steps of 8 parameters: .* or 3 x 8"):
        run(Reference(), TWO_BLOCKS, task, [True] * 8, STEPS, [0.1] * 7)
    with pytest.raises(ValueError, match="sgd_: 3 rates for 2 parameters"):
        Reference().sgd_([torch.ones(1)] * 2, [torch.ones(1)] * 2, [0.1] * 3)


NETWORKS = {**MIXED, **{f"few-{name}": FEW[name][0] for name in ("winograd", "first", "5x5", "1x3-dilation")}}


def firsts(network: Network) -> range:
    """The layers from which everything can be updated."""
    return range(len(network.layers) + 1)


@needs_native
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_layer_takes_rates_as_a_plain_loop(name: str, tasks: int) -> None:
    network = NETWORKS[name]
    task = given(network, tasks=tasks, own=tasks > 1)
    for first in firsts(network):
        updated = network.from_layer(first)
        rates = drawn_rates(updated)
        have = run(Native(), network, task, updated, STEPS, flat(rates), query=True)
        assert have.logits is not None
        want = plain(network, task, updated, rates)
        assert want.logits is not None
        near(f"{name} {first} losses", have.rows, want.rows)
        near(f"{name} {first} logits", have.logits, want.logits)
        for i, (mine, theirs) in enumerate(zip(have.updated, want.updated, strict=True)):
            near(f"{name} {first} value {i}", mine, theirs if tasks > 1 else theirs[0])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_rates_are_one_rate(name: str, dtype: torch.dtype) -> None:
    network = NETWORKS[name]
    task = given(network, dtype, tasks=2)
    for first in firsts(network):
        updated = network.from_layer(first)
        want = run(Native(), network, task, updated, STEPS, query=True)
        assert same(run(Native(), network, task, updated, STEPS, [LR] * (STEPS * sum(updated)), query=True), want)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_parameter_whose_rates_are_all_0_is_a_frozen_one(name: str, dtype: torch.dtype) -> None:
    """Its value and, bit for bit, everything else."""
    network = NETWORKS[name]
    task = given(network, dtype)
    everything = network.from_layer(0)
    count = len(everything)
    for frozen in (range(min(3, count)), range(1), range(1, 2), range(count - 2, count), range(count)):
        updated = [i not in frozen for i in range(count)]
        rates = drawn_rates(everything)
        rates[:, list(frozen)] = 0.0
        have = run(Native(), network, task, everything, STEPS, flat(rates), query=True)
        for i in frozen:
            assert torch.equal(have.updated[i], task.parameters[i])
            assert have.updated[i].data_ptr() != task.parameters[i].data_ptr()
        rest = have._replace(updated=[value for value, flag in zip(have.updated, updated) if flag])
        assert same(rest, run(Native(), network, task, updated, STEPS, flat(rates[:, updated]), query=True))


@needs_native
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_rate_0_leaves_even_infinite_gradients(name: str) -> None:
    network = NETWORKS[name]
    task = given(network)
    bad = task._replace(x=torch.full_like(task.x, torch.nan))
    updated = network.from_layer(0)
    rates = torch.zeros(STEPS, sum(updated), dtype=torch.float64)
    rates[1, 0] = LR  # of one parameter, in one step
    found = run(Native(), network, bad, updated, STEPS, flat(rates))
    assert found.rows.isnan().all() and found.updated[0].isnan().any()
    assert all(torch.equal(mine, old) for mine, old in zip(found.updated[1:], task.parameters[1:], strict=True))


@needs_native
@pytest.mark.parametrize("name", NETWORKS)
def test_many_tasks_are_one_after_another(name: str) -> None:
    network = NETWORKS[name]
    task = given(network, torch.float32, tasks=3)
    for first in firsts(network):
        updated = network.from_layer(first)
        rates = flat(drawn_rates(updated))
        together = run(Native(), network, task, updated, STEPS, rates, query=True)
        for at in range(3):
            alone = task._replace(x=task.x[at : at + 1], labels=task.labels[at : at + 1], query=task.query[at : at + 1])
            found = run(Native(), network, alone, updated, STEPS, rates, query=True)
            assert found.logits is not None and together.logits is not None
            assert torch.equal(found.logits[0], together.logits[at])
            assert torch.equal(found.rows[:, 0], together.rows[:, at])
            assert all(torch.equal(a, b[at]) for a, b in zip(found.updated, together.updated, strict=True))


@needs_native
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_near_to_the_truth_as_a_plain_loop(name: str) -> None:
    network = NETWORKS[name]
    single = given(network, torch.float32)
    updated = network.from_layer(0)
    rates = drawn_rates(updated)

    truth = plain(network, single.to(torch.float64), updated, rates).updated
    stock = plain(network, single, updated, rates).updated
    have = [t[None] for t in run(Native(), network, single, updated, STEPS, flat(rates)).updated]
    assert distance(have, truth) <= 2 * distance(stock, truth) + 1e-6


@needs_native
@pytest.mark.parametrize("name", NETWORKS)
def test_a_prepared_call_is_the_inner_loop(name: str) -> None:
    network = NETWORKS[name]
    task = given(network, torch.float32)
    updated = network.from_layer(0)
    call = Native().prepared(task.parameters, updated, network.specs)
    for rates in ([LR], flat(drawn_rates(updated))):
        found = call(task.x[0], task.labels[0], STEPS, rates)
        want = run(Native(), network, task, updated, STEPS, rates).updated
        assert found is not None and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    for label in (-1, network.ways):
        assert call(task.x[0], torch.full_like(task.labels[0], label), STEPS, [LR]) is None
    assert call(task.x[0], task.labels[0], STEPS, [LR, LR]) is None
    assert call(task.x[0] * torch.inf, task.labels[0], STEPS, [LR]) is None


@needs_native
def test_a_prepared_call_takes_labels_of_one_class() -> None:
    network = MIXED["winograd-first"]
    task = given(network)
    updated = network.from_layer(1)
    one_class = task._replace(labels=torch.ones_like(task.labels))
    found = Native().prepared(task.parameters, updated, network.specs)(task.x[0], one_class.labels[0], STEPS, [LR])
    rates = torch.full((STEPS, sum(updated)), LR, dtype=torch.float64)
    want = plain(network, one_class, updated, rates).updated
    assert found is not None
    for i, (mine, theirs) in enumerate(zip(found, want, strict=True)):
        near(f"value {i}", mine, theirs[0])
