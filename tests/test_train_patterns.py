"""Patterns in training: fixed, by a schedule over iterations, or drawn anew for each meta-batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GRADIENT
from small_runs import VAL, assert_same_bits, network, plain_training, run, small

from lambda_maml import Pattern, checkpoint, data
from lambda_maml.evaluate import evaluate
from lambda_maml.schedule import training_pattern, validation_pattern
from lambda_maml.settings import stages
from lambda_maml.train import BEST, Settings

pytestmark = pytest.mark.usefixtures("one_thread")

ITERATIONS = 5


def drawn(iteration: int, seed: int = 0, zero_head: bool = False) -> str:
    settings = small(patterns="sampled", seed=seed, zero_head=zero_head)
    return str(training_pattern(settings, iteration, network()))


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "fixed": ({"pattern": "01001"}, lambda i: "01001"),
    "schedule": ({"patterns": "MAML; 1: 00011; 3: ANIL"}, lambda i: ("11111", "00011", "00011", "00001", "00001")[i]),
    "sampled": ({"patterns": "sampled"}, drawn),
}


@pytest.mark.parametrize("case", CASES)
def test_training_adapts_what_the_pattern_of_the_iteration_says(case: str, tmp_path: Path) -> None:
    changes, bits = CASES[case]
    settings, model = small(**changes), network().double()
    want = plain_training(model, ITERATIONS, settings, bits=bits)
    run(tmp_path, ITERATIONS, settings, model)
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, want, **GRADIENT)


@pytest.mark.parametrize("case", ["schedule", "sampled"])
def test_patterns_resume_to_the_same_bits(case: str, tmp_path: Path) -> None:
    settings = small(**CASES[case][0], val_every=1)
    run(tmp_path / "whole", ITERATIONS, settings)
    run(tmp_path / "parts", 2, settings)
    run(tmp_path / "parts", ITERATIONS, settings, network(seed=9), resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_each_pattern_is_drawn_as_often_as_any_other() -> None:
    count = Counter(drawn(i) for i in range(3100))
    assert set(count) == {str(p) for p in Pattern.all(5)}
    assert min(count.values()) > 60 and max(count.values()) < 145  # 100 of each, with a deviation of 10
    count = Counter(drawn(i, zero_head=True) for i in range(1600))
    assert set(count) == {str(p) for p in Pattern.all(5) if str(p).endswith("1")}
    assert min(count.values()) > 60 and max(count.values()) < 145
    assert [drawn(i) for i in range(20)] == [drawn(i) for i in range(20)] != [drawn(i, seed=1) for i in range(20)]


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, "11111"),
        ({"pattern": "00011"}, "00011"),
        ({"patterns": "sampled"}, "11111"),
        ({"patterns": "sampled", "pattern": "ANIL"}, "00001"),
        ({"patterns": "MAML; 2: 00011"}, "00011"),
        ({"patterns": "MAML; 2: 00011", "pattern": "00111"}, "00111"),
    ],
)
def test_validation_has_one_pattern(changes: dict[str, Any], bits: str, tmp_path: Path) -> None:
    settings = small(**changes, val_every=2)
    assert str(validation_pattern(settings, network())) == bits
    result = run(tmp_path, 2, settings)
    tasks = data.sample_tasks(VAL, 6, ways=3, shots=1, query=2, seed=0)
    model, _ = checkpoint.load(tmp_path / BEST)
    assert result.best is not None
    assert evaluate(model, tasks, pattern=bits, steps=2, lr=0.1).mean == result.best.accuracy


def test_a_schedule_is_read_with_inner_schedules_and_paths() -> None:
    assert stages("11111,00001; 10: stages:0011 ; 200: layer4:01") == [
        (0, "11111,00001"), (10, "stages:0011"), (200, "layer4:01")
    ]  # fmt: skip
    assert stages("0: BOIL;7:ANIL") == [(0, "BOIL"), (7, "ANIL")] and stages("stages:0011") == [(0, "stages:0011")]
    assert stages("sampled") == stages(None) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MAML; 00011", "with the iterations from which they hold"),
        ("MAML; 20: ANIL; 10: BOIL", "in order"),
        ("5: MAML; 20: ANIL", "no pattern for iteration 0"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(patterns=text)


def test_a_pattern_that_does_not_fit_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'001' has 3 bits, Conv4 has 5 layers"):
        run(tmp_path / "out", 1, small(patterns="MAML; 100: 001"))
    assert not (tmp_path / "out").exists()
