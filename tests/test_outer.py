"""The outer gradient through a chain's steps, without autograd, is that of a plain float64 loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from chains import MIXED, SOME_OWN, TWO_BLOCKS, Given, Layer, Network, drawn_rates, forward, given
from machine import fresh, needs_native, on_threads
from torch import Tensor

from lambda_kernels.backends import Backend, Native, Reference
from lambda_kernels.outer import adapted, classified

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = [Reference(), pytest.param(Native(), marks=needs_native)]
SMALL = Network((2, 7, 6), (Layer(3), Layer(4, stride=(1, 2), pool=1, eps=1e-3)), images=4, ways=3)
LINEAR = Network((5,), (), images=4, ways=3)
# Seven images are taken in parts of at most 2^16 values of z: 4 + 3 of the second block, one by one of the first.
PARTS = {
    "winograd": Network((3, 43, 39), (Layer(32), Layer(32), Layer(32)), images=7),
    "library": Network((3, 43, 39), (Layer(32), Layer(32, kernel=(5, 4), stride=(1, 2)), Layer(8)), images=7),
}


class Leaves(NamedTuple):
    """What a gradient may be asked of."""

    x: Tensor
    rates: Tensor
    parameters: list[Tensor]

    @classmethod
    def of(cls, task: Given, rates: Tensor) -> Leaves:
        return cls(
            task.x.clone().requires_grad_(),
            rates.clone().requires_grad_(),
            [p.clone().requires_grad_() for p in task.parameters],
        )

    def __call__(self) -> list[Tensor]:
        return [self.x, self.rates, *self.parameters]


def each_task(network: Network, parameters: Sequence[Tensor], task: int) -> list[Tensor]:
    ranks = [4, 1, 1] * len(network.layers) + [2, 1]
    return [p[task] if p.dim() > n else p for p, n in zip(parameters, ranks)]


def plain(
    network: Network, leaves: Leaves, labels: Tensor, updated: Sequence[bool], second_order: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loop as anyone writes it, one task after another: losses [steps, T], new values [T, ...]."""
    places = [i for i, flag in enumerate(updated) if flag]
    all_losses, values = [], []
    for task, (x, y) in enumerate(zip(leaves.x, labels)):
        own, losses = each_task(network, leaves.parameters, task), []
        for row in leaves.rates:
            now = [p.view_as(p) if second_order else p.detach() for p in own]
            for i in places:
                now[i] = now[i] if second_order else now[i].requires_grad_()
            loss = F.cross_entropy(forward(network, now, x if second_order else x.detach()), y)
            slopes = torch.autograd.grad(loss, [now[i] for i in places], create_graph=second_order)
            for i, slope, rate in zip(places, slopes, row):
                own[i] = own[i] - rate * slope
            losses.append(loss.detach())
        all_losses.append(torch.stack(losses))
        values.append([own[i] for i in places])
    return torch.stack(all_losses, 1), [torch.stack(v) for v in zip(*values)]


def outer_loss(values: Sequence[Tensor]) -> Tensor:
    """A smooth function of the new values that no two of them enter alike."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([(torch.randn(v.shape, generator=generator).to(v) * v.sin()).sum() for v in values]).sum()


def gradients(loss: Tensor, leaves: Leaves, create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves(), allow_unused=True, retain_graph=True, create_graph=create_graph)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves(), found)]


def far(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The worst difference, relative to the greatest value of each tensor, or to 1 where that is less."""
    pairs = [(g.detach(), w.detach()) for g, w in zip(got, want, strict=True)]
    return max(float((g - w).abs().max()) / max(1.0, float(w.abs().max())) for g, w in pairs)


def check(
    backend: Backend, network: Network, updated: Sequence[bool], rates: Tensor, second_order: bool, tasks: int = 2,
    own: bool | Sequence[bool] = False,
) -> None:  # fmt: skip
    task = given(network, tasks=tasks, own=own)
    leaves, twins = Leaves.of(task, rates), Leaves.of(task, rates)
    losses, values = adapted(
        backend, leaves.x, task.labels, leaves.parameters, updated, network.specs, leaves.rates,
        second_order=second_order,
    )  # fmt: skip
    want_losses, want = plain(network, twins, task.labels, updated, second_order)
    assert not losses.requires_grad
    assert far([losses, *values], [want_losses, *want]) < 1e-10
    got, true = gradients(outer_loss(values), leaves), gradients(outer_loss(want), twins)
    assert far(got, true) < 1e-10


def patterns(layers: int) -> list[str]:
    return [f"{bits:0{layers}b}" for bits in range(1, 2**layers)]


def flags(pattern: str, norm: str) -> list[bool]:
    """Of a chain's parameters: a layer's bit for its weight, and for its norm where norm is "follow"."""
    *blocks, head = (bit == "1" for bit in pattern)
    return [flag for bit in blocks for flag in (bit, *[bit and norm == "follow"] * 2)] + [head, head]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_every_pattern_of_conv4_has_the_gradient_of_a_plain_loop(
    backend: Backend, norm: str, second_order: bool
) -> None:
    network = Network((1, 9, 8), (Layer(3), Layer(2, pool=1), Layer(3, pool=1), Layer(2)), images=3)
    for pattern in patterns(5):
        updated = flags(pattern, norm)
        check(backend, network, updated, torch.full((2, sum(updated)), 0.1).double(), second_order)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("network", MIXED.values(), ids=MIXED)
def test_every_kind_of_layer_has_the_gradient_of_a_plain_loop(
    backend: Backend, second_order: bool, network: Network
) -> None:
    for first in range(0, len(network.layers) + 1, 2):
        updated = network.from_layer(first)
        check(backend, network, updated, drawn_rates(updated, 2), second_order, tasks=1 + first)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("bits", ["11111111", "00011100", "10010010", "01000001", "00000011"])
def test_a_rate_per_step_and_parameter_and_parameters_of_each_tasks_own(backend: Backend, bits: str) -> None:
    updated = [bit == "1" for bit in bits]
    for own in (False, True, SOME_OWN):
        check(backend, TWO_BLOCKS, updated, drawn_rates(updated), second_order=True, own=own)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("network", [SMALL, LINEAR], ids=["blocks", "linear"])
def test_gradcheck_and_gradgradcheck(backend: Backend, network: Network) -> None:
    task = given(network, tasks=2)
    updated = [i not in (1, 3) for i in range(len(task.parameters))]
    leaves = Leaves.of(task, torch.full((2, sum(updated)), 0.1).double())

    def steps(x: Tensor, rates: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        found = adapted(
            backend, x, task.labels, parameters, updated, network.specs, rates, second_order=True
        )  # fmt: skip
        return tuple(found[1])

    assert torch.autograd.gradcheck(steps, tuple(leaves()), fast_mode=True)
    # against differences of gradients, which are rounded themselves
    assert torch.autograd.gradgradcheck(steps, tuple(leaves()), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_a_gradient_in_the_graph_is_the_same_and_so_are_those_of_a_map(backend: Backend, second_order: bool) -> None:
    task, updated = given(SMALL, tasks=2), SMALL.from_layer(1)
    leaves = Leaves.of(task, drawn_rates(updated, 2))
    _, values = adapted(
        backend, leaves.x, task.labels, leaves.parameters, updated, SMALL.specs, leaves.rates,
        second_order=second_order,
    )  # fmt: skip
    want = gradients(outer_loss(values), leaves)
    assert far(gradients(outer_loss(values), leaves, create_graph=True), want) < 1e-12
    rows = torch.stack([torch.ones_like(values[0]), torch.full_like(values[0], -0.5)])
    asked = [t for t, flag in zip(leaves.parameters, updated) if flag]

    def one(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(values[0], asked, g, retain_graph=True, allow_unused=True, materialize_grads=True)

    assert far([g[1] for g in torch.func.vmap(one)(rows)], one(rows[1])) < 1e-12
    expected = one(rows[1])
    batched = torch.autograd.grad(values[0], asked, rows, is_grads_batched=True)
    assert far([g[1] for g in batched], expected) < 1e-12


def test_a_value_changed_in_place_before_the_backward_pass_is_refused() -> None:
    task, updated = given(SMALL, tasks=1), SMALL.from_layer(0)
    leaves = Leaves.of(task, torch.full((2, sum(updated)), 0.1).double())
    _, values = adapted(
        Reference(), leaves.x, task.labels, leaves.parameters, updated, SMALL.specs, leaves.rates, second_order=True
    )
    with torch.no_grad():
        leaves.parameters[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outer_loss(values).backward()


def plain_logits(network: Network, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    return torch.stack([forward(network, each_task(network, parameters, t), own) for t, own in enumerate(x)])


@needs_native
@pytest.mark.parametrize("own", [False, True, SOME_OWN], ids=["shared", "own", "some-own"])
@pytest.mark.parametrize("x_moves", [True, False], ids=["x", "no-x"])
@pytest.mark.parametrize("network", [*MIXED.values(), *PARTS.values(), TWO_BLOCKS, SMALL, LINEAR])
def test_the_logits_of_a_chain_have_the_gradients_of_plain_layers(
    network: Network, x_moves: bool, own: bool | Sequence[bool]
) -> None:
    if own is SOME_OWN and network is not TWO_BLOCKS:
        own = False
    task = given(network, tasks=3, own=own)
    for gamma in task.parameters[1:-2:3]:
        gamma[..., ::2] *= -1.0  # a window's maximum is then the minimum before the norm
    x = task.x.clone().requires_grad_(x_moves)
    parameters = [p.clone().requires_grad_() for p in task.parameters]
    silent = torch.randn(4).double().requires_grad_()
    logits = classified(Native(), x, parameters, network.specs, [silent])
    want = plain_logits(network, parameters, x)
    assert logits is not None and far([logits], [want]) < 1e-10
    asked = [*parameters, *([x] if x_moves else [])]
    true = torch.autograd.grad(outer_loss([want]), asked)
    assert far(torch.autograd.grad(outer_loss([logits]), asked, retain_graph=True), true) < 1e-10
    *in_graph, zero = torch.autograd.grad(outer_loss([logits]), [*asked, silent], create_graph=True)
    assert far(in_graph, true) < 1e-10
    (alone,) = torch.autograd.grad(outer_loss([logits]), silent, retain_graph=True)
    assert torch.equal(alone, torch.zeros(4).double()) and torch.equal(zero, alone)


@needs_native
@pytest.mark.parametrize("x_moves", [True, False], ids=["x", "no-x"])
@pytest.mark.parametrize("name", ["images-winograd-library", "library-groups", "winograd-first"])
def test_the_features_of_the_first_blocks_have_the_gradients_of_plain_layers(name: str, x_moves: bool) -> None:
    network = MIXED[name]
    task = given(network, tasks=3)
    for count in range(1, len(network.layers) + 1):
        x = task.query.clone().requires_grad_(x_moves)
        parameters = [p.clone().requires_grad_() for p in task.parameters[: 3 * count]]
        features = classified(Native(), x, parameters, network.specs[:count])
        want = torch.stack([blocks(network, parameters, own) for own in x])
        assert features is not None and far([features], [want]) < 1e-10
        asked = [*parameters, *([x] if x_moves else [])]
        true = torch.autograd.grad(outer_loss([want]), asked)
        assert far(torch.autograd.grad(outer_loss([features]), asked, retain_graph=True), true) < 1e-10
        assert far(torch.autograd.grad(outer_loss([features]), asked, create_graph=True), true) < 1e-10


def blocks(network: Network, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """The blocks whose parameters are given, as anyone writes them."""
    for layer, (weight, gamma, beta) in zip(network.layers, zip(*[iter(parameters)] * 3)):
        z = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        x = F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.0, layer.eps))
        x = F.max_pool2d(x, layer.pool) if layer.pool > 1 else x
    return x


@needs_native
@pytest.mark.parametrize("network", [SMALL, LINEAR], ids=["blocks", "linear"])
def test_gradcheck_and_gradgradcheck_of_the_logits(network: Network) -> None:
    task = given(network, tasks=2)
    leaves = [t.clone().requires_grad_() for t in (task.query, *task.parameters)]

    def logits(x: Tensor, *parameters: Tensor) -> Tensor:
        found = classified(Native(), x, parameters, network.specs)
        assert found is not None
        return found

    assert torch.autograd.gradcheck(logits, leaves, fast_mode=True)
    # against differences of gradients, which are rounded themselves
    assert torch.autograd.gradgradcheck(logits, leaves, fast_mode=True, atol=1e-4)


@needs_native
def test_a_query_pass_keeps_the_maxima_of_its_windows_alone() -> None:
    network = PARTS["winograd"]
    task, pixels = given(network, torch.float32), (21 * 19, 10 * 9, 5 * 4)
    found = Native().logits(task.x, [p.unsqueeze(0) for p in task.parameters], network.specs, True)
    assert found is not None
    logits, kept = found
    maxima = 32 * 7 * sum(pixels[1:])  # of all blocks but the first, of which nothing is kept
    assert logits.shape[1] == 7
    assert kept.nbytes <= maxima * (4 + 4 + 1) + 8 * 28**2 + 4096  # z, y, index; the patches' moments; in whole lines


@needs_native
def test_logits_are_asked_only_for_the_gradients_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = given(TWO_BLOCKS, tasks=2), list[Sequence[bool]]()
    parameters = [p.clone().requires_grad_() for p in task.parameters]
    plain_grad = Native.logits_grad

    def noted(self: Native, *args: Any) -> Any:
        seen.append(args[5])
        return plain_grad(self, *args)

    monkeypatch.setattr(Native, "logits_grad", noted)
    logits = classified(Native(), task.query, parameters, TWO_BLOCKS.specs)
    assert logits is not None
    torch.autograd.grad(logits.sum(), parameters[-2:], retain_graph=True)
    torch.autograd.grad(logits.sum(), parameters[3], retain_graph=True)
    assert [[i for i, flag in enumerate(w) if flag] for w in seen] == [[6, 7], [3]]


def test_a_backend_without_an_operation_for_the_whole_gives_no_logits() -> None:
    task = given(TWO_BLOCKS)
    assert classified(Reference(), task.query, task.parameters, TWO_BLOCKS.specs) is None


# Meta-gradients of chains of every kind of layer, to be compared between processes.
META = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from chains import MIXED, given
from lambda_kernels.backends import Native
from lambda_kernels.outer import adapted, classified
torch.set_num_threads(1)
out = []
for network in MIXED.values():
    task = given(network, tasks=2)
    parameters = [p.clone().requires_grad_() for p in task.parameters]
    updated = network.from_layer(0)
    rates = torch.full((2, sum(updated)), 0.1).double().requires_grad_()
    _, new = adapted(Native(), task.x, task.labels, parameters, updated, network.specs, rates, second_order=True)
    logits = classified(Native(), task.query, new, network.specs)
    for g in torch.autograd.grad(logits.square().mean(), [*parameters, rates]):
        out.append(g.flatten().tolist())
print(json.dumps(out))
"""


@needs_native
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_every_instruction_set_gives_the_same_meta_gradient(isa: str) -> None:
    folder = str(Path(__file__).parent)
    got, want = (json.loads(fresh(META, folder, LAMBDA_KERNELS_ISA=name)) for name in (isa, ""))
    assert far([torch.tensor(g).double() for g in got], [torch.tensor(w).double() for w in want]) < 1e-10


@needs_native
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_threads_change_no_bit_of_a_meta_gradient(tasks: int) -> None:
    network = Network((3, 18, 19), (Layer(16), Layer(64)))  # torch's library may add up in another order
    task, updated = given(network, torch.float32, tasks=tasks), network.from_layer(0)
    found = []
    for threads in (1, 2, 3):
        parameters = [p.clone().requires_grad_() for p in task.parameters]
        rates = torch.full((2, sum(updated)), 0.1).requires_grad_()
        with on_threads(threads):
            _, new = adapted(
                Native(), task.x, task.labels, parameters, updated, network.specs, rates, second_order=True
            )  # fmt: skip
            logits = classified(Native(), task.query, new, network.specs)
            assert logits is not None
            found.append(torch.autograd.grad(logits.square().mean(), [*parameters, rates]))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_native
def test_the_way_back_repeats_the_steps_whatever_is_asked_of_it() -> None:
    """Of images that require a gradient, the first block is another operation than of those that do not."""
    network = MIXED["images-winograd-library"]
    task, updated = given(network, torch.float32), network.from_layer(0)
    leaves = Leaves.of(task, torch.full((2, sum(updated)), 0.1))
    _, new = adapted(
        Native(), leaves.x, task.labels, leaves.parameters, updated, network.specs, leaves.rates, second_order=True
    )
    loss = outer_loss(new)
    _, *both = torch.autograd.grad(loss, [leaves.x, *leaves.parameters], retain_graph=True)
    alone = torch.autograd.grad(loss, leaves.parameters)
    assert all(torch.equal(a, b) for a, b in zip(both, alone))


@pytest.mark.parametrize("shape", [(0, 8), (2, 7), (8,)], ids=str)
def test_rates_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    task, updated = given(TWO_BLOCKS), [True] * 8
    with pytest.raises(ValueError, match="updated parameters: give"):
        adapted(
            Reference(), task.x, task.labels, task.parameters, updated, TWO_BLOCKS.specs, torch.ones(shape),
            second_order=True,
        )  # fmt: skip
