"""Adaptation in closed form: the head's ridge regression and the neural tangent kernel, by their identities, in
float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, close
from machine import needs_native
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lambda_kernels import agreement, layers, to_torch, use_backend
from lambda_maml import Pattern, adapt, models
from lambda_maml.inner import remembered
from lambda_maml.methods import ntk, ridge_head
from lambda_maml.methods.ntk import MatrixFunction
from lambda_maml.places import Learned, Problem

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own forward mode, when it is first used
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning"),
]
PATTERNS = pytest.mark.parametrize("pattern", ["00001", "00011", "11111"])
TIGHT: Any = {"rtol": 0.0, "atol": 1e-14}  # the digits that the identities are given with, for parameters below 1
LIMIT: Any = {"rtol": 0.0, "atol": 1e-10}  # of descent that has come to its limit


def task(ways: int = 2, shots: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    xs, ys, xq, _ = CONV4._replace(ways=ways).task(shots=shots)
    return xs, ys, xq


def head(learner: nn.Module) -> Tensor:
    """[C, F + 1]"""
    found: dict[str, Tensor] = dict(learner.named_parameters())
    return torch.cat([found["head.weight"], found["head.bias"].unsqueeze(1)], 1).detach()


def phi(xs: Tensor) -> Tensor:
    """[N, F + 1]: what the head reads, and 1."""
    features = nn.Sequential(*list(CONV4.network.children())[:-1])(xs).detach()
    return torch.cat([features, torch.ones(len(xs), 1, dtype=torch.float64)], 1)


def jacobian(names: tuple[str, ...], xs: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs [N C] and their Jacobian [N C, parameters], by torch on the network itself."""
    own = dict(CONV4.network.named_parameters())

    def outputs(moved: dict[str, Tensor]) -> Tensor:
        return functional_call(CONV4.network, {**own, **moved}, (xs,)).flatten()

    moved = {n: own[n].detach() for n in names}
    by_name = jacrev(outputs)(moved)
    return outputs(moved).detach(), torch.cat([by_name[n].flatten(1) for n in names], 1).detach()


@pytest.mark.parametrize("shots", [1, 3])
def test_the_ridge_head_is_the_limit_of_descent_on_its_objective(shots: int) -> None:
    xs, ys, _ = task(shots=shots)
    features, want, lam = phi(xs), head(CONV4.network).clone(), 0.5
    start, targets = want.clone(), F.one_hot(ys, 2).double()
    rate = 1 / (torch.linalg.eigvalsh(features.T @ features)[-1] + lam)
    for _ in range(2000):
        want -= rate * ((features @ want.T - targets).T @ features + lam * (want - start))
    found = adapt(CONV4.network, xs, ys, pattern="00001", solver=ridge_head(lam))
    torch.testing.assert_close(head(found), want, **LIMIT)
    same = adapt(CONV4.network, xs, ys, pattern="00001", solver=ntk(time=math.inf, ridge=lam))
    torch.testing.assert_close(head(same), want, **LIMIT)


@PATTERNS
@pytest.mark.parametrize("kind", ["time", "steps", "ridge"])
def test_the_order_of_the_support_set_does_not_matter(kind: str, pattern: str) -> None:
    xs, ys, xq = task(shots=2)
    solver = {"time": ntk(time=2.0), "steps": ntk(steps=3, lr=1e-3), "ridge": ntk(time=math.inf, ridge=0.1)}[kind]
    order = torch.tensor([2, 0, 3, 1])
    want = adapt(CONV4.network, xs, ys, pattern=pattern, solver=solver)(xq)
    close(adapt(CONV4.network, xs[order], ys[order], pattern=pattern, solver=solver)(xq), want, kind)


def test_without_a_ridge_the_support_set_is_fitted() -> None:
    xs, ys, _ = task(shots=1)
    for lam in (0.0, 1e-9):
        learner = adapt(CONV4.network, xs, ys, pattern="00001", solver=ridge_head(lam))
        torch.testing.assert_close(learner(xs), F.one_hot(ys, 2).double(), rtol=0, atol=1e-6 if lam else 1e-11)  # lam
    for pattern in ("00001", "00011", "11111"):
        learner = adapt(CONV4.network, xs, ys, pattern=pattern, solver=ntk(time=math.inf, ridge=1e-12))
        # to the ridge over the kernel's least eigenvalue
        torch.testing.assert_close(learner(xs), F.one_hot(ys, 2).double(), rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="the kernel of 4 support outputs is singular with the ridge 0: raise"):
        adapt(CONV4.network, xs.repeat(2, 1, 1, 1), ys.repeat(2), pattern="00001", solver=ridge_head(0.0))


def test_a_scale_is_what_class_numbers_are_fitted_to() -> None:
    xs, ys, _ = task(shots=3)
    start = head(CONV4.network)
    scaled = adapt(CONV4.network, xs, ys, pattern="00001", solver=ridge_head(0.7, scale=4.0).double())
    rest = 4.0 * F.one_hot(ys, 2).double() - phi(xs) @ start.T
    kernel = phi(xs) @ phi(xs).T + 0.7 * torch.eye(len(xs), dtype=torch.float64)
    torch.testing.assert_close(head(scaled), start + torch.linalg.solve(kernel, rest).T @ phi(xs), **TIGHT)
    learned = ridge_head(0.7, learned=True, scale=4.0).double()
    learner = adapt(CONV4.network, xs, ys, pattern="00001", solver=learned, second_order=True)
    F.cross_entropy(learner(xs), ys).backward()
    assert all(p.grad is not None and p.grad != 0 for p in (learned.log_lam, learned.log_scale) if p is not None)
    assert len(list(learned.parameters())) == 2
    for scale in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="ridge_head: scale must be above 0"):
            ridge_head(scale=scale)


@needs_native
@pytest.mark.parametrize("solver", [ridge_head(0.7, scale=3.0), ntk(time=2.0)], ids=["ridge", "ntk"])
def test_a_prepared_call_is_the_first_one_again(solver: Any) -> None:
    """In float64; with another task, other parameters of the network, and what is wrong."""
    network = copy.deepcopy(CONV4.network)
    xs, ys, _ = task()
    more, _, _ = task(shots=3)

    def long_way(images: Tensor) -> Tensor:  # of a class of its own, tensors are not taken by what is prepared
        return head(adapt(network, images.as_subclass(_Own), ys, pattern="00001", solver=solver))

    adapt(network, xs, ys, pattern="00001", solver=solver)
    assert remembered.features_again(network, xs, ys, "00001", "follow") is not None
    for images in (xs, more[: len(xs)]):
        found = adapt(network, images, ys, pattern="00001", solver=solver)
        # features read off a gradient: two roundings
        torch.testing.assert_close(head(found), long_way(images), rtol=0, atol=1e-13)
    with torch.no_grad():
        network.get_parameter("block2.conv.weight").mul_(1.5)
        network.get_parameter("head.weight").add_(0.1)
    found = adapt(network, xs, ys, pattern="00001", solver=solver)
    torch.testing.assert_close(head(found), long_way(xs), rtol=0, atol=1e-13)  # as above
    F.cross_entropy(found(xs), ys).backward()
    for name in ("head.weight", "block1.conv.weight"):
        assert network.get_parameter(name).grad is not None
    for wrong in (ys - 1, ys + 1):
        with pytest.raises(ValueError, match="the network's outputs from 0 to 1"):
            adapt(network, xs, wrong, pattern="00001", solver=solver)
    with pytest.raises(FloatingPointError, match="diverged"):
        adapt(network, xs * math.nan, ys, pattern="00001", solver=solver)


def test_a_prepared_call_says_that_its_kernel_is_singular() -> None:
    xs, ys, _ = task(shots=1)
    adapt(CONV4.network, xs.repeat(2, 1, 1, 1), ys.repeat(2), pattern="00001", solver=ridge_head(1.0))
    with pytest.raises(ValueError, match="the kernel of 4 support outputs is singular with the ridge 0: raise"):
        adapt(CONV4.network, xs.repeat(2, 1, 1, 1), ys.repeat(2), pattern="00001", solver=ridge_head(0.0))


class _Own(Tensor):
    pass


@PATTERNS
def test_steps_are_those_of_descent_on_the_linearised_network(pattern: str) -> None:
    xs, ys, xq = task(shots=2)
    names = Pattern(pattern).parameters(CONV4.network)
    outputs, j = jacobian(names, xs)
    targets = F.one_hot(ys, 2).double().flatten()
    rate = 0.5 / float(torch.linalg.eigvalsh(j @ j.T)[-1])
    moved = torch.zeros(j.shape[1], dtype=torch.float64)
    for _ in range(200):
        moved -= rate * (j.T @ (outputs + j @ moved - targets))
    learner = adapt(CONV4.network, xs, ys, pattern=pattern, solver=ntk(steps=200, lr=rate))
    after = learner.parameters_dict()
    found = torch.cat([(after[n] - CONV4.network.get_parameter(n)).flatten() for n in names])
    torch.testing.assert_close(found.detach(), moved, **TIGHT)
    query, k = jacobian(names, xq)
    # a product of some hundred terms more
    torch.testing.assert_close(learner(xq).detach(), (query + k @ moved).view(-1, 2), rtol=1e-12, atol=1e-13)
    flow = adapt(CONV4.network, xs, ys, pattern=pattern, solver=ntk(time=200 * rate))(xq)
    assert 1e-6 < float((flow - learner(xq)).detach().abs().max()) < 0.1  # time goes on within a step


def test_steps_of_the_head_are_those_of_the_network_itself() -> None:
    xs, ys, xq = task(shots=2)
    want = adapt(
        CONV4.network, xs, ys, pattern="00001", steps=5, lr=0.02,
        loss=lambda logits, y: (logits - F.one_hot(y, 2)).square().sum() / 2,
    )  # fmt: skip
    found = adapt(CONV4.network, xs, ys, pattern="00001", solver=ntk(steps=5, lr=0.02))
    torch.testing.assert_close(head(found), head(want), **TIGHT)
    torch.testing.assert_close(found(xq), want(xq), **TIGHT)


def test_the_kernel_of_the_head_is_that_of_the_features_for_each_output() -> None:
    xs, _, _ = task(shots=2)
    _, j = jacobian(Pattern("00001").parameters(CONV4.network), xs)
    features = phi(xs)
    torch.testing.assert_close(j @ j.T, torch.kron(features @ features.T, torch.eye(2).double()), **TIGHT)


@PATTERNS
def test_no_time_changes_nothing(pattern: str) -> None:
    xs, ys, xq = task()
    for solver in (ntk(time=0.0), ntk(steps=0, lr=0.1)):
        close(adapt(CONV4.network, xs, ys, pattern=pattern, solver=solver)(xq), CONV4.network(xq), pattern)


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda: ridge_head(0.3, learned=True), "00001"),
        (lambda: ntk(time=2.0), "00001"),
        (lambda: ntk(time=2.0), "00011"),
        (lambda: ntk(steps=4, lr=1e-2, ridge=0.1), "00011"),
    ],
    ids=["ridge", "time of the head", "time", "steps"],
)
def test_the_outer_gradient_goes_through_the_closed_form(make: Any, pattern: str) -> None:
    solver = make().double()
    xs, ys, xq = task(shots=2)
    yq = torch.tensor([0, 1, 1])
    model, leaves = CONV4.network, [*CONV4.network.parameters(), *solver.parameters()]

    def loss() -> Tensor:
        return F.cross_entropy(adapt(model, xs, ys, pattern=pattern, solver=solver, second_order=True)(xq), yq)

    grads = torch.autograd.grad(loss(), leaves, allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in leaves]
    slope = sum(float((g * w).sum()) for g, w in zip(grads, ways) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, w in zip(leaves, ways):
                p += sign * 1e-5 * w
            values.append(float(loss()))
            for p, w in zip(leaves, ways):
                p -= sign * 1e-5 * w
    assert abs(slope - (values[0] - values[1]) / 2e-5) < 1e-6 * max(1.0, abs(slope))


def test_an_eigenvalue_that_stands_twice_has_a_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.tensor([2.0, 2.0, 0.5, 0.0], dtype=torch.float64)) @ basis.T
    for solver in (ntk(time=1.5), ntk(steps=3, lr=0.2)):
        assert torch.autograd.gradcheck(
            lambda m, s=solver: MatrixFunction.apply((m + m.T) / 2, s._phi, s._limit),
            [matrix.clone().requires_grad_()],
            atol=1e-6,  # of gradcheck's central difference
        )


def test_what_does_not_fit_is_said() -> None:
    xs, ys, _ = task()
    with pytest.raises(ValueError, match=r"ridge_head: pattern 00011 moves .*: give the pattern 'head', or take ntk"):
        adapt(CONV4.network, xs, ys, pattern="00011", solver=ridge_head(1.0))
    with pytest.raises(ValueError, match="00011,00001 is a schedule"):
        adapt(CONV4.network, xs, ys, pattern="00011,00001", solver=ntk(time=1.0))
    with pytest.raises(ValueError, match=r"labels for a squared loss.*got torch.float64 \[4, 3\]"):
        adapt(
            CONV4.network, xs, torch.randn(4, 3).double(), pattern="00001", solver=ntk(time=1.0),
            loss=F.mse_loss,
        )  # fmt: skip
    for wrong in (lambda: ntk(), lambda: ntk(time=1.0, steps=3), lambda: ntk(steps=3), lambda: ntk(time=-1.0)):
        with pytest.raises(ValueError, match="ntk: "):
            wrong()
    for lam, learned in ((-1.0, False), (math.inf, False), (0.0, True)):
        with pytest.raises(ValueError, match="ridge_head: lam"):
            ridge_head(lam, learned)
    with pytest.raises(ValueError, match="the solver's predictions are not those of a network"):
        adapt(CONV4.network, xs, ys, pattern="00011", solver=ntk(time=1.0), statistics="support")


def test_numbers_of_any_kind_are_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)).double()
    xs = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(1)
    ys = torch.randn(5, 1, generator=generator, dtype=torch.float64)
    learner = adapt(network, xs, ys, pattern="11", solver=ntk(time=math.inf, ridge=1e-10), loss=F.mse_loss)
    torch.testing.assert_close(learner(xs), ys, rtol=0, atol=1e-4)  # of the ridge over a small eigenvalue


@needs_native
def test_a_heads_features_come_by_one_operation_and_are_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In first order no block runs by itself; float32 is as near to the truth as stock PyTorch's."""
    torch.manual_seed(0)
    model = models.conv4(ways=3, in_channels=1, width=5, image_size=16)
    xs, ys = torch.randn(6, 1, 16, 16), torch.arange(3).repeat(2)
    found: list[Tensor] = []

    def keep(problem: Problem) -> Learned:
        found.append(problem.features(problem.meta))
        return Learned(problem.meta)

    with use_backend("native"):
        adapt(model, xs, ys, pattern="00001", solver=keep)  # the network is looked into
        monkeypatch.setattr(layers, "fused_block", lambda *args: pytest.fail("a block ran by itself"))
        adapt(model, xs, ys, pattern="00001", solver=keep)
    monkeypatch.undo()
    stock: Any = to_torch(model)
    plain = nn.Sequential(*list(stock.children())[:-1])
    stocks, exact = plain(xs).detach(), plain.double()(xs.double()).detach()
    assert not found[1].requires_grad and torch.equal(*found)
    wrong, theirs = (agreement.distance([one], [exact]) for one in (found[1], stocks))
    assert wrong <= 2 * theirs + 1e-6 * float(exact.norm())
