"""The fastest Lambda pattern within an allowed drop of accuracy (Khabarlak, arXiv 2206.05930)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import info
from lambda_kernels.agreement import DRAWS

from . import models, racing
from .adapt import STATISTICS
from .checkpoint import digest, tensors_of_rule
from .choice import FEW_BITS, Limit, Table, candidates_of, front
from .data.episodes import Task, as_tasks
from .evaluate import ACCURACY, Metric, check_metric, stack
from .fingerprint import fingerprint
from .goal import Goal
from .inner.checks import Loss
from .inner.rates import DEFAULT_LR, Rate, Rates
from .inner.rule import Rule, is_rule
from .memory import measure_memory
from .patterns import Pattern
from .per_task import FEWEST, Costs, Known, PerTask, fit, kinds_of
from .places import Solver
from .plain_torch import disagreement
from .progress import Progress, shown
from .ranks import ALONE, Ranks
from .remembered_scores import Scores
from .scored import Scored
from .search import counted_or_none, planned, race_among, search_deep, suffixes_and_stages
from .selection import Selection, trial_of
from .tested import alone_fault, check_disjoint, on_test, rule_on_test
from .timing import STOCK, Timing, Work, busy, measure_passes, measure_times, read_trials, stock_of
from .trial_loops import InnerLoops
from .trials import Trial, counts_of, rates_of

__all__ = ["Selection", "rates_in_json", "select_pattern"]

FEW_TASKS = 30
"""With fewer validation tasks than this a selection carries a warning."""

MANY_BITS = 12
"""A network of more layers is searched, unless it is said how."""


def select_pattern(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    steps: int | Sequence[int],
    lr: Rate = DEFAULT_LR,
    rates: Sequence[float] | None = None,
    max_drop: float | None = None,
    relative: bool = False,
    rule: str | Rule = "bound",
    decide: str | None = None,
    max_time: float | None = None,
    max_memory: float | None = None,
    search: str | None = None,
    error: float = racing.ERROR,
    norm: str = "follow",
    loss: Loss = F.cross_entropy,
    metric: Metric = ACCURACY,
    lower_is_better: bool = False,
    statistics: str = "batch",
    patterns: Iterable[Pattern | str] | None = None,
    test_tasks: Sequence[Task] | None = None,
    timings: str | Path | None = None,
    seconds: float | None = 30.0,
    progress: Progress | bool | None = None,
    plan: Callable[[str], object] | None = None,
    resume: str | Path | None = None,
    ranks: Ranks = ALONE,
    solver: Solver | None = None,
    per_task: bool = False,
) -> Selection:
    """Evaluate patterns on the same validation `tasks`, time them, and take the fastest within `max_drop`.

    >>> chosen = select_pattern(model, tasks, steps=5, lr=0.03, patterns=["00001", "00011"], seconds=0.1)
    >>> sorted(str(candidate.pattern) for candidate in chosen.table)     # chosen.pattern is one of them
    ['00001', '00011', '11111']

    After Khabarlak 2022 (arXiv 2206.05930).

    steps, lr, norm, loss: of the inner loop, as in `adapt`.
    rates: inner rates in place of `lr`. With several of them, or several `steps`, candidates are patterns with each
        number of steps and each rate; a drop is against the full pattern with the steps and rate that suit it best.
    metric, lower_is_better: what a pattern is judged by, as in `evaluate`, and whether less of it is better:
        `loss=F.mse_loss, metric=F.mse_loss, lower_is_better=True` for regression.
    statistics: which norm statistics it is judged with, "batch" (query images together) or "support", as in `adapt`.
    patterns: candidates; the full pattern is always among them. Default: all 2^n - 1, by parts of the network ("stages:
        ...") where it has more than 8 layers; see `choice.candidates_of`.
    max_drop: how much worse than the full pattern's the mean score may be, in the metric's unit: a fraction for
        accuracy. With `relative`, as a fraction of the full pattern's score. Default: 0.01.
    solver: what finds the parameters in place of `steps` steps of `lr` or a rule, as in `adapt`; every candidate, the
        full pattern too, has to fit it.
    rule: how an inner step goes, in place of `lr` (see `rules`); or how a drop is judged, "bound" or "point" (see
        `choose`), which `decide` says too.
    max_time, max_memory: a budget in place of `max_drop`: milliseconds of an adaptation, and MB (10^6 bytes) that it
        needs above parameters and inputs (`memory.measure_memory`). The most accurate pattern within it is taken.
    search: "all" judges every candidate on all tasks; "race" rules candidates out after as few tasks as it takes, the
        fastest first, with a probability of at most `error` to lose one that all tasks would admit (see `racing`). Of a
        network of more than 8 layers a race compares suffixes and stages, and what is cheaper than their best (see
        `search`). Default: "all", and "race" for more than 12 layers whose patterns are not given.
    test_tasks: tasks to report the choice and the full pattern on, with the norms' statistics of the query images
        together and with those of the support set (see `adapt`); none of them may be among `tasks`.
    timings: pytest-benchmark's JSON to take the times from, see `read_timings`; else adaptation is timed here on the
        first task, all patterns and plain PyTorch interleaved, for about `seconds`.
    progress: called as progress(done, total, what); True shows a bar, or lines, on stderr.
    plan: called on rank 0 with what is to be done and the time that it is expected to take, before it starts.
    resume: a file that keeps the scores of the patterns that are evaluated, until the selection is made: the next call
        with the same weights, tasks, inner loop and metric goes on from it. None: nothing is kept.
    ranks: they divide the tasks; rank 0 alone measures times, while the others sleep. All get the same selection.
    per_task: also look for a rule that adapts to some tasks by one pattern of the front and to others by a dearer one.
        It is kept, as `Selection.per_task`, if it beats the choice at its time; see `per_task`. All patterns of the
        front are then judged on all tasks, after a race too, whose front is that of the candidates that it saw.

    Raises ValueError for an unknown rule, metric or search, a max_drop out of range or beside a budget, a budget that
    no pattern keeps (names the best there is), no tasks, test tasks that were chosen on, or per_task with fewer than 20
    tasks or with times from a file.
    """
    inner, decide = _judged_by(rule, decide)
    tasks, test_tasks = as_tasks(tasks, "select_pattern"), as_tasks(test_tasks or (), "select_pattern: test_tasks")
    if not tasks:
        raise ValueError("select_pattern: there are no tasks")
    check_metric(metric, tasks)
    goal = Goal(loss, metric, lower_is_better)
    limit = Limit.of(max_drop, decide, relative, max_time, max_memory, goal.name, lower_is_better)
    _check_search(search, error, statistics)
    if test_tasks:
        check_disjoint(tasks, test_tasks)
    if per_task:
        _check_per_task(tasks, timings)
    loops = InnerLoops(counts_of(steps), rates_of(rates, lr, inner), inner, norm, loss, solver)
    field = _Field.of(model, patterns, search, loops)
    trials = field.trials
    xs, ys, xq, _ = (part[0] for part in stack(tasks[:1], model))
    loops.check(model, xs, ys, trials)
    clock = _Clock(model, (xs, ys, xq), loops, ranks, seconds)
    network, (ways, shots) = _network(model), _ways_shots(tasks[0])
    if timings is not None:
        dtype = str(xs.dtype).removeprefix("torch.")
        clock.read(timings, trials, {"network": network, "shots": shots, "norm": norm, "dtype": dtype})
    judged: dict[str, Any] = {"metric": metric, "ranks": ranks}
    kept = _kept(resume, model, tasks, loops, goal, statistics, ranks)

    with shown(progress, "selecting", here=ranks.rank == 0) as told:
        scored = Scored(model, tasks, loops, {**judged, "statistics": statistics}, kept, told)
        scored.candidates, scored.race = len(trials), field.race
        counted = counted_or_none(model, xs, loops.counts[0], norm) if field.deep or plan is not None else None
        if plan is not None:
            each = scored.seconds_a_task(field.fulls[0])
            todo = planned(each, trials, field.fulls, counted, field.race, len(tasks), len(test_tasks), seconds)
            if ranks.rank == 0:
                plan(str(todo))
        for trial in trials if not field.race and limit.budget is None else field.fulls:
            scored(trial, len(tasks))
        reference = max(field.fulls, key=lambda trial: goal.sign * float(scored.known[trial].mean()))
        clock.compare(tasks[:DRAWS], reference)
        if field.deep and limit.budget is None and timings is None:
            search_deep(trials, reference, limit, scored, counted, len(tasks), error)
            memory, by_time = None, clock(list(scored.known), reference, told)
        else:
            memory, by_time = _sized(model, xs, ys, limit, trials, loops, ranks), clock(trials, reference, told)
            limit.check_budget(by_time, memory)
            for trial in [] if field.race else trials:
                scored(trial, len(tasks))
            if field.race:
                race_among(trials, reference, limit, scored, by_time, memory, len(tasks), error)
        found = {t: own[: len(tasks)] for t, own in scored.known.items()}
        trial, table = limit.choose(found, by_time, reference, memory)
        warnings = [*_few(len(tasks), decide, limit)]
        per_task_rule: PerTask | None = None
        if per_task:
            passes = clock.passes(trial)
            costs = Costs({t: ms.median for t, ms in by_time.items()}, *passes, passes[1] * (statistics == "support"))
            per_task_rule, said = _rule_per_task(scored, table, trial, costs, goal)
            warnings += [] if said is None else [said]
    warnings += [
        said for said in (busy(by_time.values(), clock.beside), limit.alone(table), clock.fault) if said is not None
    ]
    end_to_end = clock.end_to_end(trial, reference)

    best = loops.of(reference)
    own = best if trial == reference else loops.of(trial)
    if getattr(solver, "linearises", False):
        fault: str | None = "its predictions are those of no network"
    else:
        fault = alone_fault(model, test_tasks[:1], best)
    if fault is not None:
        warnings.append(f"there are no test figures of images classified each by itself: {fault}")
    test = on_test(model, test_tasks, own, best, goal.sign, judged, STATISTICS[: 1 if fault else None])
    if per_task_rule is not None and test_tasks:
        descent = loops.descent(trial)
        per_task_rule = rule_on_test(model, test_tasks, per_task_rule, descent, own, costs, goal.sign, judged)
    kept.remove()
    moved, chosen = inner if solver is None else solver, loops.descent(trial)
    return Selection(
        trial=trial,
        full_trial=reference,
        table=table,
        settings={
            "network": network.get("network", type(model).__name__),
            "ways": ways, "shots": shots, "steps": chosen["steps"], "lr": rates_in_json(chosen["lr"], moved),
            "norm": norm,
            **({} if moved is None else {"inner_rule": " ".join(repr(moved).split())}),
            **({} if goal.name == ACCURACY else {"metric": goal.name, "lower_is_better": lower_is_better}),
            **limit.to_dict(),
            "statistics": statistics,
            "search": {
                "kind": "race" if field.race else "all", "tasks": len(tasks),
                "candidates": len(found if field.deep else trials), "adaptations": sum(map(len, found.values())),
                **({"error": error} if field.race else {}),
            },
        },
        times=clock.times,
        end_to_end_ms=end_to_end,
        test=test,
        environment=clock.environment,
        warnings=warnings,
        per_task=per_task_rule,
    )  # fmt: skip


def _judged_by(rule: str | Rule, decide: str | None) -> tuple[Rule | None, str]:
    """The inner rule, and how a drop is judged, which `rule` may be either of."""
    inner = rule if not isinstance(rule, str) and is_rule(rule) else None
    if inner is None and decide is None:
        decide, rule = str(rule), "bound"
    decide = decide or "bound"
    if decide not in ("bound", "point") or (inner is None and rule != "bound"):
        wrong = decide if decide not in ("bound", "point") else rule
        raise ValueError(f"rule is {wrong!r}, expected 'bound' or 'point', or an inner rule such as rules.adam(0.01)")
    return inner, decide


class _Field(NamedTuple):
    """The candidates, and how they are gone through."""

    trials: list[Trial]
    fulls: list[Trial]  # those of the full pattern
    race: bool
    deep: bool  # a race that goes on to what is cheaper than the best of `trials`

    @classmethod
    def of(
        cls, model: nn.Module, patterns: Iterable[Pattern | str] | None, search: str | None, loops: InnerLoops
    ) -> _Field:
        full = Pattern.full(len(models.layer_names(model)))
        race = search == "race" or (search is None and patterns is None and full.layers > MANY_BITS)
        deep = race and patterns is None and full.layers > FEW_BITS
        candidates = (
            list(dict.fromkeys([*suffixes_and_stages(model), full])) if deep else candidates_of(model, patterns)
        )
        trials = loops.trials(candidates)
        return cls(trials, [trial for trial in trials if trial.pattern == full], race, deep)


class _Clock:
    """Adaptation times on one task: taken here, on rank 0 alone, or those of a file."""

    def __init__(
        self, model: nn.Module, task: tuple[Tensor, Tensor, Tensor], loops: InnerLoops, ranks: Ranks,
        seconds: float | None,
    ) -> None:  # fmt: skip
        self.model, self.task, self.loops, self.ranks, self.seconds = model, task, loops, ranks, seconds
        self.times: dict[str, Timing] = {}
        self.external: dict[str, Timing] | None = None
        self.fault: str | None = None  # where adapt disagrees with plain PyTorch, which is then not timed
        self.beside = 0.0  # the largest share of the processors that other processes took meanwhile
        self.environment = ranks.first(lambda: info.environment(task[0].device))

    def read(self, path: str | Path, trials: Sequence[Trial], config: Mapping[str, Any]) -> None:
        """Take the times from a file."""
        self.external, self.environment = self.ranks.first(lambda: read_trials(path, trials, self.loops.counts, config))

    def compare(self, tasks: Sequence[Task], reference: Trial) -> None:
        """Note whether `adapt` agrees with plain PyTorch on one of the tasks, where that has such an inner loop."""
        loops = self.loops
        if loops.rule is None and loops.solver is None and isinstance(loops.rates[0], (int, float)):
            descent = loops.descent(reference)
            self.fault = self.ranks.first(lambda: _disagreement(self.model, tasks, descent))

    def __call__(self, wanted: Sequence[Trial], reference: Trial, told: Progress | None) -> dict[Trial, Timing]:
        """Their times; `times` gets them, too, and plain PyTorch's."""
        if self.external is None:
            self.times |= self._measured(wanted, reference, seconds=self.seconds, progress=told)
        else:
            self.times |= self.external
            if (stock := stock_of(reference)) in self.external:
                self.times[STOCK] = self.external[stock]
            if self.fault is not None:
                self.times.pop(STOCK, None)
        return {trial: self.times[trial.timed] for trial in wanted}

    def end_to_end(self, trial: Trial, reference: Trial) -> dict[str, float]:
        """Milliseconds with the query images classified; none by a file's times."""
        if self.external is not None:
            return {}
        part = None if self.seconds is None else self.seconds / 4
        pair = self._measured([trial, reference], reference, xq=self.task[2], seconds=part)
        return {key: timing.median for key, timing in pair.items()}

    def passes(self, trial: Trial) -> tuple[float, float]:
        """Milliseconds of a pass over the query set and one over the support set."""
        part = None if self.seconds is None else self.seconds / 8
        return self.ranks.first(lambda: measure_passes(self.model, *self.task, seconds=part, **self.loops.of(trial)))

    def _measured(self, wanted: Sequence[Trial], reference: Trial, **more: Any) -> dict[str, Timing]:
        how = {**self.loops.descent(reference), **more, "stock": self.fault is None}

        def timed() -> tuple[dict[str, Timing], float]:
            before = Work.now()
            times = measure_times(self.model, *self.task[:2], patterns=wanted, **how)
            after = Work.now()
            return times, 0.0 if before is None or after is None else before.beside(after)

        times, beside = self.ranks.first(timed)
        self.beside = max(self.beside, beside)
        return times


def _few(tasks: int, decide: str, limit: Limit) -> Iterator[str]:
    """What is to be said of a choice that rests on few tasks."""
    if tasks == 1 and decide == "bound" and limit.budget is None:
        yield "one task has no spread, so every bound is infinite and only the full pattern is admissible"
    elif tasks < FEW_TASKS:
        yield f"the choice rests on {tasks} tasks, fewer than {FEW_TASKS}: take more for a firm one"


def _kept(
    resume: str | Path | None, model: nn.Module, tasks: Sequence[Task], loops: InnerLoops, goal: Goal,
    statistics: str, ranks: Ranks,
) -> Scores:  # fmt: skip
    """Scores of an earlier call with the same weights, tasks, inner loops and metric."""
    rates = [rates_in_json(rate, loops.rule) for rate in loops.rates]
    inner = [(part, digest(tensors_of_rule(part), "")) for part in (loops.rule, loops.solver) if part is not None]
    parts = fingerprint([loops.rule, loops.solver, goal.loss, goal.metric])
    about = repr((loops.counts, rates, loops.norm, inner, parts, statistics))
    return Scores(Path(resume) if resume and ranks.rank == 0 else None, model.state_dict(), tasks, about)


def _sized(
    model: nn.Module, xs: Tensor, ys: Tensor, limit: Limit, trials: Sequence[Trial], loops: InnerLoops, ranks: Ranks
) -> dict[Trial, float] | None:
    """MB of each candidate, where the budget is one of memory."""
    if limit.budget is None or limit.budget.memory_mb is None:
        return None
    return ranks.first(lambda: measure_memory(model, xs, ys, {trial: loops.of(trial) for trial in trials}))


def _check_per_task(tasks: Sequence[Task], timings: str | Path | None) -> None:
    if timings is not None:
        raise ValueError(
            f"per_task counts the passes that its statistic takes, which timings {timings} do not have: leave one out"
        )
    if len(tasks) < FEWEST:
        raise ValueError(f"per_task judges rules on {FEWEST} tasks at least, got {len(tasks)}: give more")


def _rule_per_task(
    scored: Scored, table: Table, fixed: Trial, costs: Costs, goal: Goal
) -> tuple[PerTask | None, str | None]:
    """A rule over the front's patterns that beats the choice at its time, or else that there is none."""
    ms = costs.adapting
    edge = list(dict.fromkeys([*(trial_of(row) for row in front(table)), fixed]))
    cheap = [trial for trial in edge if ms[trial] < ms[fixed]]
    scores = {trial: scored.whole(trial) for trial in edge if cheap or trial == fixed}
    values = {(trial, kind): scored.value(trial, kind) for trial in cheap for kind in kinds_of(goal.name)}
    rule, beats = fit(Known(scores, values, costs, fixed, scored.judged["statistics"], goal.sign))
    at = f"{fixed} at its {ms[fixed]:.3g} ms"
    if rule is None:
        return None, f"no rule per task beat {at}: no two patterns of the front fit into that time"
    return (rule, None) if beats else (None, f"no rule per task beat {at}: the best is {rule}: {rule.worth(goal.name)}")


def _check_search(search: str | None, error: float, statistics: str) -> None:
    if search not in (None, "all", "race"):
        raise ValueError(f"search is {search!r}, expected 'all' or 'race'")
    if not 0 < error < 1:
        raise ValueError(f"error is {error}, expected a probability between 0 and 1")
    if statistics not in STATISTICS:
        raise ValueError(f"statistics is {statistics!r}, expected {' or '.join(map(repr, STATISTICS))}")


def _disagreement(model: nn.Module, tasks: Sequence[Task], descent: Mapping[str, Any]) -> str | None:
    """None where `adapt` agrees with plain PyTorch on one of the tasks, else the figures of the last one."""
    fault: str | None = None
    for task in tasks:
        xs, ys, _, _ = (part[0] for part in stack([task], model))
        fault = disagreement(model, xs, ys, **{k: v for k, v in descent.items() if k not in ("rule", "solver")})
        if fault is None:
            break
    return fault


def rates_in_json(lr: Rate, rule: Any) -> Any:
    """Inner rates as pattern.json has them: a number, rows of numbers, or None where a rule has its own."""
    if rule is not None:
        return None
    values: Any = Rates(lr).value
    return (
        values.tolist() if isinstance(values, Tensor) else values if isinstance(values, (float, list)) else repr(values)
    )


def _network(model: nn.Module) -> dict[str, Any]:
    """The model's config, or nothing for a network that `models` did not build."""
    try:
        return dict(models.config_of(model))
    except (ValueError, TypeError):
        return {}


def _ways_shots(task: Task) -> tuple[int | None, int]:
    """Classes of the support set, and its images per class (the least, if they differ); its size where targets are no
    class numbers."""
    if task.ys.is_floating_point():
        return None, len(task.ys)
    classes, counts = task.ys.unique(return_counts=True)
    return classes.numel(), int(counts.min())
