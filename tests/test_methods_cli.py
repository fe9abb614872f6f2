"""Related methods on the command line: their table, runs that are trained with them, and checkpoints that hold them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import network, run, small
from torch import nn

from lambda_maml import Pattern, adapt, checkpoint, cli, cli_types, data, explain, rules
from lambda_maml.evaluate import evaluate
from lambda_maml.inner.rule import Rule
from lambda_maml.methods import METHODS, alfa, backward, descend, ntk, remembering, ridge_head, spsa, top_gradient
from lambda_maml.methods.catalogue import described, made, named
from lambda_maml.parts import Parts
from lambda_maml.run_state import BEST, LAST
from lambda_maml.saved_parts import load_inner

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is :DeprecationWarning"),  # torch's forward mode
]
SMALL = ["--width", 4, "--steps", 2, "--lr", 0.1, "--query", 2, "--val-tasks", 2, "--val-every", 50, "--meta-batch", 2]


def call(*args: Any) -> int:
    return cli.run([str(arg) for arg in args])


def train(out: Path, *args: Any, iterations: int = 1) -> Path:
    assert call("train", "--out", out, "--iterations", iterations, *SMALL, *args) == 0
    return out / BEST


def refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    capsys.readouterr()
    assert call(*args) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    return captured.err


def evaluated(capsys: pytest.CaptureFixture[str], *args: Any) -> Any:
    capsys.readouterr()
    assert call("eval", *args, "--tasks", 3, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_table_has_every_method_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(METHODS) and len(rows) >= 20
    assert all(row["paper"].rsplit(", ", 1)[1] and row["place"] and row["chain"] and row["does"] for row in rows)
    assert call("methods") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in METHODS) and "Baik et al." in shown


def test_the_table_says_who_stays_on_the_chain() -> None:
    model, names = network(), Pattern("00011").parameters(network())
    xs, ys, _, _ = data.sample_tasks(data.load("glyphs"), 1, ways=3)[0]
    xs = torch.nn.functional.interpolate(xs, 16)
    steps: dict[str, dict[str, Any]] = {
        "alfa": {"rule": alfa(names, 5), "second_order": True},
        "lslr": {"rule": METHODS["lslr"].make(names, 5), "second_order": True},
        "descend": {"solver": descend(rules.sgd(0.1), 5)},
        "fisher": {"pattern": METHODS["fisher"].make(0.5)},
        "backward": {"solver": descend(rules.sgd(0.1), 5, backward(lambda problem, params, step: torch.arange(3)))},
        "ridge_head": {"solver": ridge_head(), "pattern": "00001"},
        "forward_gradient": {"solver": descend(rules.sgd(0.1), 5, METHODS["forward_gradient"].make())},
    }
    for name, given in steps.items():
        told = explain(model, xs, ys, **{"pattern": "00011", **given})
        stays = "yes" in METHODS[name].chain and name != "backward"
        assert ("a chain" in told.splitlines()[1]) == stays, told


@pytest.mark.parametrize(
    "part",
    [
        alfa(["a", "b"], 3, lr=0.1), ridge_head(0.5, learned=True, scale=4.0), ntk(time=math.inf), ntk(steps=3, lr=0.1),
        descend(rules.sgd([0.1, 0.2]), 2, estimator=METHODS["rescaled"].make(top_gradient(0.5))),
        spsa(4, gains=(0.1, 0.2)), METHODS["spsa_track"].make(4, seed=3), METHODS["lslr"].make(["a"], 2),
    ],
    ids=lambda part: type(part).__name__,
)  # fmt: skip
def test_a_part_is_made_again_from_what_is_written(part: nn.Module) -> None:
    form = json.loads(json.dumps(described(part), allow_nan=False))
    again = made(form, network())
    assert type(again) is type(part) and repr(again) == repr(part) and described(again) == described(part)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in part.state_dict().items()}


def test_a_memory_is_made_again_for_a_network() -> None:
    part = remembering(descend(rules.sgd(0.1), 1), network(), "00011", tasks=3)
    again = made(described(part), network())
    assert isinstance(again, remembering) and again.names == part.names and isinstance(again.solver, descend)
    with pytest.raises(ValueError, match="none of the package's own parts"):
        described(descend(rules.sgd(0.1), 1, penalty=lambda params: params["w"].norm()))

    class Own(alfa):
        pass

    with pytest.raises(ValueError, match="none of the package's own parts"):
        described(Own(["a"], 1))


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        (["--method", "alfa"], "00011"), (["--method", "lslr:lr=0.2"], "00011"), (["--inner", "ridge"], "ANIL"),
        (["--inner", "ntk:time=10"], "00011"), (["--method", "forward_gradient", "--first-order"], "00011"),
        (["--method", "local_losses"], "00011"),
        (["--inner", "remembering:beta=0.5", "--task-source", "pool:size=3"], "00011"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_checkpoint_holds_its_method(
    asked: list[Any], pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = train(tmp_path, *asked, "--pattern", pattern)
    model, meta = checkpoint.load(best)
    inner = load_inner(best, model, meta)
    assert len(inner) == 1
    found = evaluated(capsys, best, "--pattern", pattern)
    tasks = data.sample_tasks(data.load("glyphs", split="test"), 3, ways=5, shots=1, query=2, seed=cli_types.TEST_SEED)
    assert found["accuracy"] == evaluate(model, tasks, pattern=pattern, steps=2, **inner).mean
    assert call("info", best, "--pattern", pattern) == 0
    assert "steps of alfa" in capsys.readouterr().out or asked != ["--method", "alfa"]


def test_a_run_with_methods_is_resumed_exactly(tmp_path: Path) -> None:
    asked = ["--method", "alfa", "--task-weights", "spsa", "--task-source", "prioritised:size=4", "--pattern", "00011"]
    train(tmp_path / "steady", *asked, iterations=4)
    train(tmp_path / "broken", *asked, iterations=2)
    train(tmp_path / "broken", *asked, "--resume", iterations=4)
    one, two = (checkpoint.read_tensors(tmp_path / name / LAST)[0] for name in ("steady", "broken"))
    assert {"rule:rule.rates", "rule:weights.weights", "rule:source.scores"} <= one.keys()
    assert [k for k in one if k != "random" and not torch.equal(one[k], two[k])] == []


def test_select_takes_the_checkpoints_solver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = train(tmp_path, "--inner", "ntk:time=10", "--pattern", "00011")
    given = ["--tasks", 2, "--seconds", 0, "--max-drop", 1, "--patterns", "ANIL"]
    assert call("select", best, *given) == 0
    found = json.loads((tmp_path / "pattern.json").read_text(encoding="utf-8"))
    assert found["inner_rule"] == "ntk(time=10)" and [c["pattern"] for c in found["candidates"]]
    ridge = train(tmp_path / "ridge", "--inner", "ridge", "--pattern", "ANIL")
    assert "the closed form is of the last layer alone" in refused(capsys, "select", ridge, *given)


def test_learned_rates_beside_other_parts_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = train(tmp_path, "--learn-lr", "layer", "--task-weights", "spsa")
    assert len(evaluated(capsys, best)["lr"]) == 5
    assert "steps" in evaluated(capsys, best, "--pattern", "fisher:budget=0.5")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--inner", "ridge"], "ridge_head: pattern 11111 moves block1"),
        (["--inner", "ntk:time=1", "--pattern", "11111,00001"], "is a schedule, a closed form has no steps"),
        (["--method", "alpha"], "there is no one method 'alpha': expected one of"),
        (["--inner", "spsa"], "--inner spsa: it is a weights: give it as --method spsa"),
        (["--method", "ridge", "--inner", "ntk:time=1"], "ridge_head and ntk are both a solver"),
        (["--inner", "ridge:width=3", "--pattern", "ANIL"], "ridge_head: got an unexpected keyword argument 'width'"),
        (["--inner", "ridge:3"], "expected NAME[:KEY=VALUE,...]"),
        (["--inner", "remembering:tasks=3"], "remembers tasks that come back: draw them from methods.pool"),
        (["--task-source", "pool:size=1"], "a meta-batch of 2 tasks is more than the pool has, 1"),
        (["--method", "top_gradient"], "the batch norms of Conv4 take their statistics from all rows"),
        (["--method", "forward_gradient"], "adapt in first order"),
        (["--method", "sparse_rates:weight=0.1"], "one rate for each tensor and step expected"),
        (["--method", "fisher:budget=0.3"], "give it to adapt or eval, --pattern fisher:budget=0.3"),
        (["--method", "lslr", "--test-steps", 3], "lr has rates for 2 steps, the adaptation has 3"),
        (["--inner", "ridge", "--pattern", "ANIL", "--test-steps", 3], "a solver has its own number of steps"),
        (["--inner", "ridge", "--pattern", "ANIL", "--learn-lr", "one"], "leave learn_lr and rule= out"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_said_before_anything_is_computed(
    asked: list[Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(self: Any, *args: Any) -> None:
        raise AssertionError("an iteration began")

    monkeypatch.setattr("lambda_maml.train._Run.update", computed)
    assert words in refused(capsys, "train", "--out", tmp_path, *SMALL, *asked)
    assert not (tmp_path / LAST).exists()


def test_a_rule_of_another_pattern_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = train(tmp_path, "--method", "alfa", "--pattern", "00011")
    assert "use the pattern and norm= that it was made and trained for" in refused(capsys, "eval", best)
    assert evaluated(capsys, best, "--lr", 0.1)["lr"] == 0.1
    ridge = train(tmp_path / "ridge", "--inner", "ridge", "--pattern", "ANIL")
    assert "has its own steps: leave --steps out" in refused(capsys, "eval", ridge, "--steps", 3)


class Halved(Rule):
    """A rule of a user's own."""

    def update(self, grads: Any, state: Any, params: Any, step: Any) -> Any:
        return {n: -0.05 * g for n, g in grads.items()}, state


def test_a_part_of_ones_own_is_not_left_out_in_silence(tmp_path: Path) -> None:
    run(tmp_path, 1, small(val_tasks=2, val_every=50), rule=Halved())
    model, meta = checkpoint.load(tmp_path / BEST)
    with pytest.raises(ValueError, match=r"trained with the rule Halved\(\), which is none of the package's own"):
        load_inner(tmp_path / BEST, model, meta)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"part": "os.system", "with": {"command": "true"}}, "expected one of alfa"),
        ({"part": "spsa", "with": {"tasks": 10**15}}, "is of another part: weights"),
        ({"part": "spsa", "with": {"tasks": "many"}}, "spsa"),
        ({"part": "ridge_head", "with": {"lam": -1.0}}, "lam must be at least 0"),
        ({"part": "ridge_head", "with": {}, "more": 1}, "a part is"),
        ({"part": "ridge_head", "with": {"sum": 1}}, "unexpected keyword argument"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_header_makes_nothing_but_parts_of_the_files_size(form: Any, words: str, tmp_path: Path) -> None:
    parts = Parts(solver=ridge_head(learned=True))
    run(tmp_path, 1, small(pattern="00001", val_tasks=2, val_every=50), parts=parts)
    model, meta = checkpoint.load(tmp_path / BEST)
    assert load_inner(tmp_path / BEST, model, meta)["solver"].log_lam is not None
    with pytest.raises(ValueError, match=words):
        load_inner(tmp_path / BEST, model, {**meta, "parts": {"solver": form}})


def test_a_name_may_be_the_beginning_of_one() -> None:
    assert named("ridge").name == "ridge_head" and named("spsa").name == "spsa"
    with pytest.raises(ValueError, match="several: rescaled, remembering"):
        named("re")
    model = network()
    xs, ys, _, _ = data.sample_tasks(data.load("glyphs"), 1, ways=3)[0]
    part = descend(rules.sgd(0.1), 2)
    assert adapt(model, torch.nn.functional.interpolate(xs, 16), ys, pattern="ANIL", solver=part) is not None
