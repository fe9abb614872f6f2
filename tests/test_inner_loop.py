"""The operators of the inner loop, on chains made by hand: every kind of layer, memory, threads, scratch memory."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from itertools import product

import pytest
import torch
from cases import STEPS, assert_as_exact
from chains import FEW, MIXED, Given, Layer, Network, given, in_other_memory, near, run
from machine import needs_native, on_threads
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lambda_kernels.agreement import errors
from lambda_kernels.backends.native import Native
from lambda_kernels.backends.reference import Reference
from lambda_maml import adapt, models

pytestmark = [
    needs_native,
    pytest.mark.usefixtures("one_thread"),
]

MOST_KEPT = 256 * 2**20  # kMostKept of csrc/arena.h


def check(network: Network, task: Given, updated: list[bool], steps: int, name: str = "") -> None:
    want_rows, want, _ = run(Reference(), network, task, updated, steps)
    before = [p.clone() for p in task.parameters]
    rows, have, _ = run(Native(), network, task, updated, steps)
    near(f"{name} losses", rows, want_rows)
    assert len(have) == len(want) == sum(updated)
    for i, (mine, theirs) in enumerate(zip(have, want)):
        near(f"{name} parameter {i}", mine, theirs)
    assert all(torch.equal(p, old) for p, old in zip(task.parameters, before)), name


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", FEW)
def test_steps_on_few_pixels_are_the_plain_steps(name: str, steps: int) -> None:
    network, first = FEW[name]
    task = given(network)
    every = network.from_layer(first)
    weight = [i == 3 * first for i in range(len(every))]
    head = every[:-2] + [False, False]
    for updated in (every, weight, head):
        check(network, task, updated, steps, name)


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("name", FEW)
def test_few_pixels_of_several_tasks(name: str, steps: int) -> None:
    network, first = FEW[name]
    for own in (False, True):
        check(network, given(network, tasks=3, own=own), network.from_layer(first), steps, name)


@pytest.mark.parametrize("name", FEW)
def test_few_pixels_in_float32_are_as_near_to_the_truth_as_the_plain_steps(name: str) -> None:
    network, first = FEW[name]
    updated = network.from_layer(first)
    single = given(network, torch.float32)
    wide = single._replace(x=single.x.double(), parameters=[p.double() for p in single.parameters])
    truth = run(Reference(), network, wide, updated, 5)[1]
    have, stock = (run(backend, network, single, updated, 5)[1] for backend in (Native(), Reference()))

    found = errors(have, stock, truth)
    assert found.agree and found.mine < 1e-5, found  # the steps are few


def recorded(call: Callable[[], object]) -> list[str]:
    """The names of what torch does in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    return [event.name for event in found.events() or ()]


@pytest.mark.parametrize("name", ["stride", "5x5", "1x3-dilation", "2x2", "1x1"])
def test_few_pixels_need_no_convolution_but_for_one_step(name: str) -> None:
    network, first = FEW[name]
    network = network._replace(layers=network.layers[: first + 1])
    task = given(network)

    def convolutions(steps: int) -> int:
        names = recorded(lambda: run(Native(), network, task, network.from_layer(first), steps))
        return names.count("aten::convolution")

    assert [convolutions(steps) for steps in (1, 2, 7)] == [1, 0, 0]


HEADS = {
    "45-features": Network((2, 6, 6), (Layer(5),)),
    "pool-1": Network((2, 3, 5), (Layer(7, pool=1),), images=5),
    "64-features": Network((2, 4, 4), (Layer(16),)),
    "winograd": Network((8, 6, 4), (Layer(9),), images=3),
    "7": Network((7,), (), images=5),
    "48": Network((48,), ()),
    "33": Network((33,), (), images=1),
}


@pytest.mark.parametrize("ways", range(1, 18))
def test_linear_layers_of_any_size(ways: int) -> None:
    for name, network in HEADS.items():
        network = network._replace(ways=ways)
        task = given(network, tasks=2)
        blocks = [False] * (3 * len(network.layers))
        flags = [network.from_layer(0), blocks + [True, True], blocks + [True, False], blocks + [False, True]]
        if blocks:
            flags += [[True] * len(blocks) + [False, False], [False, True, False, False, True]]
        for updated in flags:
            check(network, task, updated, 3, f"{name} {ways} {updated}")


def test_labels_that_do_not_fit_are_errors() -> None:
    network = HEADS["64-features"]
    task = given(network)
    for label in (-1, 3):
        labels = task.labels.clone()
        labels[0, 2] = label
        with pytest.raises(RuntimeError, match=f"label {label} is not one of 0 to 2"):
            run(Native(), network, task._replace(labels=labels), network.from_layer(0), 1)


@pytest.mark.parametrize("name", MIXED)
def test_memory_layouts(name: str) -> None:
    network = MIXED[name]
    task = in_other_memory(given(network, tasks=2))
    assert any(not p.is_contiguous() for p in task.parameters)
    for first in range(len(network.layers) + 1):
        check(network, task, network.from_layer(first), 2, f"{name} {first}")


def test_vectors_may_be_strided() -> None:
    network = MIXED["images-winograd-library"]
    task = given(network, tasks=2, own=True)
    wide = [torch.stack([p, p], -1)[..., 0] if p.dim() == 2 else p for p in task.parameters]
    for first in range(5):
        want = run(Native(), network, task, network.from_layer(first), 2)
        have = run(Native(), network, task._replace(parameters=wide), network.from_layer(first), 2)
        assert torch.equal(have.rows, want.rows) and equal(have.updated, want.updated)


@pytest.mark.parametrize("name", MIXED)
def test_new_values_share_no_memory_with_what_was_given(name: str) -> None:
    network = MIXED[name]
    for tasks, own in ((1, False), (1, True), (3, True)):
        task = given(network, tasks=tasks, own=own)
        before = [p.clone() for p in task.parameters]
        for steps in (0, 2):
            rows, new, _ = run(Native(), network, task, network.from_layer(0), steps)
            assert rows.shape == (steps + 1, tasks)
            for old, given_one, mine in zip(before, task.parameters, new):
                assert torch.equal(given_one, old) and mine.data_ptr() != given_one.data_ptr()
                assert mine.shape == given_one.shape and torch.equal(mine, old) == (steps == 0)


def forward(network: Network, parameters: list[Tensor], x: Tensor) -> Tensor:
    """Logits by the reference, of parameters that all have a task axis."""
    for i, block in enumerate(network.specs):
        weight, gamma, beta = parameters[3 * i : 3 * i + 3]
        x = Reference().block(x, weight, gamma, beta, block)[0]
    return Reference().linear(x.flatten(2), *parameters[-2:])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("name", MIXED)
def test_logits_are_a_forward_pass_by_the_new_values(name: str, tasks: int, threads: int) -> None:
    network = MIXED[name]
    for own, first in product((False, True), {0, len(network.layers) // 2, len(network.layers)}):
        task, updated = given(network, tasks=tasks, own=own), network.from_layer(first)
        before = [p.clone() for p in task.parameters]
        rows, new, none = run(Native(), network, task, updated, 3)
        assert none is None
        moved = iter(new)
        final = [next(moved) if flag else p for p, flag in zip(task.parameters, updated)]
        ranks = [4, 1, 1] * len(network.layers) + [2, 1]
        want = forward(network, [p if p.dim() > n else p[None] for p, n in zip(final, ranks)], task.query)
        for memory in (task, in_other_memory(task))[: 2 if threads == 1 else 1]:
            with on_threads(threads):
                found = run(Native(), network, memory, updated, 3, query=True)
            assert found.logits is not None and found.logits.shape == (tasks, 4, network.ways)
            near(f"{name} {first} losses", found.rows, rows)
            near(f"{name} {first} logits", found.logits, want.expand_as(found.logits))
            for mine, theirs in zip(found.updated, new):
                near(f"{name} {first} new value", mine, theirs)
        assert all(torch.equal(p, old) for p, old in zip(task.parameters, before))


def test_query_images_that_do_not_fit_are_errors_that_name_the_sizes() -> None:
    network = MIXED["winograd-first"]
    task, updated = given(network, tasks=2), network.from_layer(0)
    for query in (task.query[:1], task.query[..., :5], task.query[:, :0], task.query.float(), task.query[0]):
        with pytest.raises(RuntimeError, match=r"query images must be \[2, at least 1, 16, 9, 7\]"):
            run(Native(), network, task._replace(query=query), updated, 1, query=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_a_task_by_rounding_alone(threads: int) -> None:
    for network in MIXED.values():
        task = given(network, tasks=3)
        want = run(Native(), network, task, network.from_layer(0), 3)
        with on_threads(threads):
            together = run(Native(), network, task, network.from_layer(0), 3)
            one_task = task._replace(x=task.x[:1], labels=task.labels[:1])
            alone = run(Native(), network, one_task, network.from_layer(0), 3)
        for whole, one, first in zip(want[1], together[1], alone[1]):
            torch.testing.assert_close(one, whole, **STEPS)
            torch.testing.assert_close(first, whole[0], **STEPS)


BIG = Network((3, 40, 41), (Layer(48), Layer(48), Layer(48)), images=8)


def results(network: Network, task: Given, steps: int = 3) -> list[Tensor]:
    """All that the operator gives, with and without a query, from every first layer."""
    found = []
    for first in range(len(network.layers) + 1):
        updated = network.from_layer(first)
        rows, new, _ = run(Native(), network, task, updated, steps)
        again = run(Native(), network, task, updated, steps, query=True)
        assert again.logits is not None
        found += [rows, *new, again.rows, *again.updated, again.logits]
    return found


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_what_ran_before_changes_nothing(dtype: torch.dtype) -> None:
    networks = {**MIXED, **{name: network for name, (network, _) in FEW.items()}}
    big = given(BIG, dtype)
    first = results(BIG, big, 1)
    tasks = {name: given(network, dtype) for name, network in networks.items()}
    want = {name: results(network, tasks[name]) for name, network in networks.items()}
    assert equal(results(BIG, big, 1), first)
    for name, network in networks.items():
        assert equal(results(network, tasks[name]), want[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_nan_of_an_earlier_task_stays_there(dtype: torch.dtype) -> None:
    """Scratch memory is not initialised: whoever read what it did not write would read these."""
    networks = {**MIXED, **{name: network for name, (network, _) in FEW.items()}}
    for name, network in networks.items():
        task = given(network, dtype)
        want = results(network, task)
        bad = task._replace(x=torch.full_like(task.x, torch.nan), query=torch.full_like(task.query, torch.nan))
        assert results(network, bad)[0].isnan().all()
        assert equal(results(network, task), want), name


def test_python_threads_get_what_they_get_alone() -> None:
    networks = [*MIXED.values(), *(FEW[name][0] for name in ("winograd", "stride", "5x5"))]
    assert len(networks) == 8
    tasks = [given(network, torch.float32, tasks=1 + i % 2) for i, network in enumerate(networks)]
    alone = [results(network, task) for network, task in zip(networks, tasks)]
    begin = threading.Barrier(len(networks))
    differ: list[str] = []

    def work(i: int) -> None:
        try:
            torch.set_num_threads(1)
            begin.wait()
            for turn in range(4):
                if not equal(results(networks[i], tasks[i]), alone[i]):
                    differ.append(f"network {i}, turn {turn}")
        except BaseException as error:
            differ.append(f"network {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(networks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differ == []
    assert kept_bytes() <= MOST_KEPT


def kept_bytes() -> int:
    return importlib.import_module("lambda_kernels._C").kept_bytes()


def test_scratch_memory_does_not_grow() -> None:
    results(BIG, given(BIG, torch.float32), 1)
    networks = [*MIXED.values(), FEW["5x5"][0]]
    tasks = [given(network, tasks=2) for network in networks]
    for network, task in zip(networks, tasks):
        results(network, task)
    before = kept_bytes()
    assert 0 < before <= MOST_KEPT
    for turn in range(50):
        network, task = networks[turn % len(networks)], tasks[turn % len(networks)]
        run(Native(), network, task, network.from_layer(0), 2)
    assert kept_bytes() == before


def test_scratch_memory_of_a_giant_is_given_back() -> None:
    """288 MB of padded images, more than may wait."""
    x = torch.zeros(()).expand(1, 1, 1, 9000, 8000)
    weight, ones = torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1)
    y, *_ = torch.ops.lambda_kernels.frozen_block(x, weight, ones, ones, [2, 2, 0, 0, 1, 1, 2], 1e-5)
    assert y.shape[-2:] == (2250, 2000) and bool((y == 1).all())
    assert kept_bytes() <= MOST_KEPT
    results(HEADS["64-features"], given(HEADS["64-features"]))
    assert 0 < kept_bytes() <= MOST_KEPT


@pytest.mark.parametrize("pattern", ["11111", "00011", "00001", "01010"])
def test_more_steps_need_no_more_allocations(pattern: str) -> None:
    model = models.conv4(3, 2, 32, 21)
    xs, ys = torch.randn(6, 2, 21, 21), torch.arange(6) % 3

    adapt(model, xs, ys, pattern=pattern, steps=1, lr=0.01)  # a program's first call is checked against the network

    def allocations(steps: int) -> int:
        names = recorded(lambda: adapt(model, xs, ys, pattern=pattern, steps=steps, lr=0.01))
        assert "aten::convolution" not in names
        return names.count("[memory]")

    for steps in (2, 12):  # the first call of a kind checks more
        allocations(steps)
    assert 0 < allocations(12) == allocations(2) <= 30


def test_float32_losses_and_logits_are_as_near_as_torchs() -> None:
    for name, network in MIXED.items():
        single = given(network, torch.float32)
        wide = Given(single.x.double(), single.labels, single.query.double(), [p.double() for p in single.parameters])
        updated = network.from_layer(0)

        def both(backend: Reference, task: Given) -> tuple[Tensor, Tensor]:
            rows, _, logits = run(backend, network, task, updated, 2, query=True)  # noqa: B023
            assert logits is not None
            return rows, logits

        truth, have, stock = both(Reference(), wide), both(Native(), single), both(Reference(), single)
        for what, mine, theirs, exact in zip(("losses", "logits"), have, stock, truth):
            terms = 9 * max((layer.outputs for layer in network.layers), default=network.size[0])
            assert_as_exact(f"{name} {what}", mine.float(), theirs.float(), exact.double(), terms)
