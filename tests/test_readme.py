"""README.md and docs/: the code runs, and the commands, options, files and links that they name exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from benches import module

import lambda_kernels
import lambda_maml
from lambda_maml import Pattern, cli
from lambda_maml.maml import TaskLearner

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def fewer(function: Callable[..., Any], **small: Any) -> Callable[..., Any]:
    """The function with some of its named arguments given, whatever the caller says."""
    return lambda *args, **given: function(*args, **{**given, **small})


def shortened(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Tasks, candidates, timings and iterations of the pages' code are few, and what it writes goes to the folder."""
    from lambda_maml import train

    sample = lambda_maml.data.sample_tasks
    monkeypatch.setattr(lambda_maml.data, "sample_tasks", lambda dataset, n, **more: sample(dataset, min(n, 2), **more))
    some = ["00001", "00011", "10000"]
    monkeypatch.setattr(lambda_maml, "select_pattern", fewer(lambda_maml.select_pattern, patterns=some, seconds=0.0))
    monkeypatch.setattr(train, "train", fewer(train.train, iterations=1))
    monkeypatch.setattr(train, "Settings", fewer(train.Settings, val_tasks=2, query=2))
    monkeypatch.chdir(folder)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shortened(monkeypatch, tmp_path)
    names: dict[str, Any] = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)
    if page == README:
        assert names["logits"].shape == (75, 5) and bool(torch.isfinite(names["logits"]).all())
        assert isinstance(names["task"], TaskLearner) and isinstance(names["chosen"].pattern, Pattern)
        assert all(p.grad is not None for p in names["model"].parameters())
    if page.name == "training.md":
        assert names["result"].iteration == 1 and (tmp_path / "runs" / "mine" / "best.safetensors").is_file()


@pytest.mark.usefixtures("one_thread")
def test_the_architecture_page_shows_what_its_examples_print(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "architecture.md"
    found, shown = blocks(page, "python"), blocks(page, "text")
    assert len(found) == len(shown) == 2
    names: dict[str, Any] = {}
    for code, text in zip(found, shown):
        exec(compile(code, str(page), "exec"), names)
        assert capsys.readouterr().out == text


def commands(program: str) -> list[list[str]]:
    """The arguments of every line of the pages' shell blocks, and of prose in backquotes, that calls the program."""
    joined = [block.replace("\\\n", " ") for page in PAGES for block in blocks(page, "sh")]
    lines = [line for block in joined for line in block.splitlines()]
    lines += [code for page in PAGES for code in re.findall(r"`([^`\n]+)`", prose(page))]
    split = [shlex.split(part, comments=True) for line in lines if program in line for part in line.split(" && ")]
    calls = [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in split]
    return [words[1:] for words in calls if words and words[0] == program]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = [target for words in commands("make") for target in words]
    assert {"demo", "test"} <= set(called) <= targets


def test_commands_and_their_options_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (file,) = blocks(ROOT / "docs" / "training.md", "toml")
    Path("mine.toml").write_text(file, encoding="utf-8")
    called = commands("lambda-maml")
    assert {words[0] for words in called} >= {"train", "select", "eval", "adapt", "report", "info"}
    for name, *arguments in called:
        command = cli.cli.commands[name]
        try:
            command.make_context(name, arguments, resilient_parsing=False)
        except click.UsageError as error:
            pytest.fail(f"lambda-maml {name} {' '.join(arguments)}: {error.format_message()}")


def test_the_figures_are_those_of_the_results() -> None:
    front = module("front_page")
    text = README.read_text(encoding="utf-8")
    assert front.page(text, front.figures(*front.results())) == text
    assert {path.name for path in front.PICTURES} == set(re.findall(r"docs/(demo[-\w]*\.svg)", text))


def test_image_sets_are_all_there() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(lambda_maml.data.NAMES)


def test_the_site_has_every_page() -> None:
    places = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(places) == sorted("index.md" if page == README else page.name for page in PAGES)


def test_the_citation_is_of_this_version_and_actions_are_pinned() -> None:
    cited = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == [lambda_kernels.__version__]
    flows = [path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    used = [action for flow in flows for action in re.findall(r"uses: (.+)$", flow, re.MULTILINE)]
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = prose(page)
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*|[\w]+\.(?:py|cpp|h|inl|cu|md))`", text)
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    places = [ROOT, ROOT / "python", ROOT / "lambda_kernels", ROOT / "csrc", ROOT / "python" / "lambda_maml"]
    made = ("images_evaluation/", "train/", "val/", "test/", "runs/")  # by users and runs
    kept = [name for name in named if not name.startswith(made)]
    missing = [name for name in kept if not any((place / name).exists() for place in places)]
    assert missing == [] and all((page.parent / target).exists() for target in linked)
