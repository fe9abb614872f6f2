"""Meta-training with methods' parts: the loss that is descended, exact resume with each of them, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT
from small_runs import SMALL, TRAIN, network, run, small, state
from torch import nn

from lambda_maml import Pattern, adapt, checkpoint, data, rules
from lambda_maml.evaluate import evaluate
from lambda_maml.methods import (
    alfa,
    backward,
    covering,
    descend,
    direct,
    lslr,
    ntk,
    pool,
    prioritised,
    query_loss,
    remembering,
    ridge_head,
    spsa,
    spsa_track,
    uncertainty,
    uniform,
)
from lambda_maml.parts import Parts
from lambda_maml.train import BEST, LAST, meta_gradient

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own forward mode, when it is first used
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning"),
]
NAMES = Pattern("00011").parameters(network())
HEAD, LAST_TWO = small(pattern="00001", val_tasks=2, val_every=50), small(pattern="00011", val_tasks=2, val_every=50)
Made = dict[str, Any]
CASES: dict[str, tuple[Any, Callable[[nn.Module], Made]]] = {
    "alfa": (LAST_TWO, lambda model: {"rule": alfa(NAMES, 2, lr=0.1), "parts": Parts()}),
    "lslr": (LAST_TWO, lambda model: {"rule": lslr(NAMES, 2, lr=0.1)}),
    "ridge": (HEAD, lambda model: {"parts": Parts(solver=ridge_head(1.0, learned=True))}),
    "ntk": (LAST_TWO, lambda model: {"parts": Parts(solver=ntk(steps=3, lr=0.01))}),
    "penalty": (
        LAST_TWO,
        lambda model: {"parts": Parts(solver=descend(rules.sgd(0.1), 2, penalty=lambda p: p["head.weight"].norm()))},
    ),
    "spsa": (LAST_TWO, lambda model: {"parts": Parts(weights=spsa(2))}),
    "track": (LAST_TWO, lambda model: {"parts": Parts(weights=spsa_track(2))}),
    "uncertainty": (LAST_TWO, lambda model: {"parts": Parts(weights=uncertainty(2))}),
    "memory": (LAST_TWO, lambda model: {"parts": Parts(solver=memory(model), source=pool(5))}),
    "memory 2": (LAST_TWO, lambda model: {"parts": Parts(solver=memory(model, version=2, batch=2), source=pool(5))}),
    "cover": (
        HEAD,
        lambda model: {"parts": Parts(solver=ridge_head(), objective=query_loss() + direct(), source=covering(12, 3))},
    ),
    "buffer": (LAST_TWO, lambda model: {"parts": Parts(source=prioritised(3))}),
}


def memory(model: nn.Module, **given: Any) -> remembering:
    return remembering(descend(rules.sgd(0.1), 1), model, "00011", tasks=5, **given)


def trained(out: Path, case: str, iterations: int, **more: Any) -> dict[str, Any]:
    settings, make = CASES[case]
    model = network()
    made = make(model)
    run(out, iterations, settings, model, **made, **more)
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_resumed_ends_as_one_without_a_break(case: str, tmp_path: Path) -> None:
    trained(tmp_path / "steady", case, 4)
    trained(tmp_path / "broken", case, 2)
    torch.rand(5)
    trained(tmp_path / "broken", case, 4, resume=True)
    one, two = (state(tmp_path / name)[0] for name in ("steady", "broken"))
    kept = [k for k in one if k.startswith("rule:")]
    assert kept or case in ("ntk", "penalty", "cover")
    assert [k for k in one if k != "random" and not torch.equal(one[k], two[k])] == []


@pytest.mark.parametrize("case", ["ridge", "memory", "alfa"])
def test_a_checkpoint_holds_the_parts(case: str, tmp_path: Path) -> None:
    settings, make = CASES[case]
    made = trained(tmp_path, case, 3)
    model, _ = checkpoint.load(tmp_path / BEST)
    own = make(model)
    part = own["parts"].of_run(own.get("rule"), settings, 1)
    checkpoint.load_rule(tmp_path / BEST, part)
    want = made["parts"].state_dict()
    assert want and all(torch.equal(value, want[name]) for name, value in part.state_dict().items())
    with pytest.raises(ValueError, match="is of another rule"):
        checkpoint.load_rule(tmp_path / BEST, Parts(weights=spsa(2)))
    with pytest.raises(ValueError, match="the run to resume has rule name"):
        run(tmp_path, 5, settings, network(), parts=Parts(weights=spsa(2)), resume=True)


@pytest.mark.parametrize("kind", ["none", "descend", "uniform", "query", "opened"])
@pytest.mark.parametrize("pattern", ["11111", "00011", "11111,00001"])
@pytest.mark.parametrize("second_order", [True, False])
def test_parts_that_change_nothing_give_mamls_gradient(kind: str, pattern: str, second_order: bool) -> None:
    settings = small(pattern=pattern, second_order=second_order)
    tasks = data.sample_tasks(TRAIN, 2, ways=3, shots=1, query=2)
    one, two = network().double(), network().double()
    parts = {
        "none": Parts(),
        "descend": Parts(solver=descend(rules.sgd(SMALL.lr), SMALL.steps)),
        "uniform": Parts(weights=uniform()),
        "query": Parts(objective=query_loss()),
        "opened": Parts(solver=descend(rules.sgd(SMALL.lr), SMALL.steps, estimator=backward())),
    }[kind]
    want = meta_gradient(one, tasks, settings)
    assert abs(parts.gradient(two, tasks, [0, 1], settings, 0) - want) < 1e-12
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a.grad, b.grad, **GRADIENT)


def test_task_weights_scale_each_tasks_loss() -> None:
    tasks = data.sample_tasks(TRAIN, 2, ways=3, shots=1, query=2)
    weights = spsa(2)
    weights.weights.copy_(torch.tensor([0.5, 2.0]))
    found = []
    for k in (0, 1):
        model = network().double()
        meta_gradient(model, [tasks[k]], LAST_TWO)
        found.append([p.grad for p in model.parameters()])
    model, parts = network().double(), Parts(weights=weights)
    parts.gradient(model, tasks, [0, 1], LAST_TWO, 0)
    for p, a, b in zip(model.parameters(), *found):
        assert p.grad is not None and a is not None and b is not None
        torch.testing.assert_close(p.grad, (a / 0.25 + b / 4) / 2, **GRADIENT)
    parts.after_step(0)
    assert not torch.equal(weights.weights, torch.tensor([0.5, 2.0]).double())


def test_fine_tuning_on_one_task_of_all_classes_is_plain_training() -> None:
    model, plain = network().double(), network().double()
    (task,) = data.sample_tasks(TRAIN, 1, ways=3, shots=1, query=2)
    source = covering(3, 3)
    assert source.size == 1 and [source.draw(i, 1) for i in range(3)] == [[0]] * 3
    optimisers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (model, plain)]
    parts = Parts(objective=direct(), source=source)
    for iteration in range(3):
        for optimiser in optimisers:
            optimiser.zero_grad()
        parts.gradient(model, [task], [0], SMALL, iteration)
        xs = torch.cat([task.xs, task.xq]).double()
        F.cross_entropy(plain(xs), torch.cat([task.ys, task.yq])).backward()
        for optimiser in optimisers:
            optimiser.step()
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, **GRADIENT)


def test_a_trained_solver_evaluates_and_adapts(tmp_path: Path) -> None:
    made = trained(tmp_path, "ridge", 2)
    model, _ = checkpoint.load(tmp_path / BEST)
    tasks = data.sample_tasks(TRAIN, 3, ways=3, shots=1, query=2)
    found = evaluate(model, tasks, pattern="00001", solver=made["parts"].solver)
    xs, ys, xq, yq = tasks[2]
    own = (adapt(model, xs, ys, pattern="00001", solver=made["parts"].solver)(xq).argmax(1) == yq).double().mean()
    assert float(found.accuracies[2]) == float(own)


def test_what_leaves_no_place_for_parts_is_said(tmp_path: Path) -> None:
    def call(parts: Parts, **settings: Any) -> None:
        run(tmp_path, 1, small(**settings), parts=parts)

    with pytest.raises(ValueError, match="outer='reptile' has an outer loss of its own"):
        call(Parts(weights=uniform()), outer="reptile")
    with pytest.raises(ValueError, match="multi_step_iterations has an outer loss of its own"):
        call(Parts(weights=uniform()), multi_step_iterations=2)
    with pytest.raises(ValueError, match="is the whole inner loop: leave learn_lr and rule= out"):
        call(Parts(solver=ridge_head()), learn_lr="one")
    with pytest.raises(ValueError, match="a meta-batch of 2 tasks is more than the pool has, 1"):
        call(Parts(source=pool(1)))
    with pytest.raises(ValueError, match="task weights are for 3 tasks, the meta-batch has 2"):
        call(Parts(weights=spsa(3)))
    with pytest.raises(ValueError, match="train it in one process, not 2"):
        Parts(weights=spsa(3)).of_run(None, SMALL, 2)
    assert not (tmp_path / LAST).exists() and copy.deepcopy(Parts(weights=spsa(3))).weights is not None
