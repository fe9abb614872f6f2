"""The page of runs: what is on it, that nothing is fetched, that names are text, and what a browser says of it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
from test_site import CHROMIUM, DESK, PHONE, QUIET, complaints, listen, needs_browser

from lambda_maml import cli
from lambda_maml.files import read_json, write_json
from lambda_maml.report import pareto
from lambda_maml.report_html import page
from lambda_maml.report_runs import Run, read_runs
from lambda_maml.report_selection import selection_parts

ROOT = Path(__file__).resolve().parents[1]
DEMO: dict[str, Any] = read_json(ROOT / "bench" / "results" / "demo.json")
EVIL = "<script>alert('x')</script>&\"'"


def selection(steps: int = 10, **changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(DEMO)), "steps": steps, **changes}


def with_quartiles() -> dict[str, Any]:
    found = selection()
    for row in found["candidates"]:
        row["time"] = {"low": 0.9 * row["time_ms"], "median": row["time_ms"], "high": 1.2 * row["time_ms"]}
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run: two selections, a checkpoint's header, and the lines of a training."""
    run = tmp_path / "mine"
    run.mkdir()
    write_json(run / "pattern.json", with_quartiles())
    write_json(run / "pattern-k1.json", selection(1, command="lambda-maml select mine/best.safetensors --steps 1"))
    (run / "pattern-k5.evaluated.json").write_text("{}")
    settings = {"ways": 5, "shots": 1, "second_order": False, "lr": 0.4, "learn_lr": None, "seed": 0}
    about = {"settings": settings, "network": {"network": "conv4", "width": 32}, "dataset": {"name": "glyphs"}}
    write_json(run / "best.json", about)
    lines: list[dict[str, Any]] = [{"kind": "train", "iteration": k, "loss": 1 / k} for k in (50, 100, 150)]
    lines += [{"kind": "validation", "iteration": k, "accuracy": k / 200, "ci95": 0.02} for k in (50, 100)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    return run


class Elements(HTMLParser):
    """The tags of a page with their attributes, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_folder_gives_a_page_of_all_that_lies_there(folder, capsys):
    assert cli.run(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"page: {folder / 'report.html'}\n"
    text = (folder / "report.html").read_text(encoding="utf-8")
    found = Elements(text)
    labels = [of["aria-label"] for of in found.of("svg") if "aria-label" in of]
    assert [label.partition(".")[0] for label in labels] == [
        "accuracy, % over adaptation time", "accuracy, % over adaptation time", "accuracy, % by the number of steps",
        "Validation in the course of training", "Loss in the course of training",
    ]  # fmt: skip
    row = next(row for row in DEMO["candidates"] if row["pattern"] == DEMO["chosen"]["pattern"])
    for said in (f"{100 * row['accuracy']:.2f} ± {100 * row['ci95']:.2f}", row["pattern"], "Pareto front, "):
        assert any(said.strip(", ") in cell for cell in found.cells), said
    assert "lambda-maml select mine/best.safetensors --steps 1" in text
    assert "lambda-maml train --dataset=glyphs --out=RUN --network=conv4 --width=32 --first-order --lr=0.4" in text
    assert "--iterations=150" in text and DEMO["environment"]["torch"] in text


def test_nothing_is_fetched(folder):
    found = Elements(page(read_runs([folder])))
    (policy,) = [of["content"] for of in found.of("meta") if of.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    asked = [value for _, of in found.tags for name, value in of.items() if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith(("#", "data:")) for value in asked)
    assert not re.search(r"url\(|@import|fetch\(|https?://", page(read_runs([folder])))


def test_a_file_alone_still_gives_tables_and_a_picture_unless_a_page_is_named(folder, tmp_path, capsys):
    assert cli.run(["report", str(folder / "pattern.json"), "--out", str(tmp_path / "one.svg")]) == 0
    assert "Candidates on validation tasks" in capsys.readouterr().out and (tmp_path / "one.svg").is_file()
    assert cli.run(["report", str(folder / "pattern.json"), "--out", str(tmp_path / "one.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(tmp_path / "one.html"), "runs": ["pattern.json"]}


def test_several_runs_stand_in_one_table(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "pattern.json", selection())
    found = Elements(page(read_runs([folder, other, folder / "pattern-k1.json"])))
    assert {"#run0", "#run1", "#run2"} == {of["href"] for of in found.of("a")}
    assert {"run0", "run1", "run2"} <= {of["id"] for _, of in found.tags if "id" in of}


def test_names_are_text(tmp_path):
    row = {**DEMO["candidates"][0]}
    evil = selection(
        network=EVIL, command=EVIL, environment={EVIL: EVIL}, candidates=[row, *DEMO["candidates"][1:]],
    )  # fmt: skip
    run = Run(
        EVIL, [(EVIL, evil)], {"settings": {EVIL: EVIL}, "dataset": {"name": EVIL}},
        [{"kind": "validation", "iteration": 1, EVIL: 0.5}],
    )  # fmt: skip
    text = page([run, run])
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert len(Elements(text).of("script")) == 1
    assert not [name for _, of in Elements(text).tags for name in of if name.startswith("on")]


def test_the_front_is_of_those_that_no_faster_one_beats():
    edge = pareto(DEMO)
    rows = DEMO["candidates"]
    beaten = [
        row for row in rows
        if any(o["time_ms"] < row["time_ms"] and o["drop"] <= row["drop"] for o in rows)
    ]  # fmt: skip
    assert [row["pattern"] for row in edge] == [row["pattern"] for row in rows if row not in beaten]


def test_a_relative_drop_is_told_in_percent_whatever_the_metric():
    others: list[dict[str, Any]] = [{}, {"metric": "mse_loss", "lower_is_better": True}]
    for more in others:
        found = selection(relative=True, max_drop=0.2, rule="point", **more)
        for row in [found["chosen"], found["full"], *found["candidates"]]:
            row |= {"score": row["accuracy"]}
        assert "Allowed: drop at most 20 % of full." in "".join(selection_parts("pattern.json", found))


def test_a_selection_by_another_metric_has_a_page():
    found = selection(metric="mse_loss", lower_is_better=True)
    for row in [found["chosen"], found["full"], *found["candidates"]]:
        row["score"] = row.pop("accuracy")
    for of in (found["test"], found["test"]["support"]):
        of.update({key.replace("accuracy", "score"): of.pop(key) for key in ("full_accuracy", "chosen_accuracy")})
    text = page([Run("mine", [("pattern.json", found)])])
    assert "validation mse_loss" in text and "accuracy, %" not in text


def test_what_is_no_number_is_an_empty_cell():
    found = selection()
    found["chosen"]["end_to_end_ms"] = ["a list"]
    for row in found["candidates"]:
        row["time"], row["tasks"], row["ci95"], row["drop_bound"] = {"low": "no", "high": -1}, {"no": 1}, None, None
    text = page([Run("mine", [("pattern.json", found)], {"network": {"args": 3}}, [])])
    assert "a list" not in text and "nan" not in text.lower() and str(math.inf) not in Elements(text).cells


def test_steps_are_compared_where_there_are_several():
    one = page([Run("mine", [("pattern.json", selection())])])
    assert "one number of steps" in one and "inner steps" not in one
    two = page([Run("mine", [("pattern.json", selection()), ("pattern-k1.json", selection(1))])])
    assert "inner steps" in two and "one number of steps" not in two


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds neither a selection"),
        ({"pattern.json": "{"}, "not a JSON file"),
        ({"metrics.jsonl": "[]\n"}, "line 1 is none of a run"),
        ({"metrics.jsonl": '{"kind": "train", "iteration": 1, "loss": 1}\n', "best.json": "[]"}, "checkpoint's header"),
    ],
)
def test_what_is_no_run_is_said_with_its_file(tmp_path, capsys, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cli.run(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert said in told and str(tmp_path) in told and told.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_picture_of_several_is_refused(folder, capsys):
    assert cli.run(["report", str(folder), "--out", str(folder / "x.png")]) == 2
    assert "a picture is of one pattern.json" in capsys.readouterr().err


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_it_on_a_phone_in_print_and_sorts(folder, tmp_path):
    from playwright.sync_api import sync_playwright

    path = tmp_path / "report.html"
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "pattern.json", selection())
    path.write_text(page(read_runs([folder, other])), encoding="utf-8")
    address = path.as_uri()
    wrong: list[str] = []
    screens: list[tuple[tuple[int, int], Literal["light", "dark"]]]
    screens = [(PHONE, "light"), (PHONE, "dark"), (DESK, "dark")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, chromium_sandbox=False)
        for (width, height), colours in screens:
            shown = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
            said = listen(shown, address)
            shown.goto(address, wait_until="load")
            shown.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
            wrong += [f"{width}, {colours}: {text}" for text in (*complaints(shown, width), *said)]
            letters = "[...document.querySelectorAll('svg.figure text:not([transform])')]"
            assert min(shown.evaluate(f"{letters}.map((text) => text.getBoundingClientRect().height)")) >= 9
        table = "document.querySelectorAll('table.sorts')[1]"
        times = f"[...{table}.tBodies[0].rows].map((row) => Number(row.cells[1].dataset.v))"
        button = shown.locator("table.sorts").nth(1).locator("th button").nth(1)
        button.click()
        assert shown.evaluate(times) == sorted(shown.evaluate(times)) and len(shown.evaluate(times)) == 31
        button.press("Enter")
        assert shown.evaluate(times) == sorted(shown.evaluate(times), reverse=True)
        assert shown.evaluate(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == "descending"
        shown.emulate_media(media="print", color_scheme="dark")
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        browser.close()
    assert wrong == []
