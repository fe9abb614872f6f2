"""Inner rules against torch's optimisers and a plain loop, learned rates against finite differences, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, all_close, close
from torch import Tensor, nn

from lambda_maml import LambdaMAML, Pattern, adapt, adapt_tasks, explain, rules
from lambda_maml.inner.rates import Rates

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, LR = 4, 0.05


Optimiser = Callable[[list[Tensor]], torch.optim.Optimizer]
BUILT_IN: dict[str, tuple[Callable[[], rules.Rule], Optimiser]] = {
    "sgd": (lambda: rules.sgd(LR), lambda p: torch.optim.SGD(p, LR)),
    "momentum": (lambda: rules.momentum(LR, 0.8), lambda p: torch.optim.SGD(p, LR, momentum=0.8)),
    "nesterov": (
        lambda: rules.momentum(LR, 0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, LR, momentum=0.8, nesterov=True),
    ),
    "adam": (lambda: rules.adam(LR, (0.8, 0.95), 1e-3), lambda p: torch.optim.Adam(p, LR, (0.8, 0.95), 1e-3)),
    "rmsprop": (lambda: rules.rmsprop(LR, 0.9, 1e-3), lambda p: torch.optim.RMSprop(p, LR, 0.9, 1e-3)),
    "weight decay": (
        lambda: rules.weight_decay(0.1) | rules.sgd(LR),
        lambda p: torch.optim.SGD(p, LR, weight_decay=0.1),
    ),
    "weight decay, adam": (
        lambda: rules.weight_decay(0.1) | rules.adam(LR, eps=1e-3),
        lambda p: torch.optim.Adam(p, LR, weight_decay=0.1, eps=1e-3),
    ),
}


def groups(bits: str) -> list[str]:
    return [n for bit, pair in zip(bits, CONV4.groups) if bit == "1" for part in pair for n in part]


def by_optimiser(pattern: str, make: Optimiser, clip: Callable[[list[Tensor]], Any] = lambda p: None) -> nn.Module:
    """The network after STEPS steps of a torch optimiser; what a step does not update has no gradient in it."""
    model = copy.deepcopy(CONV4.network)
    xs, ys, _, _ = CONV4.task()
    optimiser = make(list(model.parameters()))
    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(xs), ys).backward()
        names = groups(Pattern(pattern).at(step))
        for name, p in model.named_parameters():
            if name not in names:
                p.grad = None
        clip([p for p in model.parameters() if p.grad is not None])
        optimiser.step()
    return model


@pytest.mark.parametrize("pattern", ["11111", "00011", "01000", "00001,11111"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_rule_equals_torchs_optimiser(name: str, pattern: str) -> None:
    rule, optimiser = BUILT_IN[name]
    want = by_optimiser(pattern, optimiser)
    xs, ys, xq, _ = CONV4.task()
    learner = adapt(CONV4.network, xs, ys, pattern=pattern, steps=STEPS, rule=rule())
    all_close(learner.parameters_dict(), dict(want.named_parameters()), name)
    close(learner(xq), want(xq), "logits")


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipping_equals_torchs(kind: str) -> None:
    limit = 0.05
    clips: dict[str, Callable[..., Any]] = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}
    clip = rules.clip(norm=limit) if kind == "norm" else rules.clip(value=limit)
    want = by_optimiser("11111", lambda p: torch.optim.SGD(p, LR), lambda p: clips[kind](p, limit))
    xs, ys, _, _ = CONV4.task()
    learner = adapt(CONV4.network, xs, ys, pattern="11111", steps=STEPS, rule=clip | rules.sgd(LR))
    all_close(learner.parameters_dict(), dict(want.named_parameters()), kind)
    unclipped = adapt(CONV4.network, xs, ys, pattern="11111", steps=STEPS, lr=LR).parameters_dict()
    assert any(not torch.allclose(t, unclipped[n]) for n, t in learner.parameters_dict().items())


ALL: dict[str, Callable[[], rules.Rule]] = {
    **{name: rule for name, (rule, _) in BUILT_IN.items()},
    "clip": lambda: rules.clip(norm=0.05) | rules.momentum(LR),
    "rates": lambda: rules.sgd([[0.1, 0.0, 0.05, 0.02, 0.2]] * 2 + [[0.1, 0.1, 0.05, 0.0, 0.2]] * 2),
}


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", ALL)
def test_many_tasks_and_the_verbs_equal_one_task(name: str, second_order: bool) -> None:
    """Clipping by the norm must not see the gradients of other tasks; gradients reach the model alike."""
    seeds = range(3)
    xs, ys, xq, yq = (torch.stack(t) for t in zip(*(CONV4.task(seed=s) for s in seeds)))
    for pattern in ("11111", "00110,00001"):
        model = copy.deepcopy(CONV4.network)
        given: dict[str, Any] = {"pattern": pattern, "steps": STEPS, "second_order": second_order}

        def slopes(loss: Tensor, model: nn.Module = model) -> dict[str, Tensor]:
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            return {n: g for (n, _), g in zip(model.named_parameters(), found) if g is not None}

        rule = ALL[name]()
        logits = adapt_tasks(model, xs, ys, xq, rule=rule, **given)
        together = slopes(sum(F.cross_entropy(z, y) for z, y in zip(logits, yq)))  # type: ignore[arg-type]
        one_by_one: dict[str, Tensor] = {}
        for t in seeds:
            alone = adapt(model, xs[t], ys[t], rule=rule, **given)
            close(logits[t], alone(xq[t]), f"task {t}")
            clone = LambdaMAML(model, pattern=pattern, rule=rule, first_order=not second_order).clone()
            for _ in range(STEPS):
                clone.adapt(F.cross_entropy(clone(xs[t]), ys[t]))
            close(clone(xq[t]), alone(xq[t]), f"verbs, task {t}")
            for n, g in slopes(F.cross_entropy(clone(xq[t]), yq[t])).items():
                one_by_one[n] = one_by_one.get(n, 0.0) + g
        all_close(together, one_by_one, "gradient of", rtol=1e-7, scale=1e-9)  # sums of three tasks


# Rates.


def plain(rate: Callable[[str, int], Any], pattern: str, second_order: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The query loss and the adapted parameters of a plain loop with a rate per parameter and step."""
    xs, ys, xq, yq = CONV4.task()
    state: dict[str, Tensor] = dict(CONV4.network.named_parameters())
    for step in range(STEPS):
        names = groups(Pattern(pattern).at(step))
        own = {n: state[n].view_as(state[n]) if second_order else state[n].detach().requires_grad_() for n in names}
        loss = F.cross_entropy(torch.func.functional_call(CONV4.network, {**state, **own}, (xs,)), ys)
        found = torch.autograd.grad(loss, list(own.values()), create_graph=second_order)
        state = {**state, **{n: state[n] - rate(n, step) * g for n, g in zip(names, found)}}
    return F.cross_entropy(torch.func.functional_call(CONV4.network, state, (xq,)), yq), state


def layer_of(name: str) -> int:
    return next(i for i, pair in enumerate(CONV4.groups) if any(name in part for part in pair))


TABLE = np.random.default_rng(0).uniform(0.01, 0.2, (STEPS, 5))
FORMS: dict[str, tuple[Any, Callable[[str, int], float]]] = {
    "float": (0.1, lambda n, k: 0.1),
    "int": (1, lambda n, k: 1.0),
    "numpy": (np.float32(0.125), lambda n, k: 0.125),
    "tensor": (torch.tensor(0.125), lambda n, k: 0.125),
    "per layer": (TABLE[0].tolist(), lambda n, k: TABLE[0, layer_of(n)]),
    "per step": (TABLE[:, :1], lambda n, k: TABLE[k, 0]),
    "per layer and step": (TABLE, lambda n, k: TABLE[k, layer_of(n)]),
    "as a tensor": (torch.from_numpy(TABLE), lambda n, k: TABLE[k, layer_of(n)]),
    "by name": (
        {"block1.conv": 0.1, "block2.conv": TABLE[:, 0], "block3.conv": 0.0, "block4.conv": 0.05, "head": 0.1,
         "head.bias": 0.2},
        lambda n, k: {0: 0.1, 1: TABLE[k, 0], 2: 0.0, 3: 0.05, 4: 0.2 if n == "head.bias" else 0.1}[layer_of(n)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("pattern", ["11111", "00111", "01010", "11111,00011"])
@pytest.mark.parametrize("form", FORMS)
def test_rates_of_every_form_equal_the_plain_loop(form: str, pattern: str) -> None:
    lr, rate = FORMS[form]
    xs, ys, _, _ = CONV4.task()
    for second_order in (False, True):
        _, want = plain(rate, pattern, second_order)
        got = adapt(CONV4.network, xs, ys, pattern=pattern, steps=STEPS, lr=lr, second_order=second_order)
        all_close(got.parameters_dict(), want, form)


def test_known_rates_stay_on_the_chain_and_a_rate_of_0_freezes() -> None:
    xs, ys, _, _ = CONV4.task()
    model = CONV4.network
    for lr in (0.1, TABLE, torch.from_numpy(TABLE)):
        assert "steps 1 to 4: a chain from the inputs on" in explain(model, xs, ys, pattern="11111", steps=STEPS, lr=lr)
    frozen = [0.0, 0.0, 0.0, 0.1, 0.1]
    said = explain(model, xs, ys, pattern="11111", steps=STEPS, lr=frozen)
    assert said.splitlines()[1:] == explain(model, xs, ys, pattern="00011", steps=STEPS, lr=0.1).splitlines()[1:]
    got = adapt(model, xs, ys, pattern="11111", steps=STEPS, lr=frozen).parameters_dict()
    want = adapt(model, xs, ys, pattern="00011", steps=STEPS, lr=0.1).parameters_dict()
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_explain_says_which_way_other_rules_and_learned_rates_take() -> None:
    xs, ys, _, _ = CONV4.task()
    learned = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    for rule, way, words in (
        (rules.adam(0.1), "a chain's gradients", "no gradient descent with one known rate"),
        (rules.sgd(learned), "a chain with its own way back", "are learned"),
    ):
        said = explain(CONV4.network, xs, ys, pattern="00011", steps=2, rule=rule)
        assert f"steps 1 to 2: {way}" in said and words in said
    with torch.no_grad():  # the rates are known here
        assert (
            "a chain"
            in explain(CONV4.network, xs, ys, pattern="00011", steps=2, rule=rules.sgd(learned)).splitlines()[1]
        )


LEARNED: dict[
    str, tuple[tuple[int, ...], Callable[[Tensor], Any], Callable[[Tensor], Callable[[str, int], Tensor]]]
] = {
    "one": ((), lambda t: t, lambda t: lambda n, k: t),
    "per layer": ((5,), lambda t: t, lambda t: lambda n, k: t[layer_of(n)]),
    "per layer and step": ((STEPS, 5), lambda t: t, lambda t: lambda n, k: t[k, layer_of(n)]),
    "per element": (
        (2, 3),
        lambda t: {**{f"block{i}.conv": 0.1 for i in range(1, 5)}, "head.weight": t, "head.bias": 0.1},
        lambda t: lambda n, k: t if n == "head.weight" else torch.tensor(0.1, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("form", LEARNED)
def test_learned_rates_get_the_plain_loops_gradients(form: str, second_order: bool) -> None:
    shape, given, rate = LEARNED[form]
    start = torch.from_numpy(np.random.default_rng(1).uniform(0.02, 0.2, shape))
    if form == "per element":
        start = torch.full((2, 3 * 1 * 1), 0.1, dtype=torch.float64) + 0.01 * torch.randn(2, 3, dtype=torch.float64)
    xs, ys, xq, yq = CONV4.task()
    for pattern in ("11111", "00011", "00001,11111"):
        mine, theirs = (nn.Parameter(start.clone()) for _ in range(2))
        loss, _ = plain(rate(theirs), pattern, second_order)
        (want,) = torch.autograd.grad(loss, [theirs])
        rule = rules.sgd(given(mine))
        assert [p is mine for p in rule.parameters()] == [True]
        learner = adapt(CONV4.network, xs, ys, pattern=pattern, steps=STEPS, rule=rule, second_order=second_order)
        found = F.cross_entropy(learner(xq), yq)
        close(found, loss, "query loss")
        (got,) = torch.autograd.grad(found, [mine])
        close(got, want, "gradient of the rates")
        x, y, q, z = (torch.stack([t, t]) for t in (xs, ys, xq, yq))
        logits = adapt_tasks(CONV4.network, x, y, q, pattern=pattern, steps=STEPS, rule=rule, second_order=second_order)
        (twice,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), z.flatten()), [mine])
        close(twice, want, "gradient of the rates, of two tasks")


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "rmsprop"])
def test_learned_rates_against_finite_differences(name: str) -> None:
    xs, ys, xq, yq = CONV4.task()

    def loss(rates: Tensor) -> Tensor:
        rule = getattr(rules, name)(rates, **({"eps": 1e-2} if name in ("adam", "rmsprop") else {}))
        learner = adapt(CONV4.network, xs, ys, pattern="00011", steps=2, rule=rule, second_order=True)
        return F.cross_entropy(learner(xq), yq)

    start = torch.tensor([[0.1, 0.1, 0.1, 0.05, 0.2], [0.1, 0.1, 0.1, 0.1, 0.03]], dtype=torch.float64)
    (slopes,) = torch.autograd.grad(loss(rates := start.clone().requires_grad_()), [rates])
    for k, layer in ((0, 3), (0, 4), (1, 3), (1, 4)):
        nudge = torch.zeros_like(start)
        nudge[k, layer] = 1e-5
        with torch.no_grad():
            slope = (loss(start + nudge) - loss(start - nudge)) / 2e-5
        assert float(slopes[k, layer]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)
    assert not slopes[:, :3].any()


def test_the_outer_optimiser_learns_the_rates_of_the_verbs() -> None:
    """MAML++'s rates per layer and step, as a parameter of the LambdaMAML."""
    xs, ys, xq, yq = CONV4.task()
    rates = nn.Parameter(torch.full((2, 5), 0.1, dtype=torch.float64))
    maml = LambdaMAML(copy.deepcopy(CONV4.network), rates, pattern="00011")
    assert any(p is rates for p in maml.parameters())
    task = maml.clone()
    for _ in range(2):
        task.adapt(F.cross_entropy(task(xs), ys))
    F.cross_entropy(task(xq), yq).backward()
    assert rates.grad is not None and rates.grad[:, 3:].all() and not rates.grad[:, :3].any()
    before = rates.detach().clone()
    torch.optim.SGD(maml.parameters(), 0.1).step()
    assert not torch.equal(rates, before)
    with pytest.raises(ValueError, match="rates for 2 steps, step 3 has none"):
        task.adapt(F.cross_entropy(task(xs), ys))


def test_lr_may_be_assigned_later() -> None:
    maml = LambdaMAML(CONV4.network, 0.1)
    assert maml.lr == 0.1
    maml.lr = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))  # type: ignore[misc]
    assert any(p is maml.lr for p in maml.parameters()) and isinstance(maml.rule, rules.sgd)


# Rules of the user's own.


class Sign(rules.Rule):
    """Looks at a whole tensor: with many tasks it must see one task's."""

    def init(self, params: rules.Params) -> Any:
        return {"calls": {n: p.new_zeros(()) for n, p in params.items()}}

    def update(self, grads: rules.Params, state: Any, params: rules.Params, step: rules.Step) -> Any:
        calls = {**state["calls"], **{n: state["calls"][n] + 1 for n in grads}}
        return {n: -0.01 * g.sign() * g.norm() * (1 + step.loss) / calls[n] for n, g in grads.items()}, {"calls": calls}


class Duck:
    """No subclass of anything."""

    def init(self, params: rules.Params) -> Any:
        return ()

    def update(self, grads: rules.Params, state: Any, params: rules.Params, step: rules.Step) -> Any:
        return {n: -0.1 * g for n, g in grads.items()}, state


@pytest.mark.parametrize("make", [Sign, Duck])
def test_a_rule_of_the_users_own_runs_under_every_pattern(make: Any) -> None:
    xs, ys, xq, _ = (torch.stack(t) for t in zip(*(CONV4.task(seed=s) for s in range(2))))
    for pattern in [*Pattern.all(5), Pattern("11111,00001"), Pattern("00001,11000")]:
        for second_order in (False, True):
            given: dict[str, Any] = {"pattern": pattern, "steps": 2, "rule": make(), "second_order": second_order}
            together = adapt_tasks(CONV4.network, xs, ys, xq, **given)
            for t in range(2):
                close(together[t], adapt(CONV4.network, xs[t], ys[t], **given)(xq[t]), str(pattern))


# Errors.


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        ([0.1, 0.2], r"shape \[2\], the network 5 layers.*per step \[steps, 1\].*give shape \[2, 1\]"),
        ([0.1, -0.2, 0.1, 0.1, 0.1], "positive numbers, or 0"),
        ([0.1, float("nan"), 0.1, 0.1, 0.1], "positive numbers, or 0"),
        ([[0.1] * 5] * 3, "rates for 3 steps, the adaptation has 2"),
        ([[0.1], [0.2, 0.3]], "rows of equal length"),
        ({}, "empty mapping"),
        ({"body": 0.1}, r"lr names body: neither a layer \(block1.conv,.*head\) nor one of the parameters"),
        ({"head": 0.1}, "no rate for block1.conv.weight: give one, or 0 to leave it frozen"),
        (torch.tensor(1), "floating point"),
        (True, "positive number"),
    ],
)
def test_wrong_rates_are_named(lr: Any, words: str) -> None:
    xs, ys, _, _ = CONV4.task()
    with pytest.raises(ValueError, match=words):
        adapt(CONV4.network, xs, ys, pattern="11111", steps=2, lr=lr)


def test_wrong_rules_are_named() -> None:
    xs, ys, _, _ = CONV4.task()

    def run(**given: Any) -> None:
        adapt(CONV4.network, xs, ys, pattern="11111", steps=2, **given)

    with pytest.raises(TypeError, match="rule must have init and update"):
        run(rule="adam")
    with pytest.raises(ValueError, match="not both"):
        run(lr=0.1, rule=rules.sgd(0.1))
    with pytest.raises(ValueError, match=r"clip\(norm=1.0\) changes gradients only"):
        run(rule=rules.clip(norm=1.0))
    for wrong in ({}, {"norm": 1.0, "value": 1.0}, {"norm": 0.0}):
        with pytest.raises(ValueError, match="clip"):
            rules.clip(**wrong)
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1.0"):
        rules.momentum(0.1, 1.0)

    class Wrong(rules.Rule):
        def update(self, grads: Any, state: Any, params: Any, step: Any) -> Any:
            return {n: g.sum() for n, g in grads.items()}, state

    with pytest.raises(ValueError, match="a tensor of each parameter's shape"):
        run(rule=Wrong())
    with pytest.raises(NotImplementedError, match="without `update`"):
        run(rule=rules.Rule())


def test_rates_know_what_is_learned() -> None:
    learned = nn.Parameter(torch.tensor(0.1))
    assert Rates(0.1).parameters == [] and Rates({"head": learned, "body": 0.1}).parameters == [learned]
    assert rules.sgd(learned).learned and not rules.sgd(0.1).learned
    with torch.no_grad():
        assert not rules.sgd(learned).learned
