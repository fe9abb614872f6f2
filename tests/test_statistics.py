"""Norms with the statistics of the support set: what a plain network gives, whatever images are classified together."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from machine import PATIENCE, needs_native, on_threads
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lambda_kernels as lk
from lambda_kernels.agreement import within
from lambda_kernels.evaluated import EvaluatedChain
from lambda_kernels.program import program_for
from lambda_maml import adapt, adapt_tasks, say, statistics
from lambda_maml import evaluate as evaluating
from lambda_maml.data import load, sample_tasks
from lambda_maml.evaluate import evaluate, evaluate_both
from lambda_maml.models import conv4
from lambda_maml.statistics import norms_of_batches

pytestmark = pytest.mark.usefixtures("one_thread")

D = torch.float64
YS = torch.arange(3).repeat(3)


def images(count: int, size: tuple[int, ...], dtype: torch.dtype = D, seed: int = 0) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Residual(nn.Module):
    """A block with a way past it, of which only the first norm alone reads a convolution's result."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.other = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.other(x + self.conv(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return lk.convert(nn.Sequential(*layers, nn.Linear(72, 3)))


# Networks for images of 2x6x6, and how many of their norms fold.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (mlp, 1), "residual": (Residual, 1), "converted": (convolutions, 2),
    "conv4": (lambda: conv4(ways=3, in_channels=2, width=8, image_size=16), 4),
}  # fmt: skip


def made(name: str, dtype: torch.dtype = D) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, a support set and a query set."""
    torch.manual_seed(3)
    model = NETWORKS[name][0]().to(dtype)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # gammas of both signs, and betas
    size = (2, 16, 16) if name == "conv4" else (2, 6, 6)
    return model, images(9, size, dtype), images(7, size, dtype, seed=1)


def by_hand(network: nn.Module, xs: Tensor, xq: Tensor) -> Tensor:
    """The logits of xq by a network whose norms normalise xs and xq apart, by the statistics of xs."""
    twin = lk.to_torch(copy.deepcopy(network))
    known: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def forward(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        axes, shape = [a for a in range(x.dim()) if a != 1], [1, -1] + [1] * (x.dim() - 2)
        if norm not in known:
            known[norm] = x.mean(axes), x.var(axes, correction=0)
        mean, variance = (t.view(shape) for t in known[norm])
        y = (x - mean) / torch.sqrt(variance + norm.eps)
        return y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape)

    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = forward.__get__(module)  # type: ignore[method-assign]
    with torch.no_grad():
        twin(xs)
        logits: Tensor = twin(xq)
    return logits


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pattern", ["1", "01"])
def test_a_learner_classifies_by_the_statistics_of_its_support_set(name: str, pattern: str) -> None:
    model, xs, xq = made(name)
    given: Any = dict(pattern=pattern.rjust(layers(model), pattern[0]), steps=2, lr=0.1)
    learner = adapt(model, xs, YS, **given)
    together, want = learner(xs).detach(), by_hand(learner.to_module(), xs, xq)
    assert learner.freeze_statistics() is learner
    torch.testing.assert_close(learner(xs).detach(), together, **EXACT)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(learner(xq).detach(), want, **EXACT)
            torch.testing.assert_close(learner(xq[:1]).detach(), want[:1], **EXACT)
    torch.testing.assert_close(adapt(model, xs, YS, statistics="support", **given)(xq).detach(), want, **EXACT)
    assert norms_of_batches(model) and not norms_of_batches(learner.module)


def layers(model: nn.Module) -> int:
    return sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_is_the_network(name: str) -> None:
    model, xs, xq = made(name)
    learner = adapt(model, xs, YS, pattern="1" * layers(model), steps=1, lr=0.1)
    norms = len(norms_of_batches(model))
    with pytest.raises(ValueError, match="takes its statistics from each batch, which no layer can hold"):
        learner.to_module(fold=True)
    want = learner.freeze_statistics()(xq).detach()
    network = learner.to_module(fold=True)
    left = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    assert norms - left == NETWORKS[name][1]
    torch.testing.assert_close(network(xq).detach(), want, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(network(xq), want, **EXACT)
    assert all(p.is_leaf for p in network.parameters())
    torch.testing.assert_close(learner(xq).detach(), want, **EXACT)  # the learner is as it was


GROUPED = """
import sys, torch
from lambda_kernels.info import collect
from lambda_maml import adapt
from lambda_maml.models import conv4

ys = torch.arange(3).repeat(2)
for width, channels, size, dtype in [(32, 3, 32, "float32"), (8, 1, 28, "float32"), (12, 3, 21, "float64")]:
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    model = conv4(3, channels, width, size).to(dtype)
    xs, xq = torch.randn(6, channels, size, size, dtype=dtype), torch.randn(13, channels, size, size, dtype=dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        learner = adapt(model, xs, ys, pattern="00011", steps=1, lr=0.1, statistics="support")
        with torch.no_grad():
            whole = learner(xq)
            for size_of_part in (1, 2, 5, 12):
                parts = torch.cat([learner(part) for part in xq.split(size_of_part)])
                assert torch.equal(whole, parts), (width, size, dtype, threads, size_of_part)
            assert torch.equal(whole.flip(0), learner(xq.flip(0)))
            laid = xq.contiguous(memory_format=torch.channels_last)
            assert torch.equal(whole, learner(laid))
print("alike")
"""


@needs_native
@pytest.mark.parametrize("isa", ["", "generic", "avx2"])
def test_images_that_are_classified_together_change_no_bit_of_each_other(isa: str) -> None:
    environment = {**os.environ, "LAMBDA_KERNELS_ISA": isa} if isa else dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", GROUPED], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.split() == ["alike"], done.stderr


@pytest.mark.parametrize("name", NETWORKS)
def test_images_one_at_a_time_have_the_same_bits_by_any_network(name: str) -> None:
    model, xs, xq = made(name, torch.float32)
    learner = adapt(model, xs, YS, pattern="1" * layers(model), steps=1, lr=0.1, statistics="support")
    with torch.no_grad():
        alone = torch.cat([learner(x) for x in xq.split(1)])
        backwards = torch.cat([learner(x.clone()) for x in xq.flip(0).split(1)])
        assert torch.equal(alone, backwards.flip(0))
        torch.testing.assert_close(alone, learner(xq), **within(torch.float32, "steps"))


@needs_native
@pytest.mark.parametrize("name", ["conv4", "converted"])
def test_a_chain_is_one_operation_unless_a_derivative_or_a_look_is_wanted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, xs, xq = made(name)
    learner = adapt(model, xs, YS, pattern="1" * layers(model), steps=1, lr=0.1, statistics="support")
    called: list[int] = []
    plain = EvaluatedChain.__call__

    def noted(self: EvaluatedChain, folded: Any, x: Any) -> Any:
        found = plain(self, folded, x)
        called.append(found is not None)
        return found

    monkeypatch.setattr(EvaluatedChain, "__call__", noted)
    with torch.no_grad():
        want = learner(xq)
        assert called == [True]
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(learner(xq), want, **EXACT)
        assert counter.get_total_flops() > 0
        with lk.use_backend("reference"):
            torch.testing.assert_close(learner(xq), want, **EXACT)
        assert True not in called[1:]
        assert torch.equal(learner(xq), want) and called[-1]
    x = xq.clone().requires_grad_()
    (slope,) = torch.autograd.grad(learner(x).sum(), x)
    (true,) = torch.autograd.grad(learner.to_module().eval()(x).sum(), x)
    torch.testing.assert_close(slope, true, **EXACT)


def test_what_is_changed_after_freezing_is_seen() -> None:
    model, xs, xq = made("conv4")
    learner = adapt(model, xs, YS, pattern="00001", steps=1, lr=0.1, statistics="support")
    with torch.no_grad():
        before = learner(xq)
        learner.block2.norm.running_mean.add_(0.3)
        learner.head.bias.data.add_(1.0)
        want = by_parts(learner.module, xq)
        torch.testing.assert_close(learner(xq), want, **EXACT)
        assert not torch.allclose(before, want)
        learner.block1.norm.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(learner(xq), want, **EXACT)
        learner.train()  # the batch's own again
        torch.testing.assert_close(learner(xq), lk.to_torch(learner.to_module()).train()(xq), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["blocks", "torch"])
def test_fused_blocks_tell_what_hooks_on_their_norms_would(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a user's own network too, which is of torch's layers."""
    model: nn.Module = conv4(ways=3, in_channels=2, width=8, image_size=20).to(dtype)
    model = model if kind == "blocks" else lk.to_torch(model)
    x = (torch.randn(9, 2, 20, 20) * 3 + 1).to(dtype)
    norms = norms_of_batches(model)
    with torch.no_grad():
        want = statistics._seen_by_norms(model, x, norms)
        monkeypatch.setattr(statistics, "moments", None)
        statistics.freeze(model, x)
    assert len(want) == 4
    allowed = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for path, (mean, variance) in want.items():
        norm: Any = model.get_submodule(path)
        assert norm.running_mean.dtype == norm.running_var.dtype == dtype and not norm.training
        torch.testing.assert_close(norm.running_mean, mean, rtol=allowed, atol=allowed * float(mean.abs().max()))
        torch.testing.assert_close(norm.running_var, variance, rtol=allowed, atol=0)


class Part(nn.Module):
    """Two blocks in a row, of which one has a norm that somebody looks at, and a third that is not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (lk.ConvBlock(2 if i == 0 else 4, 4) for i in range(3))
        self.head = nn.Linear(4 * 25, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(x)).flatten(1))
        return y


def test_a_block_that_is_not_reached_keeps_its_norm_as_it_is() -> None:
    model, x, looked = Part().double(), torch.randn(6, 2, 20, 20).double(), []
    model.second.norm.register_forward_hook(lambda *_: looked.append(1))
    statistics.freeze(model, x)
    assert model.third.norm.running_mean is None and model.third.norm.training and looked
    z = F.conv2d(x, model.first.conv.weight, model.first.conv.bias, padding=1)
    torch.testing.assert_close(model.first.norm.running_mean, z.mean((0, 2, 3)), **EXACT)
    torch.testing.assert_close(model.first.norm.running_var, z.var((0, 2, 3), correction=0), **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:1], model(x[:1]), **EXACT)


def by_parts(network: nn.Module, x: Tensor) -> Tensor:
    """conv4 by torch's functions, its norms by their running statistics."""
    for name in ("block1", "block2", "block3", "block4"):
        block: Any = network.get_submodule(name)
        z = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
        norm = block.norm
        z = F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        x = F.max_pool2d(F.relu(z), 2)
    head: Any = network.get_submodule("head")
    return F.linear(x.flatten(1), head.weight, head.bias)


def test_gradients_reach_the_network_with_statistics_as_constants() -> None:
    model, xs, xq = made("conv4")
    learner = adapt(model, xs, YS, pattern="00011", steps=1, lr=0.1, second_order=True, statistics="support")
    loss = learner(xq).square().sum()
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    twin = adapt(model, xs, YS, pattern="00011", steps=1, lr=0.1, second_order=True)
    state = twin.parameters_dict()
    frozen = {n: b for n, b in learner.module.named_buffers() if "running" in n}
    x = xq
    for name in ("block1", "block2", "block3", "block4"):
        z = F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=1)
        mean, variance = (frozen[f"{name}.norm.running_{part}"].view(1, -1, 1, 1) for part in ("mean", "var"))
        z = (z - mean) / torch.sqrt(variance + 1e-5)
        scale, shift = (state[f"{name}.norm.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        x = F.max_pool2d(F.relu(z * scale + shift), 2)
    want_loss = F.linear(x.flatten(1), state["head.weight"], state["head.bias"]).square().sum()
    want = torch.autograd.grad(want_loss, list(model.parameters()), allow_unused=True)
    for g, w in zip(got, want):
        torch.testing.assert_close(g if g is not None else torch.zeros(()), w if w is not None else torch.zeros(()))


def test_many_tasks_and_their_accuracy() -> None:
    set_ = load("glyphs", split="val")
    tasks = sample_tasks(set_, 3, ways=3, shots=2, query=2)
    model = conv4(ways=3, in_channels=1, width=8, image_size=28)
    given: Any = dict(pattern="00011", steps=2, lr=0.1, statistics="support")
    xs, ys, xq = (torch.stack(part) for part in list(zip(*tasks))[:3])
    with torch.no_grad():
        logits = adapt_tasks(model, xs, ys, xq, **given)
        want = torch.stack([adapt(model, x, y, **given)(q) for x, y, q, _ in tasks])
        assert torch.equal(logits, want)
        listed = adapt_tasks(model, list(tasks), **given)
    assert all(map(torch.equal, listed, want))
    right = torch.stack([(found.argmax(-1) == task.yq).double().mean() for found, task in zip(want, tasks)])
    assert torch.equal(evaluate(model, tasks, **given).accuracies, right)


def test_both_kinds_are_evaluated_with_one_adaptation_to_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = sample_tasks(load("glyphs", split="val"), 5, ways=3, shots=2, query=2)
    model = conv4(ways=3, in_channels=1, width=8, image_size=28)
    given: Any = dict(pattern="00011", steps=2, lr=0.1)
    want = {kind: evaluate(model, tasks, statistics=kind, **given) for kind in ("batch", "support")}
    losses = evaluate(model, tasks, statistics="support", metric=F.cross_entropy, **given)
    adapted: list[Any] = []

    def noted(*task: Any, **how: Any) -> Any:
        adapted.append(task)
        return adapt(*task, **how)

    monkeypatch.setattr(evaluating, "adapt", noted)
    told: list[int] = []
    found = evaluate_both(model, tasks, progress=lambda done, total, what: told.append(done), **given)
    assert len(adapted) == 5 and told == [1, 2, 3, 4, 5] and found.keys() == want.keys()
    assert all(torch.equal(found[kind].scores, want[kind].scores) for kind in want)
    assert found["batch"].metric == "accuracy" and found["support"].mean == want["support"].mean
    again = evaluate_both(model, tasks, metric=F.cross_entropy, **given)["support"]
    torch.testing.assert_close(again.scores, losses.scores)
    with pytest.raises(ValueError, match="there are no tasks"):
        evaluate_both(model, [], **given)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.layer(self.norm(x))))
        return y


class ByFunction(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.batch_norm(self.layer(x), None, None, training=True))
        return y


class ByMean(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.layer(x - x.mean(0))))
        return y


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Twice(), "norm normalises several times in one pass"),
        (ByMean(), "still depends on the images beside it"),
        (ByFunction(), "cannot be called with one image: Expected more than 1 value per channel"),
    ],
    ids=["twice", "mean", "function"],
)
def test_statistics_that_cannot_be_kept_are_refused(model: nn.Module, why: str) -> None:
    xs = images(9, (4,))
    with pytest.raises(ValueError, match=why):
        adapt(model.double(), xs, YS, pattern="01", steps=1, lr=0.1, statistics="support")


def test_a_support_set_that_is_not_what_it_was_is_refused() -> None:
    model, xs, xq = made("mlp")
    learner = adapt(model, xs, YS, pattern="01", steps=1, lr=0.1)
    twin = copy.deepcopy(learner)
    with pytest.raises(ValueError, match="support set of this learner is not known: give it"):
        twin.freeze_statistics()
    kept = xs.clone()
    xs.mul_(2.0)
    with pytest.raises(ValueError, match="support set was changed in place since `adapt`: give it"):
        learner.freeze_statistics()
    with torch.no_grad():
        assert torch.equal(twin.freeze_statistics(kept)(xq), learner.freeze_statistics(kept)(xq))
    for call in (adapt, adapt_tasks):
        with pytest.raises(ValueError, match="statistics must be one of batch, support, got 'query'"):
            call(model, xs, YS, pattern="01", statistics="query")


def test_few_images_by_their_own_statistics_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model, xs, xq = made("conv4")
    learner = adapt(model, xs, YS, pattern="00001", steps=1, lr=0.1)
    say._said.clear()
    with caplog.at_level(logging.WARNING):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                learner(xq)
                assert len(caplog.messages) == grad
                learner(xq[: 2 + grad])
                learner(xq[: 2 + grad])
        adapt_tasks(model, xs[None], YS[None], xq[None, :4], pattern="00001", steps=1, lr=0.1)  # as in meta-training
        with torch.no_grad():
            adapt_tasks(model, xs[None], YS[None], xq[None, :1], pattern="00001", steps=1, lr=0.1)
            learner.freeze_statistics()(xq[:4])
            adapt_tasks(model, xs[None], YS[None], xq[None, :4], pattern="00001", steps=1, lr=0.1, statistics="support")
    told = [message.partition(" own statistics alone")[0] for message in caplog.messages]
    assert told == [f"{n} images are normalised by their" for n in (2, 3)] + ["1 image is normalised by its"]


def test_freezing_says_nothing_of_hooks_that_nobody_set(caplog: pytest.LogCaptureFixture) -> None:
    model = lk.convert(Residual())
    xs, xq = images(9, (2, 6, 6), torch.float32), images(7, (2, 6, 6), torch.float32, seed=1)
    learner = adapt(model, xs, YS, pattern="001", steps=1, lr=0.1)
    say._said.clear()
    with caplog.at_level(logging.INFO, "lambda_kernels"), torch.no_grad():
        learner.freeze_statistics()(xq)
        model(xq)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lambda_")]
    assert said == [] and program_for(model, (xq,), {}).untraceable is None


@needs_native
def test_a_chain_that_does_not_fit_the_images_is_left_to_the_network() -> None:
    model, xs, xq = made("conv4", torch.float32)
    learner = adapt(model, xs, YS, pattern="00001", steps=1, lr=0.1, statistics="support")
    with torch.no_grad(), pytest.raises(ValueError, match="x has 32 features, weight takes 8"):
        learner(images(2, (2, 32, 32), torch.float32))
    chain = EvaluatedChain.find(program_for(learner.module, (xq,), {}), learner.module)
    assert chain is not None and len(chain.blocks) == 4
    assert chain(chain.folded(dict(learner.module.state_dict())), xq.double()) is None
    with on_threads(2), torch.no_grad():
        # float32 through four blocks, by Winograd and not
        torch.testing.assert_close(learner(xq), by_parts(learner.module, xq), rtol=1e-4, atol=1e-5)
