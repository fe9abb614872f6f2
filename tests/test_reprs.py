"""What a thing says of itself: one or two lines, with names and sizes and without tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import VAL
from torch import nn

from lambda_maml import LambdaMAML, Pattern, adapt, data, explain, models, rules, select_pattern
from lambda_maml.choice import Table
from lambda_maml.evaluate import evaluate
from lambda_maml.train import Result, Validation

pytestmark = pytest.mark.usefixtures("one_thread")

TASK, OTHER = data.sample_tasks(VAL, 2, ways=3, query=2)
GIVEN: dict[str, Any] = {"steps": 1, "lr": 0.1}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.conv4(ways=3, in_channels=1, width=2, image_size=16)


def clone(model: nn.Module) -> Any:
    task = LambdaMAML(model, lr=0.1, pattern="ANIL").clone()
    task.adapt(F.cross_entropy(task(TASK.xs), TASK.ys))
    return task


SAYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pattern": (lambda m: Pattern("11111,00001"), r"Pattern('11111,00001')"),
    "learner": (
        lambda m: adapt(m, *TASK[:2], pattern="00011"),
        "Learner(Conv4, adapted: block4.conv, block4.norm, head)",
    ),
    "whole": (
        lambda m: adapt(m, *TASK[:2], pattern="MAML"),
        "Learner(Conv4, adapted: block1.conv, block1.norm, ... 5 more ..., block4.norm, head)",
    ),
    "maml": (
        lambda m: LambdaMAML(m, lr=0.1, pattern="ANIL"),
        "LambdaMAML(Conv4, pattern=00001, rule=sgd(lr=0.1), second order)",
    ),
    "clone": (clone, "TaskLearner(Conv4 after 1 inner steps)"),
    "images": (
        lambda m: VAL,
        f"ImageSet({VAL.name} {VAL.split}: {VAL.num_classes} classes, {len(VAL)} images of [1, 16, 16])",
    ),
    "task": (lambda m: TASK, "Task(xs [3, 1, 16, 16], ys [3], xq [6, 1, 16, 16], yq [6])"),
    "rule": (lambda m: rules.clip(norm=1.0) | rules.sgd(torch.ones(5, 5)), "clip(norm=1.0) | sgd(lr=tensor [5, 5])"),
    "evaluation": (
        lambda m: evaluate(m, [TASK], pattern="ANIL", **GIVEN),
        "Evaluation(accuracy ... ± inf over 1 tasks)",
    ),
    "selection": (
        lambda m: select_pattern(m, [TASK, OTHER], patterns=["ANIL"], seconds=0.0, **GIVEN),
        "Selection(... of 2 patterns: 00001 ...% in ... ms, 11111 ...% in ... ms)",
    ),
    "table": (lambda m: Table(metric="mse_loss"), "Table(0 patterns by mse_loss)"),
    "result": (
        lambda m: Result(10, Validation(8, 0.5, 0.1, None, 3.0), stopped="minutes"),
        "Result(10 iterations, ended by minutes, best validation 0.5 at 8)",
    ),
}


@pytest.mark.parametrize("name", SAYS)
def test_it_says_what_it_is(name: str, model: nn.Module) -> None:
    make, want = SAYS[name]
    told = repr(make(model))
    rest, last = told, 0
    for part in want.split("..."):
        last = rest.find(part)
        assert last >= 0, told
        rest = rest[last + len(part) :]
    assert rest == "" and "\n" not in told and len(told) < 240


def test_an_explanation_prints_line_by_line(model: nn.Module) -> None:
    assert explain(model, TASK.xs, pattern="ANIL").splitlines()[0].startswith("Conv4 under 00001, 5 steps of sgd")
