"""Rules beyond `adapt`: meta-training learned rates, exact resume, evaluation, selection, timing, the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from lambda_maml import adapt, checkpoint, data, measure_time, models, rules, select_pattern
from lambda_maml.cli import cli
from lambda_maml.evaluate import evaluate
from lambda_maml.train import BEST, LAST, Settings, meta_gradient, train

SMALL = Settings(ways=2, shots=1, query=2, steps=2, meta_batch=2, val_tasks=2, val_every=2, seed=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def images() -> Any:
    return data.load("glyphs", split="val")


def network() -> models.Conv4:
    torch.manual_seed(0)
    return models.conv4(ways=2, in_channels=1, width=4, image_size=28)


def learned() -> rules.sgd:
    return rules.sgd(nn.Parameter(torch.full((2, 5), 0.1)))


def tensors(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
def test_the_meta_gradient_reaches_the_rule(images: Any, second_order: bool) -> None:
    settings = Settings(ways=2, shots=1, query=2, steps=2, second_order=second_order)
    tasks = data.sample_tasks(images, 3, ways=2, shots=1, query=2, seed=0)
    found = []
    for batched in (True, False):
        model, rule = network(), learned()
        loss = meta_gradient(model, tasks, settings, rule=rule, batched=batched)
        (rates,) = rule.parameters()
        assert rates.grad is not None and rates.grad.all()
        found.append([torch.tensor(loss), rates.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)  # two orders of float32 sums


def test_learned_rates_are_trained_saved_and_resumed_to_the_same_bits(images: Any, tmp_path: Path) -> None:
    def run(out: Path, iterations: int, resume: bool = False) -> tuple[models.Conv4, rules.sgd]:
        model, rule = network(), learned()
        train(model, images, images, out=out, settings=SMALL, rule=rule, iterations=iterations, resume=resume)
        return model, rule

    whole, in_parts = tmp_path / "whole", tmp_path / "parts"
    model, rule = run(whole, 4)
    run(in_parts, 3)
    again, rates = run(in_parts, 4, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors(model, rule), tensors(again, rates), strict=True))
    assert not torch.equal(*tensors(rule, learned()))  # they were trained
    fresh = learned()
    checkpoint.load_rule(whole / LAST, fresh)
    assert torch.equal(*tensors(fresh, rule))
    loaded, meta = checkpoint.load(whole / BEST)
    best = learned()
    checkpoint.load_rule(whole / BEST, best)
    assert "sgd" in meta["rule"]["name"] and not torch.equal(*tensors(best, learned()))
    tasks = data.sample_tasks(images, 2, ways=2, shots=1, query=2, seed=1)
    assert evaluate(loaded, tasks, pattern="11111", steps=2, rule=best).accuracies.shape == (2,)
    with pytest.raises(ValueError, match="is of another rule: rate0 is .2, 5. in the file, .3, 5. in the rule"):
        checkpoint.load_rule(whole / BEST, rules.sgd(nn.Parameter(torch.full((3, 5), 0.1))))
    with pytest.raises(ValueError, match="the run to resume has rule name sgd"):
        train(network(), images, images, out=whole, settings=SMALL, iterations=5, resume=True)


@pytest.mark.usefixtures("one_thread")
def test_selection_and_timing_take_a_rule(images: Any) -> None:
    tasks = data.sample_tasks(images, 3, ways=2, shots=1, query=2, seed=0)
    given: dict[str, Any] = {"steps": 2, "max_drop": 1.0, "patterns": ["00001", "00011"], "seconds": 0.1}
    rule = rules.clip(norm=1.0) | rules.momentum(0.1)
    chosen = select_pattern(network(), tasks, rule=rule, **given)
    report = json.loads(chosen.to_json())
    assert report["rule"] == "bound" and report["lr"] is None and "momentum" in report["inner_rule"]
    assert report["stock_full"]["time_ms"] is None  # plain PyTorch's loop is gradient descent
    for pattern in ("00001", "11111"):
        want = evaluate(network(), tasks, pattern=pattern, steps=2, rule=rule).mean
        assert chosen[pattern].accuracy == want
    assert json.loads(select_pattern(network(), tasks, rule=rule, decide="point", **given).to_json())["rule"] == "point"
    per_layer = select_pattern(network(), tasks, lr=[0.1, 0.1, 0.1, 0.2, 0.1], rule="point", **given)
    assert json.loads(per_layer.to_json())["lr"] == [0.1, 0.1, 0.1, 0.2, 0.1]
    for wrong in ({"rule": "best"}, {"rule": rule, "decide": "best"}):
        with pytest.raises(ValueError, match="rule is 'best', expected 'bound' or 'point', or an inner rule"):
            select_pattern(network(), tasks, **{**given, **wrong})
    xs, ys = tasks[0].xs, tasks[0].ys
    assert measure_time(network(), xs, ys, pattern="00011", steps=2, rule=rule, repeats=2) > 0


def test_info_says_which_way_a_checkpoint_is_adapted(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    settings = {"ways": 2, "shots": 1, "query": 2, "steps": 3, "test_steps": None, "lr": 0.1, "norm": "follow"}
    checkpoint.save(path, network(), {"settings": settings, "dataset": {"name": "glyphs", "mean": [0.0], "std": [1.0]}})
    done = CliRunner().invoke(cli, ["info", str(path), "--pattern", "00011"])
    assert done.exit_code == 0, done.output
    assert "Conv4 under 00011, 3 steps of sgd(lr=0.1), first order" in done.output
    assert "steps 1 to 3: a chain from the inputs on" in done.output
    whole = CliRunner().invoke(cli, ["info", str(path), "--pattern", "00011", "--json"])
    assert json.loads(whole.output)["adaptation"][0].startswith("Conv4 under 00011")
    plain = CliRunner().invoke(cli, ["info", "--json"])
    assert "adaptation" not in json.loads(plain.output)


def test_the_command_line_names_a_rule_that_it_cannot_build(images: Any, tmp_path: Path) -> None:
    tasks = data.sample_tasks(images, 2, ways=2, shots=1, query=2, seed=0)
    chosen = select_pattern(
        network(), tasks, steps=1, rule=rules.adam(0.1), max_drop=1.0, patterns=["00001"], seconds=0.1
    )
    chosen.save(tmp_path / "pattern.json")
    path = tmp_path / "net.safetensors"
    settings = {"ways": 2, "shots": 1, "query": 2, "steps": 1, "test_steps": None, "lr": 0.1, "norm": "follow"}
    checkpoint.save(path, network(), {"settings": settings, "dataset": {"name": "glyphs", "mean": [0.0], "std": [1.0]}})
    done = CliRunner().invoke(cli, ["info", str(path), "--pattern", str(tmp_path / "pattern.json")])
    assert isinstance(done.exception, ValueError) and "inner rule adam(lr=0.1" in str(done.exception)
    assert (
        CliRunner()
        .invoke(cli, ["info", str(path), "--pattern", str(tmp_path / "pattern.json"), "--lr", "0.1"])
        .exit_code
        == 0
    )


def test_learners_of_a_trained_rule_need_no_gradient(images: Any) -> None:
    task = data.sample_tasks(images, 1, ways=2, shots=1, query=2, seed=0)[0]
    with torch.no_grad():
        learner = adapt(network(), task.xs, task.ys, pattern="11111", steps=2, rule=learned())
        assert not learner(task.xq).requires_grad


class Plainest:
    """A rule that is no module."""

    def init(self, params: Any) -> Any:
        return ()

    def update(self, grads: Any, state: Any, params: Any, step: Any) -> Any:
        return {n: -0.1 * g for n, g in grads.items()}, state


def test_training_by_a_rule_that_is_no_module_goes_on(images: Any, tmp_path: Path) -> None:
    whole, parts = network(), network()
    rule: Any = Plainest()
    train(whole, images, images, out=tmp_path / "a", settings=SMALL, rule=rule, iterations=3)
    for end in (2, 3):  # another object each time
        rule = Plainest()
        train(parts, images, images, out=tmp_path / "b", settings=SMALL, rule=rule, iterations=end, resume=end > 2)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters()))
