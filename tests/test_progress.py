"""How far long work is: lines without a terminal, a bar on one, the time left by the pace, one way for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import TRAIN, VAL, small

from lambda_maml import data, models, select_pattern
from lambda_maml.evaluate import evaluate
from lambda_maml.progress import shown, time_left
from lambda_maml.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the module is told."""
    now = [0.0]
    monkeypatch.setattr("lambda_maml.progress.time.monotonic", lambda: now[0])
    return now


def test_lines_come_now_and_then_with_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with shown(True, "working") as told:
        assert told is not None
        for done in range(1, 7):
            clock[0] = 4.0 * done
            told(done, 6, "parts")
        for done in (1, 2):  # another stretch, of its own pace
            clock[0] += 60
            told(done, 3, "rounds")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "working: 3/6 parts, 12 s left", "working: 6/6 parts", "working: 1/3 rounds", "working: 2/3 rounds, 1 min left",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s left"), (59.6, "1 min left"), (3599, "1 h 0 min left"), (90, "2 min left")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert time_left(seconds) == words


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with shown(True, "working") as told:
        assert told is not None
        told(3, 6, "parts")
    assert "━" in (err := capsys.readouterr().err) and "3/6" in err and "parts" in err


def test_nothing_is_shown_unasked_or_by_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    def own(done: int, total: int, what: str) -> None: ...

    with shown(None, "a") as none, shown(False, "b") as false, shown(True, "c", here=False) as other:
        assert none is false is other is None
    with shown(own, "d", here=False) as given:
        assert given is own
    assert capsys.readouterr() == ("", "")


def test_all_long_work_takes_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = models.conv4(ways=3, in_channels=1, width=2, image_size=16)
    tasks = data.sample_tasks(VAL, 2, ways=3, query=2)
    inner: dict[str, Any] = {"steps": 1, "lr": 0.1, "progress": True}
    evaluate(model, tasks, pattern="00001", **inner)
    select_pattern(model, tasks, patterns=["00001"], seconds=0.0, **inner)
    train(model, TRAIN, VAL, out=tmp_path, settings=small(second_order=False), iterations=1, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluating: 2/2 tasks" and lines[1].startswith("selecting: 2/2 patterns, 11111 at ")
    assert lines[-1].startswith("training: 1/1 iterations, loss ")
