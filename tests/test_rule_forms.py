"""Rates and rules at their edges: forms, dtypes, what is remembered, what vmap cannot follow."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import far
from programs import program_of
from torch import Tensor, nn
from torch.func import functional_call

from lambda_maml import LambdaMAML, adapt, adapt_tasks, explain, rules
from lambda_maml.inner.rules import rule_of
from lambda_maml.plan import plan_of

STEPS = WAYS = 5


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, WAYS)).double()


def chain() -> Any:
    """A network whose steps are one native call."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    head = nn.Linear(64, WAYS)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), head)


def task() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(10, 6, dtype=torch.float64), torch.arange(10) % WAYS


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(10, 1, 8, 8), torch.arange(10) % WAYS


def by_hand(model: nn.Module, rates: Tensor) -> dict[str, Tensor]:
    """STEPS steps with rates [STEPS, parameters]."""
    xs, ys = task()
    fast = {n: p.detach().clone() for n, p in model.named_parameters()}
    for row in rates.detach():
        fast = {n: p.detach().requires_grad_() for n, p in fast.items()}
        grads = torch.autograd.grad(F.cross_entropy(functional_call(model, fast, xs), ys), list(fast.values()))
        fast = {n: p - rate * g for (n, p), rate, g in zip(fast.items(), row, grads)}
    return fast


def per_step(form: str, model: nn.Module, by_layer: Tensor) -> Any:
    """Rates [STEPS, 2] in a form in which one rate per step of the last bias is as long as the bias."""
    by_name = {n: by_layer[:, 0 if n.startswith("0") else 1] for n, _ in model.named_parameters()}
    return {
        "array": nn.Parameter(by_layer),
        "layers": {"0": by_layer[:, 0], "2": by_layer[:, 1]},
        "tensors": by_name,
    }[form]


@pytest.mark.parametrize("form", ["array", "layers", "tensors"])
def test_rates_per_step_are_not_rates_per_number_of_a_bias_of_that_length(form: str) -> None:
    model, (xs, ys) = mlp(), task()
    by_layer = 0.3 * torch.rand(STEPS, 2, dtype=torch.float64)
    want = by_hand(model, by_layer[:, [0, 0, 1, 1]])
    given: dict[str, Any] = {"pattern": "11", "steps": STEPS, "lr": per_step(form, model, by_layer)}
    for learner in (adapt(model, xs, ys, **given), adapt(model, xs, ys, second_order=True, **given)):
        assert max(far(p, want[n]) for n, p in learner.parameters_dict().items()) < 1e-12
    clone = LambdaMAML(model, given["lr"]).clone()
    for _ in range(STEPS):
        clone.adapt(F.cross_entropy(clone(xs), ys))
    assert max(far(p, want[n]) for n, p in clone.parameters_dict().items()) < 1e-12


def test_a_rate_per_number_of_every_parameter_stays_one() -> None:
    """Meta-SGD, where a bias has as many numbers as there are steps."""
    model, (xs, ys) = mlp(), task()
    rates = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    learner = adapt(model, xs, ys, pattern="11", steps=STEPS, lr=rates)
    fast = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(STEPS):
        fast = {n: p.detach().requires_grad_() for n, p in fast.items()}
        grads = torch.autograd.grad(F.cross_entropy(functional_call(model, fast, xs), ys), list(fast.values()))
        fast = {n: p - rates[n] * g for (n, p), g in zip(fast.items(), grads)}
    assert max(far(p, fast[n]) for n, p in learner.parameters_dict().items()) < 1e-12


@pytest.mark.parametrize("rule", ["sgd", "adam", "clip"])
def test_rates_of_another_dtype_leave_the_networks(rule: str) -> None:
    model, (xs, ys) = mlp().float(), task()
    rates = {n: torch.full(p.shape, 0.1, dtype=torch.float64) for n, p in model.named_parameters()}
    made = {"sgd": rules.sgd, "adam": rules.adam, "clip": lambda r: rules.clip(value=0.1) | rules.sgd(r)}[rule](rates)
    learner = adapt(model, xs.float(), ys, pattern="11", rule=made)
    assert learner(xs.float()).dtype == torch.float32
    clone = LambdaMAML(model, rule=made).clone()
    for _ in range(2):
        clone.adapt(F.cross_entropy(clone(xs.float()), ys))
    assert all(p.dtype == torch.float32 for p in clone.parameters())


@pytest.mark.parametrize("make", [rules.sgd, rules.adam], ids=["sgd", "adam"])
def test_learned_rates_without_gradients_leave_no_graph(make: Any) -> None:
    model, (xs, ys) = mlp(), task()
    with torch.no_grad():
        learner = adapt(model, xs, ys, pattern="11", rule=make(nn.Parameter(torch.tensor(0.1))))
    assert not any(p.requires_grad for p in learner.parameters_dict().values())


@dataclasses.dataclass
class Plainest:
    """A rule that is no module and has no hash."""

    rate: float = 0.1

    def init(self, params: Any) -> Any:
        return ()

    def update(self, grads: Any, state: Any, params: Any, step: Any) -> Any:
        return {n: -self.rate * g for n, g in grads.items()}, state


def test_a_rule_without_a_hash_beside_remembered_calls() -> None:
    model, (xs, ys) = chain(), images()
    for _ in range(2):
        want = adapt(model, xs, ys, pattern="11", lr=0.1)
    learner = adapt(model, xs, ys, pattern="11", rule=Plainest())  # type: ignore[arg-type]
    assert max(far(a, b) for a, b in zip(learner.parameters(), want.parameters())) < 1e-6


def test_a_remembered_call_is_that_of_its_rates() -> None:
    model, (xs, ys) = chain(), images()
    rule = rules.sgd(0.1)
    first = [adapt(model, xs, ys, pattern="11", rule=rule)(xs) for _ in range(3)][-1]
    with pytest.raises(ValueError, match="not both"):
        adapt(model, xs, ys, pattern="11", lr=0.5, rule=rule)
    other = adapt(model, xs, ys, pattern="11", rule=rules.sgd(0.2))(xs)
    assert far(first, other) > 1e-3
    assert far(first, adapt(model, xs, ys, pattern="11", rule=rules.sgd(0.1))(xs)) == 0.0
    assert far(other, adapt(model, xs, ys, pattern="11", lr=0.2)(xs)) == 0.0


# torch itself does so, where it first makes a dual number
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning")
def test_rates_in_a_tensor_are_those_that_it_holds_at_the_call() -> None:
    model, (xs, ys) = chain(), images()
    tensor = torch.tensor([[0.1, 0.2], [0.3, 0.0]])
    for rates in ([[0.1, 0.2], [0.3, 0.0]], [[0.5, 0.2], [0.3, 0.0]]):
        tensor.copy_(torch.tensor(rates))
        assert rule_of(tensor) is rule_of(tensor.tolist())
        for _ in range(2):  # the second call is a prepared one
            got = adapt(model, xs, ys, pattern="11", steps=2, lr=tensor)(xs)
        assert far(got, adapt(model, xs, ys, pattern="11", steps=2, rule=rules.sgd(tensor.tolist()))(xs)) == 0.0
        assert far(got, adapt(model, xs, ys, pattern="11", steps=2, rule=rules.sgd(tensor))(xs)) < 1e-5
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensor, tensor)
        for lr in (tensor.neg(), tensor.clone().requires_grad_(), tensor * torch.inf, dual):
            assert rule_of(lr).lr is lr


class Signs(rules.sgd):
    """A rule made of a built-in one."""

    def update(self, grads: Any, state: Any, params: Any, step: Any) -> Any:
        return super().update({n: g.sign() for n, g in grads.items()}, state, params, step)


@pytest.mark.parametrize("rate", [0.01, [0.01, 0.01]])
def test_a_rule_made_of_sgd_takes_its_own_steps(rate: Any) -> None:
    model, (xs, ys) = chain(), images()
    learner = adapt(model, xs, ys, pattern="11", steps=1, rule=Signs(rate))
    moved = (learner.parameters_dict()["5.weight"] - model[5].weight).detach().abs()
    assert far(moved, torch.full_like(moved, 0.01)) < 1e-6


def test_a_rules_setting_may_change_between_adaptations() -> None:
    model, (xs, ys) = mlp(), task()
    rule = rules.momentum([0.1, 0.1], decay=0.9)
    adapt(model, xs, ys, pattern="11", rule=rule)
    rule.decay = 0.0
    want = adapt(model, xs, ys, pattern="11", lr=0.1).parameters_dict()
    for name, p in adapt(model, xs, ys, pattern="11", rule=rule).parameters_dict().items():
        assert far(p, want[name]) < 1e-12


def test_rates_are_loaded_in_place_or_by_assignment() -> None:
    for assign in (False, True):
        by_step = [nn.Parameter(torch.tensor(0.2)) for _ in range(STEPS)]
        maml = LambdaMAML(mlp(), {"0": nn.Parameter(torch.tensor(0.1)), "2": by_step})
        state = {n: torch.full_like(t, 0.7) if "rate" in n else t.clone() for n, t in maml.state_dict().items()}
        maml.load_state_dict(state, assign=assign)
        assert maml.lr["0"].item() == maml.lr["2"][3].item() == pytest.approx(0.7)
        assert {id(maml.lr["0"])} < {id(p) for p in maml.parameters()}


def test_parameter_lists_are_rates_per_layer() -> None:
    model, (xs, ys) = mlp(), task()
    rates = nn.ParameterList([nn.Parameter(torch.tensor(r, dtype=torch.float64)) for r in (0.1, 0.3)])
    want = by_hand(model, torch.tensor([[0.1, 0.1, 0.3, 0.3]] * STEPS, dtype=torch.float64))
    for name, p in adapt(model, xs, ys, pattern="11", lr=rates).parameters_dict().items():
        assert far(p, want[name]) < 1e-12


def test_rules_say_all_that_they_were_made_with_and_no_values_of_tensors() -> None:
    learned = {"0": nn.Parameter(torch.rand(STEPS)), "2": 0.1}
    assert repr(rules.sgd(learned)) == "sgd(lr={'0': tensor [5], '2': 0.1})"
    joined = rules.clip(norm=1.0) | rules.adam(0.1)
    assert repr(joined) == "clip(norm=1.0) | adam(lr=0.1, betas=(0.9, 0.999), eps=1e-08)"
    pairs = [
        (rules.momentum(0.1, 0.8), rules.momentum(0.1, 0.9)),
        (rules.rmsprop(0.1, 0.8), rules.rmsprop(0.1, 0.9)),
        (rules.weight_decay(0.1), rules.weight_decay(0.2)),
        (rules.clip(value=1.0), rules.clip(norm=1.0)),
    ]
    assert all(repr(a) != repr(b) for a, b in pairs)


class Unmappable(rules.Rule):
    """A rule that `torch.func.vmap` cannot follow."""

    def update(self, grads: Any, state: Any, params: Any, step: Any) -> Any:
        scale = float(sum(g.abs().sum() for g in grads.values()))
        return {n: -0.1 * g / scale for n, g in grads.items()}, state


def test_what_vmap_cannot_follow_slows_down_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    model, (xs, ys) = mlp(), task()
    x, y = torch.stack([xs, 2 * xs]), torch.stack([ys, ys])
    found = adapt_tasks(model, x, y, x, pattern="11", rule=Unmappable())
    for t in range(2):
        assert far(found[t], adapt(model, x[t], y[t], pattern="11", rule=Unmappable())(x[t])) < 1e-12
    assert "task by task" in explain(model, xs, ys, pattern="11", rule=Unmappable())
    assert "as batches" in explain(model, xs, ys, pattern="11")

    def loss(weight: float, z: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(z, target) * weight * float(z.detach().abs().mean() > 0)

    for weight in (1.0, 2.0):  # another object each time, of the same code
        adapt_tasks(model, x, y, x, pattern="11", loss=functools.partial(loss, weight))
    assert len(plan_of(model, program_of(model, xs)).unmapped) == 2
