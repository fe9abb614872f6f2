"""A remembered call on a CUDA device: a replay, and little around it. Recordings are tapes on the CPU."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from collections.abc import Iterator
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, all_close, close, gradients_of
from tape import Rehearsed, rehearse
from torch import Tensor, nn

from lambda_maml import adapt, adapt_tasks, models, rules
from lambda_maml.inner import recorded

GIVEN: dict[str, Any] = {"steps": 2, "lr": 0.1}


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    rehearse(monkeypatch)
    recorded.RECORDINGS.clear()
    yield
    recorded.RECORDINGS.clear()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls `adapt` where the long way is an error."""

    def call(*args: Any, **given: Any) -> Any:
        with monkeypatch.context() as without:
            without.setattr(importlib.import_module("lambda_maml.adapt"), "describe", None)
            return adapt(*args, **given)

    return call


def conv4() -> models.Conv4:
    return loops.own_conv4(loops.torch_conv4())  # type: ignore[return-value]


def task(seed: int) -> tuple[Tensor, Tensor]:
    xs, ys, _, _ = CONV4.task(seed=seed)
    return xs, ys


def fresh(model: nn.Module, xs: Tensor, ys: Tensor, **given: Any) -> dict[str, Tensor]:
    """What a network of the same values gives that has no recording."""
    return adapt(copy.deepcopy(model), xs, ys, **given).parameters_dict()


def ready(model: nn.Module, **given: Any) -> None:
    for seed in (0, 1):
        adapt(model, *task(seed), **given)
    assert (Rehearsed.made, Rehearsed.replays) == (1, 1)


RULE = rules.sgd({"head": 0.2, "block4.conv": 0.1})


@pytest.mark.parametrize(
    ("pattern", "how"),
    [("11111", {"lr": 0.1}), ("00011", {"lr": 0.1}), ("01000", {"lr": 0.1}), ("00011", {"rule": RULE})],
)
def test_the_third_call_is_a_replay_and_gives_what_the_long_way_gives(
    pattern: str, how: dict[str, Any], short: Any
) -> None:
    model, given = conv4(), {"steps": 2, "pattern": pattern, **how}
    ready(model, **given)
    for seed in range(2, 5):
        with torch.no_grad():  # as an optimiser's step between two tasks
            for p in model.parameters():
                p.mul_(1.01)
        xs, ys = task(seed)
        learner = short(model, xs, ys, **given)
        twin = copy.deepcopy(model)
        want = adapt(twin, xs, ys, **given)
        all_close(learner.parameters_dict(), want.parameters_dict(), f"task {seed}")
        model.zero_grad()
        for each in (learner, want):
            F.cross_entropy(each(xs), ys).backward()
        all_close(gradients_of(model), gradients_of(twin), "gradient of")
    assert Rehearsed.replays == 4


def test_results_are_split_before_the_device_is_waited_for(monkeypatch: pytest.MonkeyPatch, short: Any) -> None:
    model, (xs, ys) = conv4(), task(0)
    order: list[str] = []

    def noted(what: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            order.append(what)
            return function(*args)

        return call

    monkeypatch.setattr(recorded, "_apart", noted("split", recorded._apart))
    monkeypatch.setattr(Tensor, "tolist", noted("wait", Tensor.tolist))
    adapt(model, xs, ys, pattern="11111", **GIVEN)
    order.clear()
    adapt(model, xs, ys, pattern="11111", **GIVEN)
    assert order == ["split", "wait"]
    short(model, xs, ys, pattern="11111", **GIVEN)
    assert order == ["split", "wait"] * 2


def replaced(model: Any) -> None:
    model.block2.conv.weight = nn.Parameter(model.block2.conv.weight * 2)


def moved_elsewhere(model: Any) -> None:
    model.block2.conv.weight.data = model.block2.conv.weight.data * 2


def laid_out_otherwise(model: Any) -> None:
    with torch.no_grad():
        model.head.weight.data = torch.as_strided(model.head.weight.data, (2, 3), (1, 2))


def another_eps(model: Any) -> None:
    model.block1.norm.eps = 0.1


@pytest.mark.parametrize("change", [replaced, moved_elsewhere, laid_out_otherwise, another_eps])
def test_a_network_that_is_not_what_it_was_goes_the_long_way(change: Any) -> None:
    model = conv4()
    ready(model, pattern="00011", **GIVEN)
    change(model)
    xs, ys = task(3)
    for _ in range(3):
        got = adapt(model, xs, ys, pattern="00011", **GIVEN).parameters_dict()
        all_close(got, fresh(model, xs, ys, pattern="00011", **GIVEN), change.__name__)


def test_other_calls_are_no_calls_like_it(short: Any) -> None:
    model, (xs, ys) = conv4(), task(3)
    ready(model, pattern="00011", **GIVEN)
    short(model, xs, ys, pattern="00011", **GIVEN)
    for other in ({"lr": 0.2}, {"steps": 3}, {"pattern": "00001"}, {"norm": "never"}, {"second_order": True}):
        given = {**GIVEN, "pattern": "00011", **other}
        got = adapt(model, xs, ys, **given).parameters_dict()
        all_close(got, fresh(model, xs, ys, **given), str(other))
    made = Rehearsed.made
    torch.use_deterministic_algorithms(True)  # a condition of a recording
    try:
        for _ in range(3):
            adapt(model, xs, ys, pattern="00011", **GIVEN)
    finally:
        torch.use_deterministic_algorithms(False)
    assert Rehearsed.made == made + 1


def test_bad_support_sets_are_named_as_on_the_long_way() -> None:
    model, (xs, ys) = conv4(), task(3)
    ready(model, pattern="00011", **GIVEN)
    spoilt, low, high = xs.clone(), ys.clone(), ys.clone()
    spoilt[0, 0, 3, 3], low[0], high[0] = torch.nan, -1, 2
    for x, y, error in ((spoilt, ys, FloatingPointError), (xs, low, ValueError), (xs, high, ValueError)):
        replays = Rehearsed.replays
        with pytest.raises(error) as got:
            adapt(model, x, y, pattern="00011", **GIVEN)
        assert Rehearsed.replays > replays
        with pytest.raises(error) as want:
            fresh(model, x, y, pattern="00011", **GIVEN)
        assert str(got.value) == str(want.value)
    ignored = ys.clone()
    ignored[0] = -100  # which cross-entropy leaves out
    got_all = adapt(model, xs, ignored, pattern="00011", **GIVEN).parameters_dict()
    all_close(got_all, fresh(model, xs, ignored, pattern="00011", **GIVEN), "labels left out")


def test_a_recording_that_is_gone_is_not_kept_alive_and_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (xs, ys) = conv4(), task(3)
    ready(model, pattern="00011", **GIVEN)
    found = recorded.RECORDINGS.get
    kept: list[Any] = []

    def get(*args: Any) -> Any:
        kept.append(found(*args))
        return kept[-1]

    with monkeypatch.context() as watched:
        watched.setattr(recorded.RECORDINGS, "get", get)
        adapt(model, xs, ys, pattern="00011", **GIVEN)
    gone = weakref.ref(kept.pop())
    kept.clear()
    recorded.RECORDINGS.clear()
    gc.collect()
    assert gone() is None
    for _ in range(3):
        got = adapt(model, xs, ys, pattern="00011", **GIVEN).parameters_dict()
        all_close(got, fresh(model, xs, ys, pattern="00011", **GIVEN), "after")


def test_the_network_is_freed() -> None:
    model = conv4()
    ready(model, pattern="00011", **GIVEN)
    adapt(model, *task(3), pattern="00011", **GIVEN)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_tasks_at_once_lie_in_one_row_too() -> None:
    model = conv4()
    xs, ys = (torch.stack(part) for part in zip(*(task(seed) for seed in range(3))))
    want = adapt_tasks(copy.deepcopy(model), xs, ys, xs, pattern="00011", **GIVEN)
    for _ in range(3):
        close(adapt_tasks(model, xs, ys, xs, pattern="00011", **GIVEN), want, "logits")
