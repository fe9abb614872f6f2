"""A selection that was made: what was chosen, and everything that it was chosen by."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .choice import Candidate, Table, front
from .evaluate import worded
from .files import write_json
from .patterns import Pattern
from .per_task import PerTask
from .timing import STOCK, Timing
from .trials import Trial

__all__ = ["Selection"]


@dataclass(frozen=True)
class Selection:
    """What `select_pattern` chose, and everything that it chose by.

    trial, full_trial: the choice and the full pattern that it is measured against, with their steps and rates where
    several were compared; `steps` and `lr` are always the choice's. times, end_to_end_ms: by `Trial.timed`. per_task:
    a rule that beat the choice at its time, where one was asked for and found; see `PerTask`.
    """

    trial: Trial
    full_trial: Trial
    table: Table
    settings: dict[str, Any]
    times: dict[str, Timing]
    end_to_end_ms: dict[str, float]
    test: dict[str, Any]
    environment: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    per_task: PerTask | None = None

    @property
    def pattern(self) -> Pattern:
        return self.trial.pattern

    @property
    def full_pattern(self) -> Pattern:
        return self.full_trial.pattern

    @property
    def steps(self) -> int:
        """The choice's number of steps."""
        return int(self.settings["steps"])

    @property
    def front(self) -> list[Candidate]:
        """Candidates that no other one beats in both time and score, the fastest first."""
        return front(self.table)

    def __repr__(self) -> str:
        rows = [(c, worded(c.score, self.table.metric), c.time_ms) for c in self.table]
        told = [f"{c.name} {s} in {ms:.3g} ms" for c, s, ms in rows if trial_of(c) in (self.trial, self.full_trial)]
        return f"Selection({self.pattern} of {len(rows)} patterns: {', '.join(told)})"

    def __getitem__(self, pattern: Pattern | str | Trial) -> Candidate:
        """The candidate of this pattern; of several with other steps and rates the fastest, unless a `Trial` says
        which."""
        wanted = pattern if isinstance(pattern, Trial) else Pattern.parse(pattern)
        for candidate in self.table:
            if wanted in (candidate.pattern, trial_of(candidate)):
                return candidate
        raise KeyError(f"{wanted} is none of the candidates: {', '.join(c.name for c in self.table)}")

    def to_dict(self) -> dict[str, Any]:
        """The form of pattern.json, schema 1: times in ms, accuracies as fractions, None for what is undefined.
        Those of another metric are called scores, and `metric` names it."""
        rows = {trial_of(c): c.to_dict(self.table.metric) for c in self.table}
        places = {trial: at for at, trial in enumerate(rows)}
        stock, end, rule = self.times.get(STOCK), self.end_to_end_ms, self.per_task
        full = {k: v for k, v in rows[self.full_trial].items() if k not in ("drop", "drop_bound", "admissible")}
        return {
            "schema": 1,
            **self.settings,
            "chosen": {**rows[self.trial], "end_to_end_ms": end.get(self.trial.timed)},
            "full": {**full, "end_to_end_ms": end.get(self.full_trial.timed)},
            "stock_full": {
                "pattern": str(self.full_pattern),
                "time_ms": stock.median if stock else None,
                "end_to_end_ms": end.get(STOCK),
                **({} if stock is None else {"time": {"low": stock.q1, "median": stock.median, "high": stock.q3}}),
            },
            "test": self.test,
            "candidates": list(rows.values()),
            "front": [places[trial_of(c)] for c in self.front],
            **({} if rule is None else {"per_task": rule.to_dict(places, self.table.metric)}),
            "environment": self.environment,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write pattern.json, atomically."""
        write_json(path, self.to_dict())


def trial_of(candidate: Candidate) -> Trial:
    """What a row of the table was made of."""
    return Trial(candidate.pattern, candidate.steps, candidate.lr)
