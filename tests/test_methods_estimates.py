"""Gradients by forward differentiation, and patterns by Fisher information, in float64."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from loops import CONV4
from torch import Tensor, nn

from lambda_maml import Pattern, adapt, explain, rules
from lambda_maml.methods import descend, fisher, forward_gradient
from lambda_maml.places import Problem, Turn
from lambda_maml.solved import posed

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own forward mode, when it is first used
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning"),
]
XS, YS, XQ, _ = CONV4.task()


def problem_of(
    pattern: str, model: nn.Module = CONV4.network, xs: Tensor = XS, ys: Tensor = YS, task: int = 0
) -> Problem:
    return posed(
        model, xs, ys, pattern, "follow", False, F.cross_entropy, descend(rules.sgd(0.1), 1), Turn(task=task)
    )[1]  # fmt: skip


def exact(problem: Problem) -> dict[str, Tensor]:
    now = {n: p.detach().requires_grad_() for n, p in problem.meta.items()}
    return dict(zip(now, torch.autograd.grad(problem.loss(now), list(now.values()))))


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.detach().flatten() for v in values.values()])


@pytest.mark.parametrize("pattern", ["00001", "00011", "11111"])
def test_one_direction_gives_its_own_derivative(pattern: str) -> None:
    problem = problem_of(pattern)
    loss, grads = forward_gradient()(problem, problem.meta, 3)
    torch.testing.assert_close(loss, problem.loss(problem.meta).detach())
    draw = problem.random(3)
    way = torch.cat([torch.randn(p.shape, generator=draw, dtype=p.dtype).flatten() for p in problem.meta.values()])
    torch.testing.assert_close(flat(grads), (flat(exact(problem)) @ way) * way)
    again = forward_gradient()(problem, problem.meta, 3)[1]
    assert torch.equal(flat(grads), flat(again)) and not torch.equal(
        flat(grads), flat(forward_gradient()(problem_of(pattern, task=1), problem.meta, 3)[1])
    )


@pytest.mark.parametrize("at", ["weights", "activities"])
def test_the_mean_of_many_is_the_gradient(at: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    xs, ys = torch.randn(1, 6, dtype=torch.float64), torch.tensor([1])
    problem = problem_of("1", model, xs, ys)
    want, draws = flat(exact(problem)), 800
    found = torch.stack([flat(forward_gradient(1, at)(problem, problem.meta, k)[1]) for k in range(draws)])
    spread = found.std(0) / draws**0.5
    assert bool(((found.mean(0) - want).abs() < 4 * spread + 1e-12).all())
    # bias and weight of an output are perturbed together: 21 numbers in the place of p q = 18
    factor = float((found - want).square().sum() / draws / want.square().sum())
    assert factor == pytest.approx({"weights": 22.0, "activities": 4.0}[at], rel=0.15)


def test_unit_directions_in_place_of_random_ones_give_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    xs, ys = XS[:1], YS[:1]
    problem = problem_of("00001", xs=xs, ys=ys)
    units = iter(torch.eye(2, dtype=torch.float64).unsqueeze(1))
    monkeypatch.setattr(sys.modules[forward_gradient.__module__], "_normal", lambda *_: next(units))
    _, grads = forward_gradient(2, "activities")(problem, problem.meta, 0)
    torch.testing.assert_close(2 * flat(grads), flat(exact(problem)))


@pytest.mark.parametrize("pattern", ["00011", "11111,00001"])
def test_it_descends_and_says_what_it_cannot(pattern: str) -> None:
    solver = descend(rules.sgd(0.005), 6, estimator=forward_gradient(16))
    learner = adapt(CONV4.network, XS, YS, pattern=pattern, solver=solver)
    assert F.cross_entropy(learner(XS), YS).item() < F.cross_entropy(CONV4.network(XS), YS).item()
    with pytest.raises(ValueError, match="adapt in first order"):
        adapt(CONV4.network, XS, YS, pattern=pattern, solver=solver, second_order=True)
    head = descend(rules.sgd(0.01), 1, estimator=forward_gradient(at="activities"))
    with pytest.raises(ValueError, match="activities are those of the head, pattern 00011 moves"):
        adapt(CONV4.network, XS, YS, pattern="00011", solver=head)
    with pytest.raises(ValueError, match="directions of at least 1"):
        forward_gradient(0)


def test_the_potentials_are_those_of_a_hand_computation() -> None:
    problem = problem_of("11111")
    got = fisher(0.5).potentials(problem)
    x, want = XS, []
    outputs = []
    for module in CONV4.network.children():
        parts = list(module.children()) or [module]
        for part in parts:
            x = part(x)
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                outputs.append(x)
    for a, g in zip(outputs, torch.autograd.grad(F.cross_entropy(x, YS), outputs)):
        total = 0.0
        for channel in range(a.shape[1]):
            for n in range(len(a)):
                total += float((a[n, channel] * g[n, channel]).sum().detach()) ** 2
        want.append(total / (2 * len(a)))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want))


def test_a_pattern_is_chosen_within_its_budget() -> None:
    full = Pattern("11111").cost(CONV4.network, XS).step
    chosen = {budget: fisher(budget)(problem_of("11111")) for budget in (1e-9, 0.05, 0.3, 1.0)}
    assert str(chosen[1.0]) == "11111" and str(chosen[1e-9]) == "00001"
    for budget in (0.05, 0.3):
        assert chosen[budget].cost(CONV4.network, XS).step <= budget * full
    values = fisher(0.3).potentials(problem_of("11111"))

    def asked(pattern: Pattern) -> float:
        return sum(v for bit, v in zip(str(pattern), values) if bit == "1")

    costs = problem_of("11111").costs(Pattern.all(5))
    assert all(costs[p] == p.cost(CONV4.network, XS).step for p in (Pattern("00001"), Pattern("01010")))
    affordable = [p for p, cost in costs.items() if cost <= 0.3 * full]
    assert asked(chosen[0.3]) == max(map(asked, affordable))
    with pytest.raises(ValueError, match=r"budget must be in \(0, 1\]"):
        fisher(0.0)


def test_the_losss_scale_has_no_part_in_the_choice() -> None:
    one, ten = (
        posed(CONV4.network, XS, YS, "MAML", "follow", False, loss, fisher(0.3), Turn())[1]
        for loss in (F.cross_entropy, lambda logits, y: 10 * F.cross_entropy(logits, y))
    )
    torch.testing.assert_close(
        torch.tensor(fisher(0.3).potentials(ten)), 100 * torch.tensor(fisher(0.3).potentials(one))
    )
    assert fisher(0.3)(one) == fisher(0.3)(ten)


def test_a_chosen_pattern_is_adapted_with_as_by_its_name() -> None:
    chooser = fisher(0.3)
    bits = chooser(problem_of("11111"))
    want = adapt(CONV4.network, XS, YS, pattern=bits, steps=2, lr=0.1)
    got = adapt(CONV4.network, XS, YS, pattern=chooser, steps=2, lr=0.1)
    assert torch.equal(got(XQ), want(XQ)) and f"under {bits}" in explain(CONV4.network, XS, YS, pattern=chooser)
