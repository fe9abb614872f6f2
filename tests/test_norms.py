"""Second derivatives of norms under nested transforms of torch.func, against a loop over the tasks."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT, GRADIENT, assert_as_exact
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lambda_kernels as lk
from lambda_kernels.layers import moments
from lambda_kernels.norms import ByDefinition
from lambda_maml import adapt

LABELS = torch.arange(3).repeat(2)
NORMS: dict[str, Any] = {
    "batch": lambda c, side: nn.BatchNorm2d(c, track_running_stats=False),
    "batch, no affine": lambda c, side: nn.BatchNorm2d(c, affine=False, track_running_stats=False),
    "instance": lambda c, side: nn.InstanceNorm2d(c, affine=True),
    "group": lambda c, side: nn.GroupNorm(2, c),
    "layer": lambda c, side: nn.LayerNorm([c, side, side]),
    "layer, no bias": lambda c, side: nn.LayerNorm([c, side, side], bias=False),
    "rms": lambda c, side: nn.RMSNorm([c, side, side]),
}


def layers(norm: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), norm(4, 6), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1),
        norm(4, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(36, 3),
    ).double()  # fmt: skip


class Residual(nn.Module):
    """Pre-activation, and a forward of its own; `looks` makes it one that cannot be captured."""

    def __init__(self, norm: Any, looks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.conv = nn.Conv2d(3, 4, 1), norm(4, 6), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.looks = nn.Linear(4 * 36, 3), looks

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.looks:
            self.seen = len(x)
        return self.head((h + self.conv(F.silu(self.norm(h)))).flatten(1))


NETWORKS: dict[str, Any] = {
    "layers": layers,
    "captured": lambda norm: Residual(norm, False).double(),
    "as written": lambda norm: Residual(norm, True).double(),
}


def adapted(network: nn.Module, weights: dict[str, Tensor], x: Tensor, xq: Tensor, differentiate: Any) -> Tensor:
    """The query's log-sum of one task after one inner step."""

    def loss(p: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(network, p, (x,)), LABELS)

    gradients = differentiate(loss, weights)
    fast = {n: p - 0.1 * gradients[n] for n, p in weights.items()}
    result: Tensor = functional_call(network, fast, (xq,)).logsumexp(1).sum()
    return result


def by_transforms(network: nn.Module, xs: Tensor, xq: Tensor) -> dict[str, Tensor]:
    def total(p: dict[str, Tensor]) -> Tensor:
        one = vmap(lambda x, q: adapted(network, p, x, q, lambda f, w: grad(f)(w)))
        result: Tensor = one(xs, xq).sum()
        return result

    return grad(total)({n: p.detach() for n, p in network.named_parameters()})


def by_a_loop(network: nn.Module, xs: Tensor, xq: Tensor) -> dict[str, Tensor]:
    def step(f: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(weights, torch.autograd.grad(f(weights), list(weights.values()), create_graph=True)))

    weights: dict[str, Tensor] = dict(network.named_parameters())
    total = torch.stack([adapted(network, weights, x, q, step) for x, q in zip(xs, xq)]).sum()
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values()))))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_meta_gradient_by_transforms_is_that_of_a_loop(name: str, norm: str) -> None:
    stock = NETWORKS[name](NORMS[norm])
    xs, xq = (torch.randn(2, n, 3, 6, 6, dtype=torch.float64) for n in (6, 3))
    want = by_a_loop(stock, xs, xq)
    got = by_transforms(lk.convert(copy.deepcopy(stock)), xs, xq)
    for key in want:
        torch.testing.assert_close(got[key], want[key], **GRADIENT, msg=functools.partial("{}: {}".format, key))


OTHERS: dict[str, Any] = {
    "vectors": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(108, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.GELU(), nn.Linear(5, 3)
    ),
    "sequences": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(136, 3),
    ),
    "volumes": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4, track_running_stats=False),
        nn.GELU(), nn.Flatten(), nn.Linear(432, 3),
    ),
    "within": lambda: nn.Sequential(layers(NORMS["batch"]), nn.LayerNorm(3)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_meta_gradient_of_other_shapes_is_that_of_a_loop(name: str) -> None:
    torch.manual_seed(0)
    stock = OTHERS[name]().double()
    xs, xq = (torch.randn(2, n, 3, 6, 6, dtype=torch.float64) for n in (6, 3))
    want, got = by_a_loop(stock, xs, xq), by_transforms(lk.convert(copy.deepcopy(stock)), xs, xq)
    for key in want:
        torch.testing.assert_close(got[key], want[key], **GRADIENT, msg=functools.partial("{}: {}".format, key))


RUNNING: dict[str, Any] = {
    "batch": lambda c, side: nn.BatchNorm2d(c),
    "instance": lambda c, side: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
}


def with_statistics(network: nn.Module, x: Tensor) -> Any:
    """The loss of weights and statistics, and what the statistics are then."""

    def loss(p: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
        own = {n: b.clone() for n, b in buffers.items()}
        return F.cross_entropy(functional_call(network, (p, own), (x,)), LABELS), own

    return loss


@pytest.mark.filterwarnings("ignore:There is a performance drop.*lerp_:UserWarning")  # torch maps it task by task
@pytest.mark.parametrize("norm", RUNNING)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_meta_gradient_through_running_statistics_of_each_task(name: str, norm: str) -> None:
    stock = NETWORKS[name](RUNNING[norm])
    ours, xs = lk.convert(copy.deepcopy(stock)), torch.randn(2, 6, 3, 6, 6, dtype=torch.float64)
    buffers = {n: torch.stack([b, b]) for n, b in stock.named_buffers()}

    def mapped(p: dict[str, Tensor]) -> Any:
        def one(x: Tensor, own: dict[str, Tensor]) -> Any:
            loss = with_statistics(ours, x)
            gradients, own = grad(loss, has_aux=True)(p, own)
            return loss({n: t - 0.1 * gradients[n] for n, t in p.items()}, own)

        losses, kept = vmap(one)(xs, buffers)
        return losses.sum(), kept

    got, kept = grad(mapped, has_aux=True)({n: p.detach() for n, p in ours.named_parameters()})
    weights, total = dict(stock.named_parameters()), list[Tensor]()
    for task, x in enumerate(xs):
        loss = with_statistics(stock, x)
        value, own = loss(weights, dict(stock.named_buffers()))
        gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True)
        value, own = loss({n: p - 0.1 * g for (n, p), g in zip(weights.items(), gradients)}, own)
        total.append(value)
        for key, value in own.items():
            torch.testing.assert_close(kept[key][task], value, **GRADIENT)
    want = torch.autograd.grad(torch.stack(total).sum(), list(weights.values()))
    for key, value in zip(weights, want):
        torch.testing.assert_close(got[key], value, **GRADIENT, msg=functools.partial("{}: {}".format, key))


def test_a_learner_under_transforms_computes_its_norms_by_their_definition() -> None:
    model, x = layers(NORMS["batch"]), torch.randn(6, 3, 6, 6, dtype=torch.float64)
    learner = adapt(model, x, LABELS, pattern="ANIL", steps=1, lr=0.1)
    network = learner.to_module()

    def curvature(f: Any) -> Tensor:
        inner = vmap(grad(lambda q: f(q).logsumexp(1).pow(2).sum()))
        return grad(lambda q: inner(torch.stack([q, 2 * q])).pow(2).sum())(x)

    def definition(q: Tensor) -> Tensor:
        with ByDefinition():
            result: Tensor = network(q)
        return result

    torch.testing.assert_close(curvature(learner), curvature(definition), **GRADIENT)


def test_norms_by_their_definition_are_torchs() -> None:
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    w, b, mean, var = (torch.rand(4, dtype=torch.float64) + 0.5 for _ in range(4))
    calls: list[Any] = [
        lambda: F.batch_norm(x, None, None, w, b, True, eps=0.1),
        lambda: F.batch_norm(x, None, None, training=True),
        lambda: F.batch_norm(x, mean, var, w, b, False),
        lambda: F.instance_norm(x, weight=w, bias=b),
        lambda: F.instance_norm(x, mean, var, use_input_stats=False),
        lambda: F.group_norm(x, 2, w, b),
        lambda: F.group_norm(x[:, :, 0, 0], 4, eps=0.3),
        lambda: F.layer_norm(x, (3, 2), eps=0.2),
        lambda: F.layer_norm(x, [2], weight=w[:2], bias=b[:2]),
    ]
    for number, call in enumerate(calls):
        with ByDefinition():
            got = call()
        torch.testing.assert_close(got, call(), **GRADIENT, msg=functools.partial("call {}: {}".format, number))


@pytest.mark.parametrize("shape", [(7, 5), (9, 4, 6), (3, 5, 8, 7), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_moments_are_those_of_var_mean(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 100).to(dtype)
    last = (
        x.contiguous(memory_format=torch.channels_last)
        if len(shape) == 4
        else x.movedim(1, -1).contiguous().movedim(-1, 1)
    )
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(x, axes, correction=0)
    exact_variance, exact_mean = torch.var_mean(x.double(), axes, correction=0)
    for layout in (x, last, x.requires_grad_()):
        found = moments(layout)
        assert not any(t.requires_grad for t in found) and {t.dtype for t in found} == {dtype}
        for mine, stock, exact in zip(found, (mean, variance), (exact_mean, exact_variance)):
            if dtype == torch.float64:  # of which there is no truth
                torch.testing.assert_close(mine, stock, **EXACT)
            else:
                assert_as_exact("moments", mine, stock, exact)


def test_moments_under_a_transform_and_a_compiler_are_torchs_own() -> None:
    x = torch.randn(3, 6, 4, 5)
    want = torch.stack([torch.stack(moments(one)) for one in x])
    torch.testing.assert_close(torch.func.vmap(lambda one: torch.stack(moments(one)))(x), want)
    compiled = torch.compile(moments, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.stack(compiled(x[0])), want[0])
