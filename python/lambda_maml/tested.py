"""A choice on tasks that it was not chosen on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .adapt import STATISTICS, adapt
from .choice import finite, key_of
from .data.episodes import Task
from .evaluate import Evaluation, Metric, evaluate, evaluate_both, name_of, stack
from .per_task import Costs, Figures, PerTask
from .statistics import StatisticsError
from .stats import mean_ci95

__all__ = ["alone_fault", "check_disjoint", "on_test", "rule_on_test"]


def check_disjoint(tasks: Sequence[Task], test_tasks: Sequence[Task]) -> None:
    """ValueError where a test task is one of those to choose on."""
    seen = {task.xs.cpu().numpy().tobytes() for task in tasks}
    for index, task in enumerate(test_tasks):
        if task.xs.cpu().numpy().tobytes() in seen:
            raise ValueError(f"test task {index} is one of the tasks that the pattern is chosen on: take other tasks")


def alone_fault(model: nn.Module, tasks: Sequence[Task], full: Mapping[str, Any]) -> str | None:
    """Why the network, adapted to a task, cannot classify images each by itself; None where it can. All ranks ask."""
    for task in tasks:
        xs, ys, _, _ = (part[0] for part in stack([task], model))
        try:
            adapt(model, xs, ys, statistics="support", **full)
        except StatisticsError as error:
            return str(error)
    return None


def on_test(
    model: nn.Module, tasks: Sequence[Task], own: Mapping[str, Any], full: Mapping[str, Any], sign: int,
    judged: Mapping[str, Any], statistics: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The choice and the full pattern on `tasks`: query images together, and under "support" each by itself."""
    best = _by(statistics, model, tasks, {**full, **judged})
    chosen = best if own is full else _by(statistics, model, tasks, {**own, **judged})
    together, *alone = (_compared(best[kind], chosen[kind], sign, judged["metric"]) for kind in statistics)
    return {"tasks": len(tasks), **together, "support": alone[0] if alone else None}


def _by(
    statistics: Sequence[str], model: nn.Module, tasks: Sequence[Task], how: Mapping[str, Any]
) -> Mapping[str, Evaluation | None]:
    """What was evaluated by these statistics; without tasks nothing was."""
    if not tasks:
        return dict.fromkeys(statistics)
    if len(statistics) == len(STATISTICS):
        return evaluate_both(model, tasks, **how)
    return {kind: evaluate(model, tasks, statistics=kind, **how) for kind in statistics}


def _compared(
    best: Evaluation | None, chosen: Evaluation | None, sign: int, metric: Metric
) -> dict[str, float | None]:  # fmt: skip
    """Mean scores, and the drop (how much worse the choice is) with its two-sided interval."""
    full_key, chosen_key = (f"{which}_{key_of(name_of(metric))}" for which in ("full", "chosen"))
    if best is None or chosen is None:
        return {full_key: None, chosen_key: None, "drop": None, "drop_ci95": None}
    drop, ci95 = mean_ci95(sign * (best.scores - chosen.scores))
    return {
        full_key: best.mean,
        chosen_key: chosen.mean,
        "drop": drop,
        "drop_ci95": 0.0 if chosen is best else finite(ci95),
    }


def rule_on_test(
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
