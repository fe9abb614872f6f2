"""300 random networks and 2,000 random calls beside plain PyTorch in float64; `make fuzz` runs as many as one likes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fuzz import adaptations, runner
from fuzz.adaptations import check
from fuzz.calls import check_call
from fuzz.grammar import network
from machine import on_threads
from torch import Tensor

from lambda_kernels import autograd
from lambda_maml.inner import autograd as inner

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with on_threads(1):
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, 300, 20))
def test_random_networks_adapt_as_a_plain_loop_does(first: int) -> None:
    found = {seed: check(seed) for seed in range(first, first + 20)}
    wrong = [f"{seed}: {f.verdict} {f.told}" for seed, f in found.items() if f.verdict not in ("ok", "skipped")]
    assert not wrong, "PYTHONPATH=tests python -m fuzz --seed N shows one: " + "; ".join(wrong)
    assert sum(f.verdict == "ok" for f in found.values()) >= 15, {s: f for s, f in found.items() if f.verdict != "ok"}


def test_random_calls_are_atens() -> None:
    found = {seed: check_call(seed) for seed in range(2000)}
    wrong = [f"{seed}: {f.verdict} {f.told}" for seed, f in found.items() if f.verdict not in ("ok", "skipped")]
    assert not wrong, "PYTHONPATH=tests python -m fuzz --kind call --seed N shows one: " + "; ".join(wrong)


def test_the_fuzz_sees_a_wrong_step_and_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, total = inner.gradients, autograd._sum_to

    def wrong(*args: Any, **given: Any) -> dict[str, Tensor]:
        return {name: g * (1 + 1e-6) for name, g in plain(*args, **given).items()}

    with monkeypatch.context() as patch:
        patch.setattr(inner, "gradients", wrong)
        verdicts = [check(seed).verdict for seed in range(1000, 1008)]
    assert "WRONG" in verdicts, verdicts
    with monkeypatch.context() as patch:
        patch.setattr(autograd, "_sum_to", lambda g, tasks: total(g, tasks) * (1 + 1e-6))
        verdicts = [check_call(seed).verdict for seed in range(100)]
    assert "WRONG" in verdicts, verdicts


def test_a_network_of_a_seed_is_the_same_in_every_call() -> None:
    one, two = (network(7).make() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert adaptations.describe(7) == adaptations.describe(7)


def test_a_seed_that_ends_the_process_is_a_failure_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_FUZZ_CRASH", "call 3")
    counts: Counter[str] = Counter()
    found = list(runner.failures("call", [range(0, 6)], counts))
    assert [(f.kind, f.seed) for f in found] == [("call", 3)] and "CRASH" in found[0].told, found
    assert counts["ok"] == 5 and counts["CRASH"] == 1
