"""`make experiments` in its tiny form: results, kill and resume, what is refused, and the page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benches
import pytest
from machine import PATIENCE

from lambda_maml.pattern_json import read_selection

ROOT = Path(__file__).resolve().parents[1]
experiments = benches.module("experiments")
plan = benches.module("experiments_plan")
page = benches.module("experiments_page")
doing = benches.module("experiments_do")
front_page = benches.module("front_page")
memory = benches.module("memory")
JOBS = {job.name: job for job in plan.jobs(tiny=True)}
TRAINING = "glyphs-1shot-maml-s0.training"


def place(folder: Path) -> Any:
    return doing.Place(None, folder / "runs", folder / "results")


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--tiny", "--runs", str(folder / "runs"), "--results", str(folder / "results"), *more]


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "experiments.py"), *arguments(folder, *more)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the tiny plan, in this process; memory is not measured."""
    folder = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peak", lambda c, bits, contender, threads: memory.Peak(1.5, 1.0))
        for job in JOBS.values():
            doing.do(job, place(folder), experiments.command_of(job))
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "all")
    return tmp_path / "all"


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_every_result_says_what_it_is_of(done):
    files = {f"{name}.json" for name in JOBS} | {"glyphs-1shot-maml-s0.safetensors"}
    assert {path.name for path in (done / "results").iterdir()} == files
    for name, job in JOBS.items():
        found = json.loads((done / "results" / f"{name}.json").read_text())
        assert found["plan"] == json.loads(json.dumps(job.plan)) and found["name"] == name
        assert found["command"].endswith(f"--only {name} --tiny") and "--data DATA" in found["command"]
        assert found["machine"]["packages"]["torch"] and "commit" in found["machine"] and found["seconds"] >= 0
        assert str(done) not in json.dumps(found)


def test_accuracies_are_by_both_protocols_with_paired_drops(done):
    found = json.loads((done / "results" / "glyphs-1shot-maml-s0.accuracy.json").read_text())
    keys = {(row["steps"], row["pattern"], row["statistics"]) for row in found["rows"]}
    assert keys == {(k, p, s) for k in (1, 2) for p in ("11111", "00001", "11110") for s in ("batch", "support")}
    rows = {(row["steps"], row["statistics"], row["pattern"]): row for row in found["rows"]}
    for (steps, statistics, _), row in rows.items():
        full = rows[steps, statistics, "11111"]
        assert row["drop"] == pytest.approx(full["accuracy"] - row["accuracy"]) and row["drop_ci95"] >= 0


def chosen_by(clock: dict[str, Any], found: dict[str, Any], drop: float) -> str:
    """The most accurate of the candidates within the drop whose times are a tie with the fastest one's."""
    taken = page.by_name(clock, found["plan"]["steps"])
    times = {row["pattern"]: taken[row["pattern"]] for row in found["candidates"]}
    # The others lost a race.
    judged = [row for row in found["candidates"] if row["tasks"] == found["plan"]["val_tasks"]]
    within = [row for row in judged if row["pattern"] == "11111" or row["drop_bound"] <= drop + 1e-12]
    first = min((times[row["pattern"]] for row in within), key=lambda time: time["median"])
    tied = [
        row for row, time in ((row, times[row["pattern"]]) for row in within)
        if time["q1"] <= first["median"] <= time["q3"] and first["q1"] <= time["median"] <= first["q3"]
    ]  # fmt: skip
    return max(tied, key=lambda row: row["accuracy"])["pattern"]


def test_the_choice_is_by_the_file_of_times_and_its_bounds(done):
    found = json.loads((done / "results" / "glyphs-1shot-maml-s0.choice-k2.json").read_text())
    clock = json.loads((done / "results" / found["timings"]).read_text())
    taken = page.by_name(clock, 2)
    recorded = {row["pattern"]: row["time_ms"] for row in found["candidates"]}
    assert recorded == pytest.approx({bits: 1e3 * taken[bits]["median"] for bits in recorded}) and len(recorded) == 31
    for drop in (0.01, 0.005):
        assert found["chosen"][f"{drop:g}"] == chosen_by(clock, found, drop)
    best = max(row["accuracy"] for row in found["candidates"])
    assert best == next(r["accuracy"] for r in found["candidates"] if r["pattern"] == found["chosen"]["best"])
    selection = read_selection(done / "runs" / "glyphs-1shot-maml-s0" / "pattern-k2.json")
    assert selection["chosen"]["pattern"] == found["chosen"]["0.01"] and selection["test"]["tasks"] == 4


def test_a_race_is_said_in_the_plan_and_names_what_it_judged_on_all_tasks(copied, monkeypatch):
    arm = plan.ARMS["maml"]._replace(search="race")
    monkeypatch.setitem(plan.ARMS, "maml", arm)
    amount, name = plan.TINY_AMOUNT._replace(val_tasks=40), "glyphs-1shot-maml-s0.choice-k1"
    every = {job.name: job for job in plan.jobs_of(plan.experiments(tiny=True), amount)}
    assert every[name].plan["search"] == "race" and every[name].plan["drops"] == [0.01]
    assert every["glyphs-1shot-maml-s0.accuracy"].plan["patterns"] == ["11111", "00001"]
    training = copied / "results" / f"{TRAINING}.json"
    changed(training, lambda found: found.update(plan=json.loads(json.dumps(every[TRAINING].plan))))
    doing.do(every[name], place(copied), "")
    found = json.loads((copied / "results" / f"{name}.json").read_text())
    judged = {row["pattern"]: row["tasks"] for row in found["candidates"]}
    assert sum(judged.values()) < 31 * 40 and set(found["chosen"]) == {"0.01", "best"}
    assert {judged[bits] for bits in found["chosen"].values()} == {40}


def test_what_is_done_is_left_alone(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in (done / "results").iterdir()}
    assert experiments.main(arguments(done)) == 0
    assert "6 of 6 results are there, 0 to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (done / "results").iterdir()}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_checkpoint(done, tmp_path):
    """Its parent is killed, which ends the training too; then both begin again."""
    only = command(tmp_path, "--only", TRAINING)
    lines = tmp_path / "runs" / "glyphs-1shot-maml-s0" / "metrics.jsonl"
    first = subprocess.Popen(only, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not (lines.is_file() and lines.stat().st_size) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    while (lines.parent / ".lock").exists() and time.monotonic() < deadline:  # until the training has saved
        time.sleep(0.02)
    assert not (lines.parent / ".lock").exists()
    again = subprocess.run(only, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0, again.stdout + again.stderr
    one, two = (json.loads((f / "results" / f"{TRAINING}.json").read_text()) for f in (done, tmp_path))
    assert one["checkpoint_sha256"] == two["checkpoint_sha256"]
    assert one["history"] == two["history"] and two["iterations"] == 40


@pytest.mark.parametrize("reach", ["the plan", "the training"])
def test_a_result_of_another_plan_is_refused(copied, capsys, reach):
    name = TRAINING if reach == "the training" else "glyphs-1shot-maml-s0.accuracy"
    path = copied / "results" / f"{name}.json"
    changed(path, lambda found: found["plan"]["settings"].update(lr=0.3))
    assert experiments.main(arguments(copied)) == 2
    said = capsys.readouterr().err
    assert str(path) in said and "settings lr is 0.3 there and 0.4 here" in said and "--results" in said


def test_a_run_folder_of_another_configuration_is_refused(copied):
    (copied / "results" / f"{TRAINING}.json").unlink()
    run = plan.Experiment(plan.TINY, "rates-pretrained", 0)
    (copied / "runs" / "glyphs-1shot-maml-s0").rename(copied / "runs" / str(run))
    job = plan.Job("x", "training", run, {})
    with pytest.raises(ValueError, match="the run to resume has settings learn_lr None, this one layer-step"):
        doing.do(job, place(copied), "")


def test_a_checkpoint_that_is_not_that_of_the_result_is_refused(copied):
    path = copied / "results" / f"{TRAINING}.json"
    changed(path, lambda found: found.update(checkpoint_sha256="0" * 64))
    with pytest.raises(ValueError, match="they are of different runs"):
        doing.do(JOBS["glyphs-1shot-maml-s0.accuracy"], place(copied), "")
    (copied / "runs" / "glyphs-1shot-maml-s0" / "best.safetensors").unlink()
    (copied / "results" / "glyphs-1shot-maml-s0.safetensors").unlink()
    with pytest.raises(ValueError, match="the checkpoint of .* is not there"):
        doing.do(JOBS["glyphs-1shot-maml-s0.accuracy"], place(copied), "")


def test_an_evaluation_is_made_again_of_the_checkpoint_beside_the_results(copied):
    name = "glyphs-1shot-maml-s0.accuracy"
    shutil.rmtree(copied / "runs")
    path = copied / "results" / f"{name}.json"
    before = json.loads(path.read_text())["rows"]
    path.unlink()
    doing.do(JOBS[name], place(copied), "")
    assert json.loads(path.read_text())["rows"] == before


def test_other_images_than_those_of_training_are_refused(copied):
    path = copied / "results" / f"{TRAINING}.json"
    changed(path, lambda found: found["images"].update(test="other images"))
    with pytest.raises(ValueError, match="beside training they were other images"):
        doing.do(JOBS["glyphs-1shot-maml-s0.accuracy"], place(copied), "")


def test_a_folder_without_the_image_sets_is_refused(tmp_path, capsys):
    given = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert experiments.main([*given, "--data", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert experiments.main([*given, "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no image set of these lies there" in said and "CIFAR_FS_{train,val,test}.pickle" in said
    assert experiments.main(given) == 2
    assert "root is not given" in capsys.readouterr().err


def test_a_name_that_none_has_is_refused(tmp_path, capsys):
    assert experiments.main(arguments(tmp_path, "--only", "cifar*")) == 2
    assert "--only cifar*: no run or result has such a name" in capsys.readouterr().err


def test_a_run_brings_what_it_needs():
    every = list(plan.jobs())
    names = [job.name for job in plan.chosen(every, ["omniglot-1shot-rates-pretrained-s1.choice-k10"])]
    assert names == [
        "omniglot-1shot.times-follow-rates", "omniglot-1shot-rates-pretrained-s1.training",
        "omniglot-1shot-rates-pretrained-s1.choice-k10",
    ]  # fmt: skip
    assert len({job.name for job in every}) == len(every)


def test_patterns_are_chosen_after_the_steps_that_a_run_is_about():
    names = {job.name for job in plan.jobs()}
    for arm, steps in (("pretrained", (1, 5, 10)), ("onestep-pretrained", (1,)), ("fixed-pretrained", (10,))):
        run = plan.Experiment(plan.PRETRAINED[0], arm, 0)
        assert [k for k in (1, 5, 10) if f"{run}.choice-k{k}" in names] == list(steps)
        assert (f"{run}.paired" in names) == (arm != "pretrained")
    rows = {row[-1]: row for row in page.Pages({}, list(plan.jobs())).one_step().rows}
    assert rows[f"`{plan.PRETRAINED[0]}-fixed-pretrained-*`"][3:5] == ["", ""]
    assert rows[f"`{plan.PRETRAINED[0]}-pretrained-*`"][3:5] == ["not run", "not run"]


def test_all_settings_are_ones_that_the_trainer_takes():
    from lambda_maml.train import Settings

    for run in plan.experiments():
        assert Settings(**run.settings).cosine == run.iterations


def test_a_list_whose_reader_has_gone_ends_without_a_word(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command(tmp_path, "--list"), env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_times_are_taken_while_nothing_else_runs(tmp_path):
    given = experiments.parse(arguments(tmp_path, "--jobs", "2"))
    runner = experiments.Runner(list(plan.jobs()), set(), given)
    job = runner.next()
    assert job.kind == "times"
    runner.waiting.remove(job)
    runner.running[job.name] = job, None, 0.0
    assert runner.next() is None
    runner.running.clear()
    trained = next(job for job in runner.waiting if job.kind == "training")
    runner.running[trained.name] = trained, None, 0.0
    assert runner.next() is None  # the next one is to run alone
    runner.waiting = [job for job in runner.waiting if not job.alone]
    assert runner.next().kind == "training"


def test_a_job_that_fails_is_said_and_the_rest_goes_on(copied, capsys):
    for name in ("accuracy", "choice-k1"):
        (copied / "results" / f"glyphs-1shot-maml-s0.{name}.json").unlink()
    changed(copied / "results" / f"{TRAINING}.json", lambda found: found["images"].update(val="other images"))
    assert experiments.main(arguments(copied)) == 1
    said = capsys.readouterr().out
    assert "failed (status 2): glyphs-1shot-maml-s0.choice-k1: experiments: error: the val images" in said
    assert "done in" in said and (copied / "results" / "glyphs-1shot-maml-s0.accuracy.json").is_file()


def test_the_page_shows_figures_and_what_has_not_run(done, copied, tmp_path, capsys):
    out = tmp_path / "page.md"
    assert experiments.main(arguments(done, "--page", str(out))) == 0
    whole = out.read_text()
    assert "not a measurement" in whole and "not run" not in whole.split("## What has run")[1]
    found = json.loads((done / "results" / "glyphs-1shot-maml-s0.accuracy.json").read_text())
    row = next(row for row in found["rows"] if row["steps"] == 2 and row["pattern"] == "11111")
    assert f"{100 * row['accuracy']:.2f} ± {100 * row['ci95']:.2f}" in whole
    choices = whole.split("## The choice")[1].splitlines()
    *told, _, _, only = next(line for line in choices if "| glyphs, 1-shot | 2 | 1 |" in line).split(" | ")
    (copied / "results" / "glyphs-1shot.times-follow.json").unlink()  # without times a choice has no speed
    assert experiments.main(arguments(copied, "--page", str(out))) == 0
    assert " | ".join([*told, "not run", "not run", only]) in out.read_text()
    shutil.copy(done / "results" / "glyphs-1shot.times-follow.json", copied / "results")
    for name in ("accuracy", "choice-k2"):
        (copied / "results" / f"glyphs-1shot-maml-s0.{name}.json").unlink()
    changed(copied / "results" / "glyphs-1shot.memory.json", lambda found: found["plan"].update(shots=7))
    assert experiments.main(arguments(copied, "--page", str(out))) == 0
    less = out.read_text()
    assert "3 of 6 results are there" in less and "| not run | yes | not run |" in less
    assert "Not run: `glyphs-1shot-maml-*`." in less.split("## The choice")[0]
    assert "| glyphs, 1-shot | 1 | 1 |" in less.split("## The choice")[1]
    assert f"{100 * row['accuracy']:.2f} ± " not in less
    (copied / "results" / "other.json").write_text("{}")
    assert experiments.main(arguments(copied, "--page", str(out))) == 2
    assert "is no result of an experiment" in capsys.readouterr().err


def test_the_page_of_the_repository_is_that_of_its_results():
    found = page.markdown(page.read(ROOT / "results"), list(plan.jobs()))
    assert (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8") == found


def test_the_choices_of_the_repository_are_by_its_times():
    every = page.read(ROOT / "results")
    for name, found in every.items():
        if found["kind"] == "choice":
            clock = every[found["timings"].removesuffix(".json")]
            for drop, bits in found["chosen"].items():
                assert drop == "best" or bits == chosen_by(clock, found, float(drop)), (name, drop)


def test_the_checkpoints_beside_the_results_are_those_of_the_results_and_small():
    kept = {path.stem: path for path in (ROOT / "results").glob("*.safetensors")}
    assert kept.keys() == plan.SHIPPED - {"glyphs-1shot-maml-s0"}
    assert sum(path.stat().st_size for path in kept.values()) < 2_000_000
    for name, path in kept.items():
        result = json.loads((ROOT / "results" / f"{name}.training.json").read_text(encoding="utf-8"))
        assert hashlib.sha256(path.read_bytes()).hexdigest() == result["checkpoint_sha256"], name


def scores(name: str, *rows: tuple[str, float], **more: object) -> dict[str, dict[str, object]]:
    """A result whose patterns have these accuracies and drops, in percent; image by image all of it is 0."""
    found = [
        {"pattern": bits, "steps": 10, "statistics": "batch", "accuracy": accuracy / 100, "ci95": 0.003,
         "drop": 0.0007, "drop_ci95": 0.001}
        for bits, accuracy in rows
    ]  # fmt: skip
    zero = {"statistics": "support", "accuracy": 0.0, "ci95": 0.0, "drop": 0.0, "drop_ci95": 0.0}
    return {name: {"kind": "", "rows": [*({**row, **zero} for row in found), *found], **more}}


CHOSEN = {"chosen": {"0.01": "00011"}, "plan": {"steps": 10}, "timings": "times.json"}
CLOCK = {
    "kind": "times", "machine": {"processor": "any"}, "benchmarks": [
        {"extra_info": {"steps": 10, "kind": kind, "pattern": bits}, "stats": {"median": seconds}}
        for kind, bits, seconds in (("adapt", "00011", 0.002), ("stock_full", "11111", 0.08))
    ],
}  # fmt: skip


def test_a_choice_is_set_beside_plain_maml_of_its_own_seed():
    case = plan.CORE[2]
    found = {
        **scores(f"{case}-maml-s0.accuracy", ("11111", 70)),
        **scores(f"{case}-fixed-s0.choice-k10", ("11111", 60), ("00011", 71), **CHOSEN),
        **scores(f"{case}-fixed-s1.choice-k10", ("00011", 60), **CHOSEN),  # whose plain MAML has not run
    }
    pages = page.Pages(found, list(plan.jobs()))
    below = pages.below(case, "fixed", 10, "0.01")
    assert [(round(one.value, 6), round(one.ci95, 6)) for one in below] == [(-0.01, round(0.003 * 2**0.5, 6))]
    assert pages.lost(case, "fixed", 10, "0.01", True) == "-1.00 (-1.00 ± 0.42); goal, nothing lost: reached"
    found |= scores(f"{case}-maml-s1.accuracy", ("11111", 60.5))  # 0.5 ± 0.42 points above
    said = pages.lost(case, "fixed", 10, "0.01", True)
    assert said == "-0.25 (-1.00 ± 0.42, 0.50 ± 0.42); goal, nothing lost: not reached"


def test_one_step_is_set_beside_maml_of_its_own_network():
    case, best = plan.PRETRAINED_ONE_STEP[0], {**CHOSEN, "chosen": {"best": "00001"}}
    after = [{"pattern": "11111", "statistics": "batch", "ci95": 0.003}] * 2
    rows = [{**row, "steps": k, "accuracy": share} for row, k, share in zip(after, (1, 5), (0.69, 0.735))]
    found = {
        **scores(f"{case}-onestep-pretrained-s0.choice-k1", ("11111", 60), ("00001", 72), **best),
        f"{case}-pretrained-s0.accuracy": {"kind": "", "rows": rows},
    }
    pages = page.Pages(found, list(plan.jobs()))
    said = [pages.gained(case, "onestep-pretrained", 1, steps) for steps in (1, 5)]
    assert said == ["3.00 (3.00 ± 0.42); goal 2: reached", "-1.50 (-1.50 ± 0.42); goal -1: not reached"]


def test_runs_that_share_a_pretraining_have_its_settings():
    every = {job.name: job for job in plan.jobs()}
    started = [job for job in every.values() if job.kind == "training" and "pretraining" in job.plan]
    ways = {(case.dataset, str(case.pretraining)) for case in plan.PRETRAINED}
    assert len({need for job in started for need in job.needs}) == len(plan.SEEDS) * len(ways)
    for job in started:
        (need,) = job.needs
        assert (
            every[need].plan["settings"] == job.plan["pretraining"] and every[need].plan["width"] == job.plan["width"]
        )


WAYS = {
    "ways": 6, "shots": 1, "query": 2, "pattern": "00001", "zero_head": True, "meta_batch": 2, "val_tasks": 2,
    "val_every": 2, "cosine": 4, "iterations": 4, "ridge_head": {"lam": 1.0, "learned": True, "scale": 10.0},
}  # fmt: skip


@pytest.mark.parametrize("settings", [{"epochs": 1, "batch": 128}, WAYS], ids=["supervised", "many ways"])
def test_a_training_begins_with_its_pretraining(tmp_path: Path, settings: dict[str, Any]):
    case = dataclasses.replace(plan.TINY, iterations=10, pretraining=settings)
    jobs = list(plan.jobs_of([plan.Experiment(case, "pretrained", 0)], plan.TINY_AMOUNT))
    first, then = (next(job for job in jobs if job.kind == kind) for kind in ("pretraining", "training"))
    assert then.needs == (first.name,)
    with pytest.raises(FileNotFoundError, match=f"{first.experiment.pretraining}.pretraining"):
        doing.do(then, place(tmp_path), "")
    for job in (first, then, first):  # once more: it goes on from its own state, to the same end
        doing.do(job, place(tmp_path), experiments.command_of(job))
    about = {name: json.loads((tmp_path / "results" / f"{name}.json").read_text()) for name in (first.name, then.name)}
    assert about[first.name]["plan"]["settings"] == {**settings, "seed": 0}
    start = tmp_path / "runs" / f"{first.experiment.pretraining}.pretraining"
    checkpoint = start / f"{'best' if 'iterations' in settings else 'pretrained'}.safetensors"
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() == about[first.name]["checkpoint_sha256"]
    best = json.loads((tmp_path / "runs" / str(then.experiment) / "best.json").read_text())
    weights, _ = doing.checkpoint.read_weights(checkpoint)
    assert best["start"]["sha256"] == doing.checkpoint.digest(weights, "")
    told = "".join(page.Pages(about, jobs).state())
    assert ("4 iterations in" if "iterations" in settings else "1 epochs in") in told


def test_what_is_chosen_after_pretraining_is_paired_with_the_full_pattern_of_maml(tmp_path: Path):
    case = dataclasses.replace(plan.TINY, iterations=4, pretraining={"epochs": 1, "batch": 128})
    runs = [plan.Experiment(case, arm, 0) for arm in ("pretrained", "fixed-pretrained")]
    jobs = {job.name: job for job in plan.jobs_of(runs, plan.TINY_AMOUNT)}
    last = jobs[f"{runs[1]}.paired"]
    assert last.needs == (f"{runs[1]}.training", f"{runs[1]}.choice-k2", f"{runs[0]}.training")
    for name, job in jobs.items():
        if job.kind in ("pretraining", "training") or name in (f"{case}.times-follow", *last.needs, last.name):
            doing.do(job, place(tmp_path), experiments.command_of(job))
    found = page.read(tmp_path / "results")
    (row,), bits = found[last.name]["rows"], found[last.name]["chosen"]
    own, full = (doing.trained(run, place(tmp_path)) for run in (runs[1], runs[0]))
    tasks = own.tasks(doing.images(last, place(tmp_path), "test"), "test", 4, plan.TEST_SEED)
    mine, theirs = (
        doing.evaluate(one.model, tasks, pattern=p, **one.inner(2)).scores for one, p in ((own, bits), (full, "11111"))
    )
    assert bits == found[f"{runs[1]}.choice-k2"]["chosen"]["0.01"] and row["steps"] == 2
    assert (row["drop"], row["drop_ci95"]) == pytest.approx(doing.mean_ci95(theirs - mine))
    assert found[last.name]["beside"]["checkpoint_sha256"] == full.about["checkpoint_sha256"]
    (below,) = page.Pages(found, list(jobs.values())).below(case, "fixed-pretrained", 2, "0.01")
    assert below == (row["drop"], row["drop_ci95"])


def test_the_front_page_has_a_choice_of_each_set_beside_its_full_pattern():
    case, other = plan.CORE[0], plan.CORE[2]
    plain = scores(f"{other}-maml-s0.choice-k10", ("11111", 98), ("00011", 97), **CHOSEN)
    fixed = scores(f"{other}-fixed-s0.choice-k10", ("11111", 60), ("00011", 99), **CHOSEN)
    own = scores(f"{case}-maml-s0.choice-k10", ("11111", 70), ("00011", 69), **CHOSEN)
    found = {"times": CLOCK, **own, **plain, **fixed}
    name = "CIFAR-FS, 5-shot, chosen at 1 point: `00011`"
    first = [
        (f"{name}: adaptation", "2.00 ms", "80.0 ms, `11111`", "40.0x"),
        (f"{name}: accuracy", "69.00%", "70.00%, `11111`", "cost 0.07 ± 0.10 points"),
    ]  # fmt: skip
    # Without plain MAML's accuracy there is nothing that a choice with the pattern in meta-training is set beside.
    rows = list(front_page.on_images(found))
    assert rows[:2] == first and [row[1:3] for row in rows[3:]] == [("97.00%", "98.00%, `11111`")]
    found |= scores(f"{other}-maml-s0.accuracy", ("11111", 98))
    rows = list(front_page.on_images(found))
    assert rows[:2] == first and [row[1:] for row in rows[3:]] == [
        ("99.00%", "98.00%, `11111`", "cost -1.00 ± 0.42 points")
    ]
    pretrained = plan.PRETRAINED[0]
    found |= scores(f"{pretrained}-pretrained-s0.choice-k10", ("11111", 75), ("00011", 74), **CHOSEN)
    assert [row[1:3] for row in front_page.on_images(found)][1] == ("74.00%", "75.00%, `11111`")
