"""The inner loop of every candidate of a selection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .inner.checks import Loss
from .inner.rates import Rate
from .inner.rule import Rule
from .inner.rules import rule_of
from .patterns import Pattern
from .places import Solver
from .solved import check_inner
from .trials import Trial, trials_of

__all__ = ["InnerLoops"]


@dataclass(frozen=True)
class InnerLoops:
    """The numbers of steps and the rates that are compared, and what all candidates share."""

    counts: list[int]
    rates: list[Rate]
    rule: Rule | None
    norm: str
    loss: Loss
    solver: Solver | None

    def trials(self, patterns: Iterable[Pattern]) -> list[Trial]:
        counts = self.counts if len(self.counts) > 1 else [None]
        return trials_of(patterns, counts, self.rates if len(self.rates) > 1 else [None])  # type: ignore[arg-type]

    def descent(self, trial: Trial) -> dict[str, Any]:
        """Arguments of `adapt`, less the pattern."""
        rate = self.rates[0] if trial.rate is None else trial.rate
        own = {"steps": trial.steps or self.counts[0], "lr": rate}
        return {**own, "rule": self.rule, "norm": self.norm, "loss": self.loss, "solver": self.solver}

    def of(self, trial: Trial) -> dict[str, Any]:
        """Arguments of `adapt`."""
        return {**self.descent(trial), "pattern": trial.pattern}

    def check(self, model: nn.Module, xs: Tensor, ys: Tensor, trials: Iterable[Trial]) -> None:
        """ValueError where the rule or the solver does not fit one of the candidates."""
        if self.rule is None and self.solver is None:
            return
        for trial in trials:
            if not trial.pattern.rows:
                own = self.descent(trial)
                rule = rule_of(own["lr"], self.rule)
                check_inner(model, xs, ys, trial.pattern, own["steps"], self.norm, False, self.loss, rule, self.solver)
