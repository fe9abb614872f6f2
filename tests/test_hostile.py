"""Bad files of every kind (hostile.py): none is taken, ends in a traceback, hangs, or runs a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hostile
import pytest
from PIL import Image

from lambda_maml import cli
from lambda_maml.data.pictures import read_picture

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("default")]
CASES = 6 * len(hostile.KINDS)


def test_bad_files_are_refused_in_words(tmp_path: Path) -> None:
    seen, faults = hostile.tried_all(tmp_path / "files", CASES, seed=0)
    assert not faults, "\n".join(faults)
    assert sum(seen.values()) == CASES and len(seen) > 15


def test_what_is_taken_that_should_not_be_is_found(tmp_path: Path) -> None:
    Image.new("L", (3, 3)).save(tmp_path / "x.png")
    sound = hostile.Case("sound", lambda: read_picture(tmp_path / "x.png", "L"))
    assert "taken" in str(hostile.tried(sound))
    fault: Any = hostile.Case("fault", lambda: sound.missing)  # type: ignore[attr-defined]
    assert "AttributeError" in str(hostile.tried(fault))
    assert hostile.tried(sound._replace(fine=lambda got: got.shape == (3, 3))) is None


def test_a_command_that_ends_otherwise_than_in_one_line_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.cli, "main", lambda *_, **__: [][0])
    with pytest.raises(AssertionError, match="unforeseen"):
        hostile.command("info")
