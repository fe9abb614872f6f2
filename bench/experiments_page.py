"""docs/experiments.md from the files of results: `python bench/experiments.py --page docs/experiments.md`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments_plan import ANIL, ARMS, BOIL, FIXED, FULL, Case, Job
from gpu_report import cell, digits, met, write
from report_tables import Table

__all__ = ["markdown", "read", "read_one", "write"]

Row = Mapping[str, Any]
Results = Mapping[str, Row]
PUBLISHED = {
    ("omniglot", 1): "98.7 ± 0.4 (Finn et al. 2017)",
    ("omniglot", 5): "99.9 ± 0.1 (Finn et al. 2017)",
    ("cifar_fs", 1): "58.9 ± 1.9 (Bertinetto et al. 2019)",
    ("cifar_fs", 5): "71.5 ± 1.0 (Bertinetto et al. 2019)",
    ("mini_imagenet", 1): "48.70 ± 1.84 (Finn et al. 2017)",
    ("mini_imagenet", 5): "63.11 ± 0.92 (Finn et al. 2017)",
}
GOALS = {("omniglot", 1): 98.0, ("omniglot", 5): 99.3, ("cifar_fs", 5): 72.5, ("cifar_fs", 1): 58.5}
SPEED_GOALS = {0.01: (50.0, 10.0), 0.005: (20.0, None)}  # over the full pattern in stock PyTorch, and in ours
ONE_STEP_GOALS = (2.0, -1.0)  # points above the full pattern after one step, and after five
DATASETS = {
    "omniglot": "Omniglot", "cifar_fs": "CIFAR-FS", "fc100": "FC100", "mini_imagenet": "mini-ImageNet",
    "glyphs": "glyphs",
}  # fmt: skip
MAIN = ("maml", "pretrained")  # arms whose patterns are those of meta-test alone, with one rate
NAMES = {FULL: f"MAML `{FULL}`", ANIL: f"ANIL `{ANIL}`", BOIL: f"BOIL `{BOIL}`"}
NONE = "not run"
SAID_OF_A_ROW = {"set", "channels", "training", "adapted", "steps", "pattern", "allowed drop", "ONLY"}  # columns
BUSY = 1.5  # processes that ran on average in the minute before; one of them is the times before these
HEAD = """# Experiments on image sets

```sh
make experiments DATA=... JOBS=2
```

trains, evaluates and times one configuration after another on the image sets that lie in `DATA`
([which files](data.md)), in so many processes of one thread each, and writes one JSON file for each run and each
evaluation to `results/`: its command, plan, seed, commit, versions, machine and figures. This page is made from these
files (`python bench/experiments.py --page docs/experiments.md`); what has none is "not run", and named under its
table. What is done is left alone and what was ended goes on, from the training's own state: start it again.

To do a row again, name its runs, and folders in which nothing lies yet:

```sh
make experiments DATA=... RESULTS=again RUNS=again ONLY='cifar_fs-5shot-maml-*'
```

The last column of each table is that `ONLY`. `bench/experiments_plan.py` holds all settings,
`python bench/experiments.py --list` says what is done.

"""
HOW = """## How it is measured

- Network: four blocks (convolution 3x3, batch norm with batch statistics, ReLU, max-pool), then a linear layer. A
  pattern has a bit for each of these five layers; `{full}` is MAML, `{anil}` ANIL, `{boil}` BOIL.
- Training is first-order MAML, but with one support image per class of CIFAR-FS and Omniglot, where the second half
  of it is second-order; with an exponential average of the weights and a cosine schedule of the meta rate. The
  checkpoint is that of the best validation accuracy. Finn et al.'s figures are of second order.
- "Pretrained", CIFAR-FS and FC100: the four blocks first learn to tell all training classes apart
  ([pretraining](training.md#pretraining)), then 3,000 iterations of first-order MAML follow. Except in CIFAR-FS,
  5-shot, classes turned by 90, 180 and 270 degrees are classes of the pretraining too, and the last layer is zero at
  the start of each task (`--zero-head`). Trained in one step, the turned classes and the zero head are in both, all is
  second-order, and 1-shot has 8,000 iterations, as with ANIL in meta-training. The published figures have no
  pretraining.
- "Pretrained", Omniglot: the pretraining is itself a meta-training, in 20-way 1-shot tasks, with ridge regression as
  the last layer ([how](training.md#other-numbers-of-classes)). First-order MAML with a zero head follows, 1,500
  iterations of 1-shot and 2,000 of 5-shot. Training images are shifted by up to 2 pixels (`--crop 2`).
- Accuracies are of 5-way tasks with 15 query images per class, in percent, on test classes. Every figure is "mean of
  the seeds (each seed ± the half width of its 95% interval over tasks)": the first interval is of tasks, what lies
  between the seeds is that of seeds. "Together": the norms' statistics are those of a task's query images, as in the
  published figures. "By itself": each image is classified alone, by the statistics of the support set.
- A drop is how many points below `{full}` of the same checkpoint and number of steps, the mean of paired differences
  over the same test tasks.
- The choice is that of `lambda_maml.select_pattern` on validation tasks, of all 31 patterns: the fastest one whose
  one-sided 95% bound of the drop is within the allowed one. Test tasks have no part in it. For fixed and sampled
  patterns, learned rates and norms that never adapt after pretraining it is a race (`lambda-maml select --search
  race`), and the best pattern is that of the ones which the race judged on all tasks.
- Adaptation time runs from support tensors to adapted parameters, on one thread, the query forward not in it: the
  median of interleaved rounds with nothing beside them. Stock is plain PyTorch's full pattern in the same rounds, and
  so is learn2learn's, where `LEARN2LEARN_SRC` names the folder of a checkout or of an unpacked release. Results are
  compared with the plain loop's in float64 first. Memory is the peak of the resident set above parameters and inputs,
  in a process of its own.

## Why figures differ

- Plain MAML and the published figures: most of ours has 32 channels and gradients of first order, and fewer images
  (below). With 64 channels CIFAR-FS, 5-shot, lies within the published interval; Omniglot stays below it, with other
  classes.
- Plain MAML and pretraining: five classes at a time stop teaching before the features are good. On Omniglot the
  training loss of 5-way tasks falls to 0.02 while the validation accuracy stays (`history` in
  `results/omniglot-1shot-maml-s0.training.json`). To tell 20 classes apart, or all of a set, teaches more.
- MAML and ANIL: plain MAML leaves to the inner steps what these can do. On Omniglot ANIL is then far below it; on
  CIFAR-FS it is so with 32 channels and five support images alone. After pretraining the features were made for a
  linear layer, and ANIL loses little on all sets.
- BOIL keeps the last layer as training left it. Where that is zero (`--zero-head`), all classes are one; where it was
  meta-learned, it was learned to be changed.
- One step from a zero head: each class's weights are then the sum of its support images' features, less that of all
  images, whatever the rate, and classes with long features win images of others. More steps make up for it; training in
  one step makes features for which it is right. The others then have the rate of that one.
- Fixed and sampled patterns, learned rates and norms that never adapt, after pretraining: all rows of a set begin with
  the same features, and what is chosen lies within 0.6 points of MAML's `{full}` in all of them.
- Image by image: with one support image per class the norms' statistics are those of five images, with five of 25, and
  cost less. The query images together have 75.
- Speed-ups fall with fewer steps: what is done once, the frozen layers' pass, is shared by fewer of them.

## Where these sets differ from the published ones

CIFAR-FS and FC100 have here 400 of the 600 images of each class, and Omniglot's classes are those of the split of
Vinyals et al. with rotations in training; published figures of Omniglot are of random classes.
"""


def read(folder: Path) -> dict[str, Row]:
    """All results in a folder, by name. ValueError for one that is none."""
    return {path.stem: read_one(path) for path in sorted(folder.glob("*.json"))}


def read_one(path: Path) -> Row:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        is_one = found["schema"] == 1 and found["name"] == path.stem and isinstance(found["plan"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no result of an experiment ({error!r}): move it away") from error
    if not is_one:
        raise ValueError(f"{path}: is no result of an experiment: move it away, or name another --results")
    return dict(found)


def markdown(results: Results, jobs: Sequence[Job]) -> str:
    """The page. Results of other plans than the jobs' have no part in it."""
    names = {job.name: job for job in jobs}
    found = {
        name: one for name, one in results.items()
        if name in names and one["plan"] == json.loads(json.dumps(names[name].plan))
    }  # fmt: skip
    pages = Pages(found, jobs)
    parts = [HEAD, *(f"**{said}**\n\n" for said in pages.warnings())]
    tables = (pages.headline, pages.choices, pages.one_step, pages.arms, pages.known, pages.times, pages.memory)
    for table in (make() for make in tables):
        parts += [f"## {table.title}\n\n", f"{table.note}\n\n" if table.note else "", *with_figures(table), "\n"]
    parts += [HOW.format(full=FULL, anil=ANIL, boil=BOIL), "\n", *pages.state()]
    return "".join(parts).rstrip() + "\n"


def lines(table: Table) -> str:
    rows = [f"| {' | '.join(cells)} |" for cells in (table.head, ["---"] * len(table.head), *table.rows)]
    return "\n".join(rows) + "\n"


def with_figures(table: Table) -> Iterator[str]:
    """A table without its rows that have no figure, and what these are of."""
    empty = [row for row in table.rows if NONE in row and all(is_no_figure(*named) for named in zip(table.head, row))]
    yield lines(table._replace(rows=[row for row in table.rows if row not in empty]))
    if empty:
        yield f"\nNot run: {', '.join(dict.fromkeys(row[-1] for row in empty))}.\n"


def is_no_figure(column: str, cell: str) -> bool:
    return column in SAID_OF_A_ROW or not cell or cell.startswith(NONE)


class Figure(NamedTuple):
    """A figure of one seed and the half width of its interval, fractions."""

    value: float
    ci95: float | None


def row_of(one: Row, pattern: str, statistics: str = "batch", steps: int | None = None) -> Row:
    """The row of a pattern in a choice, or in an accuracy at so many steps."""
    wanted = {"pattern": pattern, "statistics": statistics} | ({} if steps is None else {"steps": steps})
    found: Row = next(row for row in one["rows"] if wanted.items() <= row.items())
    return found


def figure(row: Row, key: str) -> Figure:
    return Figure(row[key], row[{"accuracy": "ci95", "drop": "drop_ci95"}[key]])


def percent(seeds: Sequence[Figure]) -> str:
    """The mean of the seeds and each of them, in percent or points."""
    if not seeds:
        return NONE
    return f"{100 * mean(s.value for s in seeds):.2f} ({', '.join(map(in_points, seeds))})"


def in_points(seed: Figure) -> str:
    return f"{100 * seed.value:.2f}" + ("" if seed.ci95 is None else f" ± {100 * seed.ci95:.2f}")


def mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)


def said_of(case: Case, arm: str = "") -> str:
    wide = f", {case.width} channels" if case.wide else ""
    return f"{DATASETS[case.dataset]}, {case.shots}-shot{wide}" + (", pretrained" if arm == "pretrained" else "")


class Pages:
    """The tables of some results."""

    def __init__(self, results: Results, jobs: Sequence[Job]) -> None:
        self.results, self.jobs = results, jobs
        self.runs = list(dict.fromkeys(job.experiment for job in jobs if job.kind == "training"))
        self.pairs = list(dict.fromkeys((run.case, run.arm) for run in self.runs))
        self.main = [(case, arm) for case, arm in self.pairs if arm in MAIN]
        self.steps: list[int] = sorted({job.steps for job in jobs if job.kind == "choice"})
        self.drops: list[float] = next(job.plan["drops"] for job in jobs if job.kind == "choice")
        self.is_tiny = any(run.case.dataset == "glyphs" for run in self.runs)

    def warnings(self) -> Iterator[str]:
        if self.is_tiny:
            yield "Tiny shapes: not a measurement."
        busy = [n for n, r in self.results.items() if r["kind"] == "times" and r["machine"]["load"] > BUSY]
        if busy:
            yield f"Other work was going on when these times were taken: {', '.join(busy)}."

    def of(self, case: Case, arm: str, kind: str) -> list[Row]:
        """A kind of result of all seeds that have it."""
        names = [f"{run}.{kind}" for run in self.runs if (run.case, run.arm) == (case, arm)]
        return [self.results[name] for name in names if name in self.results]

    def tested(self, case: Case, arm: str, pattern: str, steps: int, statistics: str, key: str) -> list[Figure]:
        """A figure of a well-known pattern on test tasks, for each seed."""
        return [figure(row_of(one, pattern, statistics, steps), key) for one in self.of(case, arm, "accuracy")]

    def chosen(self, case: Case, arm: str, steps: int, which: str, statistics: str, key: str) -> list[Figure]:
        """The same of what was chosen."""
        every = self.of(case, arm, f"choice-k{steps}")
        return [figure(row_of(one, one["chosen"][which], statistics), key) for one in every]

    def below(self, case: Case, arm: str, steps: int, which: str, others_steps: int | None = None) -> list[Figure]:
        """How far what was chosen lies below the full pattern of MAML, by default after as many steps, seed by seed.
        Where both were not evaluated in pairs, their intervals are taken together as those of different tasks are,
        which is wider than that of paired differences."""
        found, theirs_after = [], others_steps or steps
        for run in (run for run in self.runs if (run.case, run.arm) == (case, arm)):
            pairs = self.results.get(f"{run}.paired")
            if pairs is not None and (pairs["plan"]["steps"], pairs["plan"]["which"]) == (steps, which):
                found.append(figure(next(row for row in pairs["rows"] if row["steps"] == theirs_after), "drop"))
                continue
            own, plain = (self.results.get(name) for name in (f"{run}.choice-k{steps}", f"{run.beside}.accuracy"))
            if own is not None and plain is not None:
                mine, theirs = row_of(own, own["chosen"][which]), row_of(plain, FULL, steps=theirs_after)
                found.append(Figure(theirs["accuracy"] - mine["accuracy"], math.hypot(theirs["ci95"], mine["ci95"])))
        return found

    def bits(self, case: Case, arm: str, steps: int, which: str) -> str:
        each = [f"`{one['chosen'][which]}`" for one in self.of(case, arm, f"choice-k{steps}")]
        return ", ".join(each) or NONE

    def ratios(self, case: Case, arm: str, steps: int, which: str) -> tuple[list[float], list[float]]:
        """How often faster each seed's choice adapts than the full pattern, in stock PyTorch and in ours."""
        stock, ours = [], []
        for one in self.of(case, arm, f"choice-k{steps}"):
            if found := medians(self.results, one):
                own = found[one["chosen"][which]]
                ours.append(found[FULL] / own)
                stock.append(found[STOCKS[FULL]] / own)
        return stock, ours

    def speed(self, ratios: Sequence[float], goal: float | None) -> str:
        if not ratios:
            return NONE
        said = ", ".join(f"{digits(ratio)}x" for ratio in ratios)
        return said if goal is None else f"{said}; goal {goal:g}x: {met(min(ratios), goal, self.is_tiny)}"

    def headline(self) -> Table:
        rows = []
        last = self.steps[-1]
        for case, arm in self.main:
            together, alone = (
                self.tested(case, arm, FULL, last, statistics, "accuracy") for statistics in ("batch", "support")
            )
            goal, said = GOALS.get((case.dataset, case.shots)), percent(together)
            if goal is not None:
                reached = met(100 * mean(s.value for s in together), goal, self.is_tiny) if together else NONE
                said += f"; goal {goal:g}: {reached}"
            published = PUBLISHED.get((case.dataset, case.shots), "")
            rows.append([said_of(case, arm), str(case.width), said, percent(alone), published, f"`{case}-{arm}-*`"])
        note = f"Test accuracy after {last} steps, norm weights and all layers adapted."
        head = ["set", "channels", "ours, together", "ours, each by itself", "published, together", "ONLY"]
        return Table(f"`{FULL}` beside the published figures", note, head, rows)

    def choices(self) -> Table:
        rows = []
        for case, arm in self.main:
            for steps in reversed(self.steps):
                for drop in self.drops:
                    which, speeds = f"{drop:g}", SPEED_GOALS.get(drop, (None, None))
                    goals = speeds if (case.dataset, case.shots) in GOALS else (None, None)
                    own = [self.chosen(case, arm, steps, which, s, "drop") for s in ("batch", "support")]
                    stock, ours = self.ratios(case, arm, steps, which)
                    rows.append([
                        said_of(case, arm), str(steps), f"{100 * drop:g}", self.bits(case, arm, steps, which),
                        *map(percent, own), self.speed(stock, goals[0]), self.speed(ours, goals[1]),
                        f"`{case}-{arm}-*`",
                    ])  # fmt: skip
        head = [
            "set", "steps", "allowed drop", "chosen, by seed", "drop, together", "drop, each by itself",
            f"faster than stock `{FULL}`", f"than ours `{FULL}`", "ONLY",
        ]  # fmt: skip
        note = "Patterns at meta-test only: checkpoints are trained with all layers. Drops on test tasks, in points."
        return Table("The choice", note, head, rows)

    def one_step(self) -> Table:
        rows = []
        low, middle = self.steps[0], self.steps[min(1, len(self.steps) - 1)]
        for case, arm in self.pairs:
            full = [self.tested(case, arm, FULL, steps, "batch", "accuracy") for steps in (low, middle)]
            best, accuracy = "", ""
            if ARMS[arm].choices != "last":
                best = self.bits(case, arm, low, "best")
                accuracy = percent(self.chosen(case, arm, low, "best", "batch", "accuracy"))
            is_one_step = ARMS[arm].choices == "first"
            gained = [self.gained(case, arm, low, steps) if is_one_step else "" for steps in (low, middle)]
            rows.append([
                said_of(case), ARMS[arm].words, percent(full[0]), best, accuracy, percent(full[1]), *gained,
                f"`{case}-{arm}-*`",
            ])  # fmt: skip
        head = [
            "set", "training", f"`{FULL}`, {low} step", "best on validation tasks", f"its accuracy, {low} step",
            f"`{FULL}`, {middle} steps", f"above MAML's `{FULL}`, {low} step", f"above MAML's `{FULL}`, {middle} steps",
            "ONLY",
        ]  # fmt: skip
        note = (
            f"Test accuracy, query images together. Above MAML's: how far the best pattern after {low} step lies above "
            f"`{FULL}` of the same network after MAML with one rate, in points; after pretraining the mean of paired "
            "differences over the same tasks, else with the interval of a difference of independent means."
        )
        return Table("One step", note, head, rows)

    def gained(self, case: Case, arm: str, low: int, steps: int) -> str:
        """How far the best pattern in few steps lies above the full one of MAML, and whether far enough."""
        above = [Figure(-one.value, one.ci95) for one in self.below(case, arm, low, "best", steps)]
        goal = ONE_STEP_GOALS[steps != low] if case.dataset == "cifar_fs" else None
        if goal is None or not above:
            return percent(above)
        reached = met(100 * mean(one.value for one in above), goal, self.is_tiny)
        return f"{percent(above)}; goal {goal:g}: {reached}"

    def arms(self) -> Table:
        rows = []
        last, which = self.steps[-1], f"{self.drops[0]:g}"
        for case, arm in self.pairs:
            if ARMS[arm].choices == "first":
                continue
            stock, _ = self.ratios(case, arm, last, which)
            is_trained = arm.startswith("fixed")  # with what is chosen
            rows.append([
                said_of(case), ARMS[arm].words, percent(self.tested(case, arm, FULL, last, "batch", "accuracy")),
                self.bits(case, arm, last, which), percent(self.chosen(case, arm, last, which, "batch", "accuracy")),
                percent(self.chosen(case, arm, last, which, "batch", "drop")),
                "" if arm == "maml" else self.lost(case, arm, last, which, is_trained),
                self.speed(stock, SPEED_GOALS[0.01][0] if is_trained else None), f"`{case}-{arm}-*`",
            ])  # fmt: skip
        head = [
            "set", "training", f"`{FULL}`", f"chosen at {100 * self.drops[0]:g} points", "its accuracy", "its drop",
            f"below `{FULL}` of MAML", f"faster than stock `{FULL}`", "ONLY",
        ]  # fmt: skip
        note = (
            f"Test accuracy after {last} steps, query images together. Stock PyTorch has one rate in all rows. A drop "
            f"is below `{FULL}` of the same checkpoint. Beside it: how far the choice lies below `{FULL}` of MAML's "
            'checkpoint, with the interval of a difference of independent means. For a row that begins with "after '
            "pretraining\" MAML's checkpoint is that after the same pretraining, and the differences are paired."
        )
        return Table("Patterns at meta-test alone and in meta-training, norms, learned rates", note, head, rows)

    def lost(self, case: Case, arm: str, steps: int, which: str, is_goal: bool) -> str:
        """How far what was chosen lies below the full pattern of MAML, and whether each seed's interval reaches 0."""
        below = self.below(case, arm, steps, which)
        if not (is_goal and below):
            return percent(below)
        reached = met(min(one.ci95 - one.value for one in below if one.ci95 is not None), 0.0, self.is_tiny)
        return f"{percent(below)}; goal, nothing lost: {reached}"

    def known(self) -> Table:
        rows = []
        for case, arm in self.main:
            for steps in self.steps:
                for pattern in (FULL, ANIL, BOIL):
                    own = [self.tested(case, arm, pattern, steps, s, "accuracy") for s in ("batch", "support")]
                    drop = percent(self.tested(case, arm, pattern, steps, "batch", "drop"))
                    rows.append([
                        said_of(case, arm), str(steps), NAMES[pattern], *map(percent, own),
                        "" if pattern == FULL else drop, f"`{case}-{arm}-*`",
                    ])  # fmt: skip
        head = ["set", "steps", "pattern", "together", "each by itself", "drop, together", "ONLY"]
        return Table("MAML, ANIL and BOIL", "Test accuracy of checkpoints trained with all layers.", head, rows)

    def times(self) -> Table:
        rows = []
        columns = (STOCKS[FULL], "learn2learn", FULL, "00111", FIXED, ANIL)
        for job in (job for job in self.jobs if job.kind == "times"):
            one = self.results.get(job.name)
            for steps in job.plan["steps"]:
                found = {} if one is None else by_name(one, steps)
                missing = "" if one is None else "not there"
                told = [ms(found[name]) if name in found else missing or NONE for name in columns]
                words = f"norm weights {job.plan['norm']}" + (", learned rates" if "learn_lr" in job.plan else "")
                rows.append([said_of(job.experiment.case), words, str(steps), *told, f"`{job.name}`"])
        head = [
            "set", "adapted", "steps", f"stock `{FULL}`", f"learn2learn `{FULL}`",
            *(f"ours `{bits}`" for bits in columns[2:]), "ONLY",
        ]  # fmt: skip
        note = "Milliseconds of one adaptation: median [quartiles]. All 31 patterns are in the files."
        skipped = {why for one in self.results.values() if one["kind"] == "times" for why in one["skipped"].values()}
        note += f" learn2learn: {'; '.join(cell(why) for why in sorted(skipped))}." if skipped else ""
        return Table("Adaptation time", note, head, rows)

    def memory(self) -> Table:
        rows = []
        for job in (job for job in self.jobs if job.kind == "memory"):
            one = self.results.get(job.name)
            for steps in job.plan["steps"]:
                found = {} if one is None else {
                    (r["pattern"], r["contender"]): r["first_mib"] for r in one["rows"] if r["steps"] == steps
                }  # fmt: skip
                keys = [(bits, who) for bits in (FULL, FIXED) for who in ("ours", STOCKS[bits], "learn2learn")]
                missing = NONE if one is None else "not there"
                told = [digits(found[key]) if key in found else missing for key in keys]
                rows.append([said_of(job.experiment.case), str(steps), *told, f"`{job.name}`"])
        head = ["set", "steps"]
        head += [f"{who} `{bits}`" for bits in (FULL, FIXED) for who in ("ours", "stock", "learn2learn")]
        return Table("Peak memory of one adaptation", "MiB, of the first call.", [*head, "ONLY"], rows)

    def state(self) -> Iterator[str]:
        """What has run and what has not, and where."""
        yield "## What has run\n\n"
        done = [job for job in self.jobs if job.name in self.results]
        yield f"{len(done)} of {len(self.jobs)} results are there.\n\n"
        machines: dict[str, list[str]] = {}  # the commits of each
        for machine in (self.results[job.name]["machine"] for job in done):
            commits = machines.setdefault(about(machine), [])
            if (commit := machine["commit"] or "unknown") not in commits:
                commits.append(commit)
        for said, commits in machines.items():
            yield f"- {said}; commits {', '.join(commits)}\n"
        yield "\n" if machines else ""
        rows = []
        for run in self.runs:
            trained = self.results.get(f"{run}.training")
            told = NONE if trained is None else (
                f"{trained['iterations']} iterations in {trained['training_seconds'] / 60:.0f} min, best at "
                f"{trained['best']['iteration']}"
            )  # fmt: skip
            if (first := self.results.get(f"{run.pretraining}.pretraining")) is not None:
                many = "iterations" in first
                much = f"{first['iterations']} iterations" if many else f"{len(first['history'])} epochs"
                told = f"{much} in {first['training_seconds'] / 60:.0f} min; {told}"
            kinds = {f"{run}.accuracy": "", **{f"{run}.choice-k{steps}": "" for steps in self.steps}}
            kinds |= {job.name: NONE for job in self.jobs if job.name in kinds}
            kinds |= {name: "yes" for name in kinds if name in self.results}
            rows.append([f"`{run}`", told, *kinds.values()])
        yield lines(Table("", "", ["ONLY", "training", "accuracy", *(f"choice, {k} steps" for k in self.steps)], rows))


STOCKS = {FULL: "stock_full", FIXED: "stock_masked"}


def by_name(one: Row, steps: int) -> dict[str, Row]:
    """The times of a file at some number of steps: by pattern, and by who else was timed."""
    found = {}
    for benchmark in one["benchmarks"]:
        extra = benchmark["extra_info"]
        if extra["steps"] == steps:
            found[extra["pattern"] if extra["kind"] == "adapt" else extra["kind"]] = benchmark["stats"]
    return found


def clock(results: Results, choice: Row) -> Row | None:
    """The result that has the times by which a choice was made; None where it is not there."""
    return results.get(choice["timings"].removesuffix(".json"))


def medians(results: Results, choice: Row) -> dict[str, float]:
    """These times after as many steps, in milliseconds: by pattern, and by who else was timed."""
    one = clock(results, choice)
    found = {} if one is None else by_name(one, choice["plan"]["steps"])
    return {name: 1e3 * stats["median"] for name, stats in found.items()}


def ms(stats: Row) -> str:
    median, q1, q3 = (digits(1e3 * stats[key]) for key in ("median", "q1", "q3"))
    return f"{median} [{q1}, {q3}]"


def about(machine: Row) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['processor']}, instruction set {machine['instruction_set']}, {machine['threads']} thread a process; "
        f"Python {machine['python']}, {packages}"
    )
