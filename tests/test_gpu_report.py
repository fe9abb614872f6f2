"""The report of `make gpu`: goals, failures, and that docs/gpu.md is that of the newest results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benches import module

ROOT = Path(__file__).resolve().parents[1]


def ratio(median: float) -> dict[str, float]:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}


def recorded(**more: Any) -> dict[str, Any]:
    """Results as `make gpu` writes them, with figures made up for these tests."""
    common = {"network": "84x84x3", "dtype": "float32", "main": True, "status": "passed"}
    adapt = {"kind": "adapt", "name": "adapt 00011", "pattern": "00011", **common}
    columns = {"ours": ratio(0.5), "stock_full": ratio(20.0), "stock_graph_tuned": {"skipped": "no | memory"}}
    backends = {"triton": {**ratio(2.0), "fraction_of_floor": 0.75, "bytes_per_s": 1e12, "flops_per_s": 1e13}}
    passed = {"floor_ms": 1.5, "bound": "memory", "backends": {**backends, "cuda": {"failed": "0.1 away"}}}
    rows = [
        {**adapt, "columns": columns, "ratios": {"stock_full": ratio(40.0), "stock_graph": ratio(1.7)}},
        {**adapt, "kind": "adapt", "pattern": "11111", "name": "adapt 11111", "status": "failed", "reason": "0.2 away"},
        {"kind": "kernel", "name": "block 1: 64 tasks", "pattern": "", **common, "passes": {"forward": passed}},
    ]
    tasks = {**adapt, "kind": "tasks", "name": "tasks 00011 bfloat16", "dtype": "bfloat16", "main": False}
    half = {**tasks, "columns": columns, "ratios": {"stock_full": ratio(140.0)}}
    slow = [{**adapt, "kind": "compile", "columns": {}, "ratios": {"compile_default": ratio(1.4)}}]
    kernels = [{"name": "convolve", "count": 30, "us": 61.5}, {"name": "copy", "count": 5, "us": 10.0}]
    replay = {"kind": "replay", "name": "replay 00011 of 1", "pattern": "00011", "tasks": 1, **common}
    replays = [{**replay, "nodes": 35, "span_us": 81.5, "kernels": kernels}]
    stages = {
        "tests": {
            "status": "failed", "seconds": 7.0, "reason": "1 failed", "outcomes": {"passed": 3, "failed": 1},
            "failures": [{"test": "tests/test_x.py::test_y", "reason": "assert 1 == 2"}],
        },
        "smoke": {"status": "failed", "seconds": 3.0, "checks": [
            {"backend": "cuda", "operation": "sgd_", "status": "wrong", "reason": "0.3 away"},
            {"backend": "cuda", "operation": "block", "status": "right"},
        ]},
        "replays": {"status": "passed", "seconds": 9.0, "rows": replays},
        "rows": {"status": "failed", "seconds": 100.0, "rows": [*rows, half]},
        "slow": {"status": "passed", "seconds": 9.0, "rows": slow},
    }  # fmt: skip
    return {
        "schema": 1, "dry_run": False, "gpu": "NVIDIA X", "started": "2026-01-02T03:04:05+00:00", "commit": "abc",
        "seconds": 107.0, "stages": stages, **more,
    }  # fmt: skip


def model() -> dict[str, Any]:
    """Predictions, made up for these tests: 7 of everything."""
    figures = {figure.name: 7.0 for figure in module("gpu_page").FIGURES}
    return {"card": "H200", "figures": figures, "constants": {"the gap": ["1 us", "assumed"]}}


def test_the_report_states_each_figure_as_measured_or_as_predicted():
    lines = module("gpu_report").page(recorded(), model()).splitlines()
    start = lines.index("| figure | goal | found | |") + 2
    found = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines[start : start + 17])}
    card = "measured, NVIDIA X, 2026-01-02, commit abc"
    stock, best = "over eager stock, all layers", "over the best graph or `torch.compile` by hand"
    many = "`adapt_tasks`, 64 tasks, per task, `00011`"
    assert found["`adapt`, `00011`: nodes"] == ["at most 40", "35, reached", card]
    assert found["`adapt`, `11111`: nodes"] == ["at most 190", "7", "predicted for an H200"]
    assert found[f"`adapt`, `00011`, {stock}"] == ["12x", "40.0x (36.0 to 44.0), reached", card]
    goal, said, source = found[f"`adapt`, `00011`, {best}"]
    assert (goal, source) == ("2x", card) and said.startswith("1.40x (1.26 to 1.54), not reached (without ")
    assert found[f"`adapt`, `11111`, {stock}"] == ["5x", "no figure: 0.2 away", card]
    assert found[f"`adapt`, `11111`, {best}"] == ["1.5x", "no figure: 0.2 away", card]
    assert found[f"{many}, {stock}"] == ["85x", "7x", "predicted for an H200"]
    assert found[f"{many} in bfloat16, {stock}"] == ["130x", "140x (126 to 154), reached", card]
    assert found[f"{many}, over `vmap` of stock"] == ["8x", "7x", "predicted for an H200"]
    assert found["fused block 1, forward, 64 tasks: of its floor"] == ["60%", "75%, reached (triton)", card]
    assert found["fused block 1, backward, 64 tasks: of its floor"] == ["60%", "700%", "predicted for an H200"]
    assert len(found) == 17 and not lines[start + 17]
    assert "| `convolve` | 30 | 61.5 |" in lines and "35 nodes, 81.5 us from the first one's start" in "\n".join(lines)


def test_the_report_shows_failures_and_skips():
    text = module("gpu_report").page(recorded(), model())
    assert "| tests | failed | 7 | 3 passed, 1 failed; 1 failed |" in text
    assert "`tests/test_x.py::test_y`: assert 1 == 2" in text
    assert "| CUDA graph, tuned | | no \\| memory |" in text
    assert "| | wrong | | cuda sgd_: 0.3 away |" in text and "cuda block" not in text
    assert "| block 1: 64 tasks | forward | 1.50 (memory) | cuda | wrong: 0.1 away | | | |" in text
    assert "- adapt 11111: failed, 0.2 away" in text
    assert "Nothing has run on a GPU" not in text and "not a measurement" not in text.replace("nothing of that is", "")
    assert all("\n" not in line and line.count(" |") >= 2 for line in text.splitlines() if line.startswith("|"))


def test_a_recorded_dry_run_reaches_nothing():
    report = module("gpu_report")
    text = report.page(recorded(dry_run=True), model())
    assert "**A dry run in tiny shapes on the CPU" in text and ", reached" not in text and "not reached" not in text
    assert "measured, " not in text and "| 35, not a measurement | a dry run |" in text
    assert "not a measurement" in report.summary(recorded(dry_run=True), model()).splitlines()[-1]


def test_the_newest_results_of_a_gpu_are_reported(tmp_path):
    report = module("gpu_report")
    assert report.newest(tmp_path) is None
    written: dict[str, dict[str, Any]] = {
        "nvidia-x-2026-01-02.json": {},
        "nvidia-y-2026-01-04.json": {"gpu": "NVIDIA Y", "started": "2026-01-04T00:00:00+00:00"},
        "dry-run-cpu-2026-01-09.json": {"dry_run": True, "started": "2026-01-09T00:00:00+00:00"},
    }
    for name, more in written.items():
        (tmp_path / name).write_text(json.dumps(recorded(**more)))
    (tmp_path / "nvidia-y-2026-01-04-timings.json").write_text("{}")
    (tmp_path / "local.json").write_text("{}")
    assert report.newest(tmp_path)["gpu"] == "NVIDIA Y"
    assert "## NVIDIA Y, 2026-01-04" in report.page(report.newest(tmp_path), model())


def test_without_results_the_page_says_so_and_predicts_each_figure():
    text = module("gpu_report").page(None, model())
    assert "## Nothing has run on a GPU yet" in text and "measured, " not in text
    figures = module("gpu_page").FIGURES
    rows = [line for line in text.splitlines() if line.startswith("|") and line.endswith(" | predicted for an H200 |")]
    assert len(rows) == len(figures) == 17
    assert all(row.startswith(f"| {figure.what} | ") for row, figure in zip(rows, figures))
    assert "reached" not in text and "| the gap | 1 us | assumed |" in text


def test_the_page_is_that_of_the_newest_results():
    report = module("gpu_report")
    expected = report.page(report.newest(ROOT / "bench" / "results"), report.predictions())
    assert (ROOT / "docs" / "gpu.md").read_text() == expected, "run python3 bench/gpu_report.py"
