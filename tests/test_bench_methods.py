"""bench/methods.py, run small, and the page that shows what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benches import module

from lambda_maml.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
bench, pages = module("methods"), module("methods_page")
TINY = ["--width=4", "--start=1", "--iterations=1", "--tasks=3", "--pictures=2", "--seconds=0"]


def test_a_row_is_measured_once_and_compared_with_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_memory", lambda model, xs, ys, descents: dict.fromkeys(descents, 1.5))
    monkeypatch.setattr(module("methods_times"), "AT_LEAST", 0.1)
    work, out, page = tmp_path / "runs", tmp_path / "found.json", tmp_path / "methods.md"
    words = [
        *TINY,
        f"--work={work}",
        f"--json={out}",
        f"--page={page}",
        "--only=maml-00001,ridge_head-00001,alfa-00011",
    ]
    bench.main([*words[:-1], f"{words[-1]},maml-00011"])
    found = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == {"maml-00001", "maml-00011", "ridge_head-00001", "alfa-00011"}
    assert rows["maml-00001"]["difference"] == 0.0 and rows["alfa-00011"]["base"] == "maml-00011"
    assert rows["alfa-00011"]["iteration_ms"][0] > 0 and rows["ridge_head-00001"]["time_ms"][0] > 0
    assert rows["ridge_head-00001"]["parts_ms"].keys() >= {"prefix", "system", "steps", "ten", "closed"}
    text = page.read_text(encoding="utf-8")
    assert "Parts of `ridge_head` on 5 images" in text
    assert "`--only alfa-00011`" in text and "±" in text and all(f"`{name}`" in text for name in METHODS)

    def again(own: Any, row: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(bench, "measured", again)
    bench.main(words)
    with pytest.raises(SystemExit, match="is of other settings"):
        bench.main([*words, "--tasks=4"])


def test_neural_fields_are_fitted_from_chosen_points(tmp_path: Path) -> None:
    out, page = tmp_path / "found.json", tmp_path / "methods.md"
    bench.main([*TINY, f"--work={tmp_path / 'runs'}", f"--json={out}", f"--page={page}", "--only=fields"])
    ways = json.loads(out.read_text(encoding="utf-8"))["fields"]["ways"]
    assert ways.keys() == {"chosen", "random", "rescaled", "all"} and ways["random"]["difference"] == 0.0
    assert ways["chosen"]["difference"] == pytest.approx(ways["chosen"]["psnr"] - ways["random"]["psnr"], abs=1e-5)
    assert "| 25%, `top_gradient` |" in page.read_text(encoding="utf-8")


def test_every_row_is_made(tmp_path: Path) -> None:
    args = bench.parsed([*TINY, f"--work={tmp_path}"])
    own = bench.Bench(args)
    for row in bench.ROWS:
        made = row.make(own.network(), own.sets["train"])
        assert {"rule", "parts"} >= made.train.keys() and bench.adapting(row, own.network(), made)["pattern"]
        assert row.base in {r.name for r in bench.ROWS}


def test_a_difference_within_its_interval_is_no_gain() -> None:
    assert pages.verdict(0.01, 0.02) == "no gain within its interval"
    assert pages.verdict(0.03, 0.02) == "gains" and pages.verdict(-0.03, 0.02) == "loses"


def test_what_the_closed_form_can_gain_is_said_from_its_parts() -> None:
    parts = {"prefix": 0.5, "system": 0.25, "steps": 0.75, "ten": 1.25, "closed": 1.0, "images": 5}
    text = pages.closed_form({"method": "ridge_head", "parts_ms": parts})
    assert "a ratio of 1.25" in text and "Behind the prefix ten steps take 3.00 times as long" in text
    assert "at most 2.50 times as fast" in text and "out of reach" in text
    text = pages.closed_form({"method": "ridge_head", "parts_ms": {**parts, "ten": 1.75}})
    assert "out of reach" not in text


def test_the_page_shows_the_results() -> None:
    names = ("methods.json", "methods-5-shot.json", "methods-cifar.json")
    results = [ROOT / "bench" / "results" / name for name in names]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == pages.page(found)
