"""The fastest Lambda pattern within an allowed drop of accuracy (Khabarlak, arXiv 2206.05930)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import info
from lambda_kernels.agreement import DRAWS

from . import models
from .adapt import STATISTICS
from .checkpoint import digest, tensors_of_rule
from .choice import Candidate, Table, candidates_of, choose, finite, key_of
from .data.episodes import Task, as_tasks
from .evaluate import ACCURACY, Evaluation, Metric, check_metric, evaluate, name_of, stack, worded
from .files import write_json
from .goal import Goal
from .inner.checks import Loss
from .inner.rates import DEFAULT_LR, Rate, Rates
from .inner.rule import Rule, is_rule
from .inner.rules import rule_of
from .patterns import Pattern
from .places import Solver
from .plain_torch import disagreement
from .progress import Progress, shown
from .ranks import ALONE, Ranks
from .remembered_scores import Scores
from .solved import check_inner
from .stats import mean_ci95
from .timing import STOCK, Timing, measure_times, read_timings

FEW_TASKS = 30
"""With fewer validation tasks than this a selection carries a warning."""


@dataclass(frozen=True)
class Selection:
    """What `select_pattern` chose, and everything that it chose by."""

    pattern: Pattern
    table: Table
    settings: dict[str, Any]
    times: dict[str, Timing]
    end_to_end_ms: dict[str, float]
    test: dict[str, Any]
    environment: dict[str, Any]
    full_pattern: Pattern
    warnings: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        rows = [(c.pattern, worded(c.score, self.table.metric), c.time_ms) for c in self.table]
        told = [f"{p} {s} in {ms:.3g} ms" for p, s, ms in rows if p in (self.pattern, self.full_pattern)]
        return f"Selection({self.pattern} of {len(rows)} patterns: {', '.join(told)})"

    def __getitem__(self, pattern: Pattern | str) -> Candidate:
        """The candidate of this pattern."""
        wanted = Pattern.parse(pattern)
        for candidate in self.table:
            if candidate.pattern == wanted:
                return candidate
        raise KeyError(f"{wanted} is none of the candidates: {', '.join(str(c.pattern) for c in self.table)}")

    def to_dict(self) -> dict[str, Any]:
        """The form of pattern.json, schema 1: times in ms, accuracies as fractions, None for what is undefined.
        Those of another metric are called scores, and `metric` names it."""
        rows = {c.pattern: c.to_dict(self.table.metric) for c in self.table}
        full, stock, end = rows[self.full_pattern], self.times.get(STOCK), self.end_to_end_ms
        return {
            "schema": 1,
            **self.settings,
            "chosen": {**rows[self.pattern], "end_to_end_ms": end.get(str(self.pattern))},
            "full": {
                **{key: full[key] for key in ("pattern", key_of(self.table.metric), "ci95", "time_ms")},
                "end_to_end_ms": end.get(str(self.full_pattern)),
            },
            "stock_full": {
                "pattern": str(self.full_pattern),
                "time_ms": stock.median if stock else None,
                "end_to_end_ms": end.get(STOCK),
            },
            "test": self.test,
            "candidates": list(rows.values()),
            "environment": self.environment,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write pattern.json, atomically."""
        write_json(path, self.to_dict())


def select_pattern(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    steps: int,
    lr: Rate = DEFAULT_LR,
    max_drop: float = 0.01,
    relative: bool = False,
    rule: str | Rule = "bound",
    decide: str | None = None,
    norm: str = "follow",
    loss: Loss = F.cross_entropy,
    metric: Metric = ACCURACY,
    lower_is_better: bool = False,
    patterns: Iterable[Pattern | str] | None = None,
    test_tasks: Sequence[Task] | None = None,
    timings: str | Path | None = None,
    seconds: float | None = 30.0,
    progress: Progress | bool | None = None,
    resume: str | Path | None = None,
    ranks: Ranks = ALONE,
    solver: Solver | None = None,
) -> Selection:
    """Evaluate every pattern on the same validation `tasks`, time each, and take the fastest within `max_drop`.

    >>> chosen = select_pattern(model, tasks, steps=5, lr=0.03, patterns=["00001", "00011"], seconds=0.1)
    >>> sorted(str(candidate.pattern) for candidate in chosen.table)     # chosen.pattern is one of them
    ['00001', '00011', '11111']

    After Khabarlak 2022 (arXiv 2206.05930).

    steps, lr, norm, loss: of the inner loop, as in `adapt`.
    metric, lower_is_better: what a pattern is judged by, as in `evaluate`, and whether less of it is better:
        `loss=F.mse_loss, metric=F.mse_loss, lower_is_better=True` for regression.
    patterns: candidates; the full pattern is always among them. Default: all 2^n - 1, by parts of the network ("stages:
        ...") where it has more than 8 layers; see `choice.candidates_of`.
    max_drop: how much worse than the full pattern's the mean score may be, in the metric's unit: a fraction for
        accuracy. With `relative`, as a fraction of the full pattern's score.
    solver: what finds the parameters in place of `steps` steps of `lr` or a rule, as in `adapt`; every candidate, the
        full pattern too, has to fit it.
    rule: how an inner step goes, in place of `lr` (see `rules`); or how a drop is judged, "bound" or "point" (see
        `choose`), which `decide` says too.
    test_tasks: tasks to report the choice and the full pattern on, with the norms' statistics of the query images
        together and with those of the support set (see `adapt`); none of them may be among `tasks`.
    timings: pytest-benchmark's JSON to take the times from, see `read_timings`; else adaptation is timed here on the
        first task, all patterns and plain PyTorch interleaved, for about `seconds`.
    progress: called as progress(done, total, what); True shows a bar, or lines, on stderr.
    resume: a file that keeps the scores of the patterns that are evaluated, until the selection is made: the next call
        with the same weights, tasks, inner loop and metric goes on from it. None: nothing is kept.
    ranks: they divide the tasks; rank 0 alone measures times, while the others sleep. All get the same selection.

    Raises ValueError for an unknown rule or metric, a max_drop out of range, no tasks, or test tasks that were chosen
    on.
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
    most = 1.0 if name == ACCURACY or relative else math.inf
    if not 0 <= max_drop <= most or max_drop == math.inf:
        raise ValueError(f"max_drop is {max_drop}, expected {'a fraction from 0 to 1' if most == 1 else '0 or more'}")
    if test_tasks:
        _check_disjoint(tasks, test_tasks)
    descent: dict[str, Any] = {"steps": steps, "lr": lr, "rule": inner, "norm": norm, "loss": loss, "solver": solver}
    candidates = candidates_of(model, patterns)
    full = Pattern.full(len(models.layer_names(model)))
    ways, shots = _ways_shots(tasks[0])
    xs, ys, xq, _ = (part[0] for part in stack(tasks[:1], model))
    warnings: list[str] = []
    if len(tasks) == 1 and decide == "bound":
        warnings.append("one task has no spread, so every bound is infinite and only the full pattern is admissible")
    elif len(tasks) < FEW_TASKS:
        warnings.append(f"the choice rests on {len(tasks)} tasks, fewer than {FEW_TASKS}: take more for a firm one")

    for pattern in candidates if inner is not None or solver is not None else ():
        if not pattern.rows:
            check_inner(model, xs, ys, pattern, steps, norm, False, loss, rule_of(lr, inner), solver)
    network = _network(model)
    external: dict[str, Timing] = {}
    environment = ranks.first(lambda: info.environment(xs.device))
    if timings is not None:
        file, dtype = timings, str(xs.dtype).removeprefix("torch.")
        external, environment = ranks.first(
            lambda: read_timings(
                file, patterns=candidates, network=network, shots=shots, steps=steps, norm=norm, dtype=dtype
            )
        )
    judged: dict[str, Any] = {**descent, "metric": metric, "ranks": ranks}
    who = (inner,) if solver is None else (inner, solver, digest(tensors_of_rule(solver), ""))
    about = repr((steps, rates_in_json(lr, inner), norm, *who, getattr(loss, "__qualname__", loss), name))
    kept = Scores(Path(resume) if resume and ranks.rank == 0 else None, model.state_dict(), tasks, about)
    plain = inner is None and solver is None and isinstance(lr, (int, float))  # as plain PyTorch's loop is
    fault: str | None = None

    def measure(patterns: Iterable[Pattern], **more: Any) -> dict[str, Timing]:
        return ranks.first(
            lambda: measure_times(model, xs, ys, patterns=patterns, stock=fault is None, **descent, **more)
        )

    with shown(progress, "selecting", here=ranks.rank == 0) as told:
        found: dict[Pattern, Evaluation] = {}
        for pattern in candidates:
            known = ranks.first(partial(kept.get, str(pattern)))
            if known is None:
                found[pattern] = evaluate(model, tasks, pattern=pattern, **judged)
                kept.put(str(pattern), found[pattern].scores)
            else:
                found[pattern] = Evaluation(known, *mean_ci95(known), name)
            if told is not None:
                told(len(found), len(candidates), f"patterns, {pattern} at {worded(found[pattern].mean, name)}")
        if plain:
            given = {**descent, "lr": float(lr)}  # type: ignore[arg-type]
            fault = ranks.first(lambda: _disagreement(model, tasks[:DRAWS], given))
        if fault is not None:
            warnings.append(fault)
            external.pop(STOCK, None)
        times = external if timings is not None else measure(candidates, seconds=seconds, progress=told)
    scores = {p: e.scores for p, e in found.items()}
    times_ms = {p: times[str(p)].median for p in candidates}
    pattern, table = choose(
        scores, times_ms, full, max_drop=max_drop, rule=decide, relative=relative, metric=name,
        lower_is_better=lower_is_better,
    )  # fmt: skip
    end_to_end: dict[str, float] = {}
    if timings is None:
        pair = measure([pattern, full], xq=xq, seconds=None if seconds is None else seconds / 4)
        end_to_end = {name: timing.median for name, timing in pair.items()}

    own = inner if solver is None else solver
    test = _on_test(model, test_tasks, pattern, full, goal.sign, judged)
    kept.remove()
    return Selection(
        pattern=pattern,
        table=table,
        settings={
            "network": network.get("network", type(model).__name__),
            "ways": ways, "shots": shots, "steps": steps, "lr": rates_in_json(lr, own), "norm": norm,
            **({} if own is None else {"inner_rule": " ".join(repr(own).split())}),
            **({} if name == ACCURACY else {"metric": name, "lower_is_better": lower_is_better}),
            "max_drop": max_drop, "rule": decide, "relative": relative,
        },
        times=times,
        end_to_end_ms=end_to_end,
        test=test,
        environment=environment,
        full_pattern=full,
        warnings=warnings,
    )  # fmt: skip


def _disagreement(model: nn.Module, tasks: Sequence[Task], descent: Mapping[str, Any]) -> str | None:
    """None where `adapt` agrees with plain PyTorch on one of the tasks, else the figures of the last one."""
    fault: str | None = None
    for task in tasks:
        xs, ys, _, _ = (part[0] for part in stack([task], model))
        fault = disagreement(model, xs, ys, **{k: v for k, v in descent.items() if k not in ("rule", "solver")})
        if fault is None:
            break
    return fault


def _on_test(
    model: nn.Module, tasks: Sequence[Task], pattern: Pattern, full: Pattern, sign: int, judged: Mapping[str, Any]
) -> dict[str, Any]:
    """The choice and the full pattern on `tasks`: query images together, and under "support" each by itself."""
    linearised = getattr(judged["solver"], "linearises", False)  # its predictions are those of no network
    together, alone = (
        _compared(model, () if linearised and how == "support" else tasks, pattern, full, sign, given)
        for how in STATISTICS
        for given in [{**judged, "statistics": how}]
    )
    return {"tasks": len(tasks), **together, "support": alone}


def _compared(
    model: nn.Module, tasks: Sequence[Task], pattern: Pattern, full: Pattern, sign: int, judged: Mapping[str, Any]
) -> dict[str, float | None]:
    """Mean scores, and the drop (how much worse the choice is) with its two-sided interval."""
    full_key, chosen_key = (f"{which}_{key_of(name_of(judged['metric']))}" for which in ("full", "chosen"))
    if not tasks:
        return {full_key: None, chosen_key: None, "drop": None, "drop_ci95": None}
    best = evaluate(model, tasks, pattern=full, **judged)
    own = best if pattern == full else evaluate(model, tasks, pattern=pattern, **judged)
    drop, ci95 = mean_ci95(sign * (best.scores - own.scores))
    return {
        full_key: best.mean,
        chosen_key: own.mean,
        "drop": drop,
        "drop_ci95": 0.0 if pattern == full else finite(ci95),
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
