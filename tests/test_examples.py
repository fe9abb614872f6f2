"""Every file in examples/ runs as written and says what it is there to say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from lambda_kernels import backends

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUMBER = r"[-+]?\d+\.\d+"
# What each of them prints, whole.
PRINTS = {
    "backend.py": r"largest difference of the logits: \d\.\d\de-0[5-9]\n",
    "export.py": r"\d+% right; the first one is [a-e]\nlargest difference to the learner's logits: \d\.\d\de-0[5-9]\n",
    "inner_rule.py": rf"(.+: query loss {NUMBER}, its derivative by the decay {NUMBER}\n){{4}}",
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PRINTS)
def test_it_runs_as_written(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))  # one of them registers its own
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.fullmatch(PRINTS[name], printed), printed


def test_all_are_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix} == PRINTS.keys()
