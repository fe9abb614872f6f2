"""The rows of `make gpu`'s benchmark: a wrong result gets no figure, and what stands before the figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import module

from lambda_kernels.backends import Cuda, current
from lambda_kernels.backends.cuda.library import dependent_launches
from lambda_kernels.backends.native import Native


def tiny(
    rows: int, monkeypatch: pytest.MonkeyPatch, path: Path, which: str = "rows"
) -> tuple[int, list[dict[str, Any]]]:
    """(rows that failed, what was written) of the benchmark's first rows on the CPU."""
    bench_gpu = module("bench_gpu")
    every = getattr(bench_gpu.Bench, which)
    monkeypatch.setattr(bench_gpu.Bench, which, lambda self: list(every(self))[:rows])
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_float32_flops": 1e9}
    failed = bench_gpu.run_rows(bench_gpu.Bench(bench_gpu.TINY, torch.device("cpu"), ceilings), path, 60.0, which)
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return failed, found


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_adaptation_gets_no_time(monkeypatch, tmp_path):
    bench_gpu, harness = module("bench_gpu"), module("harness")
    right = harness.adapt
    for where in (bench_gpu, harness):
        monkeypatch.setattr(where, "adapt", lambda *a, lr, **k: right(*a, lr=1.01 * lr, **k))
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json")
    assert failed == 1 and row["status"] == "failed" and "00011 in torch.float64: 0.00" in row["reason"]
    assert "columns" not in row and "ratios" not in row


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_batch_of_tasks_gets_no_time(monkeypatch, tmp_path):
    bench_gpu = module("bench_gpu")
    right = bench_gpu.adapt_tasks
    monkeypatch.setattr(bench_gpu, "adapt_tasks", lambda *a, **k: right(*a, **k) * 1.01)
    failed, rows = tiny(3, monkeypatch, tmp_path / "rows.json")
    assert failed == 1 and [row["status"] for row in rows] == ["passed", "passed", "failed"]
    assert "the logits of adapt_tasks: 0.01 away" in rows[2]["reason"] and "columns" not in rows[2]


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_backend_gets_no_time_and_does_not_hide_the_others(monkeypatch, tmp_path):
    bench_gpu = module("bench_gpu")
    right = Native.block
    monkeypatch.setattr(Native, "block", lambda self, x, w, gamma, *more: right(self, x, w, 1.01 * gamma, *more))
    every = bench_gpu.Bench.rows
    monkeypatch.setattr(bench_gpu.Bench, "rows", lambda self: [r for r in every(self) if r[0]["kind"] == "kernel"])
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json")
    assert failed == 1 and row["status"] == "failed"
    found = row["passes"]["forward"]["backends"]
    assert "conv_block forward on native: 0.0" in found["native"]["failed"] and "median" not in found["native"]
    assert found["reference"]["median"] > 0


@pytest.mark.usefixtures("one_thread")
def test_a_competitor_that_computes_something_else_is_not_timed(monkeypatch, tmp_path):
    by_hand = module("by_hand")
    right = by_hand.Stock.result
    monkeypatch.setattr(by_hand.Stock, "result", lambda self: [1.01 * t for t in right(self)])
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json")
    assert failed == 0 and "stock_prefix: " in row["columns"]["stock_prefix"]["skipped"]
    assert set(row["ratios"]) == {"stock_full"}


@pytest.mark.usefixtures("one_thread")
def test_dependent_launches_have_a_column_where_the_library_runs(monkeypatch, tmp_path, emulated_library):
    """Under them each call is made, and a result that is another one has no times."""
    bench_gpu = module("bench_gpu")
    monkeypatch.setattr(bench_gpu, "Cuda", lambda: Cuda(tmp_path / "_cuda.so"))
    assert "are not built" in row_of_one(monkeypatch, tmp_path)["columns"]["ours_dependent"]["skipped"]
    seen: list[bool] = []
    right = bench_gpu.adapt

    def noted(*given: Any, **how: Any) -> Any:
        seen.append(dependent_launches())
        return right(*given, **how)

    monkeypatch.setattr(bench_gpu, "Cuda", lambda: Cuda(emulated_library, "cpu"))
    monkeypatch.setattr(bench_gpu, "adapt", noted)
    row = row_of_one(monkeypatch, tmp_path)
    assert row["columns"]["ours_dependent"]["median"] > 0 and row["ratios"]["ours_dependent"]["median"] > 0
    assert {True, False} == set(seen)
    monkeypatch.setattr(
        bench_gpu.Dependent, "result", lambda self: [t * 1.1 for t in self().parameters_dict().values()]
    )
    assert " away from plain PyTorch" in row_of_one(monkeypatch, tmp_path)["columns"]["ours_dependent"]["skipped"]


def row_of_one(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        failed, (row,) = tiny(1, patch, folder / "rows.json")
    assert failed == 0
    return row


@pytest.mark.usefixtures("one_thread")
def test_the_gate_in_float64_asks_the_reference_alone(monkeypatch, tmp_path):
    """The other backends would compile all their kernels for a type that is not timed."""
    bench_gpu, harness = module("bench_gpu"), module("harness")
    asked: set[tuple[torch.dtype, str]] = set()
    right = harness.adapt

    def adapt(model: Any, xs: torch.Tensor, *more: Any, **given: Any) -> Any:
        asked.add((xs.dtype, current()))
        return right(model, xs, *more, **given)

    monkeypatch.setattr(harness, "adapt", adapt)
    assert tiny(1, monkeypatch, tmp_path / "rows.json")[0] == 0
    assert asked == {(torch.float64, "reference"), (torch.float32, "auto")}
    assert bench_gpu.Bench(bench_gpu.TINY, torch.device("cpu"), {"copy": 1.0}).ceilings == {"copy": 1.0}


def test_without_the_stage_environment_the_rows_measure_the_ceilings():
    bench_gpu = module("bench_gpu")
    found = bench_gpu.Bench(bench_gpu.TINY, torch.device("cpu")).kernels.ceilings
    assert found.keys() > {"copy_bytes_per_s", "matmul_tf32_flops"} and min(found.values()) > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_a_replay_that_gives_something_else_has_no_kernels(monkeypatch, tmp_path, factor):
    bench_gpu = module("bench_gpu")
    right = bench_gpu.adapt
    calls: list[Any] = []
    graphs: list[str | None] = []

    class Wrong:
        def parameters_dict(self) -> dict[str, torch.Tensor]:
            return {name: factor * t for name, t in calls[-1].parameters_dict().items()}

    def adapt(*task: Any, **given: Any) -> Any:
        calls.append(right(*task, **given))
        graphs.append(os.environ.get("LAMBDA_KERNELS_GRAPHS"))
        return Wrong() if len(calls) == 4 else calls[-1]

    monkeypatch.setattr(bench_gpu, "adapt", adapt)
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json", "replays")
    assert failed == 1 and row["status"] == "failed" and "kernels" not in row
    assert row["reason"].endswith(" of its length away from the eager call")
    assert graphs == ["0", *[None] * 3]  # what it is held against is no replay


@pytest.mark.usefixtures("one_thread")
def test_a_profiler_that_sees_nothing_is_said(monkeypatch, tmp_path):
    bench_gpu = module("bench_gpu")
    monkeypatch.setattr(bench_gpu.Bench, "profiled", lambda self, run: run() and [])
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json", "replays")
    assert failed == 1 and row["status"] == "failed" and "the profiler sees no kernels" in row["reason"]
