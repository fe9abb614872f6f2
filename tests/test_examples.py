"""Every file in examples/ runs as written and says what it is there to say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from lambda_kernels import backends

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUMBER = r"[-+]?\d+\.\d+"
SCORES = r"Evaluation\(mse_loss .+ over 50 tasks\)\n"
# What each of them prints, whole.
PRINTS = {
    "backend.py": r"largest difference of the logits: \d\.\d\de-0[5-9]\n",
    "own_folder.py": r"Folder\(.+: train 19 classes, 190 pictures, val 5 .+, test 6 .+ of 28x28x1, 0.2 MiB\)\n"
    r"60 iterations: [5-9]\d% of new classes' pictures are classified right \(chance: 33%\)\n",
    "backbones.py": r"(?:(?:timm|torchvision) \w+, .+: [01]+, logits \[15, 5\]\n){3}",
    "export.py": r"\d+% right; the first one is [a-e]\nlargest difference to the learner's logits: \d\.\d\de-0[5-9]\n",
    "inner_rule.py": rf"(.+: query loss {NUMBER}, its derivative by the decay {NUMBER}\n){{4}}",
    "regression.py": rf"{SCORES}{SCORES}pattern  time ms  mse_loss .+\n(?:[01]{{3}} .+\n){{7}}",
    "own_method.py": rf"iteration 40, scale {NUMBER}, one task's accuracy {NUMBER}\n",
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PRINTS)
def test_it_runs_as_written(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))  # one of them registers its own
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as `python FILE` has it
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as needs:  # of packages that the tests do not install
        pytest.skip(str(needs))
    printed = capsys.readouterr().out
    assert re.fullmatch(PRINTS[name], printed), printed


def test_all_are_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix} == PRINTS.keys()
