"""The choice of a pattern: its rules on made-up figures, its report, and timings from a benchmark's file."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_maml import Pattern, adapt, data, models, select_pattern
from lambda_maml import report as reports
from lambda_maml.choice import choose
from lambda_maml.evaluate import evaluate
from lambda_maml.pattern_json import read_selection
from lambda_maml.plain_torch import disagreement, plain_adapt
from lambda_maml.stats import mean_ci95, ratio_upper_bound95, t_quantile, upper_bound95
from lambda_maml.timing import STOCK, Timing, interleave, measure_times, read_timings, timing_info

FULL = Pattern("111")
ALTERNATING = torch.tensor([0.05, -0.05] * 8, dtype=torch.float64)


def made_up(drops: dict[str, float], noise: Tensor = ALTERNATING) -> dict[Pattern, Tensor]:
    """Accuracies on 16 tasks: the full pattern at 0.80, each other one lower by its drop on average, with the spread
    of `noise` in its paired differences."""
    base = 0.80 + torch.linspace(-0.1, 0.1, len(noise), dtype=torch.float64)
    return {FULL: base, **{Pattern.parse(p): base - drop + noise for p, drop in drops.items()}}


def times(**ms: float) -> dict[Pattern, float]:
    return {Pattern.parse(k.strip("_").replace("_", ",")): v for k, v in ms.items()}


# name, drops, times, options, expected choice
CASES: list[tuple[str, dict[str, float], dict[str, float], dict[str, Any], str]] = [
    ("point takes the fastest within the drop", {"001": 0.03, "011": 0.009}, {"_001": 1, "_011": 2, "_111": 4},
     {"rule": "point", "max_drop": 0.01}, "011"),
    ("point admits a drop equal to the limit", {"001": 0.01, "011": 0.0}, {"_001": 1, "_011": 2, "_111": 4},
     {"rule": "point", "max_drop": 0.01}, "001"),
    # The spread of ALTERNATING is 0.0516 in 16 tasks: the bound is the drop + 1.753 * 0.0129 = the drop + 0.0226.
    ("bound refuses what the estimate admits", {"001": 0.0, "011": -0.02}, {"_001": 1, "_011": 2, "_111": 4},
     {"rule": "bound", "max_drop": 0.01}, "011"),
    ("bound falls back on the full pattern", {"001": 0.0, "011": 0.0}, {"_001": 1, "_011": 2, "_111": 4},
     {"rule": "bound", "max_drop": 0.01}, "111"),
    ("bound admits a wide limit", {"001": 0.0, "011": 0.0}, {"_001": 1, "_011": 2, "_111": 4},
     {"rule": "bound", "max_drop": 0.023}, "001"),
    ("relative point: 0.02 of 0.80 is 0.025", {"001": 0.02, "011": 0.0}, {"_001": 1, "_011": 2, "_111": 4},
     {"rule": "point", "max_drop": 0.0251, "relative": True}, "001"),
    ("relative point: the same drop beyond the limit", {"001": 0.02, "011": 0.0}, {"_001": 1, "_011": 2, "_111": 4},
     {"rule": "point", "max_drop": 0.0249, "relative": True}, "011"),
    ("relative bound: 0.0226 of 0.80 is 0.0283", {"001": 0.0}, {"_001": 1, "_111": 4},
     {"rule": "bound", "max_drop": 0.029, "relative": True}, "001"),
    ("relative bound: beyond the limit", {"001": 0.0}, {"_001": 1, "_111": 4},
     {"rule": "bound", "max_drop": 0.0275, "relative": True}, "111"),
    ("the slower pattern is not taken, however accurate", {"001": 0.0, "011": -0.15}, {"_001": 1, "_011": 2, "_111": 4},
     {"rule": "point", "max_drop": 0.01}, "001"),
    ("equal times: the more accurate", {"001": 0.005, "010": 0.002}, {"_001": 1, "_010": 1, "_111": 4},
     {"rule": "point", "max_drop": 0.01}, "010"),
    ("equal times and accuracies: by the text", {"010": 0.0, "001": 0.0}, {"_010": 1, "_001": 1, "_111": 4},
     {"rule": "point", "max_drop": 0.01}, "001"),
    ("a full pattern that is the fastest is chosen", {"001": 0.0}, {"_001": 5, "_111": 4},
     {"rule": "point", "max_drop": 0.01}, "111"),
    ("schedules are candidates like all others", {"001": 0.05, "111,001": 0.0},
     {"_001": 1, "_111_001": 2, "_111": 4}, {"rule": "point", "max_drop": 0.01}, "111,001"),
]  # fmt: skip


@pytest.mark.parametrize("drops, ms, options, expected", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_rules(drops, ms, options, expected):
    pattern, table = choose(made_up(drops), times(**ms), FULL, **options)
    assert str(pattern) == expected
    assert [c.time_ms for c in table] == sorted(ms.values())


def test_drop_and_bound_are_those_of_paired_differences():
    _, table = choose(made_up({"001": 0.02}), times(_001=1, _111=4), FULL, max_drop=0.01)
    row = next(c for c in table if str(c.pattern) == "001")
    spread = 0.05 * math.sqrt(16 / 15)
    assert row.drop == pytest.approx(0.02)
    assert row.drop_bound == pytest.approx(0.02 + 1.7530503557 * spread / 4, rel=1e-8)
    assert not row.admissible
    full = next(c for c in table if c.pattern == FULL)
    assert (full.drop, full.drop_bound, full.admissible) == (0.0, 0.0, True)


def test_one_task_has_an_infinite_bound():
    accuracies = {FULL: torch.tensor([0.5]), Pattern("001"): torch.tensor([0.9])}
    assert choose(accuracies, times(_001=1, _111=4), FULL, max_drop=1.0, rule="bound")[0] == FULL
    assert str(choose(accuracies, times(_001=1, _111=4), FULL, max_drop=1.0, rule="point")[0]) == "001"


def test_choose_refuses_unequal_tasks():
    with pytest.raises(ValueError, match="001 has 3 tasks, 111 has 2"):
        choose({FULL: torch.zeros(2), Pattern("001"): torch.zeros(3)}, times(_001=1, _111=4), FULL, max_drop=0)


# Tables of Student's t, to the digits printed there.
@pytest.mark.parametrize(
    "p, dof, expected",
    [(0.95, 1, 6.313752), (0.975, 1, 12.706205), (0.95, 2, 2.919986), (0.975, 3, 3.182446), (0.95, 4, 2.131847),
     (0.975, 10, 2.228139), (0.95, 29, 1.699127), (0.975, 30, 2.042272), (0.95, 99, 1.660391), (0.975, 120, 1.979930),
     (0.95, 1000, 1.646379)],
)  # fmt: skip
def test_t_quantile(p, dof, expected):
    assert t_quantile(p, dof) == pytest.approx(expected, abs=1e-6)


def test_t_quantile_at_the_edges():
    assert t_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-12)
    assert t_quantile(0.975, 0) == math.inf
    with pytest.raises(ValueError, match="1.0"):
        t_quantile(1.0, 5)


def test_intervals_cover_the_mean_as_often_as_they_say():
    generator = torch.Generator().manual_seed(3)
    samples = 0.7 + 0.1 * torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    pairs = [mean_ci95(row) for row in samples]
    assert sum(abs(mean - 0.7) <= half for mean, half in pairs) / 4000 == pytest.approx(0.95, abs=0.012)
    assert sum(upper_bound95(row) >= 0.7 for row in samples) / 4000 == pytest.approx(0.95, abs=0.012)
    noise = torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    drops = 0.07 + 0.6 * (samples - 0.7) + 0.05 * noise  # drops go with the accuracy
    ratios = [ratio_upper_bound95(drop, base) for drop, base in zip(drops, samples, strict=True)]
    assert sum(bound >= 0.1 for bound in ratios) / 4000 == pytest.approx(0.95, abs=0.012)


def test_ratio_bound_is_infinite_where_the_denominator_may_be_zero():
    assert ratio_upper_bound95(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 0.4, -0.1])) == math.inf


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.conv4(ways=5, in_channels=1, width=4, image_size=28)


@pytest.fixture(scope="module")
def tasks() -> list[data.Task]:
    """8 tasks, 5-way 1-shot, of made-up images: each class is a random picture under noise."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(8):
        pictures = torch.randn(5, 1, 28, 28, generator=generator)
        noise = torch.randn(5, 4, 1, 28, 28, generator=generator)
        images = pictures[:, None] + 0.5 * noise
        labels = torch.arange(5)
        found.append(data.Task(images[:, 0], labels, images[:, 1:].flatten(0, 1), labels.repeat_interleave(3)))
    return found


def quick(model: nn.Module, tasks: list[data.Task], **more: Any):
    options = {"steps": 2, "lr": 0.1, "patterns": ["00001", "00011"], "seconds": 0.0, **more}
    return select_pattern(model, tasks, **options)


def test_select_evaluates_as_the_plain_loop_does_and_reports_all(model, tasks, tmp_path):
    chosen = quick(model, tasks[:5], test_tasks=tasks[5:], max_drop=1.0)
    report = json.loads(chosen.to_json())
    accuracies = []
    for task in tasks[:5]:
        with torch.no_grad():
            logits = plain_adapt(model, task.xs, task.ys, steps=2, lr=0.1)(task.xq)
        accuracies.append((logits.argmax(-1) == task.yq).double().mean().item())
    assert report["full"]["accuracy"] == pytest.approx(sum(accuracies) / 5, abs=0.014)  # one image in 75
    assert [row["pattern"] for row in report["candidates"]] == [str(c.pattern) for c in chosen.table]
    assert sorted(row["pattern"] for row in report["candidates"]) == ["00001", "00011", "11111"]
    assert report["test"]["tasks"] == 3
    assert report["test"]["drop"] == pytest.approx(report["test"]["full_accuracy"] - report["test"]["chosen_accuracy"])
    alone = report["test"]["support"]
    own = evaluate(model, tasks[5:], pattern=chosen.pattern, steps=2, lr=0.1, statistics="support")
    assert alone["chosen_accuracy"] == own.mean
    assert alone["drop"] == pytest.approx(alone["full_accuracy"] - alone["chosen_accuracy"])
    assert report["stock_full"]["time_ms"] > 0
    assert {"torch", "device", "threads", "backend", "commit"} <= set(report["environment"])
    assert (report["ways"], report["shots"], report["network"]) == (5, 1, "conv4")
    assert "5 tasks, fewer than 30" in chosen.warnings[0]
    assert str(chosen.table).count("\n") == 3 and str(chosen.pattern) in str(chosen.table)
    chosen.save(tmp_path / "pattern.json")
    assert read_selection(tmp_path / "pattern.json") == report
    assert [p.name for p in tmp_path.iterdir()] == ["pattern.json"]


class Together(nn.Module):
    """A network whose norm is no module, so that nothing can hold its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(784, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.batch_norm(self.layer(x.flatten(1)), None, None, training=True).relu())
        return y


def test_a_network_that_cannot_classify_one_image_is_selected_for_all_the_same(tasks, tmp_path):
    chosen = quick(Together(), tasks[:5], test_tasks=tasks[5:], max_drop=1.0, patterns=["01"])
    assert chosen.warnings[-1].startswith("there are no test figures of images classified each by itself: the network")
    chosen.save(tmp_path / "pattern.json")
    test = read_selection(tmp_path / "pattern.json")["test"]
    assert test["support"] is None and 0 <= test["chosen_accuracy"] <= 1


def test_one_task_writes_null_and_says_so(model, tasks):
    chosen = quick(model, tasks[:1], max_drop=1.0)
    assert str(chosen.pattern) == "11111" and "one task" in chosen.warnings[0]
    report = json.loads(chosen.to_json())
    assert [row["drop_bound"] for row in report["candidates"] if row["pattern"] == "00001"] == [None]
    assert "?" in str(chosen.table)


@pytest.mark.parametrize(
    "more, words",
    [({"rule": "best"}, "rule is 'best'"), ({"max_drop": 1.5}, "max_drop is 1.5"), ({"max_drop": math.nan}, "nan"),
     ({"patterns": ["0011"]}, "0011")],
)  # fmt: skip
def test_bad_arguments(model, tasks, more, words):
    with pytest.raises(ValueError, match=words):
        quick(model, tasks[:2], **more)


def test_tasks_that_were_chosen_on_are_no_test(model, tasks):
    with pytest.raises(ValueError, match="test task 1 is one of the tasks"):
        quick(model, tasks[:3], test_tasks=[tasks[4], tasks[2]])
    with pytest.raises(ValueError, match="no tasks"):
        quick(model, [])


def test_disagreement_with_the_plain_loop_is_found_and_reported(model, tasks, tmp_path, monkeypatch):
    xs, ys = tasks[0].xs, tasks[0].ys
    assert disagreement(model, xs, ys, steps=2, lr=0.1) is None
    double = copy.deepcopy(model).double()
    assert disagreement(double, xs.double(), ys, steps=2, lr=0.1, norm="never") is None

    def wrong(*args: Any, lr: float, **more: Any) -> nn.Module:
        return adapt(*args, lr=1.01 * lr, **more)

    monkeypatch.setattr("lambda_maml.plain_torch.adapt", wrong)
    path = write(tmp_path / "bench.json", bench(model, xs, MS))
    for timings in (None, path):
        chosen = quick(model, tasks[:2], timings=timings)
        assert "no speed-up is reported" in chosen.warnings[-1]
        assert json.loads(chosen.to_json())["stock_full"]["time_ms"] is None


def test_one_task_that_agrees_is_enough(model, tasks, monkeypatch):
    """A task whose rounding falls on the edge of a pooling window must not cost the yardstick."""
    answers = iter(["one is off", None])
    monkeypatch.setattr("lambda_maml.select.disagreement", lambda *args, **more: next(answers))
    chosen = quick(model, tasks[:3])
    assert not any("off" in warning for warning in chosen.warnings)
    assert json.loads(chosen.to_json())["stock_full"]["time_ms"] > 0
    assert next(answers, "asked twice") == "asked twice"


def test_stock_is_plain_torch_and_leaves_the_model_alone(model, tasks):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = plain_adapt(model, tasks[0].xs, tasks[0].ys, steps=1, lr=0.1, norm="never")
    assert {type(m).__module__.split(".")[0] for m in twin.modules() if not list(m.children())} == {"torch"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    after = twin.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    norms = {k for k, v in before.items() if v.dim() == 1 and v.numel() == 4 and ("norm" in k or torch.all(v == 1))}
    assert moved and norms and not moved & norms


def test_interleave_runs_every_entry_each_round_in_changing_order():
    calls: list[str] = []
    resets: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = interleave(runs, repeats=6, warmup=1, before=resets.append)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 21, 3)]
    assert len(calls) == 21 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
    assert resets == calls
    assert set(found) == set("abc") and all(t.q1 <= t.median <= t.q3 for t in found.values())


def test_interleave_stops_in_time_after_three_rounds():
    calls: list[int] = []
    interleave({"a": lambda: calls.append(0)}, repeats=50, warmup=2, seconds=0.0)
    assert len(calls) == 5


def test_measure_times_names_every_candidate(model, tasks):
    found = measure_times(
        model, tasks[0].xs, tasks[0].ys, patterns=["00001", "11111,00001"], steps=2, lr=0.1, repeats=2
    )
    assert set(found) == {"00001", "11111,00001", STOCK}


def bench(model: nn.Module, xs: Tensor, ms: dict[str, float], **more: Any) -> list[dict[str, Any]]:
    """Entries of pytest-benchmark's JSON, which counts in seconds."""
    found = []
    for name, time in ms.items():
        stock = name == STOCK
        bits = "11111" if stock else name
        options: dict[str, Any] = {"pattern": bits, "shots": 1, "steps": 2, "norm": "follow", "stock": stock}
        extra = {**timing_info(model, xs, **options), **more}
        stats = {"median": time / 1e3, "q1": time / 2e3, "q3": time / 5e2}
        found.append({"name": f"adapt[{name}]", "extra_info": extra, "stats": stats})
    return found


def write(path: Path, benchmarks: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": benchmarks}))
    return path


MS = {"00001": 3.0, "00011": 1.0, "11111": 10.0, STOCK: 20.0}


def test_timings_of_a_benchmark_choose(model, tasks, tmp_path):
    xs = tasks[0].xs
    other = bench(model, xs, MS, steps=5)
    noise = [{"name": "ops", "extra_info": {}, "stats": {"median": 1.0}}]
    path = write(
        tmp_path / "bench.json", noise + other + bench(model, xs, MS, environment={"torch": "9", "device": "H1"})
    )
    chosen = quick(model, tasks[:3], timings=path, max_drop=1.0, rule="point")
    report = json.loads(chosen.to_json())
    assert str(chosen.pattern) == "00011"
    assert {row["pattern"]: row["time_ms"] for row in report["candidates"]} == {k: MS[k] for k in MS if k != STOCK}
    assert report["stock_full"]["time_ms"] == 20.0 and report["environment"]["device"] == "H1"
    assert report["chosen"]["time"] == {"low": 0.5, "median": 1.0, "high": 2.0}
    assert reports.speedups(report) == {"over_stock_full": 20.0, "over_full": 10.0}


def read(model: nn.Module, path: Path) -> dict[str, Timing]:
    wanted: dict[str, Any] = {"network": models.config_of(model), "shots": 1, "steps": 2, "norm": "follow"}
    return read_timings(path, patterns=["00001", "00011", "11111"], **wanted)[0]


def test_timings_that_do_not_fit_are_refused(model, tasks, tmp_path):
    xs, path = tasks[0].xs, tmp_path / "bench.json"
    with pytest.raises(ValueError, match="no timing for pattern 00011, 11111"):
        read(model, write(path, bench(model, xs, {"00001": 1.0})))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"steps": 5}, r"steps \(5 in the file, 2 here\)"),
        ({"norm": "never"}, r"norm \(never in the file, follow here\)"),
        ({"network": {**models.config_of(model), "width": 64}}, r"network width \(64 in the file, 4 here\)"),
        ({"dtype": "float64"}, r"dtype \(float64 in the file, float32 here\)"),
        ({"shots": 5}, r"shots \(5 in the file, 1 here\)"),
    ]
    for more, words in cases:
        with pytest.raises(ValueError, match=words):
            read(model, write(path, bench(model, xs, MS, **more)))
    with pytest.raises(ValueError, match="00001.* timed more than once"):
        read(model, write(path, bench(model, xs, MS) + bench(model, xs, {"00001": 2.0})))
    with pytest.raises(ValueError, match="cpu and cuda:0"):
        read(model, write(path, bench(model, xs, MS) + bench(model, xs, MS, device="cuda:0")))
    with pytest.raises(ValueError, match="no benchmark of kind"):
        read(model, write(path, []))
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1"):
        read(model, path)


def report_of(**more: Any) -> dict[str, Any]:
    rows = [
        {"pattern": p, "accuracy": a, "ci95": 0.01, "time_ms": t, "drop": 0.9 - a, "drop_bound": 0.905 - a}
        for p, a, t in [("001", 0.7, 1.0), ("011", 0.895, 2.0), ("100", 0.3, 3.0), ("110", 0.8, 4.0), ("111", 0.9, 5.0)]
    ]
    full = {k: rows[-1][k] for k in ("pattern", "accuracy", "ci95", "time_ms")}
    return {
        "schema": 1, "network": "conv4", "ways": 5, "shots": 1, "steps": 5, "lr": 0.1, "norm": "follow",
        "max_drop": 0.02, "rule": "bound", "relative": False, "chosen": rows[1], "full": full,
        "stock_full": {"pattern": "111", "time_ms": 9.0},
        "test": {"tasks": 10, "full_accuracy": 0.91, "chosen_accuracy": 0.9, "drop": 0.01, "drop_ci95": 0.002},
        "candidates": rows, "environment": {}, **more,
    }  # fmt: skip


def test_report_names_the_front_and_writes_a_picture(tmp_path):
    from PIL import Image
    from rich.console import Console

    report = report_of()
    assert [row["pattern"] for row in reports.pareto(report)] == ["001", "011", "111"]
    assert reports.names(report) == {"111": "MAML", "001": "ANIL", "110": "BOIL"}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(reports.headline(report), reports.candidates(report))
    text = console.export_text()
    assert "each image by itself" not in text
    alone = {"full_accuracy": 0.88, "chosen_accuracy": 0.86, "drop": 0.02, "drop_ci95": 0.003}
    console.print(reports.headline(report_of(test={**report["test"], "support": alone})))
    assert "each image by itself, by the support set's statistics: 88.00% and 86.00%, cost 2.00 ± 0.30" in " ".join(
        console.export_text().split()
    )
    assert "4.5x" in text and "2.5x" in text and "1.00 ± 0.20" in text and "…" not in text
    reports.plot(report, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        assert image.size[0] > 1000
    drawn = []
    for name, dark in (("light.svg", False), ("again.svg", False), ("dark.svg", True)):
        reports.plot(report, tmp_path / name, dark=dark)
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1] != drawn[2] and b"#14181f" in drawn[2] and b"#14181f" not in drawn[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.svg", "dark.svg", "light.svg", "report.png"]
    beyond = b"costs too much accuracy"  # said where there are such patterns alone
    report["candidates"] = [{**row, "admissible": True} for row in report["candidates"]]
    reports.plot(report, tmp_path / "all.svg")
    assert beyond in drawn[0] and beyond not in (tmp_path / "all.svg").read_bytes()
    with pytest.raises(ValueError, match="ends in .png or .svg"):
        reports.plot(report, tmp_path / "report.jpg")


@pytest.mark.parametrize(
    "change, words",
    [({"schema": 2}, "schema is 2"), ({"candidates": "all"}, "candidates is 'all'"), ({"lr": None}, "lr is missing"),
     ({"lr": math.nan}, "NaN, which is no finite number"), ({"full": {"pattern": "111"}}, "full.time_ms is missing"),
     ({"steps": -5}, "steps is -5, expected int >= 1; select a pattern again"),
     ({"stock_full": {"pattern": "111", "time_ms": -9.0}}, "stock_full.time_ms is -9.0, expected float > 0"),
     ({"max_drop": "x" * 99}, "max_drop is '" + "x" * 59 + r"\.\.\., expected"), ({"norm": "maybe"}, "norm"),
     ({"test": {"tasks": 0, **dict.fromkeys(("full_accuracy", "chosen_accuracy", "drop", "drop_ci95")), "support": {}}},
      r"test.support.\w+ is missing"),
     ({"candidates": [{}]}, r"candidates\[0\].\w+ is missing"), ({"candidates": []}, "candidates")],
)  # fmt: skip
def test_a_report_of_another_form_is_refused(tmp_path, change, words):
    path = tmp_path / "pattern.json"
    path.write_text(json.dumps(report_of(**change)))
    with pytest.raises(ValueError, match=words):
        read_selection(path)
