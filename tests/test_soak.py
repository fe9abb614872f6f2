"""The long tests as `make soak` runs them: a round of few cases, and one that fails."""

from __future__ import annotations

import pytest
import soak


def test_each_part_of_a_round_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"call": 1, "hostile": 1}
    assert few.keys() < soak.ROUND.keys()
    monkeypatch.setattr(soak, "ROUND", few)
    assert list(soak.soak(0.0, first=3)) == []
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["round 3, call", "round 3, hostile"]
    assert "1 bad files" in said[1] and "0 faults" in said[1]
    for name in soak.ROUND:
        command = soak.arguments(name, 1, 3)
        assert command[0] == "-m" or (soak.TESTS.parent / command[0]).is_file()


def test_a_part_that_fails_is_shown_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "ROUND", {"operator": 3})
    monkeypatch.setenv("LAMBDA_FUZZ_CRASH", "operator 4")
    (told,) = soak.soak(0.0, first=1)
    command, crash, *_ = told.splitlines()
    assert command == "PYTHONPATH=tests python -m fuzz --kind operator --count 3 --first 3"
    assert crash.startswith("operator 4: CRASH")
