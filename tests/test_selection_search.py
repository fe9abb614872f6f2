"""Selections that race, search, keep to a budget, and compare numbers of steps and rates."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import VAL, network
from torch import nn

from lambda_maml import Pattern, data, models, scored, select_pattern
from lambda_maml import select as select_module
from lambda_maml.choice import Limit
from lambda_maml.evaluate import evaluate
from lambda_maml.memory import measure_memory
from lambda_maml.pattern_json import read_selection
from lambda_maml.report import candidates, headline, pareto, plot
from lambda_maml.search import cheaper, planned, search_deep
from lambda_maml.timing import Timing, Work
from lambda_maml.trials import Trial, trials_of

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = data.sample_tasks(VAL, 24, ways=3, shots=1, query=4, seed=1)
PATTERNS = ["00001", "00011", "00111", "11110"]


def choose(model: nn.Module | None = None, **changes: Any) -> select_module.Selection:
    given: dict[str, Any] = {"steps": 2, "lr": 0.1, "patterns": PATTERNS, "seconds": 0.0, "rule": "point", **changes}
    return select_pattern(model or network(), given.pop("tasks", TASKS), **given)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that are no measurement: a millisecond a bit and step, the yardstick's 100."""

    def measured(*args: Any, patterns: Any, steps: int, stock: bool = True, **more: Any) -> dict[str, Timing]:
        ms = {t.timed: float(t.pattern.stages[0].count("1") * (t.steps or steps)) for t in patterns}
        return {name: Timing(t, 0.99 * t, 1.01 * t) for name, t in [*ms.items(), *[("stock_full", 100.0)] * stock]}

    monkeypatch.setattr(select_module, "measure_times", measured)


@pytest.mark.usefixtures("clock")
def test_a_race_chooses_as_all_tasks_do_and_says_how_many_each_candidate_saw(tmp_path: Path) -> None:
    every, race = (choose(max_drop=0.1, search=search) for search in ("all", "race"))
    assert race.pattern == every.pattern
    report = json.loads(race.to_json())
    assert report["search"]["kind"] == "race" and report["search"]["error"] == 0.05
    assert report["search"]["adaptations"] == sum(row["tasks"] for row in report["candidates"]) <= 24 * 5
    assert report["chosen"]["tasks"] == report["full"]["tasks"] == 24
    for row in race.table:
        own = evaluate(network(), TASKS[: row.tasks], pattern=row.pattern, steps=2, lr=0.1)
        assert row.score == own.mean and (row.tasks == 24 or not row.admissible)
    race.save(tmp_path / "pattern.json")
    assert read_selection(tmp_path / "pattern.json") == report


@pytest.mark.usefixtures("clock")
def test_a_race_goes_on_from_what_it_had_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    kept = tmp_path / "pattern.evaluated.json"

    def counted(model: Any, tasks: Any, *, pattern: Any, first: int = 0, **options: Any) -> Any:
        if len(seen) == 2:
            seen.append(("", 0, 0))
            raise KeyboardInterrupt
        seen.append((str(pattern), first, len(tasks)))
        return evaluate(model, tasks, pattern=pattern, first=first, **options)

    monkeypatch.setattr(scored, "evaluate", counted)
    options: dict[str, Any] = {"search": "race", "max_drop": 0.0, "resume": kept}
    with pytest.raises(KeyboardInterrupt):
        choose(**options)
    assert seen[:2] == [("11111", 0, 24), ("00001", 0, 10)] and kept.is_file()
    again, first = choose(**options), seen[3:]
    assert not kept.exists() and ("11111", 0, 24) not in first and ("00001", 0, 10) not in first
    assert again.to_dict() == choose(**options).to_dict()


@pytest.mark.usefixtures("clock")
def test_a_budget_takes_the_most_accurate_pattern_within_it(tmp_path: Path) -> None:
    for search in ("all", "race"):
        chosen = choose(max_time=4.0, search=search)
        within = [row for row in chosen.table if row.time_ms <= 4.0]
        assert chosen[chosen.trial] == max(within, key=lambda row: row.score)
        report = json.loads(chosen.to_json())
        assert report["budget"] == {"time_ms": 4.0, "memory_mb": None} and report["max_drop"] is None
        assert [row["admissible"] for row in report["candidates"]] == [t.time_ms <= 4.0 for t in chosen.table]
    chosen.save(tmp_path / "pattern.json")
    assert read_selection(tmp_path / "pattern.json") == report
    with pytest.raises(ValueError, match="no pattern adapts within 1.5 ms; the fastest is 00001 with 2 ms"):
        choose(max_time=1.5)
    with pytest.raises(ValueError, match="budget .3 ms. takes the place of an allowed drop"):
        choose(max_time=3.0, max_drop=0.1)
    with pytest.raises(ValueError, match="max_time is -1"):
        choose(max_time=-1)


@pytest.mark.usefixtures("clock")
def test_a_budget_of_memory_goes_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(model: Any, xs: Any, ys: Any, descents: Any) -> dict[Trial, float]:
        return {trial: 10.0 * str(how["pattern"]).count("1") for trial, how in descents.items()}

    monkeypatch.setattr(select_module, "measure_memory", measured)
    chosen = choose(max_memory=25.0, max_time=1e3)
    assert {row.memory_mb for row in chosen.table} == {10.0, 20.0, 30.0, 40.0, 50.0}
    assert chosen[chosen.trial].memory_mb in (10.0, 20.0)
    with pytest.raises(ValueError, match="within 5 MB; the smallest is 00001 with 10 MB"):
        choose(max_memory=5.0)


def test_memory_of_an_adaptation_is_at_least_that_of_its_activations() -> None:
    model = models.conv4(ways=5, in_channels=3, width=32, image_size=84)
    xs, ys = torch.randn(25, 3, 84, 84), torch.arange(5).repeat(5)
    given = {p: {"pattern": p, "steps": 1, "lr": 0.1} for p in ("11111", "00001")}
    found = measure_memory(model, xs, ys, given)
    assert 25 * 32 * 42 * 42 * 4 / 1e6 < found["11111"] < 1e3  # the first block's results
    assert 0 < found["00001"] < found["11111"]
    with pytest.raises(ValueError, match="handed as a pickle"):
        measure_memory(model, xs, ys, {"own": {"pattern": "1", "steps": 1, "lr": 0.1, "loss": lambda a, b: a.sum()}})
    with pytest.raises(RuntimeError, match="memory: ValueError: .*'0011'"):
        measure_memory(model, xs, ys, {"wrong": {"pattern": "0011", "steps": 1, "lr": 0.1}})


@pytest.mark.usefixtures("clock")
def test_steps_and_rates_are_chosen_with_the_pattern(tmp_path: Path) -> None:
    every = choose(steps=[1, 3], rates=[0.1, 0.5], max_drop=0.05)
    assert len(every.table) == 5 * 2 * 2
    report = json.loads(every.to_json())
    full = max((row for row in every.table if str(row.pattern) == "11111"), key=lambda row: row.score)
    assert (report["full"]["steps"], report["full"]["accuracy"]) == (full.steps, full.score)
    chosen = every[every.trial]
    assert (report["steps"], report["lr"]) == (chosen.steps, chosen.lr) == (every.steps, report["chosen"]["lr"])
    for row in every.table:
        own = evaluate(network(), TASKS, pattern=row.pattern, steps=row.steps or 0, lr=row.lr or 0.0)
        assert row.score == own.mean and row.time_ms == str(row.pattern).count("1") * (row.steps or 0)
    race = choose(steps=[1, 3], rates=[0.1, 0.5], max_drop=0.05, search="race")
    assert race.trial == every.trial
    every.save(tmp_path / "pattern.json")
    assert read_selection(tmp_path / "pattern.json") == report
    plot(report, tmp_path / "report.svg")
    text = printed(report)
    assert "steps" in text and "rate" in text and f"{chosen.steps} steps, rate {chosen.lr}" in text


def printed(report: dict[str, Any]) -> str:
    import io

    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(headline(report), candidates(report, every=True))
    return console.export_text()


@pytest.mark.usefixtures("clock")
def test_one_rate_and_number_of_steps_are_no_part_of_a_candidates_name() -> None:
    chosen = choose(steps=[2], rates=[0.1])
    assert chosen.to_dict() == choose().to_dict() and "steps" not in chosen.to_dict()["candidates"][0]


@pytest.mark.usefixtures("clock")
def test_tables_and_files_say_quartiles_and_the_front(tmp_path: Path) -> None:
    chosen = choose()
    report = json.loads(chosen.to_json())
    row = report["candidates"][0]
    assert row["time"] == {"low": 0.99 * row["time_ms"], "median": row["time_ms"], "high": 1.01 * row["time_ms"]}
    assert [row["pattern"] for row in pareto(report)] == [str(row.pattern) for row in chosen.front]
    best = 1.0
    for row in report["candidates"]:  # sorted by time
        assert (row in pareto(report)) == (row["drop"] < best)
        best = min(best, row["drop"])
    assert "1.98-2.02" in printed(report) and "1.980-2.020" in str(chosen.table)
    front = {**report, "front": [0, 9]}
    (tmp_path / "pattern.json").write_text(json.dumps(front))
    with pytest.raises(ValueError, match="front names row 9 of 5 candidates"):
        read_selection(tmp_path / "pattern.json")


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: Any, patterns: Any, **more: Any) -> dict[str, Timing]:
        return {t.timed: Timing(1.0, 0.8, 1.3) for t in patterns}

    monkeypatch.setattr(select_module, "measure_times", measured)
    chosen = choose(max_drop=1.0)
    assert any("the machine was busy" in said and "lie 50% apart" in said for said in chosen.warnings)
    assert chosen[chosen.trial].score == max(row.score for row in chosen.table)  # all times are a tie


def test_work_of_other_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it slows all adaptations alike."""
    moments = iter([Work(0.0, 100.0, 5.0), Work(10.0, 100.0 + 4.0 + 2.0 * (os.cpu_count() or 1), 9.0)])
    monkeypatch.setattr(Work, "now", lambda: next(moments, None))

    def measured(*args: Any, patterns: Any, **more: Any) -> dict[str, Timing]:
        return {t.timed: Timing(1.0, 0.99, 1.01) for t in patterns}

    monkeypatch.setattr(select_module, "measure_times", measured)
    (said,) = [w for w in choose(max_drop=1.0).warnings if "busy" in w]
    assert "other processes took 20% of the processors" in said and "quartiles" not in said


def test_work_is_read_from_what_linux_counts(tmp_path: Path) -> None:
    counted = tmp_path / "stat"
    assert Work.now(counted) is None
    counted.write_text("cpu  100 20 30 9999 500 4 5 41 7 0\ncpu0 1 2 3\n")
    found = Work.now(counted)
    assert found is not None and found.all == 200 / os.sysconf("SC_CLK_TCK") and found.own > 0
    counted.write_text("intr 5\n")
    assert Work.now(counted) is None
    start = Work(5.0, 50.0, 1.0)
    assert start.beside(Work(6.0, 51.0, 2.0)) == 0.0 == start.beside(Work(5.1, 99.0, 1.0))


@pytest.mark.usefixtures("clock")
def test_a_choice_may_be_made_by_the_support_sets_statistics() -> None:
    chosen = choose(statistics="support", test_tasks=data.sample_tasks(VAL, 6, ways=3, shots=1, query=4, seed=2))
    own = evaluate(network(), TASKS, pattern="00011", steps=2, lr=0.1, statistics="support")
    assert chosen["00011"].score == own.mean
    report = json.loads(chosen.to_json())
    assert report["statistics"] == "support" and report["test"]["support"]["chosen_accuracy"] is not None


def test_a_drop_that_no_pattern_keeps_names_the_best_there_is() -> None:
    base = torch.linspace(0.7, 0.9, 40, dtype=torch.float64)
    scores = {Pattern("111"): base, Pattern("001"): base - 0.05, Pattern("011"): base - 0.03}
    limit = Limit(0.02, "point")
    trial, table = limit.choose(scores, {p: float(str(p).count("1")) for p in scores}, Pattern("111"))
    assert str(trial) == "111"
    assert limit.alone(table) == (
        "no pattern but the full one is within 2.00 points: the drop of the best other one, 011, is 3.00 points"
    )
    assert Limit(0.04, "point").alone(Limit(0.04, "point").choose(scores, dict.fromkeys(scores, 1.0), trial)[1]) is None


@pytest.mark.parametrize(
    "more, words",
    [({"search": "fast"}, "search is 'fast', expected 'all' or 'race'"), ({"error": 1.0}, "error is 1.0"),
     ({"steps": []}, r"steps is \[\]"), ({"steps": [1, 1]}, r"steps is \[1, 1\]"), ({"steps": [0]}, r"steps is \[0\]"),
     ({"rates": [0.1, -1]}, r"rates is \[0.1, -1\]"), ({"statistics": "own"}, "statistics is 'own'")],
)  # fmt: skip
def test_bad_arguments(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose(**more)


class Deep(nn.Sequential):
    """14 layers, the last ones of which are wide: a small residual network's costs without its time."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(256, 12)]
        for _ in range(12):
            layers += [nn.ReLU(), nn.Linear(12, 12)]
        super().__init__(*layers, nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.usefixtures("clock")
def test_a_deep_network_is_searched_from_the_cheapest_patterns_up() -> None:
    torch.manual_seed(0)
    told: list[str] = []
    chosen = choose(Deep(), patterns=None, max_drop=0.05, plan=told.append)
    report = json.loads(chosen.to_json())
    assert report["search"]["kind"] == "race" and len(chosen.full_pattern.stages[0]) == 14
    assert report["search"]["adaptations"] < 24 * 2**6 < 24 * 2**14
    assert chosen[chosen.trial].admissible and chosen[chosen.trial].tasks == 24
    assert told[0].startswith("14 candidates, a race on 24 tasks: about")
    steps = [row for row in chosen.table if row.tasks < 24]
    assert all(not row.admissible for row in steps)


def test_what_is_cheaper_keeps_the_first_updated_layer() -> None:
    assert {at: str(p) for at, p in cheaper(Pattern("01110")).items()} == {(0, 2): "01010", (0, 3): "01100"}
    assert [str(p) for p in cheaper(Pattern("111,001")).values()] == ["101,001", "110,001"]
    assert cheaper(Pattern("00100")) == {}


def test_a_layer_whose_freezing_was_ruled_out_is_not_frozen_later() -> None:
    # Of 14 layers under a full pattern that alone is admitted, freezing every other one costs nothing.
    full, harmless = Pattern.full(14), {2, 4, 6, 8, 10, 12}
    seen: dict[str, int] = {}

    def scores(trial: Trial, count: int) -> torch.Tensor:
        bits = trial.pattern.stages[0]
        seen[bits] = count
        harm = {layer for layer in range(14) if bits[layer] == "0"} - harmless
        return torch.full((count,), 0.9 - 0.2 * len(harm)) + 0.01 * torch.tensor([1.0, -1.0] * 20)[:count]

    candidates = [Trial(Pattern("0" * (14 - k) + "1" * k)) for k in range(1, 15)]
    limit = Limit.of(0.01, "bound", False, None, None, "accuracy", False)
    search_deep(candidates, Trial(full), limit, scores, lambda trial: float(str(trial).count("1")), 40, 0.05)  # type: ignore[arg-type]
    assert seen["11010101010101"] == 40
    later = [bits for bits in seen if Trial(Pattern(bits)) not in candidates]
    assert len(later) == 13 and all(bits[0] == "1" for bits in later)


@pytest.mark.parametrize("seconds, timing", [(0.0, 5 * 31.0), (1000.0, 1250.0)])
def test_a_plan_counts_the_rounds_that_are_timed_in_any_case(seconds: float, timing: float) -> None:
    trials = trials_of([Pattern(f"{bits:05b}") for bits in range(1, 32)])
    plan = planned(1.0, trials, trials[-1:], None, False, 10, 3, seconds)
    assert plan.likely == plan.most == 10 * 31 + 2 * 3 * 2 + timing


def test_more_patterns_than_twelve_bits_have_are_not_compared_by_default() -> None:
    model = models.resnet12(ways=3, in_channels=1, image_size=16, widths=(2, 2, 2, 2))
    told: list[str] = []
    chosen = select_pattern(
        model, TASKS[:3], steps=1, lr=0.1, max_drop=1.0, rule="point", seconds=0.0, plan=told.append
    )
    assert told[0].startswith("43 candidates, a race") and "at most" in told[0]
    assert chosen[chosen.trial].admissible and len(chosen.table) < 43
