"""The tutorial's way, from pictures to a prediction by an exported network, each command as the page has it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from whole_way import draw

from lambda_maml import cli, data

ROOT = Path(__file__).resolve().parents[1]
FIRST_OF_ALL = "make && source .venv/bin/activate"
# What makes a command short; an option that is given twice counts as given last.
FEWER = {
    "train": "--minutes 1 --iterations 12 --width 8 --query 3 --val-tasks 4 --meta-batch 2 --steps 1 --image-size 28",
    "select": "--tasks 4 --seconds 0.1",
}
FIRST, CHOOSING = 0, 1  # of the pages' blocks of commands


def lines(page: Path) -> list[list[str]]:
    """The lines of each of a page's blocks of commands."""
    text = page.read_text(encoding="utf-8")
    return [block.splitlines() for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def commands(block: int) -> list[list[str]]:
    """The tutorial's calls of lambda-maml, as lists of words."""
    found = lines(ROOT / "docs" / "tutorial.md")[block]
    return [shlex.split(line)[1:] for line in found if line.startswith("lambda-maml ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many pictures as the page asks for."""
    folder = tmp_path_factory.mktemp("way")
    draw(folder, each=16, ways=5)
    return folder


def run(words: list[str]) -> str:
    """What the command prints on stdout, run in the present folder."""
    done = CliRunner().invoke(cli.cli, [*words, *shlex.split(FEWER.get(words[0], ""))])
    assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}\n{done.exception!r}"
    return done.stdout


def predictions(network: str) -> dict[str, str]:
    """The class of each unknown picture."""
    found = json.loads(run(["predict", network, "unknown", "--json"]))
    return {Path(row["image"]).name: row["class"] for row in found["predictions"]}


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime: pip install 'lambda-kernels[export]'",
)
@pytest.mark.usefixtures("one_thread")
def test_from_pictures_to_a_prediction_by_an_exported_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = commands(FIRST)
    assert [name for name, *_ in words] == ["train", "adapt", "export", "predict"]
    printed = [run(each) for each in words][-1].splitlines()
    assert len(printed) == 10
    assert all(re.fullmatch(r"unknown/3\d-[23]\.png: 3[0-4] \(\d+\.\d%\)", line) for line in printed)

    exported = predictions("runs/mine/adapted.onnx")
    assert exported == predictions("runs/mine/adapted.safetensors")
    assert set(exported.values()) <= {path.name for path in (folder / "new").iterdir()}

    for each in commands(CHOOSING):  # the pattern is chosen
        run(each)
    assert (folder / "runs" / "mine" / "report.png").is_file()
    assert predictions("runs/mine/adapted.safetensors").keys() == exported.keys()


def test_from_a_checkout_it_is_five_commands_on_both_pages() -> None:
    five = lines(ROOT / "docs" / "tutorial.md")[FIRST]
    assert len(five) == 5 and five[0] == FIRST_OF_ALL and five in lines(ROOT / "README.md")


@pytest.mark.parametrize(("ways", "classes"), [(5, 30), (3, 19)])
def test_the_page_says_how_many_classes_are_enough(ways: int, classes: int) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8").replace("\n", " ")
    assert "tasks of five take 30 folders or more, of three (`--ways 3`) 19." in page
    for count, enough in ((classes - 1, False), *((classes + more, True) for more in range(100))):
        parts = data.divided([str(k) for k in range(count)])
        assert all(len(names) >= ways for names in parts.values()) is enough


def test_make_makes_the_environment_and_the_kernels() -> None:
    words = ["make", "--dry-run", "--always-make", "all"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    order = [done.stdout.find(text) for text in ("-m venv .venv", "--requirement requirements.txt", "--editable .")]
    assert -1 not in order and order == sorted(order)
