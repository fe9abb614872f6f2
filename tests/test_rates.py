"""An inner loop with a rate per parameter and step is a plain loop with these rates, on every kind of layer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from chains import FEW, LR, MIXED, Given, Network, given, near, run
from torch import Tensor

from lambda_kernels.backends import reasons
from lambda_kernels.backends.base import InnerLoop
from lambda_kernels.backends.native import Native

pytestmark = [
    pytest.mark.skipif(bool(reasons("native")), reason="; ".join(reasons("native"))),
    pytest.mark.usefixtures("one_thread"),
]

STEPS = 3
NETWORKS = {**MIXED, **{f"few-{name}": FEW[name][0] for name in ("winograd", "first", "5x5", "1x3-dilation")}}


def firsts(network: Network) -> range:
    """The layers from which everything can be updated."""
    return range(len(network.layers) + 1)


def drawn(updated: Sequence[bool], steps: int = STEPS) -> Tensor:
    """Rates [steps, updated parameters]: no two are equal, and some are 0."""
    columns = sum(updated)
    generator = torch.Generator().manual_seed(2)
    rates = 0.05 + 0.2 * torch.rand(steps, columns, generator=generator, dtype=torch.float64)
    rates[torch.rand(steps, columns, generator=generator) < 0.2] = 0.0
    return rates


def flat(rates: Tensor) -> list[float]:
    return [float(rate) for rate in rates.flatten()]


def forward(network: Network, parameters: list[Tensor], x: Tensor) -> Tensor:
    """Logits of one task's x [N, ...], as anyone writes them."""
    for i, layer in enumerate(network.layers):
        weight, gamma, beta = parameters[3 * i : 3 * i + 3]
        z = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        x = F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.0, 1e-5))
        x = F.max_pool2d(x, layer.pool) if layer.pool > 1 else x
    return F.linear(x.flatten(1), *parameters[-2:])


def plain(network: Network, task: Given, at: int, updated: list[bool], rates: Tensor) -> InnerLoop:
    """The loop of one of the tasks by autograd."""
    ranks = [4, 1, 1] * len(network.layers) + [2, 1]
    own = [p[at] if p.dim() > n else p for p, n in zip(task.parameters, ranks)]
    moved = [i for i, flag in enumerate(updated) if flag]
    losses = []
    for row in rates:
        leaves = [own[i].detach().requires_grad_() for i in moved]
        for i, leaf in zip(moved, leaves):
            own[i] = leaf
        loss = F.cross_entropy(forward(network, own, task.x[at]), task.labels[at])
        losses.append(loss.detach())
        for i, gradient, rate in zip(moved, torch.autograd.grad(loss, leaves), row):
            own[i] = own[i].detach() - rate * gradient
    logits = forward(network, own, task.query[at])
    return InnerLoop(torch.stack(losses), [own[i].detach() for i in moved], logits.detach())


def same(one: InnerLoop, other: InnerLoop) -> bool:
    pairs = zip([one.rows, *one.updated], [other.rows, *other.updated], strict=True)
    logits = one.logits is other.logits is None or (
        one.logits is not None and other.logits is not None and torch.equal(one.logits, other.logits)
    )
    return logits and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_rates_are_those_of_a_plain_loop(name: str, tasks: int) -> None:
    network = NETWORKS[name]
    task = given(network, tasks=tasks, own=tasks > 1)
    for first in firsts(network):
        updated = network.from_layer(first)
        rates = drawn(updated)
        have = run(Native(), network, task, updated, STEPS, flat(rates), query=True)
        assert have.logits is not None
        for at in range(tasks):
            want = plain(network, task, at, updated, rates)
            assert want.logits is not None
            near(f"{name} {first} losses", have.rows[:-1, at], want.rows)
            near(f"{name} {first} logits", have.logits[at], want.logits)
            for i, (mine, theirs) in enumerate(zip(have.updated, want.updated, strict=True)):
                near(f"{name} {first} value {i}", mine[at] if tasks > 1 else mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_rates_are_one_rate(name: str, dtype: torch.dtype) -> None:
    network = NETWORKS[name]
    task = given(network, dtype, tasks=2)
    for first in firsts(network):
        updated = network.from_layer(first)
        want = run(Native(), network, task, updated, STEPS, query=True)
        assert same(run(Native(), network, task, updated, STEPS, [LR] * (STEPS * sum(updated)), query=True), want)


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
        rates = drawn(everything)
        rates[:, list(frozen)] = 0.0
        have = run(Native(), network, task, everything, STEPS, flat(rates), query=True)
        for i in frozen:
            assert torch.equal(have.updated[i], task.parameters[i])
            assert have.updated[i].data_ptr() != task.parameters[i].data_ptr()
        rest = have._replace(updated=[value for value, flag in zip(have.updated, updated) if flag])
        assert same(rest, run(Native(), network, task, updated, STEPS, flat(rates[:, updated]), query=True))


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


@pytest.mark.parametrize("name", NETWORKS)
def test_many_tasks_are_one_after_another(name: str) -> None:
    network = NETWORKS[name]
    task = given(network, torch.float32, tasks=3)
    for first in firsts(network):
        updated = network.from_layer(first)
        rates = flat(drawn(updated))
        together = run(Native(), network, task, updated, STEPS, rates, query=True)
        for at in range(3):
            alone = task._replace(x=task.x[at : at + 1], labels=task.labels[at : at + 1], query=task.query[at : at + 1])
            found = run(Native(), network, alone, updated, STEPS, rates, query=True)
            assert found.logits is not None and together.logits is not None
            assert torch.equal(found.logits[0], together.logits[at])
            assert torch.equal(found.rows[:, 0], together.rows[:, at])
            assert all(torch.equal(a, b[at]) for a, b in zip(found.updated, together.updated, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_as_near_to_the_truth_as_a_plain_loop(name: str) -> None:
    network = NETWORKS[name]
    single = given(network, torch.float32)
    wide = Given(single.x.double(), single.labels, single.query.double(), [p.double() for p in single.parameters])
    updated = network.from_layer(0)
    rates = drawn(updated)

    def error(found: list[Tensor]) -> float:
        return sum(float((t.double() - exact).square().sum()) for t, exact in zip(found, truth, strict=True)) ** 0.5

    truth = plain(network, wide, 0, updated, rates).updated
    have = run(Native(), network, single, updated, STEPS, flat(rates)).updated
    assert error(have) <= 2 * error(plain(network, single, 0, updated, rates).updated) + 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_a_prepared_call_is_the_inner_loop(name: str) -> None:
    network = NETWORKS[name]
    task = given(network, torch.float32)
    updated = network.from_layer(0)
    call = Native().prepared(task.parameters, updated, network.specs)
    for rates in ([LR], flat(drawn(updated))):
        found = call(task.x[0], task.labels[0], STEPS, rates)
        want = run(Native(), network, task, updated, STEPS, rates).updated
        assert found is not None and all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    for label in (-1, network.ways):
        assert call(task.x[0], torch.full_like(task.labels[0], label), STEPS, [LR]) is None
    assert call(task.x[0], task.labels[0], STEPS, [LR, LR]) is None
    assert call(task.x[0] * torch.inf, task.labels[0], STEPS, [LR]) is None


def test_a_prepared_call_takes_labels_of_one_class() -> None:
    network = MIXED["winograd-first"]
    task = given(network)
    updated = network.from_layer(1)
    one_class = task._replace(labels=torch.ones_like(task.labels))
    found = Native().prepared(task.parameters, updated, network.specs)(task.x[0], one_class.labels[0], STEPS, [LR])
    rates = torch.full((STEPS, sum(updated)), LR, dtype=torch.float64)
    want = plain(network, one_class, 0, updated, rates).updated
    assert found is not None
    for i, (mine, theirs) in enumerate(zip(found, want, strict=True)):
        near(f"value {i}", mine, theirs)
