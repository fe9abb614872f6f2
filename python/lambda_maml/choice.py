"""Which patterns are compared, and which one is chosen by their scores and times (Khabarlak, arXiv 2206.05930)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from .evaluate import ACCURACY
from .groups import parts_of
from .network import layers_of
from .patterns import Pattern
from .stats import mean_ci95, ratio_upper_bound95, upper_bound95
from .timing import Timing, is_tie, median_of
from .trials import Trial

__all__ = ["Budget", "Candidate", "Limit", "Table", "candidates_of", "choose", "finite", "front", "key_of", "tied"]

FEW_BITS = 8
"""Of so many bits all patterns are compared, 255 of them."""

Key = TypeVar("Key", Pattern, Trial)


class Budget(NamedTuple):
    """What an adaptation may take at most: milliseconds, and MB (10^6 bytes) above parameters and inputs."""

    time_ms: float | None = None
    memory_mb: float | None = None

    def holds(self, time_ms: float, memory_mb: float | None) -> bool:
        """Whether an adaptation of that time and memory is within it.

        >>> Budget(time_ms=2.0).holds(1.5, None), Budget(1.0, 64.0).holds(0.5, 80.0)
        (True, False)
        """
        short = self.time_ms is None or time_ms <= self.time_ms
        return short and (self.memory_mb is None or (memory_mb is not None and memory_mb <= self.memory_mb))

    def __str__(self) -> str:
        parts = ((self.time_ms, "ms"), (self.memory_mb, "MB"))
        return " and ".join(f"{value:g} {unit}" for value, unit in parts if value is not None)


class Candidate(NamedTuple):
    """One pattern: its mean score and the half width of the score's 95% interval, adaptation time (ms), the drop
    against the full pattern and its one-sided 95% upper bound (in the score's unit, a fraction for accuracy; of the
    full pattern's score if the drop is relative).

    tasks: on how many it was judged, always the first ones; fewer than all where a race dropped it. steps, lr: where
    several were compared. time: the median again, with its quartiles. memory_mb: where it was measured.
    """

    pattern: Pattern
    score: float
    ci95: float
    time_ms: float
    drop: float
    drop_bound: float
    admissible: bool
    tasks: int = 0
    steps: int | None = None
    lr: float | None = None
    time: Timing | None = None
    memory_mb: float | None = None

    @property
    def accuracy(self) -> float:
        """The score, by its name where the metric is accuracy."""
        return self.score

    @property
    def name(self) -> str:
        """The pattern, with its steps and rate where several were compared."""
        return str(Trial(self.pattern, self.steps, self.lr))

    def to_dict(self, metric: str = ACCURACY) -> dict[str, Any]:
        """A row of pattern.json."""
        values = {key: finite(getattr(self, key)) for key in ("ci95", "time_ms", "drop", "drop_bound")}
        row: dict[str, Any] = {"pattern": str(self.pattern), key_of(metric): finite(self.score), **values}
        row["tasks"] = self.tasks
        row |= {key: value for key in ("steps", "lr", "memory_mb") if (value := getattr(self, key)) is not None}
        if self.time is not None:
            row["time"] = {"low": self.time.q1, "median": self.time.median, "high": self.time.q3}
        return {**row, "admissible": self.admissible}


class Table(list[Candidate]):
    """Candidates, the fastest first; prints as a table in plain text. `metric` names what the scores are."""

    def __init__(self, rows: Iterable[Candidate] = (), metric: str = ACCURACY) -> None:
        super().__init__(rows)
        self.metric = metric

    def __repr__(self) -> str:
        fastest = f", {self[0].name} the fastest" if self else ""
        return f"Table({len(self)} patterns by {self.metric}{fastest})"

    def __str__(self) -> str:
        percent = self.metric == ACCURACY
        width = max(len("pattern"), *(len(c.name) for c in self)) if self else len("pattern")
        title = "accuracy %" if percent else self.metric
        raced = len({c.tasks for c in self}) > 1
        rows = [("time ms", "quartiles", title, "±", "drop", "bound", "admissible", *["tasks"] * raced)]
        for c in self:
            values = (f"{100 * v:.2f}" if percent else f"{v:.4g}" for v in (c.score, c.ci95, c.drop, c.drop_bound))
            score, ci95, drop, bound = ("?" if v in ("inf", "nan") else v for v in values)
            spread = "" if c.time is None else f"{c.time.q1:.3f}-{c.time.q3:.3f}"
            rows.append(
                (f"{c.time_ms:.3f}", spread, score, ci95, drop, bound, "yes" if c.admissible else "no",
                 *[str(c.tasks)] * raced)
            )  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths) if w) for row in rows]
        names = ["pattern", *(c.name for c in self)]
        return "\n".join(f"{name:<{width}}  {line}" for name, line in zip(names, lines))


def key_of(metric: str) -> str:
    """What pattern.json calls a pattern's score."""
    return ACCURACY if metric == ACCURACY else "score"


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def candidates_of(model: nn.Module, patterns: Iterable[Pattern | str] | None) -> list[Pattern]:
    """The patterns to compare, each once, all layers (the full pattern) last unless it is named before.

    By default all 2^n - 1 of n layers, for networks of at most 8 layers. Of a deeper one, bits are given by its parts
    (those of "stages:..."), if there are at most 8; else each pattern updates the last k layers, k = 1..n.

    >>> [str(pattern) for pattern in candidates_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), None)]
    ['01', '10', '11']
    """
    names = [layer.name for layer in layers_of(model)]
    layers = len(names)
    full = Pattern.full(layers)
    if patterns is not None:
        given: Iterable[Pattern] = (Pattern.of(model, p) for p in patterns)
    elif layers <= FEW_BITS:
        given = Pattern.all(layers)
    elif 1 < (parts := len(parts_of(names)[1])) <= FEW_BITS:
        given = (Pattern.of(model, f"stages:{bits}") for bits in Pattern.all(parts))
    else:
        given = (Pattern("0" * (layers - k) + "1" * k) for k in range(1, layers + 1))
    return list(dict.fromkeys([*given, full]))


def front(rows: Iterable[Candidate]) -> list[Candidate]:
    """The Pareto front of rows that are sorted by time: those whose drop is lower than that of every faster one.

    Drops are of paired tasks, so that candidates of which a race saw fewer tasks stand beside the others.
    """
    found: list[Candidate] = []
    for row in rows:
        if not found or row.drop < found[-1].drop:
            found.append(row)
    return found


def tied(keys: Sequence[Key], times_ms: Mapping[Key, float | Timing]) -> list[Key]:
    """The first of the keys, and those whose times are a tie with its own (`timing.is_tie`)."""
    return [key for key in keys if key == keys[0] or is_tie(times_ms[key], times_ms[keys[0]])]


def choose(
    scores: Mapping[Key, Tensor], times_ms: Mapping[Key, float | Timing], full: Key, *, max_drop: float = 0.01,
    rule: str = "bound", relative: bool = False, metric: str = ACCURACY, lower_is_better: bool = False,
    budget: Budget | None = None, memory_mb: Mapping[Key, float] | None = None, raced: Collection[Key] = (),
) -> tuple[Key, Table]:  # fmt: skip
    """The fastest admissible pattern, and every candidate, from scores [tasks] on the same tasks and times.

    A pattern is admissible if its drop (rule "point") or the one-sided 95% upper bound of its drop over paired tasks
    (rule "bound", Student's t; Fieller's bound of the ratio if `relative`) is at most `max_drop`. `full` always is.
    The drop is how much worse the score is than the full pattern's. Times that are a tie with the fastest admissible
    pattern's (`timing.is_tie`; equal ones are): the better score, then the pattern's text. The bound is for one pattern
    at a time: the best of many still looks better than it is, which is why the choice is reported on other tasks.

    With a `budget`, admissible is what it holds, and the most accurate of these is taken. `raced` may have fewer
    scores, those of the first tasks, and are not taken.

    Raises ValueError for other numbers of tasks, and where the budget holds none.
    """
    base, sign = scores[full].double(), -1 if lower_is_better else 1
    found: dict[Key, Candidate] = {}
    for key, own in scores.items():
        own, n = own.double(), own.numel()
        if own.shape != base.shape and not (key in raced and 0 < n < base.numel()):
            raise ValueError(f"choose: {key} has {own.numel()} tasks, {full} has {base.numel()}")
        mean, ci95 = mean_ci95(own)
        worse = sign * (base[:n] - own)
        if key == full:
            drop = bound = 0.0
        elif relative:
            reference = float(base[:n].mean())
            drop = float(worse.mean()) / reference if reference > 0 else math.inf
            bound = ratio_upper_bound95(worse, base[:n])
        else:
            drop, bound = float(worse.mean()), upper_bound95(worse)
        time, memory = times_ms[key], None if memory_mb is None else memory_mb[key]
        if budget is not None:
            admissible = budget.holds(median_of(time), memory)
        else:
            admissible = key == full or (key not in raced and (drop if rule == "point" else bound) <= max_drop + 1e-12)
        found[key] = Candidate(
            pattern_of(key), mean, ci95, median_of(time), drop, bound, admissible, n,
            key.steps if isinstance(key, Trial) else None, key.rate if isinstance(key, Trial) else None,
            time if isinstance(time, Timing) else None, memory,
        )  # fmt: skip
    ordered = sorted(found, key=lambda k: (found[k].time_ms, -sign * found[k].score, str(k)))
    table = Table((found[k] for k in ordered), metric)
    admitted = [k for k in ordered if found[k].admissible and k not in raced]
    if not admitted:
        raise ValueError("choose: no pattern is admissible")
    if budget is None:
        admitted = tied(admitted, times_ms)
    return max(admitted, key=lambda k: sign * found[k].score), table


@dataclass(frozen=True)
class Limit:
    """What a choice is made by: an allowed drop, or a budget in its place; see `choose`.

    >>> Limit.of(None, "point", max_time=2.0).budget
    Budget(time_ms=2.0, memory_mb=None)

    Raises:
        ValueError: a number is out of range, or both are given.
    """

    max_drop: float = 0.01
    decide: str = "bound"
    relative: bool = False
    budget: Budget | None = None
    metric: str = ACCURACY
    lower_is_better: bool = False

    @classmethod
    def of(
        cls, max_drop: float | None, decide: str, relative: bool = False, max_time: float | None = None,
        max_memory: float | None = None, metric: str = ACCURACY, lower_is_better: bool = False,
    ) -> Limit:  # fmt: skip
        budget = None
        if max_time is not None or max_memory is not None:
            if max_drop is not None or relative:
                raise ValueError(
                    f"a budget ({Budget(max_time, max_memory)}) takes the place of an allowed drop: leave max_drop and "
                    "relative out"
                )
            for name, value in (("max_time", max_time), ("max_memory", max_memory)):
                if value is not None and not 0 < value < math.inf:
                    raise ValueError(f"{name} is {value}, expected a finite number above 0")
            budget = Budget(max_time, max_memory)
        return cls(0.01 if max_drop is None else max_drop, decide, relative, budget, metric, lower_is_better)

    def __post_init__(self) -> None:
        most = 1.0 if self.metric == ACCURACY or self.relative else math.inf
        if not 0 <= self.max_drop <= most or self.max_drop == math.inf:
            allowed = "a fraction from 0 to 1" if most == 1 else "0 or more"
            raise ValueError(f"max_drop is {self.max_drop}, expected {allowed}")

    @property
    def sign(self) -> int:
        """Of a difference of scores that is positive where the first one is better."""
        return -1 if self.lower_is_better else 1

    def excess(self, base: Tensor, own: Tensor) -> Tensor:
        """By how much scores [tasks] go beyond what is allowed against `base`, task by task: a pattern is admissible
        where the mean is at most 0, or the mean's bound."""
        allowed = self.max_drop * (base if self.relative else 1.0)
        return self.sign * (base - own) - allowed

    def choose(
        self, scores: Mapping[Key, Tensor], times: Mapping[Key, float | Timing], full: Key,
        memory_mb: Mapping[Key, float] | None = None,
    ) -> tuple[Key, Table]:  # fmt: skip
        """`choose`, of which those with fewer scores than `full` are ruled out."""
        return choose(
            scores, times, full, max_drop=self.max_drop, rule=self.decide, relative=self.relative, metric=self.metric,
            lower_is_better=self.lower_is_better, budget=self.budget, memory_mb=memory_mb,
            raced=[key for key, own in scores.items() if len(own) < len(scores[full])],
        )  # fmt: skip

    def check_budget(self, times: Mapping[Key, float | Timing], memory_mb: Mapping[Key, float] | None = None) -> None:
        """ValueError where the budget holds no candidate; names the best there is."""
        rows = [(str(k), median_of(ms), None if memory_mb is None else memory_mb[k]) for k, ms in times.items()]
        if self.budget is not None and not any(self.budget.holds(ms, mb) for _, ms, mb in rows):
            raise ValueError(none_within(self.budget, rows))

    def alone(self, table: Table) -> str | None:
        """That no pattern but the full one is admissible, and the best there is; else None."""
        others = [row for row in table if row.drop or row.drop_bound]
        if self.budget is not None or not others or any(row.admissible for row in others):
            return None
        of, key = ("the drop", "drop") if self.decide == "point" else ("the drop's bound", "drop_bound")
        best = min(others, key=lambda row: getattr(row, key))
        value = getattr(best, key)
        if not math.isfinite(value):
            return None
        unit = "" if self.metric != ACCURACY or self.relative else " points"
        told = [f"{100 * v:.2f}{unit}" if unit else f"{v:.4g}" for v in (self.max_drop, value)]
        return f"no pattern but the full one is within {told[0]}: {of} of the best other one, {best.name}, is {told[1]}"

    def to_dict(self) -> dict[str, Any]:
        """The fields of pattern.json."""
        own = {"max_drop": self.max_drop, "rule": self.decide, "relative": self.relative}
        return own if self.budget is None else {**own, "max_drop": None, "budget": self.budget._asdict()}


def pattern_of(key: Pattern | Trial) -> Pattern:
    """The pattern of a candidate."""
    return key.pattern if isinstance(key, Trial) else key


def none_within(budget: Budget, rows: Iterable[tuple[str, float, float | None]]) -> str:
    """That a budget holds no candidate, and the best there is, of names, times (ms) and memory (MB)."""
    rows = list(rows)
    told = f"no pattern adapts within {budget}"
    if budget.time_ms is not None:
        name, ms, _ = min(rows, key=lambda row: row[1])
        told += f"; the fastest is {name} with {ms:.3g} ms"
    if budget.memory_mb is not None:
        name, _, least = min(rows, key=lambda row: math.inf if row[2] is None else row[2])
        told += f"; the smallest is {name}" + ("" if least is None else f" with {least:.3g} MB")
    return f"{told}: allow more, or take fewer steps or a smaller network"
