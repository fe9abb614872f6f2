"""The fastest Lambda pattern within an allowed drop of accuracy (Khabarlak, arXiv 2206.05930)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import info
from lambda_kernels.agreement import DRAWS

from . import models, racing
from .adapt import STATISTICS, adapt
from .checkpoint import digest, tensors_of_rule
from .choice import FEW_BITS, Limit, Table, candidates_of, finite, front, key_of
from .data.episodes import Task, as_tasks
from .evaluate import ACCURACY, Metric, check_metric, evaluate, name_of, stack, worded
from .goal import Goal
from .inner.checks import Loss
from .inner.rates import DEFAULT_LR, Rate, Rates
from .inner.rule import Rule, is_rule
from .inner.rules import rule_of
from .memory import measure_memory
from .patterns import Pattern
from .per_task import FEWEST, Costs, Figures, Known, PerTask, fit, kinds_of, values_of
from .places import Solver
from .plain_torch import disagreement
from .progress import Progress, shown
from .ranks import ALONE, Ranks
from .remembered_scores import Scores
from .search import counted_or_none, planned, race_among, search_deep, suffixes_and_stages
from .selection import Selection, trial_of
from .solved import check_inner
from .statistics import StatisticsError
from .stats import mean_ci95
from .timing import STOCK, Timing, busy, measure_passes, measure_times, read_trials, stock_of
from .trials import Trial, counts_of, rates_of, trials_of

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
    inner = rule if not isinstance(rule, str) and is_rule(rule) else None
    if inner is None and decide is None:
        decide, rule = str(rule), "bound"
    decide = decide or "bound"
    if decide not in ("bound", "point") or (inner is None and rule != "bound"):
        wrong = decide if decide not in ("bound", "point") else rule
        raise ValueError(f"rule is {wrong!r}, expected 'bound' or 'point', or an inner rule such as rules.adam(0.01)")
    tasks, test_tasks = as_tasks(tasks, "select_pattern"), as_tasks(test_tasks or (), "select_pattern: test_tasks")
    if not tasks:
        raise ValueError("select_pattern: there are no tasks")
    check_metric(metric, tasks)
    goal = Goal(loss, metric, lower_is_better)
    name = goal.name
    limit = Limit.of(max_drop, decide, relative, max_time, max_memory, name, lower_is_better)
    _check_search(search, error, statistics)
    if test_tasks:
        _check_disjoint(tasks, test_tasks)
    if per_task:
        _check_per_task(tasks, timings)
    counts, lrs = counts_of(steps), rates_of(rates, lr, inner)
    full = Pattern.full(len(models.layer_names(model)))
    race = search == "race" or (search is None and patterns is None and full.layers > MANY_BITS)
    deep = race and patterns is None and full.layers > FEW_BITS
    candidates = list(dict.fromkeys([*suffixes_and_stages(model), full])) if deep else candidates_of(model, patterns)
    trials = trials_of(candidates, counts if len(counts) > 1 else [None], lrs if len(lrs) > 1 else [None])
    fulls = [trial for trial in trials if trial.pattern == full]

    def descent(trial: Trial) -> dict[str, Any]:
        k, rate = trial.steps or counts[0], lrs[0] if trial.rate is None else trial.rate
        return {"steps": k, "lr": rate, "rule": inner, "norm": norm, "loss": loss, "solver": solver}

    def how(trial: Trial) -> dict[str, Any]:
        return {**descent(trial), "pattern": trial.pattern}

    ways, shots = _ways_shots(tasks[0])
    xs, ys, xq, _ = (part[0] for part in stack(tasks[:1], model))
    warnings: list[str] = []
    if len(tasks) == 1 and decide == "bound" and limit.budget is None:
        warnings.append("one task has no spread, so every bound is infinite and only the full pattern is admissible")
    elif len(tasks) < FEW_TASKS:
        warnings.append(f"the choice rests on {len(tasks)} tasks, fewer than {FEW_TASKS}: take more for a firm one")

    for trial in trials if inner is not None or solver is not None else ():
        if not trial.pattern.rows:
            given = descent(trial)
            chosen_rule = rule_of(given["lr"], inner)
            check_inner(model, xs, ys, trial.pattern, given["steps"], norm, False, loss, chosen_rule, solver)
    network = _network(model)
    external: dict[str, Timing] = {}
    environment = ranks.first(lambda: info.environment(xs.device))
    if timings is not None:
        file, dtype = timings, str(xs.dtype).removeprefix("torch.")
        config = {"network": network, "shots": shots, "norm": norm, "dtype": dtype}
        external, environment = ranks.first(lambda: read_trials(file, trials, counts, config))
    judged: dict[str, Any] = {"metric": metric, "ranks": ranks}
    own_rates, own_loss = [rates_in_json(rate, inner) for rate in lrs], getattr(loss, "__qualname__", loss)
    who = (inner,) if solver is None else (inner, solver, digest(tensors_of_rule(solver), ""))
    about = repr((counts, own_rates, norm, *who, own_loss, name, statistics))
    kept = Scores(Path(resume) if resume and ranks.rank == 0 else None, model.state_dict(), tasks, about)
    plain = inner is None and solver is None and isinstance(lrs[0], (int, float))  # as plain PyTorch's loop is
    fault: str | None = None

    def measure(wanted: Sequence[Trial], **more: Any) -> dict[str, Timing]:
        given = {**descent(reference), **more}
        return ranks.first(lambda: measure_times(model, xs, ys, patterns=wanted, stock=fault is None, **given))

    def timed(wanted: Sequence[Trial]) -> dict[Trial, Timing]:
        """Their times; `times` gets them, too, and plain PyTorch's."""
        times.update(measure(wanted, seconds=seconds, progress=told) if timings is None else external)
        if timings is not None and (stock := stock_of(reference)) in external:
            times[STOCK] = external[stock]
        return {trial: times[trial.timed] for trial in wanted}

    def sized() -> dict[Trial, float] | None:
        if limit.budget is None or limit.budget.memory_mb is None:
            return None
        return ranks.first(lambda: measure_memory(model, xs, ys, {t: how(t) for t in trials}))

    with shown(progress, "selecting", here=ranks.rank == 0) as told:
        scored = _Scored(model, tasks, descent, {**judged, "statistics": statistics}, kept, told)
        scored.candidates, scored.race = len(trials), race
        times: dict[str, Timing] = {}
        counted = counted_or_none(model, xs, counts[0], norm) if deep or plan is not None else None
        if plan is not None:
            each = scored.seconds_a_task(fulls[0])
            todo = planned(each, trials, fulls, counted, race, len(tasks), len(test_tasks), seconds)
            if ranks.rank == 0:
                plan(str(todo))
        for trial in trials if not race and limit.budget is None else fulls:
            scored(trial, len(tasks))
        reference = max(fulls, key=lambda trial: goal.sign * float(scored.known[trial].mean()))
        if plain:
            given = descent(reference)
            fault = ranks.first(lambda: _disagreement(model, tasks[:DRAWS], given))
        if deep and limit.budget is None and timings is None:
            search_deep(trials, reference, limit, scored, counted, len(tasks), error)
            memory, by_time = None, timed(list(scored.known))
        else:
            memory, by_time = sized(), timed(trials)
            limit.check_budget(by_time, memory)
            for trial in [] if race else trials:
                scored(trial, len(tasks))
            if race:
                race_among(trials, reference, limit, scored, by_time, memory, len(tasks), error)
        found = {t: own[: len(tasks)] for t, own in scored.known.items()}
        trial, table = limit.choose(found, by_time, reference, memory)
        per_task_rule: PerTask | None = None
        if per_task:
            part = None if seconds is None else seconds / 8
            passes = ranks.first(lambda: measure_passes(model, xs, ys, xq, seconds=part, **how(trial)))
            costs = Costs({t: ms.median for t, ms in by_time.items()}, *passes, passes[1] * (statistics == "support"))
            per_task_rule, said = _rule_per_task(scored, table, trial, costs, goal)
            warnings += [] if said is None else [said]
    if fault is not None:
        times.pop(STOCK, None)
    warnings += [said for said in (busy(by_time.values()), limit.alone(table)) if said is not None]
    if fault is not None:
        warnings.append(fault)
    end_to_end: dict[str, float] = {}
    if timings is None:
        pair = measure([trial, reference], xq=xq, seconds=None if seconds is None else seconds / 4)
        end_to_end = {key: timing.median for key, timing in pair.items()}

    best = how(reference)
    own = best if trial == reference else how(trial)
    if getattr(solver, "linearises", False):
        alone_fault: str | None = "its predictions are those of no network"
    else:
        alone_fault = _alone_fault(model, test_tasks[:1], best)
    if alone_fault is not None:
        warnings.append(f"there are no test figures of images classified each by itself: {alone_fault}")
    test = _on_test(model, test_tasks, own, best, goal.sign, judged, STATISTICS[: 1 if alone_fault else None])
    if per_task_rule is not None and test_tasks:
        per_task_rule = _rule_on_test(model, test_tasks, per_task_rule, descent(trial), own, costs, goal.sign, judged)
    moved = inner if solver is None else solver
    kept.remove()
    chosen = descent(trial)
    return Selection(
        trial=trial,
        full_trial=reference,
        table=table,
        settings={
            "network": network.get("network", type(model).__name__),
            "ways": ways, "shots": shots, "steps": chosen["steps"], "lr": rates_in_json(chosen["lr"], moved),
            "norm": norm,
            **({} if moved is None else {"inner_rule": " ".join(repr(moved).split())}),
            **({} if name == ACCURACY else {"metric": name, "lower_is_better": lower_is_better}),
            **limit.to_dict(),
            "statistics": statistics,
            "search": {
                "kind": "race" if race else "all", "tasks": len(tasks), "candidates": len(found if deep else trials),
                "adaptations": sum(map(len, found.values())), **({"error": error} if race else {}),
            },
        },
        times=times,
        end_to_end_ms=end_to_end,
        test=test,
        environment=environment,
        warnings=warnings,
        per_task=per_task_rule,
    )  # fmt: skip


class _Scored:
    """The scores of candidates on the first so many tasks, evaluated as they are asked for, and kept."""

    def __init__(
        self, model: nn.Module, tasks: Sequence[Task], descent: Callable[[Trial], dict[str, Any]],
        judged: Mapping[str, Any], kept: Scores, told: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.tasks, self.descent, self.judged = model, tasks, descent, judged
        self.kept, self.told = kept, told
        self.known: dict[Trial, Tensor] = {}
        self.candidates, self.race = 0, False  # for the progress

    def __call__(self, trial: Trial, count: int) -> Tensor:
        ranks, known = self.judged["ranks"], self.known.get(trial)
        if known is None:
            known = ranks.first(partial(self.kept.get, str(trial)))
        begin = 0 if known is None else len(known)
        if begin < count:
            more = self._evaluated(trial, begin, count)
            known = more if known is None else torch.cat([known, more])
            self.kept.put(str(trial), known)
        assert known is not None
        if self.told is not None and len(self.known.get(trial, ())) < len(known):
            self._tell(self.told, trial, known)
        self.known[trial] = known
        return known[:count]

    def _evaluated(self, trial: Trial, begin: int, end: int) -> Tensor:
        how = {**self.descent(trial), **self.judged}
        return evaluate(self.model, self.tasks[begin:end], pattern=trial.pattern, first=begin, **how).scores

    def whole(self, trial: Trial) -> Tensor:
        """The scores on all tasks of a candidate that a race saw on some. What it lacks is kept apart, so that a
        selection that is taken up has the same table."""
        known, n = self.known[trial], len(self.tasks)
        begin, ranks = len(known), self.judged["ranks"]
        if begin == n:
            return known
        key = f"{trial}: from {begin}"
        more = ranks.first(partial(self.kept.get, key))
        if more is None:
            more = self._evaluated(trial, begin, n)
            self.kept.put(key, more)
        return torch.cat([known, more])

    def value(self, trial: Trial, statistic: str) -> Tensor:
        """A statistic [T] of all tasks, adapted to by a candidate; kept as scores are."""
        ranks, key = self.judged["ranks"], f"{trial}: {statistic}"
        known = ranks.first(partial(self.kept.get, key))
        if known is None:
            more = {k: v for k, v in self.judged.items() if k != "metric"}
            how = {**self.descent(trial), "pattern": trial.pattern, **more}
            known = values_of(statistic, self.model, self.tasks, **how)
            self.kept.put(key, known)
        return known

    def seconds_a_task(self, trial: Trial) -> float | None:
        """How long a task takes, by some of the first ones; None where these were evaluated before."""
        if self.judged["ranks"].first(partial(self.kept.get, str(trial))) is not None:
            return None
        begun = 0
        for count in (2, 10):  # the first ones load and capture
            start, count = time.perf_counter(), min(count, len(self.tasks))
            if count > begun:
                self(trial, count)
                each, begun = (time.perf_counter() - start) / (count - begun), count
        return each

    def _tell(self, told: Progress, trial: Trial, scores: Tensor) -> None:
        known = {**self.known, trial: scores}
        at = f"{trial} at {worded(float(scores.mean()), name_of(self.judged['metric']))}"
        if self.race:
            done, whole = sum(map(len, known.values())), self.candidates * len(self.tasks)
            told(done, max(done, whole), f"adaptations at most, {at}")
        else:
            told(len(known), self.candidates, f"patterns, {at}")


def _check_per_task(tasks: Sequence[Task], timings: str | Path | None) -> None:
    if timings is not None:
        raise ValueError(
            f"per_task counts the passes that its statistic takes, which timings {timings} do not have: leave one out"
        )
    if len(tasks) < FEWEST:
        raise ValueError(f"per_task judges rules on {FEWEST} tasks at least, got {len(tasks)}: give more")


def _rule_per_task(
    scored: _Scored, table: Table, fixed: Trial, costs: Costs, goal: Goal
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


def _rule_on_test(
    model: nn.Module, tasks: Sequence[Task], rule: PerTask, descent: Mapping[str, Any], fixed: Mapping[str, Any],
    costs: Costs, sign: int, judged: Mapping[str, Any],
) -> PerTask:  # fmt: skip
    """The rule with its figures on test tasks, beside the fixed choice's there."""
    again = rule.decide(model, tasks, ranks=judged["ranks"], **descent)
    own = rule.evaluate(model, tasks, again, **judged, **descent)
    other = evaluate(model, tasks, statistics=rule.statistics, **fixed, **judged)
    share = float(again.double().mean())
    gain = mean_ci95(sign * (own.scores - other.scores))
    return replace(rule, test=Figures(len(tasks), share, costs.mean(rule, share), own.mean, *gain))


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


def _alone_fault(model: nn.Module, tasks: Sequence[Task], full: Mapping[str, Any]) -> str | None:
    """Why the network, adapted to a task, cannot classify images each by itself; None where it can. All ranks ask."""
    for task in tasks:
        xs, ys, _, _ = (part[0] for part in stack([task], model))
        try:
            adapt(model, xs, ys, statistics="support", **full)
        except StatisticsError as error:
            return str(error)
    return None


def _on_test(
    model: nn.Module, tasks: Sequence[Task], own: Mapping[str, Any], full: Mapping[str, Any], sign: int,
    judged: Mapping[str, Any], statistics: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The choice and the full pattern on `tasks`: query images together, and under "support" each by itself."""
    together, *alone = (_compared(model, tasks, own, full, sign, {**judged, "statistics": kind}) for kind in statistics)
    return {"tasks": len(tasks), **together, "support": alone[0] if alone else None}


def _compared(
    model: nn.Module, tasks: Sequence[Task], own: Mapping[str, Any], full: Mapping[str, Any], sign: int,
    judged: Mapping[str, Any],
) -> dict[str, float | None]:  # fmt: skip
    """Mean scores, and the drop (how much worse the choice is) with its two-sided interval."""
    full_key, chosen_key = (f"{which}_{key_of(name_of(judged['metric']))}" for which in ("full", "chosen"))
    if not tasks:
        return {full_key: None, chosen_key: None, "drop": None, "drop_ci95": None}
    best = evaluate(model, tasks, **full, **judged)
    chosen = best if own is full else evaluate(model, tasks, **own, **judged)
    drop, ci95 = mean_ci95(sign * (best.scores - chosen.scores))
    return {
        full_key: best.mean,
        chosen_key: chosen.mean,
        "drop": drop,
        "drop_ci95": 0.0 if own is full else finite(ci95),
    }


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


def _check_disjoint(tasks: Sequence[Task], test_tasks: Sequence[Task]) -> None:
    seen = {task.xs.cpu().numpy().tobytes() for task in tasks}
    for index, task in enumerate(test_tasks):
        if task.xs.cpu().numpy().tobytes() in seen:
            raise ValueError(f"test task {index} is one of the tasks that the pattern is chosen on: take other tasks")
