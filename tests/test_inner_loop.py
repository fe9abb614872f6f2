"""The operators of the inner loop, on chains made by hand: every kind of layer, memory, threads, scratch memory."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from cases import assert_as_exact, layouts
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lambda_kernels.backends import reasons
from lambda_kernels.backends.native import Native, _constants
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec
from lambda_maml import adapt, models

pytestmark = [
    pytest.mark.skipif(bool(reasons("native")), reason="; ".join(reasons("native"))),
    pytest.mark.usefixtures("one_thread"),
]

LR = 0.1
MOST_KEPT = 256 * 2**20  # kMostKept of csrc/arena.h
NEAR: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}  # a few steps in float64 against the same in another order


class Layer(NamedTuple):
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pool: int = 2

    @property
    def spec(self) -> BlockSpec:
        return BlockSpec(ConvSpec(self.stride, self.padding, self.dilation, self.groups), 1e-5, self.pool)


class Network(NamedTuple):
    size: tuple[int, ...]  # of an image [C, H, W], or of its features
    layers: tuple[Layer, ...]
    images: int = 6
    ways: int = 3

    @property
    def specs(self) -> list[BlockSpec]:
        return [layer.spec for layer in self.layers]

    def from_layer(self, first: int) -> list[bool]:
        """The flags where everything from that layer on is updated; the linear layer is the last."""
        return [i >= 3 * first for i in range(3 * len(self.layers) + 2)]


class Given(NamedTuple):
    x: Tensor
    labels: Tensor
    query: Tensor
    parameters: list[Tensor]


def given(network: Network, dtype: torch.dtype = torch.float64, tasks: int = 1, own: bool = False) -> Given:
    """Images, labels and parameters, drawn in float64; parameters with a task axis where they are the tasks' own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    axis = (tasks,) if own else ()
    parameters, size = [], list(network.size)
    for outputs, kernel, stride, padding, dilation, groups, pool in network.layers:
        taps = size[0] // groups * kernel[0] * kernel[1]
        parameters.append(draw(*axis, outputs, size[0] // groups, *kernel) / taps**0.5)
        parameters += [1.0 + 0.2 * draw(*axis, outputs), 0.2 * draw(*axis, outputs)]
        size[0] = outputs
        for a in (0, 1):
            span = size[1 + a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1
            size[1 + a] = (span // stride[a] + 1) // pool
    features = torch.Size(size).numel()
    parameters += [draw(*axis, network.ways, features) / features**0.5, 0.2 * draw(*axis, network.ways)]
    x, query = draw(tasks, network.images, *network.size), draw(tasks, 4, *network.size)
    labels = torch.arange(network.images).remainder(network.ways).expand(tasks, network.images)
    return Given(x.to(dtype), labels, query.to(dtype), [p.to(dtype) for p in parameters])


def run(
    backend: Reference, network: Network, task: Given, updated: list[bool], steps: int
) -> tuple[Tensor, list[Tensor]]:
    found = backend.inner_loop(task.x, task.labels, task.parameters, updated, network.specs, steps, [LR])
    return found.rows, found.updated


def classified(
    backend: Reference, network: Network, task: Given, updated: list[bool], steps: int
) -> tuple[Tensor, Tensor]:
    x, labels, query, parameters = task
    found = backend.inner_loop(x, labels, parameters, updated, network.specs, steps, [LR], query)
    assert found.logits is not None
    return found.rows, found.logits


def near(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **NEAR, msg=lambda text: f"{name}: {text}")


def check(network: Network, task: Given, updated: list[bool], steps: int, name: str = "") -> None:
    want_rows, want = run(Reference(), network, task, updated, steps)
    before = [p.clone() for p in task.parameters]
    rows, have = run(Native(), network, task, updated, steps)
    near(f"{name} losses", rows, want_rows)
    assert len(have) == len(want) == sum(updated)
    for i, (mine, theirs) in enumerate(zip(have, want)):
        near(f"{name} parameter {i}", mine, theirs)
    assert all(torch.equal(p, old) for p, old in zip(task.parameters, before)), name


# The first updated layer has few pixels: all steps run on those where that takes fewer multiply-adds, which it never
# does for one step. Sizes are such that it does for two and more.
FEW: dict[str, tuple[Network, int]] = {
    "winograd": (Network((2, 9, 9), (Layer(32), Layer(64, pool=1)), images=2), 1),
    "winograd-then-more": (Network((2, 9, 9), (Layer(16), Layer(32), Layer(24, padding=(1, 2))), images=1), 1),
    "first": (Network((8, 4, 4), (Layer(32), Layer(8)), images=1), 0),
    "stride": (Network((16, 9, 8), (Layer(48, stride=(2, 2), pool=1), Layer(16, pool=1)), images=2), 0),
    "stride-pair": (Network((3, 16, 18), (Layer(16), Layer(32, stride=(3, 2), padding=(0, 1))), images=2), 1),
    "5x5": (Network((8, 4, 4), (Layer(32, (5, 5), padding=(2, 2)),), images=2), 0),
    "5x5-frozen-below": (Network((1, 8, 9), (Layer(16), Layer(32, (5, 5), padding=(2, 2))), images=2), 1),
    "1x3-dilation": (
        Network((32, 4, 5), (Layer(64, (1, 3), padding=(0, 2), dilation=(1, 2)), Layer(8, pool=1)), images=2), 0
    ),
    "2x2": (Network((32, 4, 4), (Layer(48, (2, 2), padding=(0, 0), pool=1),), images=3), 0),
    "1x1": (Network((100, 3, 3), (Layer(112, (1, 1), padding=(0, 0), pool=1),), images=2), 0),
}  # fmt: skip


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

    def error(found: list[Tensor]) -> float:
        return sum(float((t.double() - exact).square().sum()) for t, exact in zip(found, truth)) ** 0.5

    assert error(have) <= 2 * error(stock) + 1e-6


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


MIXED = {
    "images-winograd-library": Network(
        (3, 18, 19), (Layer(16), Layer(64), Layer(16, (3, 2), padding=(1, 0)), Layer(8, pool=1))
    ),
    "library-groups": Network((40, 7, 7), (Layer(12, groups=4, stride=(2, 1), pool=1), Layer(10, groups=2))),
    "winograd-first": Network((16, 9, 7), (Layer(64, pool=1), Layer(32), Layer(16, pool=1)), images=4),
    "few-pixels": FEW["winograd-then-more"][0],
    "linear": Network((33,), ()),
}  # fmt: skip


def in_other_memory(task: Given) -> Given:
    """The same values: weights of convolutions channels-last, the linear layer's transposed, images cut out."""

    def moved(p: Tensor) -> Tensor:
        kernels, matrix = p.dim() >= 4, p.dim() == 2
        return layouts(p)["channels-last"] if kernels else p.mT.contiguous().mT if matrix else p

    x = task.x if task.x.dim() == 3 else layouts(task.x)["sliced"]
    query = layouts(task.query)["strided"] if task.x.dim() == 3 else layouts(task.query)["channels-last"]
    return Given(x, task.labels, query, [moved(p) for p in task.parameters])


@pytest.mark.parametrize("name", MIXED)
def test_memory_layouts(name: str) -> None:
    network = MIXED[name]
    task = in_other_memory(given(network, tasks=2))
    assert any(not p.is_contiguous() for p in task.parameters)
    for first in range(len(network.layers) + 1):
        check(network, task, network.from_layer(first), 2, f"{name} {first}")


@pytest.mark.parametrize("name", MIXED)
def test_parameters_in_place_stay_in_their_memory(name: str) -> None:
    network = MIXED[name]
    for first in range(len(network.layers) + 1):
        updated = network.from_layer(first)
        task = given(network, tasks=2, own=True)
        want = [p.clone() for p in task.parameters]
        new = iter(run(Reference(), network, task, updated, 3)[1])
        want = [next(new) if flag else p for p, flag in zip(want, updated)]
        have = [layouts(p)["channels-last"] if p.dim() == 5 else p for p in task.parameters]
        have[-2] = have[-2].mT.contiguous().mT
        strides, places = ([method(p) for p in have] for method in (Tensor.stride, Tensor.data_ptr))
        flags, *constants = _constants(updated, network.specs)
        torch.ops.lambda_kernels.inner_loop(task.x, task.labels, have, flags, *constants, 3, LR)
        assert [p.stride() for p in have] == strides and [p.data_ptr() for p in have] == places
        for i, (mine, theirs) in enumerate(zip(have, want)):
            near(f"{name} {first} parameter {i}", mine, theirs)


def test_frozen_vectors_may_be_strided_and_updated_ones_not() -> None:
    network = MIXED["images-winograd-library"]
    task = given(network, tasks=2, own=True)
    wide = [torch.stack([p, p], -1)[..., 0] if p.dim() == 2 else p for p in task.parameters]
    frozen = network.from_layer(4)
    want = run(Native(), network, task, frozen, 2)[0]
    assert torch.equal(run(Native(), network, task._replace(parameters=wide), frozen, 2)[0], want)
    flags, *constants = _constants(network.from_layer(0), network.specs)
    with pytest.raises(RuntimeError, match="parameter 1 is updated in place and must be dense"):
        torch.ops.lambda_kernels.inner_loop(task.x, task.labels, wide, flags, *constants, 1, LR)


@pytest.mark.parametrize("name", MIXED)
def test_new_values_share_no_memory_with_what_was_given(name: str) -> None:
    network = MIXED[name]
    for tasks, own in ((1, False), (1, True), (3, True)):
        task = given(network, tasks=tasks, own=own)
        before = [p.clone() for p in task.parameters]
        for steps in (0, 2):
            rows, new = run(Native(), network, task, network.from_layer(0), steps)
            assert rows.shape == (steps + 1, tasks)
            for old, given_one, mine in zip(before, task.parameters, new):
                assert torch.equal(given_one, old) and mine.data_ptr() != given_one.data_ptr()
                assert mine.shape == given_one.shape and torch.equal(mine, old) == (steps == 0)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward(network: Network, parameters: list[Tensor], x: Tensor) -> Tensor:
    """Logits by the reference, of parameters that all have a task axis."""
    for i, block in enumerate(network.specs):
        weight, gamma, beta = parameters[3 * i : 3 * i + 3]
        x = Reference().block(x, weight, gamma, beta, block)[0]
    return Reference().linear(x.flatten(2), *parameters[-2:])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("name", MIXED)
def test_classified_is_adapted_and_a_forward_pass(name: str, tasks: int, threads: int) -> None:
    network = MIXED[name]
    for own, first in product((False, True), {0, len(network.layers) // 2, len(network.layers)}):
        task, updated = given(network, tasks=tasks, own=own), network.from_layer(first)
        before = [p.clone() for p in task.parameters]
        rows, new = run(Native(), network, task, updated, 3)
        moved = iter(new)
        final = [next(moved) if flag else p for p, flag in zip(task.parameters, updated)]
        ranks = [4, 1, 1] * len(network.layers) + [2, 1]
        want = forward(network, [p if p.dim() > n else p[None] for p, n in zip(final, ranks)], task.query)
        for one in (task, in_other_memory(task))[: 2 if threads == 1 else 1]:
            with on_threads(threads):
                found = classified(Native(), network, one, updated, 3)
            assert found[1].shape == (tasks, 4, network.ways)
            near(f"{name} {first} losses", found[0], rows)
            near(f"{name} {first} logits", found[1], want.expand_as(found[1]))
        assert all(torch.equal(p, old) for p, old in zip(task.parameters, before))


def test_query_images_that_do_not_fit_are_errors_that_name_the_sizes() -> None:
    network = MIXED["winograd-first"]
    task, updated = given(network, tasks=2), network.from_layer(0)
    for query in (task.query[:1], task.query[..., :5], task.query[:, :0], task.query.float(), task.query[0]):
        with pytest.raises(RuntimeError, match=r"classified: query images \[.*\[2, 4, 16, 9, 7\]"):
            classified(Native(), network, task._replace(query=query), updated, 1)


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
            torch.testing.assert_close(one, whole, **NEAR)
            torch.testing.assert_close(first, whole[0], **NEAR)


BIG = Network((3, 40, 41), (Layer(48), Layer(48), Layer(48)), images=8)


def results(network: Network, task: Given, steps: int = 3) -> list[Tensor]:
    """All that both operators give, from every first layer."""
    found = []
    for first in range(len(network.layers) + 1):
        updated = network.from_layer(first)
        rows, new = run(Native(), network, task, updated, steps)
        found += [rows, *new, *classified(Native(), network, task, updated, steps)]
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

    def allocations(steps: int) -> int:
        names = recorded(lambda: adapt(model, xs, ys, pattern=pattern, steps=steps, lr=0.01))
        assert "aten::convolution" not in names
        return names.count("[memory]")

    allocations(2)
    assert 0 < allocations(12) == allocations(2) <= 30


def test_float32_losses_and_logits_are_as_near_as_torchs() -> None:
    for name, network in MIXED.items():
        single = given(network, torch.float32)
        wide = Given(single.x.double(), single.labels, single.query.double(), [p.double() for p in single.parameters])
        updated = network.from_layer(0)

        def both(backend: Reference, task: Given) -> tuple[Tensor, Tensor]:
            return classified(backend, network, task, updated, 2)  # noqa: B023

        truth, have, stock = both(Reference(), wide), both(Native(), single), both(Reference(), single)
        for what, mine, theirs, exact in zip(("losses", "logits"), have, stock, truth):
            terms = 9 * max((layer.outputs for layer in network.layers), default=network.size[0])
            assert_as_exact(f"{name} {what}", mine.float(), theirs.float(), exact.double(), terms)
