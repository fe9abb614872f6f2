"""What tells two runs apart, and that a resumed run is refused where its parts are made otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import run, small
from torch import Tensor, nn

from lambda_maml import checkpoint, methods, rules
from lambda_maml.fingerprint import fingerprint
from lambda_maml.train import LAST, Parts


def penalised(by: float) -> Parts:
    def penalty(params: Any) -> Tensor:
        return by * torch.stack([p.square().sum() for p in params.values()]).sum()

    return Parts(solver=methods.descend(rules.sgd(0.1), 2, penalty=penalty))


MADE: dict[str, tuple[Callable[[Any], Any], Any, Any, str]] = {  # how, one setting, another, and where it is told
    "floor of weights": (lambda v: Parts(weights=methods.spsa(2, floor=v)), 0.1, 0.5, "floor"),
    "seed of weights": (lambda v: Parts(weights=methods.spsa(2, seed=v)), 1, 2, "seed"),
    "seed of a source": (lambda v: Parts(source=methods.prioritised(4, 0.5, seed=v)), 1, 2, "seed"),
    "rates in a tensor": (lambda v: rules.sgd(torch.full((5,), v)), 0.1, 0.2, "rates[0]"),
    "a penalty's number": (penalised, 0.1, 0.2, "closes over.by"),
    "a loss's number": (lambda v: partial(F.cross_entropy, label_smoothing=v), 0.1, 0.2, "label_smoothing"),
    "a loss's number, of a module": (lambda v: nn.CrossEntropyLoss(label_smoothing=v), 0.1, 0.2, "label_smoothing"),
    "a loss's weights": (lambda v: nn.CrossEntropyLoss(weight=torch.tensor(v)), [1.0] * 3, [1.0, 2.0, 1.0], "weight"),
}


@pytest.mark.parametrize("name", MADE)
def test_settings_tell_two_apart_and_nothing_else_does(name: str) -> None:
    make, one, other, _ = MADE[name]
    told = fingerprint(make(one))
    assert told == fingerprint(make(one)) == json.loads(json.dumps(told)) != fingerprint(make(other))


def test_what_training_moves_does_not_tell() -> None:
    rates = nn.Parameter(torch.full((5,), 0.1))
    rule, solver = rules.sgd(rates), methods.ridge_head(1.0, learned=True)
    told = fingerprint(rule), fingerprint(solver)
    with torch.no_grad():
        for parameter in (*rule.parameters(), *solver.parameters()):
            parameter.add_(1.0)
    assert (fingerprint(rule), fingerprint(solver)) == told
    calls = 0

    def counting(logits: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(logits, y)

    before = fingerprint(counting)
    counting(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert fingerprint(counting) == before


@pytest.mark.parametrize("name", ["seed of weights", "rates in a tensor", "a penalty's number", "a loss's number"])
def test_a_run_goes_on_with_the_same_parts_alone(name: str, tmp_path: Path) -> None:
    make, one, other, where = MADE[name]

    def given(value: Any) -> dict[str, Any]:
        part = make(value)
        place = "parts" if isinstance(part, Parts) else "rule" if isinstance(part, rules.Rule) else "loss"
        return {place: part}

    settings = small(meta_batch=2)
    run(tmp_path, 1, settings, **given(one))
    run(tmp_path, 2, settings, resume=True, **given(one))
    with pytest.raises(ValueError, match="the run to resume has (rule|goal) settings.*this one") as caught:
        run(tmp_path, 3, settings, resume=True, **given(other))
    assert where in str(caught.value) and f"{other}"[:3] in str(caught.value)


def test_a_run_of_a_version_that_wrote_no_settings_goes_on(tmp_path: Path) -> None:
    run(tmp_path, 1, loss=partial(F.cross_entropy, label_smoothing=0.1))
    tensors, meta = checkpoint.read_tensors(tmp_path / LAST)
    del meta["run"]["goal"]["settings"]
    checkpoint.write_tensors(tmp_path / LAST, tensors, meta)
    run(tmp_path, 2, resume=True, loss=partial(F.cross_entropy, label_smoothing=0.1))
