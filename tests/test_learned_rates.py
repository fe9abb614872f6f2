"""Inner rates that are trained with the network: against a plain loop, in checkpoints, and on the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GRADIENT
from PIL import Image
from small_runs import SMALL, TRAIN, VAL, network, plain_training, run, small
from torch import nn

from lambda_maml import adapt, checkpoint, cli, cli_types, data, rules
from lambda_maml.evaluate import evaluate
from lambda_maml.learned_rates import check_rates, fixed_rates, learned_rule, load_rates
from lambda_maml.settings import LEARNED
from lambda_maml.train import BEST, LAST, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", LEARNED)
def test_rates_are_trained_as_in_a_plain_loop(form: str, tmp_path: Path) -> None:
    model = network().double()
    names = [n for n, _ in model.named_parameters()]
    layer = {name: min(index // 4, 4) for index, name in enumerate(names)}
    shapes: dict[str, Any] = {"one": (), "layer": (5,), "step": (2, 1), "layer-step": (2, 5)}
    if form == "weight":
        plain = {n: nn.Parameter(torch.full_like(p, 0.1)) for n, p in model.named_parameters()}
    else:
        plain = {"": nn.Parameter(torch.full(shapes[form], 0.1, dtype=torch.float64))}

    def rate(name: str, step: int) -> torch.Tensor:
        if form == "weight":
            return plain[name]
        return plain[""].expand(2, 5)[step, layer[name]]

    want = plain_training(model, 3, rates=list(plain.values()), rate=rate)
    run(tmp_path, 3, small(learn_lr=form), model)
    torch.testing.assert_close(
        dict(model.named_parameters()), {n: nn.Parameter(p) for n, p in want.items()}, **GRADIENT
    )
    rule = learned_rule(model, small(learn_lr=form))
    checkpoint.load_rule(tmp_path / LAST, rule)
    found = rule.rates.value if form == "weight" else {"": rule.rates.value}
    torch.testing.assert_close(found, plain, **GRADIENT)
    moved = [name for name, p in found.items() if (p != 0.1).any()]
    assert moved == [n for n in found if not n.endswith("conv.bias")]  # in front of a norm a bias has no gradient


def test_rates_are_learned_from_the_losses_of_every_step(tmp_path: Path) -> None:
    model = network().double()
    names = [n for n, _ in model.named_parameters()]
    rates = nn.Parameter(torch.full((2, 5), 0.1, dtype=torch.float64))
    want = plain_training(
        model, 2, rates=[rates], rate=lambda name, step: rates[step, min(names.index(name) // 4, 4)],
        weights=lambda i: ((1 / 2, 1 / 2), (1 / 4, 3 / 4))[i], bits=lambda _: "00111",
    )  # fmt: skip
    run(tmp_path, 2, small(learn_lr="layer-step", multi_step_iterations=2, pattern="00111"), model)
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, want, **GRADIENT)
    torch.testing.assert_close(checkpoint.read_tensors(tmp_path / LAST)[0]["rule:rate0"], rates.detach(), **GRADIENT)


@pytest.mark.parametrize("form", ["layer-step", "weight"])
def test_learned_rates_resume_to_the_same_bits(form: str, tmp_path: Path) -> None:
    settings = small(learn_lr=form)
    run(tmp_path / "whole", 4, settings)
    run(tmp_path / "parts", 2, settings)
    run(tmp_path / "parts", 4, settings, network(seed=7), resume=True)
    run(tmp_path / "whole", 4, settings, resume=True)
    first, second = (checkpoint.read_tensors(tmp_path / part / LAST)[0] for part in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first if key != "random")
    with pytest.raises(ValueError, match=f"settings learn_lr {form}, this one one"):
        run(tmp_path / "whole", 5, small(learn_lr="one"), resume=True)
    with pytest.raises(ValueError, match="not both"):
        run(tmp_path / "other", 1, settings, rule=rules.sgd(0.1))


@pytest.mark.parametrize("form", LEARNED)
def test_a_checkpoint_knows_its_rates(form: str, tmp_path: Path) -> None:
    settings = small(learn_lr=form, test_steps=3)
    result = run(tmp_path, 3, settings)
    model, meta = checkpoint.load(tmp_path / BEST)
    rates = load_rates(tmp_path / BEST, model, meta, 3)
    tasks = data.sample_tasks(VAL, 6, ways=3, shots=1, query=2, seed=0)
    assert rates is not None and result.best is not None
    assert evaluate(model, tasks, pattern="11111", steps=3, lr=rates).mean == result.best.accuracy
    xs, ys, *_ = tasks[0]
    whole = adapt(model, xs, ys, pattern="11111", steps=2, lr=fixed_rates(learned_rule(model, settings), form, 2))
    assert whole is not None


def test_steps_beyond_the_trained_ones_have_the_last_rates() -> None:
    rule = rules.sgd(nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
    assert fixed_rates(rule, "layer-step", 4).tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]  # type: ignore[union-attr, operator]
    assert fixed_rates(rule, "layer-step", 1).tolist() == [[1, 2]]  # type: ignore[union-attr, operator]


def test_a_negative_rate_is_said_once_and_an_infinite_one_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    model, told = network(), set[str]()
    rates = nn.Parameter(torch.full((2, 5), 0.1))
    with caplog.at_level(logging.WARNING, "lambda_maml"):
        check_rates(model, rules.sgd(rates), "at iteration 1", told)
        assert not caplog.records
        with torch.no_grad():
            rates[1, 4] = -0.25
        for iteration in (2, 3):
            check_rates(model, rules.sgd(rates), f"at iteration {iteration}", told)
    (record,) = caplog.records
    assert record.getMessage().startswith("the learned rate of layer head in step 2 became -0.25 at iteration 2: ")
    assert "lower the meta rate" in record.getMessage()
    with torch.no_grad():
        rates[0, 1] = torch.inf
    with pytest.raises(
        FloatingPointError, match="learned rate of layer block2.conv in step 1 became inf at iteration 4"
    ):
        check_rates(model, rules.sgd(rates), "at iteration 4", told)
    weight = rules.sgd({"head.bias": nn.Parameter(torch.tensor([0.1, torch.nan, 0.1]))})
    with pytest.raises(
        FloatingPointError, match=r"learned rate of head.bias\[1\] became nan here: lower the meta rate"
    ):
        check_rates(model, rules.clip(norm=1) | weight, "here", told)


def test_a_run_says_that_a_rate_became_negative_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lambda_maml"):
        result = run(tmp_path, 4, small(learn_lr="layer-step", lr=0.5, meta_lr=0.3))
    assert result.iteration == 4 and len(caplog.records) == 1
    assert " became -" in caplog.records[0].getMessage()


def test_a_run_whose_rate_is_infinite_ends_with_its_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules.sgd(nn.Parameter(torch.full((2, 5), 0.1)))
    train(network(), TRAIN, VAL, out=tmp_path, settings=SMALL, rule=rule, iterations=3)
    before = (tmp_path / LAST).read_bytes()

    def again() -> None:
        train(network(), TRAIN, VAL, out=tmp_path, settings=SMALL, rule=rule, iterations=6, resume=True)

    hook = rule.rates.value.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), torch.inf))
    with pytest.raises(FloatingPointError, match="learned rate of layer block1.conv in step 2 is inf at iteration 4"):
        again()
    hook.remove()
    step = torch.optim.AdamW.step

    def overflows(self: Any, *args: Any) -> None:
        step(self, *args)
        rule.rates.value.data[0, 4] = -torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", overflows)
    with pytest.raises(
        FloatingPointError, match="learned rate of layer head in step 1 became -inf at iteration 4 .*lower"
    ):
        again()
    assert (tmp_path / LAST).read_bytes() == before


def call(*args: Any) -> int:
    return cli.run([str(arg) for arg in args])


@pytest.fixture(scope="module", params=["one", "layer-step", "weight"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    small = ["--width", 4, "--steps", 2, "--lr", 0.1, "--query", 3, "--val-tasks", 3, "--val-every", 2]
    assert call("train", "--out", out, "--iterations", 2, *small, "--learn-lr", request.param, "--meta-lr", 0.05) == 0
    return out


def test_the_command_line_uses_learned_rates_without_being_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = trained / BEST
    model, meta = checkpoint.load(best)
    rates: Any = load_rates(best, model, meta, 2)
    tasks = data.sample_tasks(data.load("glyphs", split="test"), 8, ways=5, shots=1, query=3, seed=cli_types.TEST_SEED)
    want = evaluate(model, tasks, pattern="00111", steps=2, lr=rates).mean
    other = evaluate(model, tasks, pattern="00111", steps=2, lr=0.1).mean
    capsys.readouterr()
    assert call("eval", best, "--tasks", 8, "--pattern", "00111", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == want
    if isinstance(rates, torch.Tensor):
        assert found["lr"] == rates.tolist()
    assert call("eval", best, "--tasks", 8, "--pattern", "00111", "--lr", 0.1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == other
    assert call("eval", best, "--tasks", 2, "--steps", 4) == 0  # more steps than were trained

    out = tmp_path / "pattern.json"
    assert call("select", best, "--tasks", 3, "--seconds", 0, "--max-drop", 1, "--out", out) == 0
    chosen = json.loads(out.read_text())
    capsys.readouterr()
    assert call("eval", best, "--tasks", 8, "--pattern", out, "--json") == 0
    bits = chosen["chosen"]["pattern"]
    same = evaluate(model, tasks, pattern=bits, steps=2, lr=rates).mean
    assert json.loads(capsys.readouterr().out)["accuracy"] == same
    for name in "abcde":
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.new("L", (28, 28), 40 * ord(name) % 255).save(tmp_path / "support" / name / "1.png")
    adapted = tmp_path / "adapted.safetensors"
    assert call("adapt", best, "--support", tmp_path / "support", "--pattern", "00001", "--out", adapted) == 0
    kept = load_rates(adapted, *checkpoint.load(adapted), 2)
    torch.testing.assert_close(kept, rates, rtol=0, atol=0)
    capsys.readouterr()
    assert call("info", best, "--pattern", "00111") == 0
    assert "Conv4 under 00111, 2 steps of sgd(lr=" in capsys.readouterr().out
