"""The fastest Lambda pattern within an allowed drop of accuracy (Khabarlak, arXiv 2206.05930)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lambda_kernels import info
from lambda_kernels.agreement import DRAWS

from . import models
from .adapt import STATISTICS
from .data.episodes import Task
from .evaluate import Evaluation, Progress, evaluate, stack
from .files import read_json, write_json
from .inner.rates import DEFAULT_LR, Rate, Rates
from .inner.rule import Rule, is_rule
from .patterns import Pattern
from .plain_torch import disagreement
from .ranks import ALONE, Ranks
from .stats import mean_ci95, ratio_upper_bound95, upper_bound95
from .timing import STOCK, Timing, measure_times, read_timings

FEW_TASKS = 30
"""With fewer validation tasks than this a selection carries a warning."""


class Candidate(NamedTuple):
    """One pattern: accuracy and the half width of its 95% interval (fractions), adaptation time (ms), the drop against
    the full pattern and its one-sided 95% upper bound (fractions; of the full accuracy if the drop is relative)."""

    pattern: Pattern
    accuracy: float
    ci95: float
    time_ms: float
    drop: float
    drop_bound: float
    admissible: bool

    def to_dict(self) -> dict[str, Any]:
        keys = ("accuracy", "ci95", "time_ms", "drop", "drop_bound")
        return {"pattern": str(self.pattern), **{key: _finite(getattr(self, key)) for key in keys}}


class Table(list[Candidate]):
    """Candidates, the fastest first; prints as a table in plain text."""

    def __str__(self) -> str:
        width = max(len("pattern"), *(len(str(c.pattern)) for c in self)) if self else len("pattern")
        lines = [f"{'pattern':<{width}}  time ms  accuracy %        drop  bound  admissible"]
        for c in self:
            ci = f"+- {100 * c.ci95:.2f}" if math.isfinite(c.ci95) else "+- ?"
            bound = f"{100 * c.drop_bound:5.2f}" if math.isfinite(c.drop_bound) else "    ?"
            lines.append(
                f"{c.pattern!s:<{width}}  {c.time_ms:7.3f}  {100 * c.accuracy:6.2f} {ci:<9}  {100 * c.drop:5.2f}  "
                f"{bound}  {'yes' if c.admissible else 'no'}"
            )
        return "\n".join(lines)


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

    def __getitem__(self, pattern: Pattern | str) -> Candidate:
        """The candidate of this pattern."""
        wanted = Pattern.parse(pattern)
        for candidate in self.table:
            if candidate.pattern == wanted:
                return candidate
        raise KeyError(f"{wanted} is none of the candidates: {', '.join(str(c.pattern) for c in self.table)}")

    def to_dict(self) -> dict[str, Any]:
        """The form of pattern.json, schema 1: times in ms, accuracies as fractions, None for what is undefined."""
        full, stock = self[self.full_pattern].to_dict(), self.times.get(STOCK)
        end = self.end_to_end_ms
        return {
            "schema": 1,
            **self.settings,
            "chosen": {**self[self.pattern].to_dict(), "end_to_end_ms": end.get(str(self.pattern))},
            "full": {
                **{key: full[key] for key in ("pattern", "accuracy", "ci95", "time_ms")},
                "end_to_end_ms": end.get(str(self.full_pattern)),
            },
            "stock_full": {
                "pattern": str(self.full_pattern),
                "time_ms": stock.median if stock else None,
                "end_to_end_ms": end.get(STOCK),
            },
            "test": self.test,
            "candidates": [c.to_dict() for c in self.table],
            "environment": self.environment,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write pattern.json, atomically."""
        write_json(path, self.to_dict())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def choose(
    accuracies: Mapping[Pattern, Tensor], times_ms: Mapping[Pattern, float], full: Pattern, *, max_drop: float,
    rule: str = "bound", relative: bool = False,
) -> tuple[Pattern, Table]:  # fmt: skip
    """The fastest admissible pattern, and every candidate, from accuracies [tasks] on the same tasks and times.

    A pattern is admissible if its drop (rule "point") or the one-sided 95% upper bound of its drop over paired tasks
    (rule "bound", Student's t; Fieller's bound of the ratio if `relative`) is at most `max_drop`. `full` always is.
    Equal times: the higher accuracy, then the pattern's text. The bound is for one pattern at a time: the best of many
    still looks better than it is, which is why the choice is reported on other tasks.
    """
    base = accuracies[full].double()
    rows = []
    for pattern, own in accuracies.items():
        own = own.double()
        if own.shape != base.shape:
            raise ValueError(f"choose: {pattern} has {own.numel()} tasks, {full} has {base.numel()}")
        mean, ci95 = mean_ci95(own)
        if pattern == full:
            drop = bound = 0.0
        elif relative:
            reference = float(base.mean())
            drop = float((base - own).mean()) / reference if reference > 0 else math.inf
            bound = ratio_upper_bound95(base - own, base)
        else:
            drop, bound = float((base - own).mean()), upper_bound95(base - own)
        admissible = pattern == full or (drop if rule == "point" else bound) <= max_drop + 1e-12
        rows.append(Candidate(pattern, mean, ci95, times_ms[pattern], drop, bound, admissible))
    rows.sort(key=lambda c: (c.time_ms, -c.accuracy, str(c.pattern)))
    return next(c.pattern for c in rows if c.admissible), Table(rows)


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
    patterns: Iterable[Pattern | str] | None = None,
    test_tasks: Sequence[Task] | None = None,
    timings: str | Path | None = None,
    seconds: float | None = 30.0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Selection:
    """Evaluate every pattern on the same validation `tasks`, time each, and take the fastest within `max_drop`.

    >>> chosen = select_pattern(model, tasks, steps=5, lr=0.03, patterns=["00001", "00011"], seconds=0.1)
    >>> sorted(str(candidate.pattern) for candidate in chosen.table)     # chosen.pattern is one of them
    ['00001', '00011', '11111']

    After Khabarlak 2022 (arXiv 2206.05930).

    steps, lr, norm: of the inner loop, as in `adapt`.
    patterns: candidates, default all 2^n - 1; the full pattern is always among them.
    max_drop: allowed drop of accuracy against the full pattern, a fraction; of the full accuracy if `relative`.
    rule: how an inner step goes, in place of `lr` (see `rules`); or how a drop is judged, "bound" or "point" (see
        `choose`), which `decide` says too.
    test_tasks: tasks to report the choice and the full pattern on, with the norms' statistics of the query images
        together and with those of the support set (see `adapt`); none of them may be among `tasks`.
    timings: pytest-benchmark's JSON to take the times from, see `read_timings`; else adaptation is timed here on the
        first task, all patterns and plain PyTorch interleaved, for about `seconds`.
    ranks: they divide the tasks; rank 0 alone measures times, while the others sleep. All get the same selection.

    Raises ValueError for an unknown rule, a negative max_drop, no tasks, or test tasks that were chosen on.
    """
    inner = rule if not isinstance(rule, str) and is_rule(rule) else None
    if inner is None and decide is None:
        decide, rule = str(rule), "bound"
    decide = decide or "bound"
    if decide not in ("bound", "point") or (inner is None and rule != "bound"):
        wrong = decide if decide not in ("bound", "point") else rule
        raise ValueError(f"rule is {wrong!r}, expected 'bound' or 'point', or an inner rule such as rules.adam(0.01)")
    descent: dict[str, Any] = {"lr": lr, "rule": inner}
    if not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop is {max_drop}, expected a fraction from 0 to 1")
    if not all(isinstance(task, Task) for task in tasks):
        raise TypeError("select_pattern: tasks must be a list of Task(xs, ys, xq, yq), as data.sample_tasks gives it")
    if not tasks:
        raise ValueError("select_pattern: there are no tasks")
    if test_tasks:
        _check_disjoint(tasks, test_tasks)
    layers = len(models.layer_names(model))
    full = Pattern.full(layers)
    given = Pattern.all(layers) if patterns is None else (Pattern.of(model, p) for p in patterns)
    candidates = list(dict.fromkeys([*given, full]))
    ways, shots = _ways_shots(tasks[0])
    xs, ys, xq, _ = (part[0] for part in stack(tasks[:1], model))
    warnings: list[str] = []
    if len(tasks) == 1 and decide == "bound":
        warnings.append("one task has no spread, so every bound is infinite and only the full pattern is admissible")
    elif len(tasks) < FEW_TASKS:
        warnings.append(f"the choice rests on {len(tasks)} tasks, fewer than {FEW_TASKS}: take more for a firm one")

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

    found: dict[Pattern, Evaluation] = {}
    for pattern in candidates:
        found[pattern] = evaluate(model, tasks, pattern=pattern, steps=steps, norm=norm, ranks=ranks, **descent)
        if progress is not None:
            progress(len(found), len(candidates), f"patterns, {pattern} at {found[pattern].mean:.1%}")

    def measure(patterns: Iterable[Pattern], **more: Any) -> dict[str, Timing]:
        return ranks.first(
            lambda: measure_times(
                model, xs, ys, patterns=patterns, steps=steps, norm=norm, stock=fault is None, **descent, **more
            )
        )

    plain = inner is None and isinstance(lr, (int, float))  # what plain PyTorch's loop is written for
    fault = None
    if plain:
        rate = float(lr)  # type: ignore[arg-type]
        fault = ranks.first(lambda: _disagreement(model, tasks[:DRAWS], steps=steps, lr=rate, norm=norm))
    if fault is not None:
        warnings.append(fault)
        external.pop(STOCK, None)
    times = external if timings is not None else measure(candidates, seconds=seconds, progress=progress)
    accuracies = {p: e.accuracies for p, e in found.items()}
    times_ms = {p: times[str(p)].median for p in candidates}
    pattern, table = choose(accuracies, times_ms, full, max_drop=max_drop, rule=decide, relative=relative)
    end_to_end: dict[str, float] = {}
    if timings is None:
        pair = measure([pattern, full], xq=xq, seconds=None if seconds is None else seconds / 4)
        end_to_end = {name: timing.median for name, timing in pair.items()}

    return Selection(
        pattern=pattern,
        table=table,
        settings={
            "network": network.get("network", type(model).__name__),
            "ways": ways, "shots": shots, "steps": steps, "lr": rates_in_json(lr, inner), "norm": norm,
            **({} if inner is None else {"inner_rule": repr(inner)}),
            "max_drop": max_drop, "rule": decide, "relative": relative,
        },
        times=times,
        end_to_end_ms=end_to_end,
        test=_on_test(model, test_tasks or [], pattern, full, steps=steps, norm=norm, ranks=ranks, **descent),
        environment=environment,
        full_pattern=full,
        warnings=warnings,
    )  # fmt: skip


def _disagreement(model: nn.Module, tasks: Sequence[Task], *, steps: int, lr: float, norm: str) -> str | None:
    """None where `adapt` agrees with plain PyTorch on one of the tasks, else the figures of the last one."""
    fault: str | None = None
    for task in tasks:
        xs, ys, _, _ = (part[0] for part in stack([task], model))
        fault = disagreement(model, xs, ys, steps=steps, lr=lr, norm=norm)
        if fault is None:
            break
    return fault


def _on_test(model: nn.Module, tasks: Sequence[Task], pattern: Pattern, full: Pattern, **inner: Any) -> dict[str, Any]:
    """The choice and the full pattern on `tasks`: query images together, and under "support" each by itself."""
    together, alone = (_compared(model, tasks, pattern, full, statistics=s, **inner) for s in STATISTICS)
    return {"tasks": len(tasks), **together, "support": alone}


def _compared(
    model: nn.Module, tasks: Sequence[Task], pattern: Pattern, full: Pattern, **inner: Any
) -> dict[str, float | None]:
    """Accuracies, and the drop (their difference) with its two-sided interval."""
    if not tasks:
        return {"full_accuracy": None, "chosen_accuracy": None, "drop": None, "drop_ci95": None}
    best = evaluate(model, tasks, pattern=full, **inner)
    own = best if pattern == full else evaluate(model, tasks, pattern=pattern, **inner)
    drop, ci95 = mean_ci95(best.accuracies - own.accuracies)
    return {
        "full_accuracy": best.mean,
        "chosen_accuracy": own.mean,
        "drop": drop,
        "drop_ci95": 0.0 if pattern == full else _finite(ci95),
    }


def rates_in_json(lr: Rate, rule: Rule | None) -> Any:
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


def _ways_shots(task: Task) -> tuple[int, int]:
    """Classes of the support set, and its images per class (the least, if they differ)."""
    classes, counts = task.ys.unique(return_counts=True)
    return classes.numel(), int(counts.min())


def _check_disjoint(tasks: Sequence[Task], test_tasks: Sequence[Task]) -> None:
    seen = {task.xs.cpu().numpy().tobytes() for task in tasks}
    for index, task in enumerate(test_tasks):
        if task.xs.cpu().numpy().tobytes() in seen:
            raise ValueError(f"test task {index} is one of the tasks that the pattern is chosen on: take other tasks")


_NUMBER, _MAYBE = (int, float), (int, float, type(None))
_CANDIDATE: dict[str, Any] = {
    "pattern": str, "accuracy": _NUMBER, "ci95": _MAYBE, "time_ms": _NUMBER, "drop": _MAYBE, "drop_bound": _MAYBE,
}  # fmt: skip
_ON_TEST = {"full_accuracy": _MAYBE, "chosen_accuracy": _MAYBE, "drop": _MAYBE, "drop_ci95": _MAYBE}
_FORM: dict[str, Any] = {
    "network": str, "ways": int, "shots": int, "steps": int, "lr": (int, float, list), "norm": str,
    "max_drop": _NUMBER, "rule": str,
    "chosen": _CANDIDATE,
    "full": {"pattern": str, "accuracy": _NUMBER, "ci95": _MAYBE, "time_ms": _NUMBER},
    "stock_full": {"pattern": str, "time_ms": _MAYBE},
    "test": {"tasks": int, **_ON_TEST},
    "candidates": list,
    "environment": dict,
}  # fmt: skip


def read_selection(path: str | Path) -> dict[str, Any]:
    """Read pattern.json back. Raises ValueError that names the file and the first field that is missing or wrong."""
    value = read_json(path)
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != 1:
        raise ValueError(f"{path}: schema is {schema}, expected 1: not a pattern.json of this version")
    own_rates = {"lr": object} if "inner_rule" in value else {}
    _check_form(f"{path}: ", value, {**_FORM, **own_rates})
    if "support" in value["test"]:  # files of before 2026-11-29 have none
        _check_form(f"{path}: test.support.", value["test"]["support"], _ON_TEST)
    for index, row in enumerate(value["candidates"]):
        _check_form(f"{path}: candidates[{index}].", row, _CANDIDATE)
        try:
            Pattern.parse(row["pattern"])
        except ValueError as error:
            raise ValueError(f"{path}: candidates[{index}].pattern: {error}") from error
        if row["time_ms"] <= 0:
            raise ValueError(f"{path}: candidates[{index}].time_ms is {row['time_ms']}, expected above 0")
    rows = {row["pattern"]: row for row in value["candidates"]}
    for key in ("chosen", "full"):
        row = rows.get(value[key]["pattern"])
        if row is None or row["time_ms"] != value[key]["time_ms"]:
            raise ValueError(f"{path}: {key} is {value[key]['pattern']}, which is not so among the candidates")
    return dict(value)


def _check_form(where: str, value: Any, form: Mapping[str, Any]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where.rstrip('.')} is {value!r}, expected an object")
    for key, kind in form.items():
        if key not in value:
            raise ValueError(f"{where}{key} is missing")
        found = value[key]
        if isinstance(kind, dict):
            _check_form(f"{where}{key}.", found, kind)
        elif not isinstance(found, kind) or isinstance(found, bool) or found in (math.inf, -math.inf) or found != found:
            raise ValueError(f"{where}{key} is {found!r}, which is no value for it")
