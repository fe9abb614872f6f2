"""Converted networks inside the loops of other packages: the same numbers, by the fused blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benches import module
from cases import EXACT, GRADIENT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lambda_kernels as lk

higher = pytest.importorskip("higher", reason="higher is not installed")


class Blocks(nn.Module):
    """A network of blocks, with a shared layer and a loose parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(lk.ConvBlock(3, 4), lk.ConvBlock(4, 4, pool=1))
        self.scale, self.head = nn.Parameter(torch.tensor(1.5)), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1)) * self.scale


def layers(track: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=track), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = layers()

    def forward(self, x: Tensor, twice: bool = True) -> Tensor:
        return self.net(x) * (2 if twice else 1)


class Seen(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(op))
        return op(*args, **(kwargs or {}))


NETWORKS = {"layers": layers, "tracking": lambda: layers(True), "forward": Written, "blocks": Blocks}
FUSED = {f"lambda_kernels.{name}.default" for name in ("norm_relu_pool", "image_block")}


@pytest.fixture
def task() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3, 8, 8).double(), torch.arange(3).repeat(2), torch.randn(5, 3, 8, 8).double()


def meta_gradient(network: nn.Module, task: tuple[Tensor, Tensor, Tensor], track: bool) -> tuple[Tensor, list[Tensor]]:
    """Query logits after two steps of higher's inner loop, and the meta-gradient of their square."""
    xs, ys, xq = task
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with higher.innerloop_ctx(network, optimizer, track_higher_grads=track) as (patched, inner):
        for _ in range(2):
            inner.step(F.cross_entropy(patched(xs), ys))
        logits = patched(xq)
        given = patched(xq, params=[p * 1.5 for p in patched.parameters()])  # weights for one call
        wanted = list(patched.parameters(time=0)) if track else list(patched.parameters())
        loss = logits.square().sum() + given.square().sum()
        return loss.detach(), [g.detach() for g in torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("track", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_highers_loop_fuses_and_gives_the_same(
    name: str, track: bool, task: tuple[Tensor, Tensor, Tensor]
) -> None:
    ours = lk.convert(NETWORKS[name]().double())
    stock = lk.to_torch(ours)
    meta_gradient(copy.deepcopy(ours), task, track)  # a first call is checked against the network as it was
    with Seen() as seen:
        loss, gradients = meta_gradient(ours, task, track)
    want, wanted = meta_gradient(stock, task, track)
    torch.testing.assert_close(loss, want, **EXACT)
    torch.testing.assert_close(gradients, wanted, **GRADIENT)
    for (key, mine), theirs in zip(ours.named_buffers(), stock.buffers()):
        torch.testing.assert_close(mine, theirs, **EXACT, msg=key)
    assert not any("batch_norm" in name for name in seen.names), seen.names


def test_a_patched_network_follows_its_modes(task: tuple[Tensor, Tensor, Tensor]) -> None:
    ours = lk.convert(layers(True).double())
    ours(task[0])
    stock = copy.deepcopy(lk.to_torch(ours))
    results = []
    for network in (ours, stock):
        patched = higher.monkeypatch(network)
        results.append([patched(task[2]), patched.eval()(task[2]), patched.train()(task[2])])
    torch.testing.assert_close(results[0], results[1], **EXACT)


def test_a_network_in_torchopts_differentiable_optimiser_fuses_and_gives_the_same(
    task: tuple[Tensor, Tensor, Tensor],
) -> None:
    torchopt = pytest.importorskip("torchopt", reason="TorchOpt is not installed")
    xs, ys, xq = task
    for build in NETWORKS.values():
        results = []
        ours = lk.convert(build().double())
        for network in (ours, lk.to_torch(ours)):
            weights = list(network.parameters())
            inner = torchopt.MetaSGD(network, lr=0.1)
            with Seen() as seen:
                for _ in range(2):
                    inner.step(F.cross_entropy(network(xs), ys))
                loss = network(xq).square().sum()
            results.append([loss, *torch.autograd.grad(loss, weights)])
            assert bool(FUSED & set(seen.names)) is (network is ours), seen.names
        torch.testing.assert_close(results[0], results[1], **GRADIENT)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_learn2learns_maml_fuses_and_gives_the_same(
    name: str, task: tuple[Tensor, Tensor, Tensor]
) -> None:
    try:
        maml = module("peers").learn2learn_maml()
    except module("harness").Skip as why:
        pytest.skip(str(why))
    xs, ys, xq = task
    ours = lk.convert(NETWORKS[name]().double())
    results = []
    for network in (ours, lk.to_torch(ours)):
        task_learner = maml(network, lr=0.1, first_order=False).clone()
        with Seen() as seen:
            for _ in range(2):
                task_learner.adapt(F.cross_entropy(task_learner(xs), ys))
            loss = task_learner(xq).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(network.parameters()))])
        assert bool(FUSED & set(seen.names)) is (network is ours)
    torch.testing.assert_close(results[0], results[1], **GRADIENT)
