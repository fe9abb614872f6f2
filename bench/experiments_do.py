"""What is done for each kind of result, in a process of its own: training, times, memory, accuracies, the choice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import memory
import peers
import torch
from bench_peers import machine
from by_hand import LR, NORM
from experiments_plan import FIXED, FULL, SHIPPED, Experiment, Job
from harness import Configuration, Gate, PlainLoop, Problem, Skip, reason
from torch import Tensor, nn

from lambda_maml import Pattern, adapt, checkpoint, data, models
from lambda_maml.adapt import STATISTICS
from lambda_maml.choice import tied
from lambda_maml.data import ImageSet, Task
from lambda_maml.evaluate import Evaluation, evaluate, evaluate_both
from lambda_maml.files import atomic, read_json, write_json, written
from lambda_maml.learned_rates import fixed_rates, learned_rule, load_rates
from lambda_maml.methods import ridge_head
from lambda_maml.parts import Parts
from lambda_maml.pretrain import PRETRAINED, Pretraining, pretrain
from lambda_maml.pretrain import STATE as PRETRAINING_STATE
from lambda_maml.run_state import BEST, LAST
from lambda_maml.select import select_pattern
from lambda_maml.selection import Selection
from lambda_maml.settings import Settings
from lambda_maml.stats import mean_ci95
from lambda_maml.stopping import SIGNALS
from lambda_maml.timing import STOCK, Timing, interleave, timing_info
from lambda_maml.train import train

GATE_RATE = 0.01  # at which results are compared before times are taken
TIMED = 2000  # rounds at most


class Stopped(Exception):
    """A signal ended the training; its state is saved."""


class Place(NamedTuple):
    """Where the images lie, and where checkpoints and results go."""

    data: Path | None
    runs: Path
    results: Path

    def result(self, name: str) -> Path:
        return self.results / f"{name}.json"

    def folder(self, experiment: Experiment) -> Path:
        return self.runs / str(experiment)

    def pretraining(self, experiment: Experiment) -> Path:
        return self.runs / f"{experiment.pretraining}.pretraining"

    def checkpoint(self, experiment: Experiment) -> Path:
        """Where a run's best checkpoint is kept beside its results."""
        return self.results / f"{experiment}.safetensors"


def do(job: Job, place: Place, command: str) -> None:
    """Make the result of a job and write it. Raises Stopped, ValueError and OSError."""
    begun, load = time.perf_counter(), os.getloadavg()[0]
    about = {
        "schema": 1, "name": job.name, "kind": job.kind, "plan": job.plan, "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": {**machine(), "load": load},
    }  # fmt: skip
    makers: Mapping[str, Callable[[Job, Place], dict[str, Any]]] = {
        "pretraining": pretraining, "training": training, "times": times, "memory": peaks, "accuracy": accuracy,
        "choice": choice, "paired": paired,
    }  # fmt: skip
    made = makers[job.kind](job, place)
    write_json(place.result(job.name), {**about, "seconds": round(time.perf_counter() - begun, 1), **made})


def images(job: Job, place: Place, split: str) -> ImageSet:
    dataset = job.experiment.case.dataset
    return data.load(dataset, None if dataset in BUILT_IN else place.data, split)


BUILT_IN = ("glyphs",)


def network(experiment: Experiment, some: ImageSet, ways: int | None = None) -> nn.Module:
    """The run's network, for tasks of its own ways by default, with the weights that training begins at."""
    torch.manual_seed(experiment.seed)
    channels, _, side = some.image_shape
    return models.conv4(ways or experiment.settings["ways"], channels, experiment.case.width, side)


def pretraining(job: Job, place: Place) -> dict[str, Any]:
    """Begin the pretraining, or go on with it; what it came to."""
    if "iterations" in job.plan["settings"]:
        return in_many_ways(job, place)
    some, out = images(job, place, "train"), place.pretraining(job.experiment)
    found = pretrain(
        network(job.experiment, some), some, out=out, settings=Pretraining(**job.plan["settings"]), overwrite=True,
        resume=(out / PRETRAINING_STATE).is_file(),
    )  # fmt: skip
    if found.stopped in SIGNALS.values():
        raise Stopped(f"{found.stopped} after epoch {len(found.history)}, saved")
    return {
        "images": {"train": some.fingerprint()},
        "checkpoint_sha256": sha256(out / PRETRAINED),
        "training_seconds": found.history[-1].seconds,
        "history": found.history,
    }


def in_many_ways(job: Job, place: Place) -> dict[str, Any]:
    """The same of a pretraining that is a meta-training itself, in tasks of more classes, of features for ridge
    regression."""
    run, settings = job.experiment, dict(job.plan["settings"])
    sets = {split: images(job, place, split) for split in ("train", "val")}
    iterations, parts = settings.pop("iterations"), Parts(solver=ridge_head(**settings.pop("ridge_head")))
    model = network(run, sets["train"], settings["ways"])
    return meta_trained(model, sets, place.pretraining(run), Settings(**settings), iterations, parts=parts)


def training(job: Job, place: Place) -> dict[str, Any]:
    """Begin the run, or go on with it; what it came to."""
    run = job.experiment
    sets = {split: images(job, place, split) for split in ("train", "val", "test")}
    name = BEST if "iterations" in run.case.pretraining else PRETRAINED
    start = place.pretraining(run) / name if run.pretraining else None
    out = place.folder(run)
    made = meta_trained(network(run, sets["train"]), sets, out, Settings(**run.settings), run.iterations, start=start)
    if str(run) in SHIPPED:
        kept = place.checkpoint(run)
        with written(kept), atomic(kept) as part:
            part.write_bytes((out / BEST).read_bytes())
    return made


def meta_trained(
    model: nn.Module, sets: Mapping[str, ImageSet], out: Path, settings: Settings, iterations: int, **more: Any
) -> dict[str, Any]:
    """Begin a meta-training, or go on with it; what it came to."""
    found = train(
        model, sets["train"], sets["val"], out=out, settings=settings, iterations=iterations,
        resume=(out / LAST).is_file(), log_every=max(1, iterations // 200), **more,
    )  # fmt: skip
    if found.stopped in SIGNALS.values():
        raise Stopped(f"{found.stopped} at iteration {found.iteration}, saved")
    assert found.best is not None
    return {
        "images": {split: images.fingerprint() for split, images in sets.items()},
        "checkpoint_sha256": sha256(out / BEST),
        "iterations": found.iteration,
        "best": found.best._asdict(),
        "training_seconds": found.history[-1].seconds,
        "history": [[line.iteration, line.accuracy, line.ci95, line.train_loss] for line in found.history],
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Trained(NamedTuple):
    """A run's best checkpoint, read back."""

    model: nn.Module
    meta: dict[str, Any]
    path: Path
    about: dict[str, Any]  # for the result file
    images: dict[str, str]  # fingerprints of the run's sets

    def inner(self, steps: int) -> dict[str, Any]:
        """Steps, rates and norm of an adaptation."""
        learned = load_rates(self.path, self.model, self.meta, steps)
        settings = self.meta["settings"]
        return {"steps": steps, "lr": settings["lr"] if learned is None else learned, "norm": settings["norm"]}

    def tasks(self, found: ImageSet, split: str, count: int, seed: int) -> list[Task]:
        """Tasks of a split. ValueError for other images than those of training."""
        if found.fingerprint() != self.images[split]:
            raise ValueError(
                f"the {split} images of {found.name} are {found.fingerprint()}, beside training they were "
                f"{self.images[split]}: give the same DATA, or other folders of runs and results"
            )
        episode = {key: self.meta["settings"][key] for key in ("ways", "shots", "query")}
        return data.sample_tasks(found, count, seed=seed, **episode)


def trained(run: Experiment, place: Place) -> Trained:
    """ValueError where the checkpoint is gone, or another one than the one that the run's result is of."""
    path, result = place.folder(run) / BEST, read_json(place.result(f"{run}.training"))
    if not path.is_file():
        path = place.checkpoint(run)
    if not path.is_file():
        raise ValueError(
            f"{path}: the checkpoint of {place.result(f'{run}.training')} is not there: give the folder that holds it "
            "(--runs), or another folder of results to train anew (--results)"
        )
    if (found := sha256(path)) != result["checkpoint_sha256"]:
        raise ValueError(
            f"{path}: its SHA-256 is {found[:12]}..., that of {place.result(f'{run}.training')} is "
            f"{result['checkpoint_sha256'][:12]}...: they are of different runs; give other folders"
        )
    model, meta = checkpoint.load(path)
    about = {"checkpoint_sha256": found, "iteration": meta["metrics"]["iteration"]}
    return Trained(model, meta, path, about, result["images"])


class Compared(NamedTuple):
    """One pattern on the test tasks, beside the full one."""

    pattern: str
    statistics: str
    own: Evaluation
    full: Evaluation

    def row(self) -> dict[str, Any]:
        """The drop is how much lower the pattern's accuracy is, the mean of paired differences and its 95% interval."""
        row = {
            "pattern": self.pattern, "statistics": self.statistics, "accuracy": self.own.mean, "ci95": self.own.ci95
        }  # fmt: skip
        if self.pattern == FULL:
            return {**row, "drop": 0.0, "drop_ci95": 0.0}
        drop, ci95 = mean_ci95(self.full.scores - self.own.scores)
        return {**row, "drop": drop, "drop_ci95": ci95}


def compared(model: nn.Module, tasks: list[Task], patterns: list[str], inner: Mapping[str, Any]) -> list[Compared]:
    """All patterns by both protocols, each adapted to the tasks once."""
    found = {p: evaluate_both(model, tasks, pattern=p, **inner) for p in dict.fromkeys([FULL, *patterns])}
    return [Compared(p, kind, own[kind], found[FULL][kind]) for kind in STATISTICS for p, own in found.items()]


def accuracy(job: Job, place: Place) -> dict[str, Any]:
    """Well-known patterns after each number of steps, on test tasks."""
    found, plan = trained(job.experiment, place), job.plan
    tasks = found.tasks(images(job, place, "test"), "test", plan["test_tasks"], plan["test_seed"])
    rows = [
        {"steps": steps, **one.row()}
        for steps in plan["steps"]
        for one in compared(found.model, tasks, plan["patterns"], found.inner(steps))
    ]
    return {**found.about, "rows": rows}


def choice(job: Job, place: Place) -> dict[str, Any]:
    """All patterns on validation tasks, what is chosen at each allowed drop, and these on test tasks."""
    found, plan, folder = trained(job.experiment, place), job.plan, place.folder(job.experiment)
    val = found.tasks(images(job, place, "val"), "val", plan["val_tasks"], plan["select_seed"])
    test = found.tasks(images(job, place, "test"), "test", plan["test_tasks"], plan["test_seed"])
    inner, clock = found.inner(plan["steps"]), place.result(f"{job.experiment.case}.{job.experiment.clock}")
    chosen = select_pattern(
        found.model, val, **inner, max_drop=plan["drops"][0], search=plan.get("search", "all"), timings=clock,
        resume=folder / f"choice-k{plan['steps']}.evaluated.json",
    )  # fmt: skip
    named = {f"{drop:g}": admitted(chosen, drop) for drop in plan["drops"]}
    judged = [row for row in chosen.table if row.tasks == len(val)]  # not those that a race ruled out
    named["best"] = str(max(judged, key=lambda row: row.score).pattern)
    tested = compared(found.model, test, list(named.values()), inner)
    dataclasses.replace(chosen, test=on_test(tested, len(test), str(chosen.pattern))).save(
        folder / f"pattern-k{plan['steps']}.json"
    )
    return {
        **found.about,
        "timings": clock.name,
        "warnings": chosen.warnings,
        "chosen": named,
        "rows": [one.row() for one in tested],
        "candidates": [row.to_dict() for row in chosen.table],
    }


def paired(job: Job, place: Place) -> dict[str, Any]:
    """What was chosen, beside the full pattern of MAML's checkpoint on the same test tasks, query images together."""
    own, other, plan = trained(job.experiment, place), trained(job.experiment.beside, place), job.plan
    tasks = own.tasks(images(job, place, "test"), "test", plan["test_tasks"], plan["test_seed"])
    bits = read_json(place.result(f"{job.experiment}.choice-k{plan['steps']}"))["chosen"][plan["which"]]
    mine = evaluate(own.model, tasks, pattern=bits, **own.inner(plan["steps"]))
    rows = []
    for steps in plan["others_steps"]:
        full = evaluate(other.model, tasks, pattern=FULL, **other.inner(steps))
        drop, ci95 = mean_ci95(full.scores - mine.scores)
        rows.append({"steps": steps, "accuracy": full.mean, "ci95": full.ci95, "drop": drop, "drop_ci95": ci95})
    about = {"chosen": bits, "accuracy": mine.mean, "ci95": mine.ci95}
    return {**own.about, **about, "beside": {"run": str(job.experiment.beside), **other.about}, "rows": rows}


def admitted(chosen: Selection, drop: float) -> str:
    """What `select_pattern` would choose at another allowed drop: of the rows whose bound is within it, the fastest
    one, or the most accurate of those that tie with it in time."""
    if drop == chosen.settings["max_drop"]:
        return str(chosen.pattern)
    full = chosen.full_pattern
    rows = {r.pattern: r for r in chosen.table if r.pattern == full or r.drop_bound <= drop + 1e-12}
    times = {pattern: row.time or row.time_ms for pattern, row in rows.items()}
    return str(max(tied(list(rows), times), key=lambda pattern: rows[pattern].score))


def on_test(tested: list[Compared], tasks: int, pattern: str) -> dict[str, Any]:
    """The form that pattern.json has for it."""
    rows = {one.statistics: one for one in tested if one.pattern == pattern}
    parts = {
        statistics: {
            "full_accuracy": one.full.mean, "chosen_accuracy": one.own.mean,
            **{key: one.row()[key] for key in ("drop", "drop_ci95")},
        }
        for statistics, one in rows.items()
    }  # fmt: skip
    return {"tasks": tasks, **parts["batch"], "support": parts["support"]}


def times(job: Job, place: Place) -> dict[str, Any]:
    """Adaptation times of all patterns, of plain PyTorch and of learn2learn, interleaved, in pytest-benchmark's form,
    as `select_pattern(timings=...)` reads it. Weights are those before training, on which no time depends."""
    run, plan, some = job.experiment, job.plan, images(job, place, "val")
    settings, model = Settings(**run.settings), network(run, some)
    (task,) = data.sample_tasks(some, 1, ways=settings.ways, shots=settings.shots, query=1, seed=0)
    problem = Problem(model, task.xs, task.ys)
    skipped: dict[str, str] = {}
    benchmarks = []
    for steps in plan["steps"]:
        made = contenders(problem, steps, settings.norm, skipped)
        lr = settings.lr if settings.learn_lr is None else fixed_rates(
            learned_rule(model, settings), settings.learn_lr, steps
        )  # fmt: skip
        runs: dict[str, Callable[[], object]] = {
            str(p): adaptation(problem, p, {"steps": steps, "lr": lr, "norm": settings.norm}) for p in Pattern.all(5)
        }
        runs |= {name: one.__call__ for name, one in made.items()}
        taken = interleave(runs, repeats=TIMED, seconds=plan["seconds"], before=functools.partial(reset, made))
        for name, timing in taken.items():
            about = timing_info(
                model, task.xs, pattern=FULL if name in made else name, shots=settings.shots, steps=steps,
                norm=settings.norm, stock=name == STOCK,
            )  # fmt: skip
            if name in made and name != STOCK:
                about["kind"] = name
            benchmarks.append({"name": f"{name}-k{steps}", "extra_info": about, "stats": seconds(timing)})
    return {"benchmarks": benchmarks, "skipped": skipped}


def adaptation(problem: Problem, pattern: Pattern, inner: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: adapt(*problem, pattern=pattern, **inner)


def reset(made: Mapping[str, peers.Contender], name: str) -> None:
    if name in made:
        made[name].reset()


def seconds(timing: Timing) -> dict[str, float]:
    return {key: value / 1e3 for key, value in timing._asdict().items()}


def contenders(problem: Problem, steps: int, norm: str, skipped: dict[str, str]) -> dict[str, peers.Contender]:
    """Plain PyTorch and learn2learn under the full pattern, once their results and ours are those of the plain loop in
    float64; fills `skipped` with why one of them is not there."""
    full = Pattern(FULL)
    for bits in (FULL, FIXED, "00001"):
        pattern = Pattern(bits)

        def ours(given: Problem, pattern: Pattern = pattern) -> list[Tensor]:
            learner = adapt(*given, pattern=pattern, steps=steps, lr=GATE_RATE, norm=norm)
            return [t.detach() for t in learner.parameters_dict().values()]

        Gate(problem, pattern, steps, GATE_RATE, norm)(ours, "ours")
    made: dict[str, peers.Contender] = {STOCK: PlainLoop(problem, full, steps, GATE_RATE, norm)}
    try:
        if norm != "follow":
            raise Skip("adapts all norm weights")
        make = peers.PACKAGES["learn2learn"]
        gate = Gate(problem, full, steps, LR, NORM)
        gate(lambda given: make(given, full, steps).result(), "learn2learn")
        made["learn2learn"] = make(problem, full, steps)
    except Exception as error:  # what others' code cannot do is a note
        skipped["learn2learn"] = reason(error)
    return made


def peaks(job: Job, place: Place) -> dict[str, Any]:
    """MiB of one adaptation above parameters and inputs, of ours, plain PyTorch and learn2learn."""
    case, found, skipped = job.experiment.case, [], dict[str, str]()
    channels, _, side = images(job, place, "val").image_shape
    for steps in job.plan["steps"]:
        c = Configuration(side, channels, case.width, job.experiment.settings["ways"], case.shots, steps)
        for bits, stock in ((FULL, "stock_full"), (FIXED, "stock_masked")):
            for contender in ("ours", stock, "learn2learn"):
                try:
                    peak = memory.peak(c, bits, contender, threads=1)
                except Skip as error:
                    if contender != "learn2learn":
                        raise
                    skipped[contender] = reason(error)
                else:
                    row = {"steps": steps, "pattern": bits, "contender": contender}
                    found.append({**row, "first_mib": peak.first, "later_mib": peak.later})
    return {"rows": found, "skipped": skipped}


if __name__ == "__main__":
    sys.exit("this is a part of bench/experiments.py")
