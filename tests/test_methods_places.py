"""The places of a method: what a solver is told of a task, that plain descent stays on its fast ways, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT
from loops import CONV4, all_close, close
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_maml import Pattern, adapt, adapt_tasks, explain, rules
from lambda_maml.inner import chain
from lambda_maml.methods import backward, descend
from lambda_maml.places import Learned, Problem, Turn, generator
from lambda_maml.plan import Part

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = pytest.mark.parametrize("pattern", ["11111", "00011", "11111,00001"])
ORDERS = pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])


def outcome(learned: rules.Rule, **given: Any) -> dict[str, Tensor]:
    """Query logits, adapted parameters, and the query loss's gradients by the network's and the rule's parameters."""
    xs, ys, xq, yq = CONV4.task()
    learner = adapt(CONV4.network, xs, ys, **given)
    logits = learner(xq)
    leaves = {**dict(CONV4.network.named_parameters()), **dict(learned.named_parameters())}
    grads = torch.autograd.grad(F.cross_entropy(logits, yq), list(leaves.values()), allow_unused=True)
    found = {f"grad {n}": g for n, g in zip(leaves, grads) if g is not None}
    return {"logits": logits, **learner.parameters_dict(), **found}


@ORDERS
@PATTERNS
@pytest.mark.parametrize("kind", ["sgd", "adam", "learned"])
def test_open_steps_are_those_of_the_core(kind: str, pattern: str, second_order: bool) -> None:
    made = {"sgd": lambda: rules.sgd(0.1), "adam": lambda: rules.adam(0.01)}
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    rule = rules.sgd(rate) if kind == "learned" else made[kind]()
    want = outcome(rule, pattern=pattern, steps=3, rule=rule, second_order=second_order)
    plain = outcome(rule, pattern=pattern, solver=descend(rule, 3), second_order=second_order)
    assert all(torch.equal(want[n], plain[n]) for n in want)  # the same call
    opened = outcome(rule, pattern=pattern, solver=descend(rule, 3, estimator=backward()), second_order=second_order)
    assert opened.keys() == want.keys() and ("grad rate0" in want) == (kind == "learned")
    torch.testing.assert_close(opened, want, **GRADIENT)


def test_plain_descent_takes_the_chain_and_an_estimator_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lk.convert(copy.deepcopy(CONV4.network))
    xs, ys, _, _ = CONV4.task(shots=3)
    runs: list[Any] = []
    real = chain.run

    def counted(*args: Any) -> Any:
        runs.append(args)
        return real(*args)

    monkeypatch.setattr(chain, "run", counted)
    adapt(model, xs, ys, pattern="00011", solver=descend(rules.sgd(0.07), 2))
    assert len(runs) == 1
    told = explain(model, xs, pattern="00011", solver=descend(rules.sgd(0.07), 2))
    assert "a chain from the inputs on" in told and "2 steps of sgd(lr=0.07)" in told
    own = descend(rules.sgd(0.07), 2, estimator=backward())
    adapt(model, xs, ys, pattern="00011", solver=own)
    assert len(runs) == 1
    told = explain(model, xs, pattern="00011", solver=own)
    assert "a solver of its own (3 of 6 operations run once, 3 in every step)" in told and "no chain" in told


def test_a_penalty_is_added_to_every_steps_loss() -> None:
    xs, ys, _, _ = CONV4.task()
    decayed = descend(
        rules.sgd(0.1), 3, penalty=lambda p: 0.05 * torch.stack([t.square().sum() for t in p.values()]).sum()
    )
    want = adapt(
        CONV4.network, xs, ys, pattern="00011", steps=3, rule=rules.weight_decay(0.1) | rules.sgd(0.1)
    ).parameters_dict()
    all_close(adapt(CONV4.network, xs, ys, pattern="00011", solver=decayed).parameters_dict(), want, "penalty")


@pytest.mark.parametrize("pattern", ["00001", "00011", "11111"])
def test_a_problem_tells_what_the_network_computes(pattern: str) -> None:
    xs, ys, xq, _ = CONV4.task()
    seen: list[Problem] = []

    def nothing(problem: Problem) -> Learned:
        seen.append(problem)
        return Learned(problem.meta)

    learner = adapt(CONV4.network, xs, ys, pattern=pattern, solver=nothing, turn=Turn(3, 4, 5, key=6))
    (problem,) = seen
    assert problem.names == Pattern(pattern).parameters(CONV4.network) and problem.key == 6
    assert problem.rows == len(xs) and problem.mixes_rows and problem.layers[problem.names[-1]] == "head"
    close(problem.outputs(problem.meta), CONV4.network(xs), "outputs")
    close(problem.loss(problem.meta), F.cross_entropy(CONV4.network(xs), ys), "loss")
    features = problem.features(problem.meta)
    weight, bias = (CONV4.network.get_parameter(name) for name in problem.head)
    close(F.linear(features, weight, bias), CONV4.network(xs), "features")
    close(learner(xq), CONV4.network(xq), "unchanged parameters")


def test_rows_are_taken_of_the_prefixs_values(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    xs, ys = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    rows = torch.tensor([5, 1, 2])
    runs: list[int] = []
    freeze = Part.freeze

    def counted(part: Part, *args: Any) -> Any:
        runs.append(len(part.prefix))
        return freeze(part, *args)

    monkeypatch.setattr(Part, "freeze", counted)
    want = adapt(network, xs[rows], ys[rows], pattern="011", steps=3, lr=0.1).parameters_dict()
    chosen = descend(rules.sgd(0.1), 3, estimator=backward(select=lambda problem, params, step: rows))
    runs.clear()
    got = adapt(network, xs, ys, pattern="011", solver=chosen)
    assert runs == [2]  # a linear layer and its ReLU, once
    all_close(got.parameters_dict(), want, "rows")


def test_random_numbers_come_from_a_counter() -> None:
    draws = {
        (turn, step): torch.rand(2, generator=generator(turn, step)).tolist()
        for turn in (Turn(), Turn(seed=1), Turn(iteration=1), Turn(task=1))
        for step in (0, 1)
    }
    assert len({tuple(d) for d in draws.values()}) == len(draws)
    for (turn, step), numbers in draws.items():
        torch.rand(3)
        assert torch.rand(2, generator=generator(turn, step)).tolist() == numbers


def test_a_chooser_stands_where_a_pattern_does() -> None:
    xs, ys, xq, _ = CONV4.task()
    asked: list[tuple[str, ...]] = []

    def last(problem: Problem) -> Pattern:
        asked.append(problem.names)
        return Pattern("00001")

    want = adapt(CONV4.network, xs, ys, pattern="00001", lr=0.1)(xq)
    assert torch.equal(adapt(CONV4.network, xs, ys, pattern=last, lr=0.1)(xq), want)
    two = adapt_tasks(CONV4.network, *(torch.stack([t, t]) for t in (xs, ys, xq)), pattern=last, lr=0.1)
    assert len(asked) == 3 and set(asked) == {Pattern("11111").parameters(CONV4.network)}
    torch.testing.assert_close(two, torch.stack([want, want]), rtol=0, atol=0)
    with pytest.raises(TypeError, match="a chooser of patterns gives a Pattern"):
        adapt(CONV4.network, xs, ys, pattern=lambda problem: "00001")  # type: ignore[arg-type, return-value]


def test_what_is_wrong_is_said() -> None:
    xs, ys, _, _ = CONV4.task()

    def call(solver: Any, **given: Any) -> Any:
        return adapt(CONV4.network, xs, ys, **{"pattern": "00001", "solver": solver, **given})

    def keep(problem: Problem) -> Learned:
        return Learned(problem.meta)

    with pytest.raises(ValueError, match=r"give solver=.* or lr=0.1, not both"):
        call(keep, lr=0.1)
    with pytest.raises(ValueError, match=r"give solver=.* or rule=sgd\(lr=0.1\), not both"):
        call(keep, rule=rules.sgd(0.1))
    with pytest.raises(ValueError, match="a solver gives a tensor of each parameter's shape"):
        call(lambda problem: Learned({}))
    with pytest.raises(FloatingPointError, match="diverged: parameters became infinite or NaN"):
        call(lambda problem: Learned({n: p / 0 for n, p in problem.meta.items()}))
    with pytest.raises(ValueError, match="2 tasks, but 1 turns"):
        adapt_tasks(
            CONV4.network, xs.expand(2, *xs.shape), ys.expand(2, -1), xs.expand(2, *xs.shape), pattern="00001",
            solver=keep, turns=[Turn()],
        )  # fmt: skip
    with pytest.raises(ValueError, match="labels run from 8 to 9"):
        adapt(CONV4.network, xs, ys + 8, pattern="00001", solver=keep)
