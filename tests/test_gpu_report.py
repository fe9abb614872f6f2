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
        {**adapt, "kind": "compile", "columns": {}, "ratios": {"compile_default": ratio(1.4)}},
        {**adapt, "kind": "adapt", "pattern": "11111", "name": "adapt 11111", "status": "failed", "reason": "0.2 away"},
        {"kind": "kernel", "name": "block 1", "pattern": "", **common, "passes": {"forward": passed}},
    ]
    stages = {
        "tests": {
            "status": "failed", "seconds": 7.0, "reason": "1 failed", "outcomes": {"passed": 3, "failed": 1},
            "failures": [{"test": "tests/test_x.py::test_y", "reason": "assert 1 == 2"}],
        },
        "bench": {"status": "failed", "seconds": 100.0, "rows": rows},
    }  # fmt: skip
    return {
        "schema": 1, "dry_run": False, "gpu": "NVIDIA X", "started": "2026-01-02T03:04:05+00:00", "commit": "abc",
        "seconds": 107.0, "stages": stages, **more,
    }  # fmt: skip


def test_the_report_states_each_goal_with_what_was_found():
    lines = module("gpu_report").page(recorded()).splitlines()
    split = [line.removesuffix(" |").split(" | ") for line in lines if "x | `adapt" in line]
    goal = {tuple(cells[:3]): cells[3] for cells in split}
    best = "the best of graph and `torch.compile`"
    assert goal["| 30x", "`adapt`, `00011`", "eager stock, all layers"] == "40.0x (36.0 to 44.0), reached"
    assert goal["| 1.5x", "`adapt`, `00011`", best].startswith("1.40x (1.26 to 1.54), not reached (without ")
    assert goal["| 8x", "`adapt`, `11111`", "eager stock, all layers"] == "no figure: 0.2 away"
    assert goal["| 1.5x", "`adapt`, `11111`", best] == "no figure: 0.2 away"
    assert goal["| 200x", "`adapt_tasks`, 64 tasks, per task, `00011`", "eager stock, all layers"] == "open"
    assert "| 70% of the floor | fused block 1, forward, 64 tasks | | 75% (triton), reached |" in lines
    assert "| 70% of the floor | fused block, backward, 64 tasks | | open |" in lines


def test_the_report_shows_failures_and_skips():
    text = module("gpu_report").page(recorded())
    assert "| tests | failed | 7 | 3 passed, 1 failed; 1 failed |" in text
    assert "`tests/test_x.py::test_y`: assert 1 == 2" in text
    assert "| CUDA graph, tuned | | no \\| memory |" in text
    assert "| block 1 | forward | 1.50 (memory) | cuda | wrong: 0.1 away | | | |" in text
    assert "- adapt 11111: failed, 0.2 away" in text
    assert "Nothing has run on a GPU" not in text and "not a measurement" not in text.replace("nothing of that is", "")
    assert all("\n" not in line and line.count(" |") >= 2 for line in text.splitlines() if line.startswith("|"))


def test_a_recorded_dry_run_reaches_nothing():
    report = module("gpu_report")
    text = report.page(recorded(dry_run=True))
    assert "**A dry run in tiny shapes on the CPU" in text and ", reached" not in text and "not reached" not in text
    assert "not a measurement" in report.summary(recorded(dry_run=True)).splitlines()[-1]


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
    assert "## NVIDIA Y, 2026-01-04" in report.page(report.newest(tmp_path))


def test_without_results_the_page_says_so():
    text = module("gpu_report").page(None)
    assert "## Nothing has run on a GPU yet" in text and text.count("| open |") == 8


def test_the_page_is_that_of_the_newest_results():
    report = module("gpu_report")
    expected = report.page(report.newest(ROOT / "bench" / "results"))
    assert (ROOT / "docs" / "gpu.md").read_text() == expected, "run python3 bench/gpu_report.py"
