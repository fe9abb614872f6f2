"""Every file in examples/ runs as written and says what it is there to say."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lambda_kernels import backends

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUMBER = r"[-+]?\d+\.\d+"
SCORES = r"Evaluation\(mse_loss .+ over 50 tasks\)\n"
# What each of them prints, whole.
PRINTS = {
    "own_folder.py": r"Folder\(.+: train 19 classes, 190 pictures, val 5 .+, test 6 .+ of 28x28x1, 0.2 MiB\)\n"
    r"60 iterations: [5-9]\d% of new classes' pictures are classified right \(chance: 33%\)\n",
    "backbones.py": r"(?:(?:timm|torchvision) \w+, .+: [01]+, logits \[15, 5\]\n){3}",
    "backend.py": r"largest difference of the logits: \d\.\d\de-0[5-9]\n",
    "choosing_a_pattern.py": r"bit  layer.+chosen: [01]{5}; classes of three images: \[[0-4], [0-4], [0-4]\]\n",
    "export.py": r"\d+% right; the first one is [a-e]\nlargest difference to the learner's logits: \d\.\d\de-0[5-9]\n",
    "from_learn2learn.py": rf"(iteration \d: query loss {NUMBER}\n){{3}}",
    "inner_rule.py": rf"(.+: query loss {NUMBER}, its derivative by the decay {NUMBER}\n){{4}}",
    "meta_training.py": rf"accuracy on 40 new tasks: {NUMBER}%, after: {NUMBER}%\n",
    "regression.py": rf"{SCORES}{SCORES}pattern  time ms +quartiles  mse_loss .+\n(?:[01]{{3}} .+\n){{7}}",
    "own_method.py": rf"iteration 40, scale {NUMBER}, one task's accuracy {NUMBER}\n",
}
LIGHTNING = "lightning_module.py"
LEARNED = 20  # points of accuracy


def percents(printed: str) -> list[float]:
    return [float(found) for found in re.findall(rf"({NUMBER})%", printed)]


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
    assert re.fullmatch(PRINTS[name], printed, re.DOTALL), printed
    if name == "meta_training.py":
        before, after = percents(printed)
        assert after > before + LEARNED


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs the package lightning")
def test_lightning_trains() -> None:
    command = [sys.executable, str(EXAMPLES / LIGHTNING)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"accuracy on new tasks: {NUMBER}%\n", done.stdout) and percents(done.stdout)[0] > LEARNED + 20


def test_all_are_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix} == {*PRINTS, LIGHTNING}
