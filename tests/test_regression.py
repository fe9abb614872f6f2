"""Regression: sines by a small network, meta-trained, judged and selected by MSE, beside loops in plain PyTorch."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import STEPS
from torch import Tensor, nn

from lambda_maml import checkpoint, cli, models, select_pattern
from lambda_maml.data.episodes import Task
from lambda_maml.evaluate import evaluate
from lambda_maml.goal import Goal
from lambda_maml.pattern_json import read_selection
from lambda_maml.timing import is_tie
from lambda_maml.train import BEST, Settings, train

pytestmark = pytest.mark.usefixtures("one_thread")

MSE: dict[str, Any] = {"loss": F.mse_loss, "metric": F.mse_loss}
DESCENT: dict[str, Any] = {"steps": 2, "lr": 0.02}


def mlp(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    ).double()


def sines(first: int, count: int, seed: int = 0) -> list[Task]:
    """5 support and 10 query points of y = a sin(x + b)."""
    tasks = []
    for k in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * seed + k)
        a, b, *points = torch.rand(17, generator=generator)
        x = 10 * torch.stack(points)[:, None] - 5
        y = (0.1 + 4.9 * a) * torch.sin(x + math.pi * b)
        tasks.append(Task(x[:5], y[:5], x[5:], y[5:]))
    return tasks


def plain_mse(model: nn.Module, task: Task, bits: str = "111") -> Tensor:
    """The query MSE after the inner loop, differentiable to second order."""
    task = Task(*(part.double() for part in task))
    names = [name for bit, layer in zip(bits, "024") if bit == "1" for name in (f"{layer}.weight", f"{layer}.bias")]
    params: dict[str, Tensor] = dict(model.named_parameters())
    for _ in range(DESCENT["steps"]):
        loss = F.mse_loss(torch.func.functional_call(model, params, (task.xs,)), task.ys)
        grads = torch.autograd.grad(loss, [params[n] for n in names], create_graph=True)
        params = {**params, **{n: params[n] - DESCENT["lr"] * g for n, g in zip(names, grads)}}
    return F.mse_loss(torch.func.functional_call(model, params, (task.xq,)), task.yq)


def test_scores_are_those_of_a_plain_loop() -> None:
    model, tasks = mlp(), sines(0, 5)
    tasks[3] = Task(*(part[1:] for part in tasks[3]))
    found = evaluate(model, tasks, pattern="011", **DESCENT, **MSE)
    want = [plain_mse(model, task, "011").item() for task in tasks]
    assert found.scores.tolist() == pytest.approx(want, rel=1e-10)  # rounding of float64 over two steps
    assert repr(found) == f"Evaluation(mse_loss {found.mean:.4g} ± {found.ci95:.2g} over 5 tasks)"


def test_meta_training_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    model = models.create(f"{__name__}:mlp")
    other = copy.deepcopy(model)
    settings = Settings(**DESCENT, meta_batch=3, val_tasks=4, val_every=2, optimizer="sgd", meta_lr=0.01)
    given: dict[str, Any] = {**MSE, "lower_is_better": True, "out": tmp_path, "settings": settings}
    result = train(model, sines, sines, iterations=4, **given)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    means = []
    for i in range(4):
        optimizer.zero_grad()
        torch.stack([plain_mse(other, task) for task in sines(3 * i, 3)]).mean().backward()
        optimizer.step()
        if i % 2:
            means.append(sum(plain_mse(other, task).item() for task in sines(0, 4)) / 4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], **STEPS)
    scores = [line.accuracy for line in result.history]
    assert scores == pytest.approx(means, rel=1e-9)  # rounding of float64 over four updates
    assert result.best is not None and result.best.accuracy == min(scores)
    again, meta = checkpoint.load(tmp_path / BEST)
    names = {"loss": "mse_loss", "metric": "mse_loss"}
    assert meta["goal"] == {**names, "lower_is_better": True, "settings": names}
    assert meta["metrics"]["val_mse_loss"] == min(scores) and isinstance(again, nn.Sequential)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["mse_loss"] for line in lines if line["kind"] == "validation"] == scores
    with pytest.raises(ValueError, match="has goal metric mse_loss, this one l1_loss"):
        train(model, sines, sines, iterations=5, resume=True, **{**given, "metric": F.l1_loss})


def test_a_pattern_is_selected_by_mse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tasks, seen = mlp(), sines(0, 6), []
    given: dict[str, Any] = {**DESCENT, **MSE, "lower_is_better": True, "seconds": 0.0, "decide": "point"}
    want = {
        bits: sum(plain_mse(model, task, bits).item() for task in tasks) / 6
        for bits in (f"{number:03b}" for number in range(1, 8))
    }
    limit = sum(sorted(mse / want["111"] - 1 for mse in want.values())[-2:]) / 2  # the worst pattern is beyond it
    within = {bits for bits, mse in want.items() if mse / want["111"] - 1 <= limit}
    chosen = select_pattern(
        model, tasks, test_tasks=sines(6, 3), max_drop=limit, relative=True,
        progress=lambda done, total, what: seen.append(what), **given,
    )  # fmt: skip
    assert {str(c.pattern): c.score for c in chosen.table} == pytest.approx(want)
    assert {str(c.pattern) for c in chosen.table if c.admissible} == within | {"111"} != want.keys()
    first, *others = [c for c in chosen.table if c.admissible]
    assert first.time is not None
    tied = [first, *(c for c in others if c.time is not None and is_tie(c.time, first.time))]
    assert chosen.pattern == min(tied, key=lambda c: c.score).pattern
    report = chosen.to_dict()
    assert report["metric"] == "mse_loss" and report["lower_is_better"] and report["ways"] is None
    assert report["shots"] == 5 and report["chosen"]["score"] == chosen[chosen.pattern].score
    test = report["test"]
    assert test["drop"] == pytest.approx(test["chosen_score"] - test["full_score"])
    assert "mse_loss" in str(chosen.table).splitlines()[0] and f"001 at mse_loss {want['001']:.4g}" in seen[0]
    chosen.save(tmp_path / "pattern.json")
    assert read_selection(tmp_path / "pattern.json") == json.loads(chosen.to_json())
    assert cli.run(["report", str(tmp_path / "pattern.json")]) == 2
    assert "its scores are mse_loss, tables and picture are of accuracies" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused() -> None:
    model, tasks = mlp(), sines(0, 2)
    with pytest.raises(ValueError, match="the targets are float32, which have no accuracy: give loss= and metric="):
        evaluate(model, tasks, pattern="MAML", **DESCENT)
    with pytest.raises(ValueError, match="metric is 'mse', expected 'accuracy' or a function"):
        evaluate(model, tasks, pattern="MAML", metric="mse", **DESCENT)
    with pytest.raises(ValueError, match="metric <lambda> of a task is nan, expected a finite number"):
        evaluate(model, tasks, pattern="MAML", loss=F.mse_loss, metric=lambda result, y: math.nan, **DESCENT)
    with pytest.raises(ValueError, match="lower_is_better is set, but the metric is accuracy"):
        Goal(lower_is_better=True)
    with pytest.raises(ValueError, match="max_drop is -1, expected 0 or more"):
        select_pattern(model, tasks, max_drop=-1, **MSE, **DESCENT)
    with pytest.raises(ValueError, match="max_drop is 2, expected a fraction from 0 to 1"):
        select_pattern(model, tasks, max_drop=2, relative=True, **MSE, **DESCENT)


def test_reptile_and_losses_of_every_step_take_the_loss(tmp_path: Path) -> None:
    for name, more in (("reptile", {"outer": "reptile"}), ("steps", {"multi_step_iterations": 2})):
        settings = Settings(**DESCENT, meta_batch=1, val_tasks=1, val_every=1, **more)
        model = models.create(f"{__name__}:mlp")
        result = train(
            model, sines, sines, out=tmp_path / name, settings=settings, iterations=1, lower_is_better=True, **MSE
        )
        assert result.best is not None and result.best.accuracy > 0
    with pytest.raises(ValueError, match="flip, crop and jitter change the images of an ImageSet"):
        train(mlp(), sines, sines, out=tmp_path / "flip", settings=Settings(flip=True), iterations=1, **MSE)
