"""Neural fields: which points are learned from, in which length, and towards what; and the loss without an inner
loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import CONV4
from small_runs import TRAIN
from torch import Tensor, nn
from torch.func import functional_call

from lambda_maml import Pattern, adapt, rules
from lambda_maml.methods import (
    backward,
    bootstrap,
    descend,
    pictures,
    psnr,
    query_loss,
    rescaled,
    sines,
    siren,
    steepest,
    top_gradient,
)
from lambda_maml.parts import Parts
from lambda_maml.places import Learned, Problem, Turn
from lambda_maml.settings import Settings
from lambda_maml.solved import learned_by, posed

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = pytest.mark.parametrize("pattern", ["1111", "0011", "1111,0001"])
LR = 1e-2


def field() -> nn.Sequential:
    torch.manual_seed(0)
    return siren(2, 1, width=12, layers=4).double()


def signal(k: int = 0) -> tuple[Tensor, Tensor]:
    xs, ys, _, _ = pictures(TRAIN)(k, 1)[0]
    return xs[::4].double(), ys[::4].double()


def posed_field(pattern: str, second_order: bool = False, solver: Any = None) -> tuple[nn.Sequential, Problem]:
    model, (xs, ys) = field(), signal()
    solver = descend(rules.sgd(LR), 1) if solver is None else solver
    _, problem = posed(model, xs, ys, pattern, "follow", second_order, F.mse_loss, solver, Turn())
    return model, problem


def plain(
    model: nn.Module, xs: Tensor, ys: Tensor, pattern: str, steps: int, step: Callable[..., Any]
) -> dict[str, Tensor]:
    """Steps written out: step(loss of rows, names, params) gives changes by name."""
    own: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.named_parameters()}
    for k in range(steps):
        names = Pattern(pattern).parameters(model, step=k)
        now = {n: own[n].detach().requires_grad_() for n in names}

        def gradient(rows: Any, now: dict[str, Tensor] = now) -> dict[str, Tensor]:
            loss = F.mse_loss(functional_call(model, {**own, **now}, (xs[rows],)), ys[rows])
            return dict(zip(now, torch.autograd.grad(loss, list(now.values()))))

        own.update({n: own[n] - LR * g for n, g in step(gradient, {**own, **now}).items()})
    return own


def best_rows(model: nn.Module, params: dict[str, Tensor], xs: Tensor, ys: Tensor, share: float) -> Tensor:
    with torch.no_grad():
        last = list(model.children())
        twin = nn.Sequential(*last[:-1])
        features = functional_call(
            twin, {n: p for n, p in params.items() if not n.startswith(f"{len(last) - 1}.")}, (xs,)
        )
        error = ys - functional_call(model, params, (xs,))
        outer = torch.einsum("nc,nf->ncf", error, torch.cat([features, torch.ones(len(xs), 1).double()], 1))
        return outer.flatten(1).norm(dim=1).topk(int(share * len(xs))).indices.sort().values


def test_scores_are_the_norms_of_the_last_layers_gradients() -> None:
    model, problem = posed_field("0011")
    got = top_gradient(0.25).scores(problem, problem.meta)
    xs, ys = signal()
    for n in (0, 17, 40):
        own = [p for name, p in model.named_parameters() if name.startswith("6.")]
        half = (model(xs[n : n + 1]) - ys[n : n + 1]).square().sum() / 2
        grads = torch.autograd.grad(half, own)
        torch.testing.assert_close(got[n], torch.cat([g.flatten() for g in grads]).norm())


def test_scores_of_classes_and_of_a_frozen_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    xs, ys = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    found = []
    for pattern in ("01", "10"):
        _, problem = posed(model, xs, ys, pattern, "follow", False, F.cross_entropy, descend(rules.sgd(LR), 1), Turn())
        found.append(top_gradient(0.5).scores(problem, problem.meta))
    grads = torch.autograd.grad(F.cross_entropy(model(xs[2:3]), ys[2:3]), list(model.parameters())[2:])
    for got in found:
        torch.testing.assert_close(got[2], torch.cat([g.flatten() for g in grads]).norm())


@PATTERNS
def test_steps_on_the_best_points_are_those_of_the_paper(pattern: str) -> None:
    model, (xs, ys) = field(), signal()
    want = plain(model, xs, ys, pattern, 3, lambda gradient, params: gradient(best_rows(model, params, xs, ys, 0.25)))
    solver = descend(rules.sgd(LR), 3, estimator=backward(select=top_gradient(0.25)))
    got = adapt(model, xs, ys, pattern=pattern, solver=solver, loss=F.mse_loss).parameters_dict()
    torch.testing.assert_close({n: p.detach() for n, p in got.items()}, want)


@PATTERNS
def test_all_points_are_plain_descent_bit_for_bit(pattern: str) -> None:
    model, (xs, ys) = field(), signal()
    given: dict[str, Any] = {"pattern": pattern, "loss": F.mse_loss, "second_order": True}
    want = adapt(model, xs, ys, solver=descend(rules.sgd(LR), 3, estimator=backward()), **given).parameters_dict()
    for share in (top_gradient(1.0),):
        whole = descend(rules.sgd(LR), 3, estimator=backward(select=share))
        got = adapt(model, xs, ys, solver=whole, **given).parameters_dict()
        assert all(torch.equal(got[n], want[n]) for n in want)


@PATTERNS
def test_a_rescaled_step_has_the_length_of_one_gradient_and_the_direction_of_another(pattern: str) -> None:
    model, (xs, ys) = field(), signal()

    def step(gradient: Any, params: dict[str, Tensor]) -> dict[str, Tensor]:
        whole, some = gradient(slice(None)), gradient(best_rows(model, params, xs, ys, 0.25))
        length, full = (torch.cat([g.flatten() for g in each.values()]).norm() for each in (some, whole))
        assert length > full  # the best points have more to teach
        return {n: length / full * g for n, g in whole.items()}

    want = plain(model, xs, ys, pattern, 3, step)
    solver = descend(rules.sgd(LR), 3, estimator=rescaled(top_gradient(0.25)))
    got = adapt(model, xs, ys, pattern=pattern, solver=solver, loss=F.mse_loss).parameters_dict()
    torch.testing.assert_close({n: p.detach() for n, p in got.items()}, want)


@pytest.mark.parametrize("pattern", ["1111", "0011"])
def test_the_bootstrap_is_the_way_that_is_left(pattern: str) -> None:
    solver = descend(rules.sgd(LR), 2, estimator=backward(select=top_gradient(0.5)))
    model, problem = posed_field(pattern, second_order=True, solver=solver)
    learned = learned_by(solver, problem)
    xs, ys = signal()
    names = problem.names
    own = {n: (learned.params.get(n, p)).detach() for n, p in model.named_parameters()}
    start = {n: own[n].clone() for n in names}
    for _ in range(3):
        now = {n: own[n].requires_grad_() for n in names}
        loss = F.mse_loss(functional_call(model, {**own, **now}, (xs,)), ys)
        own.update(
            {n: (now[n] - 0.05 * g).detach() for n, g in zip(names, torch.autograd.grad(loss, list(now.values())))}
        )
    want = 7.0 * torch.cat([(start[n] - own[n]).flatten() for n in names]).norm()
    found = bootstrap(3, 0.05, 7.0)(problem, learned, xs, ys)
    torch.testing.assert_close(found, want)
    assert all(g is not None for g in torch.autograd.grad(found, [model.get_parameter("4.weight")], allow_unused=True))
    query = query_loss(F.mse_loss)
    alone, none = query(problem, learned, xs, ys), (query + bootstrap(3, 0.05, 0.0))(problem, learned, xs, ys)
    assert torch.equal(alone, none)


def test_a_field_is_meta_trained_from_its_best_points() -> None:
    model = field()
    solver = descend(rules.sgd(LR), 2, estimator=backward(select=top_gradient(0.5)))
    parts = Parts(solver=solver, objective=query_loss(F.mse_loss) + bootstrap(2, 0.05, 0.1))
    optimiser, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for iteration in range(8):
        optimiser.zero_grad()
        tasks, settings = pictures(TRAIN)(0, 2), Settings(pattern="0111")
        losses.append(parts.gradient(model, tasks, [0, 1], settings, iteration, loss=F.mse_loss))
        optimiser.step()
    assert losses[-1] < losses[0]


def test_a_signal_is_an_image_or_a_curve() -> None:
    source = pictures(TRAIN, seed=3)
    xs, ys, xq, _ = source(5, 1)[0]
    assert xs.shape == (256, 2) and ys.shape == (256, 1) and xs.min() == -1 and xs.max() == 1 and xq is xs
    image = torch.as_tensor(TRAIN.images[source.order[5]])[3, 7].float() / 255
    torch.testing.assert_close(ys[3 * 16 + 7], image)
    assert torch.equal(source(5 + len(TRAIN.images), 1)[0].ys, ys) and not torch.equal(source(6, 1)[0].ys, ys)
    one, again = sines(2, 3, of=25), sines(27, 1, of=25)[0]
    assert len(one) == 3 and one[0].xs.shape == (10, 1) and not torch.equal(one[0].xs, again.xs)
    x = torch.cat([one[0].xs, again.xs]).flatten().double()
    basis = torch.stack([x.sin(), x.cos()], 1)
    y = torch.cat([one[0].ys, again.ys]).double()
    rest = y - basis @ torch.linalg.lstsq(basis, y).solution
    assert float(rest.abs().max()) < 1e-5  # the same curve at other points, in float32
    assert float(psnr(torch.tensor(0.001))) == pytest.approx(30.0)


def test_a_field_starts_in_the_range_of_its_values() -> None:
    torch.manual_seed(0)
    model = siren(2, 3, width=64, layers=5)
    xs = torch.rand(400, 2) * 2 - 1
    assert abs(float(model(xs).detach().mean()) - 0.5) < 0.1
    assert float(model.get_parameter("0.weight").detach().abs().max()) <= 0.5 and len(list(model)) == 9
    assert float(model.get_parameter("2.weight").detach().abs().max()) <= math.sqrt(6 / 64) / 30


@pytest.mark.parametrize("pattern", ["11111", "00011"])
def test_the_loss_without_an_inner_loop_foresees_one_step(pattern: str) -> None:
    xs, ys, xq, yq = CONV4.task()
    both, labels = torch.cat([xs, xq]), torch.cat([ys, yq])
    _, problem = posed(
        CONV4.network, xs, ys, pattern, "follow", True, F.cross_entropy, descend(rules.sgd(LR), 1), Turn()
    )
    apart = []
    for alpha in (2e-6, 1e-6):
        foreseen = steepest(alpha)(problem, Learned(problem.start), xq, yq)
        moved = adapt(CONV4.network, both, labels, pattern=pattern, steps=1, lr=alpha)
        apart.append(abs(float((foreseen - F.cross_entropy(moved(both), labels)).detach())))
    assert apart[0] / apart[1] == pytest.approx(4.0, rel=0.1)  # of order alpha^2
    grads = torch.autograd.grad(foreseen, list(CONV4.network.parameters()), allow_unused=True)
    assert sum(g is not None for g in grads) >= 16


def test_what_does_not_fit_is_said() -> None:
    xs, ys, _, _ = CONV4.task()
    solver = descend(rules.sgd(LR), 1, estimator=backward(select=top_gradient(0.5)))
    with pytest.raises(ValueError, match="top_gradient: the batch norms of .* take their statistics from all rows"):
        adapt(CONV4.network, xs, ys, pattern="00011", solver=solver)
    for wrong in (lambda: top_gradient(0.0), lambda: bootstrap(0), lambda: steepest(0.0), lambda: siren(layers=1)):
        with pytest.raises(ValueError):
            wrong()
