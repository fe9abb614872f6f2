"""A selection that is ended goes on from what it had evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import VAL, network

from lambda_maml import data, scored
from lambda_maml.select import Selection, select_pattern

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = data.sample_tasks(VAL, 4, ways=3, shots=1, query=2, seed=1)
PATTERNS = ["00001", "00011", "01111"]


def chosen(kept: Path, **changes: Any) -> Selection:
    given: dict[str, Any] = {"steps": 2, "lr": 0.1, "patterns": PATTERNS, "seconds": 0.0, "resume": kept, **changes}
    return select_pattern(given.pop("model", network()), given.pop("tasks", TASKS), **given)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The patterns that are evaluated; the third one fails."""
    evaluate, seen = scored.evaluate, list[str]()  # type: ignore[attr-defined]

    def counted(*args: Any, pattern: Any, **options: Any) -> Any:
        seen.append(str(pattern))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, pattern=pattern, **options)

    monkeypatch.setattr(scored, "evaluate", counted)
    return seen


def scores(selection: Selection) -> list[tuple[str, float, float]]:
    return sorted((str(c.pattern), c.accuracy, c.drop_bound) for c in selection.table)


def test_what_was_evaluated_is_taken_up_to_the_same_bits(tmp_path: Path, evaluated: list[str]) -> None:
    kept = tmp_path / "pattern.evaluated.json"
    with pytest.raises(KeyboardInterrupt):
        chosen(kept)
    assert evaluated == PATTERNS and kept.is_file()
    again = chosen(kept)
    assert evaluated[3:] == ["01111", "11111"] and not kept.exists()
    assert scores(again) == scores(chosen(kept)) and len(evaluated) == 9


@pytest.mark.parametrize(
    "changes",
    [{"steps": 3}, {"lr": 0.2}, {"norm": "never"}, {"model": network(seed=1)}, {"tasks": TASKS[:3]}, "damaged"],
    ids=["steps", "rate", "norm", "weights", "tasks", "file"],
)
def test_of_anything_else_nothing_is_taken_up(tmp_path: Path, evaluated: list[str], changes: Any) -> None:
    kept = tmp_path / "pattern.evaluated.json"
    with pytest.raises(KeyboardInterrupt):
        chosen(kept)
    if changes == "damaged":
        kept.write_bytes(kept.read_bytes()[:-5])
        changes = {}
    torch.manual_seed(0)
    chosen(kept, **changes)
    assert evaluated[3:] == [*PATTERNS, "11111"]
