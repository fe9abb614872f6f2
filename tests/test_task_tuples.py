"""A plain tuple (xs, ys, xq, yq) is a task wherever a list of tasks is taken."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from small_runs import SMALL, VAL, network

from lambda_maml import adapt_tasks, data, select, select_pattern
from lambda_maml.evaluate import evaluate
from lambda_maml.timing import Timing
from lambda_maml.train import meta_gradient, train

TASKS = data.sample_tasks(VAL, 4, ways=3, shots=1, query=2)
PLAIN: list[Any] = [tuple(task) for task in TASKS]
PLAIN[1] = list(PLAIN[1])
INNER: dict[str, Any] = {"steps": 2, "lr": 0.1}


def gradient(tasks: list[Any]) -> list[torch.Tensor | None]:
    model = network()
    meta_gradient(model, tasks, SMALL)
    return [p.grad for p in model.parameters()]


def chosen(tasks: list[Any]) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            select, "measure_times", lambda *_, patterns, **more: dict.fromkeys(map(str, patterns), Timing(1, 1, 1))
        )
        found = select_pattern(network(), tasks[:2], test_tasks=tasks[2:], patterns=["00001"], **INNER)
    rows = sorted((str(row.pattern), row.accuracy) for row in found.table)
    return [torch.tensor([accuracy for _, accuracy in rows]), torch.tensor(found.test["full_accuracy"])]


def trained(tasks: list[Any]) -> list[torch.Tensor]:
    model = network()
    with tempfile.TemporaryDirectory() as out:
        train(model, lambda first, count: tasks[first : first + count], VAL, out=out, settings=SMALL, iterations=2)
    return list(model.parameters())


TAKERS: dict[str, Any] = {
    "adapt_tasks": lambda tasks: adapt_tasks(network(), tasks, pattern="00111", **INNER),
    "evaluate": lambda tasks: [evaluate(network(), tasks, pattern="00011", **INNER).accuracies],
    "meta_gradient": gradient,
    "select_pattern": chosen,
    "train": trained,
}


@pytest.mark.parametrize("name", TAKERS)
def test_the_results_are_those_of_tasks(name: str) -> None:
    for got, want in zip(TAKERS[name](PLAIN), TAKERS[name](TASKS), strict=True):
        assert torch.equal(got, want)


XS, YS, XQ, YQ = TASKS[0]
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a pair": ((XS, YS), TypeError, "a tuple of 2 .Tensor, Tensor., expected Task.*from_learn2learn divides pairs"),
    "five parts": ((*TASKS[0], 3), TypeError, "a tuple of 5 .*int"),
    "a tensor": (XS, TypeError, "a Tensor, expected Task"),
    "another order": ((XS, XQ, YS, YQ), ValueError, "3 images in xs, 6 labels in ys; the order is xs, ys, xq, yq"),
    "missing labels": ((XS, YS, XQ, YQ[1:]), ValueError, "6 images in xq, 5 labels in yq"),
}  # fmt: skip


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("name", WRONG)
def test_other_tuples_are_told_with_their_number(name: str, taker: str) -> None:
    given, kind, message = WRONG[name]
    with pytest.raises(kind, match=rf"{taker}: task 1 is {message}" if kind is TypeError else f"task 1: {message}"):
        TAKERS[taker]([PLAIN[0], given, *PLAIN])
