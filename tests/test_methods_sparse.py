"""Layers with a spread of weights, networks that are cut by their masks, and losses at every layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import CONV4
from small_runs import assert_same_bits, run, small
from torch import Tensor, nn

from lambda_maml import Pattern, adapt, checkpoint, models, rules
from lambda_maml.inner.problem import Problem
from lambda_maml.methods import cut, descend, kl, local_losses, prune, query_loss, sparse_conv4, variational
from lambda_maml.methods.variational import divergence, log_alpha
from lambda_maml.parts import Parts
from lambda_maml.run_state import BEST

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning"),  # torch's forward mode
]


def spread(seed: int = 0, width: int = 6) -> Any:
    torch.manual_seed(seed)
    network: Any = sparse_conv4(ways=3, in_channels=1, image_size=16, width=width)
    return network.double()


def test_noise_has_the_moments_of_two_convolutions() -> None:
    torch.manual_seed(0)
    whole: Any = variational(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)))
    layer = whole[0]
    with torch.no_grad():
        layer.log_sigma.uniform_(-2, 0)
        x = torch.randn(1, 2, 4, 4)
        draws = layer(x.expand(20_000, -1, -1, -1))
        mean = F.conv2d(x, layer.weight, layer.bias, padding=1)
        deviation = F.conv2d(x.square(), (2 * layer.log_sigma).exp() + 1e-8, padding=1).sqrt()
    assert float(((draws.mean(0) - mean[0]) / deviation[0]).abs().max()) < 5 / math.sqrt(20_000)
    assert float((draws.std(0) / deviation[0] - 1).abs().max()) < 5 / math.sqrt(2 * 20_000)


def test_the_divergence_is_that_of_the_paper() -> None:
    values = {-10.0: 5.0, 0.0: -0.20, 10.0: -0.64}
    for at, want in values.items():
        assert abs(float(divergence(torch.tensor([at]))) - want) < 0.01
    grid = torch.linspace(-10, 10, 201).double()
    each = torch.stack([divergence(a) for a in grid])
    assert bool((each[1:] < each[:-1]).all())
    assert log_alpha(torch.tensor([1.0, 0.0]), torch.tensor([-8.0, 0.0])).tolist() == [-10.0, 10.0]
    weight = kl(growth=1e-6, every=1000)
    assert [weight.at(i) for i in (0, 999, 1000, 10**6)] == pytest.approx([2e-6, 2e-6, 3e-6, 1e-5])


def test_the_mask_is_the_threshold_and_evaluation_is_without_noise() -> None:
    network = spread()
    with torch.no_grad():
        for p in (p for n, p in network.named_parameters() if n.endswith("log_sigma")):
            p.uniform_(-4, 2)
    found = prune(network)
    layer = network.block2.conv
    want = log_alpha(layer.weight, layer.log_sigma) <= 3
    assert torch.equal(layer.mask.bool(), want) and 0.1 < found.weights < 0.9
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    masked = F.conv2d(x, layer.weight * want, layer.bias, padding=1)
    assert torch.equal(layer.eval()(x), masked) and not torch.equal(layer.train()(x), layer(x))


def test_a_small_spread_is_plain_maml() -> None:
    torch.manual_seed(0)
    plain = models.conv4(ways=3, in_channels=1, width=4, image_size=16).double()
    noisy = variational(plain, log_sigma=-40.0)
    xs, ys = torch.randn(3, 1, 16, 16, dtype=torch.float64), torch.arange(3)
    given: dict[str, Any] = {"pattern": "00001", "steps": 2, "lr": 0.1}
    one, two = (adapt(m, xs, ys, **given).parameters_dict()["head.weight"] for m in (plain, noisy))
    assert 0 < float((one - two).detach().abs().max()) < 1e-2  # the 1e-8 below the root is noise of 1e-4 |x|
    exact = adapt(noisy.eval(), xs, ys, **given).parameters_dict()["head.weight"]
    torch.testing.assert_close(exact, one, rtol=1e-9, atol=1e-9)  # two ways through the same layers


def thinned(seed: int) -> Any:
    """A masked network of which channels are empty, unread, or constant."""
    network = spread(seed)
    with torch.no_grad():
        for block in (network.block1, network.block2, network.block3, network.block4):
            block.norm.bias.uniform_(-0.5, 0.5)
            block.conv.log_sigma[:2] = 9.0
        network.block1.norm.bias[0], network.block1.norm.bias[1] = -0.2, 0.3
        network.block3.conv.log_sigma[:, 4] = 9.0  # nothing reads channel 4 of block 2
        network.head.log_sigma[:, 5] = 9.0
    prune(network)
    return network.eval()


@pytest.mark.parametrize("seed", range(4))
def test_a_cut_network_gives_the_same_and_is_smaller(seed: int) -> None:
    network = thinned(seed)
    smaller: Any = cut(network)
    x = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), network(x), rtol=1e-6, atol=1e-6)  # a constant's norm is 0 to rounding
    sizes = [len(getattr(smaller, f"block{i}").conv.weight) for i in range(1, 5)]
    assert sizes[0] == 5 and sizes[1] <= 5 and sizes[3] == 3  # a constant above 0 stays, unless nothing convolves it
    assert sum(p.numel() for p in smaller.parameters()) < 0.8 * sum(m.numel() for m in network.buffers())
    learner = adapt(smaller, x[:3], torch.arange(3), pattern="00001", steps=1, lr=0.1)
    assert learner(x).shape == (4, 3)


def test_a_cut_network_is_exported_smaller(tmp_path: Path) -> None:
    network = thinned(0).float()
    x = torch.randn(3, 1, 16, 16)
    bytes_of = []
    for name, one in (("whole", network), ("cut", cut(network))):
        adapt(one, x, torch.arange(3), pattern="00001", steps=1, lr=0.1).export(tmp_path / f"{name}.pt2")
        module = torch.export.load(tmp_path / f"{name}.pt2")
        bytes_of.append(sum(t.numel() for t in module.state_dict.values()))
    assert bytes_of[1] < 0.8 * bytes_of[0]


def test_a_sparse_network_trains_and_is_resumed(tmp_path: Path) -> None:
    settings = small(pattern="00011", val_tasks=2, val_every=50)

    def trained(out: Path, iterations: int, **more: Any) -> None:
        torch.manual_seed(0)
        where = "lambda_maml.methods.variational:sparse_conv4"
        model = models.create(where, ways=3, in_channels=1, image_size=16, args={"width": 4})
        parts = Parts(objective=query_loss() + kl(1e-5), solver=descend(rules.sgd(0.1), 2, penalty=kl.penalty(1e-6)))
        run(out, iterations, settings, model, parts=parts, **more)

    trained(tmp_path / "steady", 3)
    trained(tmp_path / "broken", 1)
    torch.rand(5)
    trained(tmp_path / "broken", 3, resume=True)
    assert_same_bits(tmp_path / "steady", tmp_path / "broken")
    model, _ = checkpoint.load(tmp_path / "steady" / BEST)
    assert prune(model).weights < 0.05 and isinstance(cut(model), nn.Sequential)


def test_what_has_no_spread_is_said() -> None:
    plain = models.conv4(ways=3, in_channels=1, width=4, image_size=16)
    with pytest.raises(ValueError, match="no layer has a spread of weights"):
        prune(plain)
    with pytest.raises(ValueError, match="no layer has a spread of weights"):
        kl.penalty(1.0)(dict(plain.named_parameters()))
    with pytest.raises(ValueError, match="is not blocks of convolution"):
        cut(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="kl: weight in"):
        kl(1.0)


def by_hand(part: local_losses, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
    """The gradients of conv4's layers by their own classifiers, written out."""
    network, x = CONV4.network, xs
    found: dict[str, Tensor] = {}
    for i in range(1, 5):
        block = getattr(network, f"block{i}")
        z = block(x.detach())
        head: Any = part.heads[f"block{i}/conv"]
        fields = F.adaptive_avg_pool2d(z, min(part.patches, z.shape[-1]))
        losses = []
        for g, (weight, bias) in enumerate(zip(head.weight.chunk(part.groups), head.bias.chunk(part.groups))):
            size = z.shape[1] // part.groups
            for place in fields[:, g * size : (g + 1) * size].flatten(2).unbind(2):
                losses.append(F.cross_entropy(place @ weight.T + bias, ys))
        own = dict(block.named_parameters(f"block{i}"))
        own = {n.removeprefix("."): p for n, p in own.items()}
        found.update(zip(own, torch.autograd.grad(torch.stack(losses).mean(), list(own.values()))))
        x = z
    own = dict(network.get_submodule("head").named_parameters("head"))
    loss = F.cross_entropy(network.get_submodule("head")(x.detach().flatten(1)), ys)
    return {**found, **dict(zip(own, torch.autograd.grad(loss, list(own.values()))))}


def local(**more: Any) -> local_losses:
    torch.manual_seed(1)
    return local_losses({f"block{i}.conv": 3 for i in range(1, 5)}, ways=2, **more).double()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("pattern", ["11111", "00011"])
def test_local_losses_are_those_of_their_classifiers(pattern: str, groups: int) -> None:
    part, (xs, ys, _, _) = local(groups=groups, patches=2), CONV4.task()
    want, moved = by_hand(part, xs, ys), Pattern(pattern).parameters(CONV4.network)
    learner = adapt(CONV4.network, xs, ys, pattern=pattern, solver=descend(rules.sgd(0.5), 1, part))
    start = dict(CONV4.network.named_parameters())
    for n, p in learner.parameters_dict().items():
        # Classifiers of patches are summed in another order by hand.
        torch.testing.assert_close(p, start[n] - 0.5 * want[n] if n in moved else start[n], rtol=1e-8, atol=1e-8)


def test_classifiers_learn_through_the_steps() -> None:
    part, (xs, ys, xq, yq) = local(), CONV4.task()
    learner = adapt(CONV4.network, xs, ys, pattern="00011", solver=descend(rules.sgd(0.5), 2, part), second_order=True)
    F.cross_entropy(learner(xq), yq).backward()
    used = part.heads["block4/conv"].weight
    assert isinstance(used, nn.Parameter) and used.grad is not None and float(used.grad.abs().sum()) > 0
    CONV4.network.zero_grad()


def test_directions_are_unbiased() -> None:
    """Over many draws the estimate is the local gradient, within four standard errors."""
    exact, estimated = local(), local(directions=1)
    xs, ys, _, _ = CONV4.task()
    found: list[Tensor] = []
    wanted: list[Tensor] = []

    def look(problem: Problem, params: Any, step: int) -> Any:
        if not wanted:
            wanted.append(exact(problem, params, step)[1]["block4.conv.weight"])
        loss, grads = estimated(problem, params, step)
        found.append(grads["block4.conv.weight"])
        return loss, {n: torch.zeros_like(g) for n, g in grads.items()}

    adapt(CONV4.network, xs, ys, pattern="00011", solver=descend(rules.sgd(0.1), 300, look))
    draws = torch.stack(found)
    error = draws.std(0) / math.sqrt(len(draws))
    assert float(((draws.mean(0) - wanted[0]).abs() / error.clamp(min=1e-12)).max()) < 4.5


def test_local_losses_say_what_does_not_fit() -> None:
    xs, ys, _, _ = CONV4.task()

    def call(part: Any, **given: Any) -> Any:
        return adapt(CONV4.network, xs, ys, pattern="00011", solver=descend(rules.sgd(0.1), 1, part), **given)

    with pytest.raises(ValueError, match="has no classifier for block4.conv"):
        call(local_losses({"block1.conv": 3}, ways=2))
    with pytest.raises(ValueError, match="directions have no graph"):
        call(local(directions=1), second_order=True)
    with pytest.raises(ValueError, match="groups that divide the channels"):
        local_losses({"block1.conv": 3}, ways=2, groups=2)
