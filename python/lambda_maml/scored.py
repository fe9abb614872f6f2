"""The scores of a selection's candidates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .data.episodes import Task
from .evaluate import evaluate, name_of, worded
from .per_task import values_of
from .progress import Progress
from .remembered_scores import Scores
from .trial_loops import InnerLoops
from .trials import Trial

__all__ = ["Scored"]


class Scored:
    """The scores of candidates on the first so many tasks, evaluated as they are asked for, and kept."""

    def __init__(
        self, model: nn.Module, tasks: Sequence[Task], loops: InnerLoops, judged: Mapping[str, Any], kept: Scores,
        told: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.tasks, self.loops, self.judged = model, tasks, loops, judged
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
        how = {**self.loops.of(trial), **self.judged}
        return evaluate(self.model, self.tasks[begin:end], first=begin, **how).scores

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
            known = values_of(statistic, self.model, self.tasks, **self.loops.of(trial), **more)
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
