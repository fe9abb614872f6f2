"""Which patterns are compared, and which one is chosen by their scores and times (Khabarlak, arXiv 2206.05930)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .evaluate import ACCURACY
from .groups import parts_of
from .network import layers_of
from .patterns import Pattern
from .stats import mean_ci95, ratio_upper_bound95, upper_bound95

__all__ = ["Candidate", "Table", "candidates_of", "choose", "finite", "key_of"]

FEW_BITS = 8
"""Of so many bits all patterns are compared, 255 of them."""


class Candidate(NamedTuple):
    """One pattern: its mean score and the half width of the score's 95% interval, adaptation time (ms), the drop
    against the full pattern and its one-sided 95% upper bound (in the score's unit, a fraction for accuracy; of the
    full pattern's score if the drop is relative)."""

    pattern: Pattern
    score: float
    ci95: float
    time_ms: float
    drop: float
    drop_bound: float
    admissible: bool

    @property
    def accuracy(self) -> float:
        """The score, by its name where the metric is accuracy."""
        return self.score

    def to_dict(self, metric: str = ACCURACY) -> dict[str, Any]:
        """A row of pattern.json."""
        values = {key: finite(getattr(self, key)) for key in ("ci95", "time_ms", "drop", "drop_bound")}
        return {"pattern": str(self.pattern), key_of(metric): finite(self.score), **values}


class Table(list[Candidate]):
    """Candidates, the fastest first; prints as a table in plain text. `metric` names what the scores are."""

    def __init__(self, rows: Iterable[Candidate] = (), metric: str = ACCURACY) -> None:
        super().__init__(rows)
        self.metric = metric

    def __repr__(self) -> str:
        fastest = f", {self[0].pattern} the fastest" if self else ""
        return f"Table({len(self)} patterns by {self.metric}{fastest})"

    def __str__(self) -> str:
        percent = self.metric == ACCURACY
        width = max(len("pattern"), *(len(str(c.pattern)) for c in self)) if self else len("pattern")
        title = "accuracy %" if percent else self.metric
        rows = [("time ms", title, "±", "drop", "bound", "admissible")]
        for c in self:
            values = (f"{100 * v:.2f}" if percent else f"{v:.4g}" for v in (c.score, c.ci95, c.drop, c.drop_bound))
            score, ci95, drop, bound = ("?" if v in ("inf", "nan") else v for v in values)
            rows.append((f"{c.time_ms:.3f}", score, ci95, drop, bound, "yes" if c.admissible else "no"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows]
        names = ["pattern", *(str(c.pattern) for c in self)]
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


def choose(
    scores: Mapping[Pattern, Tensor], times_ms: Mapping[Pattern, float], full: Pattern, *, max_drop: float,
    rule: str = "bound", relative: bool = False, metric: str = ACCURACY, lower_is_better: bool = False,
) -> tuple[Pattern, Table]:  # fmt: skip
    """The fastest admissible pattern, and every candidate, from scores [tasks] on the same tasks and times.

    A pattern is admissible if its drop (rule "point") or the one-sided 95% upper bound of its drop over paired tasks
    (rule "bound", Student's t; Fieller's bound of the ratio if `relative`) is at most `max_drop`. `full` always is.
    The drop is how much worse the score is than the full pattern's. Equal times: the better score, then the pattern's
    text. The bound is for one pattern at a time: the best of many still looks better than it is, which is why the
    choice is reported on other tasks.
    """
    base, sign = scores[full].double(), -1 if lower_is_better else 1
    rows = []
    for pattern, own in scores.items():
        own = own.double()
        if own.shape != base.shape:
            raise ValueError(f"choose: {pattern} has {own.numel()} tasks, {full} has {base.numel()}")
        mean, ci95 = mean_ci95(own)
        worse = sign * (base - own)
        if pattern == full:
            drop = bound = 0.0
        elif relative:
            reference = float(base.mean())
            drop = float(worse.mean()) / reference if reference > 0 else math.inf
            bound = ratio_upper_bound95(worse, base)
        else:
            drop, bound = float(worse.mean()), upper_bound95(worse)
        admissible = pattern == full or (drop if rule == "point" else bound) <= max_drop + 1e-12
        rows.append(Candidate(pattern, mean, ci95, times_ms[pattern], drop, bound, admissible))
    rows.sort(key=lambda c: (c.time_ms, -sign * c.score, str(c.pattern)))
    return next(c.pattern for c in rows if c.admissible), Table(rows, metric)
