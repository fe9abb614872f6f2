"""Generated and learned rates against a loop by hand and finite differences, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, all_close
from torch import Tensor, nn
from torch.func import functional_call

from lambda_kernels import agreement
from lambda_maml import Pattern, adapt, adapt_tasks, explain, rules
from lambda_maml.cost import layer_costs
from lambda_maml.data import Task
from lambda_maml.methods import alfa, backward, descend, lslr, schedule_of, sparse_rates
from lambda_maml.parts import Parts
from lambda_maml.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = pytest.mark.parametrize("pattern", ["11111", "00011", "11111,00001"])
STEPS = 3


def names(pattern: str) -> tuple[str, ...]:
    return Pattern(pattern).parameters(CONV4.network)


def made(pattern: str, random: bool = True) -> alfa:
    torch.manual_seed(3)
    rule = alfa(names(pattern), STEPS, lr=0.05, decay=0.02).double()
    if not random:
        for p in rule.generator[2].parameters():
            nn.init.zeros_(p) if p.dim() == 2 else nn.init.ones_(p)
    return rule


def by_hand(rule: alfa, pattern: str, xs: Tensor, ys: Tensor) -> dict[str, Tensor]:
    """The rule's steps in second order, written out."""
    own: dict[str, Tensor] = dict(CONV4.network.named_parameters())
    for k in range(STEPS):
        moved = Pattern(pattern).parameters(CONV4.network, step=k)
        loss = F.cross_entropy(functional_call(CONV4.network, own, (xs,)), ys)
        grads = dict(zip(moved, torch.autograd.grad(loss, [own[n] for n in moved], create_graph=True)))
        zero = torch.zeros((), dtype=torch.float64)
        tau = [own[n].mean() if n in moved else zero for n in rule.names]
        tau += [grads[n].mean().detach() if n in moved else zero for n in rule.names]
        w1, b1, w2, b2 = rule.generator.parameters()
        h = torch.relu(torch.stack(tau) @ w1.T + b1) @ w2.T + b2
        for i, n in enumerate(rule.names):
            if n in moved:
                a, b = h[i] * rule.rates[k, i], h[len(rule.names) + i] * rule.decays[k, i]
                own[n] = (1 - b) * own[n] - a * grads[n]
    return own


@PATTERNS
def test_generated_rates_are_those_of_the_paper(pattern: str) -> None:
    rule, (xs, ys, xq, yq) = made(pattern), CONV4.task()
    learner = adapt(CONV4.network, xs, ys, pattern=pattern, steps=STEPS, rule=rule, second_order=True)
    want = by_hand(rule, pattern, xs, ys)
    all_close(learner.parameters_dict(), want, "adapted")
    leaves = [*rule.parameters(), *CONV4.network.parameters()]
    got = torch.autograd.grad(F.cross_entropy(learner(xq), yq), leaves, allow_unused=True)
    loss = F.cross_entropy(functional_call(CONV4.network, want, (xq,)), yq)
    for g, w in zip(got, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)  # steps through batch statistics, twice over
    given: dict[str, Any] = {"pattern": pattern, "steps": STEPS, "rule": rule}
    two = adapt_tasks(CONV4.network, *(torch.stack([t, t]) for t in (xs, ys, xq)), **given)
    one = adapt(CONV4.network, xs, ys, **given)(xq)
    torch.testing.assert_close(two[1], one, rtol=1e-8, atol=1e-10)  # a batch of tasks sums in another order


@PATTERNS
def test_a_generator_of_ones_without_decay_is_gradient_descent(pattern: str) -> None:
    rule = made(pattern, random=False)
    with torch.no_grad():
        rule.rates.fill_(0.1)
        rule.decays.zero_()
    xs, ys, _, _ = CONV4.task()
    plain = rules.sgd(nn.Parameter(torch.tensor(0.1, dtype=torch.float64)))  # also by autograd, not by the chain
    loss: Callable[..., Tensor] = lambda logits, y: F.cross_entropy(logits, y)  # noqa: E731
    given: dict[str, Any] = {"pattern": pattern, "steps": STEPS, "loss": loss}
    want = adapt(CONV4.network, xs, ys, rule=plain, **given).parameters_dict()
    got = adapt(CONV4.network, xs, ys, rule=rule, **given).parameters_dict()
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_without_a_gradient_weights_shrink_by_the_decay() -> None:
    rule = made("00001", random=False)
    theta = {n: torch.randn(3, dtype=torch.float64) for n in rule.names}
    zero = {n: torch.zeros(3, dtype=torch.float64) for n in rule.names}
    changes, _ = rule.update(zero, (), theta, rules.Step(1, STEPS, torch.tensor(0.0), True))
    for n in theta:
        torch.testing.assert_close(theta[n] + changes[n], (1 - 0.05 * 0.02) * theta[n])


def test_derivatives_of_the_outer_gradient_are_those_of_the_general_path() -> None:
    rule = made("00011")
    xs, ys, xq, yq = CONV4.task()
    leaves = [*rule.parameters(), CONV4.network.get_parameter("block4.conv.weight")]

    def twice(loss: Any) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {"pattern": "00011", "steps": STEPS, "rule": rule, "second_order": True, "loss": loss}
        outer = F.cross_entropy(adapt(CONV4.network, xs, ys, **given)(xq), yq)
        grads = torch.autograd.grad(outer, leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)

    on_the_chain = twice(F.cross_entropy)
    for g, w in zip(on_the_chain, twice(lambda *given: F.cross_entropy(*given)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)  # three derivatives of batch statistics


def test_a_subclass_may_say_itself_how_it_updates() -> None:
    class Half(alfa):
        def update(self, grads: Any, state: Any, params: Any, step: Any) -> Any:
            changes, state = super().update(grads, state, params, step)
            return {n: c / 2 for n, c in changes.items()}, state

    rule = made("00011")
    half = copy.deepcopy(rule)
    half.__class__ = Half
    xs, ys, _, _ = CONV4.task()
    start = dict(CONV4.network.named_parameters())
    moved, less = (
        adapt(CONV4.network, xs, ys, pattern="00011", steps=1, rule=r).parameters_dict() for r in (rule, half)
    )
    for n in names("00011"):
        # differences of parameters of about 1
        torch.testing.assert_close((less[n] - start[n]) * 2, moved[n] - start[n], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "steps"), [("alfa", 1), ("lslr", STEPS)])
def test_learned_numbers_have_the_slope_of_the_outer_loss(kind: str, steps: int) -> None:
    """Of alfa in one step: later ones read means of gradients, which are constants to it."""
    rule: rules.Rule = made("00011") if kind == "alfa" else lslr(names("00011"), steps, lr=0.05).double()
    xs, ys, xq, yq = CONV4.task()

    def loss() -> Tensor:
        learner = adapt(CONV4.network, xs, ys, pattern="00011", steps=steps, rule=rule, second_order=True)
        return F.cross_entropy(learner(xq), yq)

    leaves = list(rule.parameters())
    grads = torch.autograd.grad(loss(), leaves, allow_unused=True)
    assert sum(g is not None and bool((g != 0).any()) for g in grads) >= 5
    for p, g in zip(leaves, grads):
        way, values = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(way, alpha=sign * 1e-5)
                values.append(float(loss()))
                p.sub_(way, alpha=sign * 1e-5)
        slope = 0.0 if g is None else float((g * way).sum())  # a bias in front of batch statistics has none
        assert abs(slope - (values[0] - values[1]) / 2e-5) < 1e-6


def test_learned_and_generated_rates_stay_on_the_chain_and_say_why_on_no_faster_one() -> None:
    xs, ys, _, _ = CONV4.task()
    given: dict[str, Any] = {"pattern": "00011", "steps": STEPS, "second_order": True}
    told = explain(CONV4.network, xs, rule=lslr(names("00011"), STEPS), **given)
    assert "steps 1 to 3: a chain with its own way back" in told
    told = explain(CONV4.network, xs, rule=alfa(names("00011"), STEPS), **given)
    assert "steps 1 to 3: a chain's gradients" in told
    assert "is no gradient descent with one rate per parameter and step" in told
    told = explain(CONV4.network, xs, rule=alfa(names("00011"), STEPS), loss=F.multi_margin_loss, **given)
    assert "steps 1 to 3: autograd" in told and "not a chain's gradients: the loss is multi_margin_loss" in told


@PATTERNS
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_generated_rates_on_a_chain_are_those_by_autograd(pattern: str, second_order: bool, dtype: torch.dtype) -> None:
    """The rule's error against float64 by autograd is at most twice that of autograd in its dtype, and rounding."""
    found: dict[str, list[Tensor]] = {}
    for way, own in (("truth", torch.float64), ("autograd", dtype), ("chain", dtype)):
        network, rule = copy.deepcopy(CONV4.network).to(own), made(pattern).to(own)
        xs, ys, xq, yq = (t.to(own) if t.is_floating_point() else t for t in CONV4.task())
        loss = F.cross_entropy if way == "chain" else lambda a, b: F.cross_entropy(a, b)
        given: dict[str, Any] = {"pattern": pattern, "steps": STEPS, "rule": rule, "loss": loss}
        learner = adapt(network, xs, ys, second_order=second_order, **given)
        F.cross_entropy(learner(xq), yq).backward()
        moved = [p.detach() for p in learner.parameters_dict().values()]
        both = [*network.parameters(), *rule.parameters()]
        found[way] = [*moved, *(torch.zeros_like(p) if p.grad is None else p.grad for p in both)]
    wrong = {w: agreement.distance(found[w], found["truth"]) for w in ("autograd", "chain")}
    assert wrong["chain"] <= 2 * wrong["autograd"] + 100 * torch.finfo(dtype).eps, wrong


def test_a_rate_of_zero_and_a_bit_of_zero_give_the_same_parameters() -> None:
    xs, ys, _, _ = CONV4.task()
    own = {n: torch.full((STEPS,), 0.05, dtype=torch.float64) for n in names("11111")}
    for n in own:
        if not n.startswith(("block4", "head")):
            own[n][:] = 0.0
        if n.startswith("block4"):
            own[n][1:] = 1e-9
    pruned = {n: torch.where(r > 1e-6, r, 0.0) for n, r in own.items()}
    pattern = schedule_of(rules.sgd(own), CONV4.network, threshold=1e-6)
    assert str(pattern) == "00011,00001"
    want = adapt(CONV4.network, xs, ys, pattern="11111", steps=STEPS, rule=rules.sgd(pruned)).parameters_dict()
    all_close(adapt(CONV4.network, xs, ys, pattern=pattern, steps=STEPS, lr=0.05).parameters_dict(), want, "schedule")
    nothing = schedule_of(rules.sgd({n: r * 0.1 for n, r in own.items()}), CONV4.network, threshold=1.0)
    assert str(nothing) == "00010,00001"  # of the largest rate, the first of equal ones
    with pytest.raises(ValueError, match="one rate for each tensor and step expected"):
        schedule_of(rules.sgd(0.1), CONV4.network, 0.0)


def test_dear_rates_are_driven_to_zero_first() -> None:
    xs, ys, xq, yq = CONV4.task()
    rule = lslr(names("11111"), STEPS, lr=0.05).double()
    parts = Parts(objective=sparse_rates(rule, CONV4.network, xs, weight=2.0)).of_run(rule, Settings(), 1)
    parts.gradient(CONV4.network, [Task(xs, ys, xq, yq)], [0], Settings(pattern="11111", steps=STEPS), 0)
    from_rates = {n: float(r.grad[0]) for n, r in rule.lr.items()}
    shares = [from_rates[f"block{i}.conv.weight"] for i in (1, 2, 3, 4)] + [from_rates["head.weight"]]
    costs = torch.tensor(layer_costs(CONV4.network, xs)).double()
    torch.testing.assert_close(torch.tensor(shares).double(), 2.0 * costs / costs.sum())


def test_what_does_not_fit_is_said() -> None:
    xs, ys, _, _ = CONV4.task()
    rule = alfa(names("00011"), STEPS)
    with pytest.raises(ValueError, match=r"alfa generates rates for block4.*, the pattern updates head.weight"):
        adapt(CONV4.network, xs, ys, pattern="00001", steps=STEPS, rule=rule)
    with pytest.raises(ValueError, match="alfa generates rates for"):
        adapt(CONV4.network, xs, ys, pattern="00011", norm="never", solver=descend(rule, STEPS, backward()))
    for make in (alfa, lslr):
        with pytest.raises(ValueError, match="at least one name and one step expected, got 0 and 2"):
            make((), 2)
