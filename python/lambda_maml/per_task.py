"""A pattern for each task: adapt by a cheap one, and where a statistic is beyond a threshold anew by a dearer one.

The statistic knows no query label: the mean entropy of the query predictions, or the support loss, both of the network
that the cheap pattern adapted. Patterns, statistic and threshold are fitted on validation tasks: of the rules whose
mean time is at most the fixed choice's, the one of the best mean score. Of many rules the best one looks better than it
is, so it is judged by cross-fitting: what is fitted on the tasks of even numbers is judged on those of odd ones, and
the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapt import adapt as adapt_model
from .choice import finite, key_of
from .data.episodes import Task, as_tasks
from .evaluate import ACCURACY, Evaluation, Metric, evaluate, name_of
from .inner.checks import Loss
from .learner import Learner
from .patterns import Pattern
from .progress import Progress
from .ranks import ALONE, Ranks
from .stats import mean_ci95
from .trials import Trial

__all__ = ["FEWEST", "Adapted", "Costs", "Figures", "Known", "PerTask", "entropy", "fit", "kinds_of", "values_of"]

ENTROPY, SUPPORT_LOSS = "entropy", "support_loss"
WORDS = {ENTROPY: "the entropy of the query predictions", SUPPORT_LOSS: "the support loss after adaptation"}
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Of the tasks that a rule is fitted on, the shares that lie beyond the thresholds that are tried."""
FEWEST = 20
"""On fewer tasks than these no rule is judged."""


def entropy(logits: Tensor, targets: object = None) -> float:
    """Mean entropy of the predictions of logits [Q, ways], in nats; it knows no target.

    >>> round(entropy(torch.zeros(3, 2)), 4), round(entropy(torch.tensor([[50.0, 0.0]])), 4)
    (0.6931, 0.0)
    """
    logs = logits.double().log_softmax(-1)
    return float(-(logs.exp() * logs).sum(-1).mean())


def kinds_of(metric: str) -> tuple[str, ...]:
    """The statistics that a selection by this metric tries: results that have no accuracy are no logits.

    >>> kinds_of("accuracy"), kinds_of("mse_loss")
    (('entropy', 'support_loss'), ('support_loss',))
    """
    return (ENTROPY, SUPPORT_LOSS) if metric == ACCURACY else (SUPPORT_LOSS,)


def values_of(
    statistic: str, model: nn.Module, tasks: Sequence[Task], *, loss: Loss = F.cross_entropy, **how: Any
) -> Tensor:  # fmt: skip
    """The statistic of each task, float64 [T], adapted as `evaluate` does it.

    >>> values_of("support_loss", model, tasks, pattern="00001", steps=5, lr=0.03).shape
    torch.Size([2])
    """
    if statistic == ENTROPY:
        return evaluate(model, tasks, metric=entropy, loss=loss, **how).scores
    own = [Task(xs, ys, xs, ys) for xs, ys, *_ in tasks]
    return evaluate(model, own, metric=loss, loss=loss, **how).scores


class Figures(NamedTuple):
    """What a rule is worth on so many tasks: the share of them that is adapted to anew, its mean time (ms), its mean
    score, and the mean of paired differences to the fixed choice's scores (above 0 where the rule is better) with the
    half width of its 95% interval."""

    tasks: int
    share: float
    time_ms: float
    score: float
    gain: float
    ci95: float

    def to_dict(self, metric: str) -> dict[str, Any]:
        """As pattern.json has them."""
        own = {"tasks": self.tasks, "share": self.share, "time_ms": self.time_ms, key_of(metric): self.score}
        return {**own, "gain": self.gain, "gain_ci95": finite(self.ci95)}


class Adapted(NamedTuple):
    """What `PerTask.adapt` gives: the adapted network, by which candidate it was adapted, and its query result, which
    is no part of a graph."""

    learner: Learner
    trial: Trial
    result: Any


@dataclass(frozen=True)
class PerTask:
    """A rule in two stages: adapt by `cheap`; where the `statistic` is above the threshold, adapt anew by `dear`.

    >>> rule = PerTask(Trial(Pattern("00001")), Trial(Pattern("00111")), "entropy", 1.2)
    >>> adapted = rule.adapt(model, xs, ys, xq, steps=5, lr=0.03)
    >>> adapted.trial in (rule.cheap, rule.dear), adapted.result.shape
    (True, torch.Size([75, 5]))

    statistic: "entropy", of the query predictions, or "support_loss", after the adaptation.
    statistics: the norms' statistics, as in `adapt`, by which the threshold was fitted.
    figures: cross-fitted on validation tasks; test: of the rule on tasks that it was not fitted on.
    """

    cheap: Trial
    dear: Trial
    statistic: str
    threshold: float
    statistics: str = "batch"
    figures: Figures | None = None
    test: Figures | None = None

    def __str__(self) -> str:
        return f"{self.cheap}, and anew {self.dear} where {WORDS[self.statistic]} is above {self.threshold:.3g}"

    def inner(self, trial: Trial, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `adapt` for one of the two, whose own steps and rate take the place of the given ones."""
        steps = {} if trial.steps is None else {"steps": trial.steps}
        rate = {} if trial.rate is None else {"lr": trial.rate, "rule": None}
        return {**given, "pattern": trial.pattern, **steps, **rate}

    def adapt(
        self, model: nn.Module, xs: Any, ys: Any, xq: Any, *, statistics: str | None = None, **inner: Any
    ) -> Adapted:  # fmt: skip
        """Adapt to one task as `lambda_maml.adapt` does under the one pattern or the other, and classify xq.

        The cheap pattern's learner was called once, with xq or xs, which updates running statistics where it has some.

        statistics: of the network that is given; default: the rule's own, by which it decides always. inner: steps, lr,
        norm, loss and the others of `adapt`; those that the rule was fitted with. Raises as `adapt`.
        """
        learner = adapt_model(model, xs, ys, statistics=self.statistics, **self.inner(self.cheap, inner))
        result = None
        with torch.no_grad():
            if self.statistic == ENTROPY:
                result = learner(xq)
                value = entropy(result)
            else:
                value = float(inner.get("loss", F.cross_entropy)(learner(xs), ys))
        trial = self.dear if value > self.threshold else self.cheap
        if trial != self.cheap or statistics not in (None, self.statistics):
            of = statistics or self.statistics
            learner, result = adapt_model(model, xs, ys, statistics=of, **self.inner(trial, inner)), None
        with torch.no_grad():
            return Adapted(learner, trial, learner(xq) if result is None else result)

    def decide(self, model: nn.Module, tasks: Sequence[Task], *, ranks: Ranks = ALONE, **inner: Any) -> Tensor:
        """Which tasks are adapted to anew, bool [T]; `inner` as in `adapt`."""
        how = {"ranks": ranks, "statistics": self.statistics, **self.inner(self.cheap, inner)}
        return values_of(self.statistic, model, as_tasks(tasks, "PerTask.decide"), **how) > self.threshold

    def evaluate(
        self, model: nn.Module, tasks: Sequence[Task], again: Tensor, *, metric: Metric = ACCURACY,
        statistics: str | None = None, ranks: Ranks = ALONE, progress: Progress | bool | None = None, **inner: Any,
    ) -> Evaluation:  # fmt: skip
        """The scores of tasks, as `evaluate` gives them, of which those of `again`, what `decide` gave, by `dear`."""
        scores = torch.zeros(len(tasks), dtype=torch.float64)
        for trial, rows in ((self.cheap, (~again).nonzero()), (self.dear, again.nonzero())):
            places = rows.flatten().tolist()
            if places:
                how = {"metric": metric, "ranks": ranks, "progress": progress, **self.inner(trial, inner)}
                part = [tasks[i] for i in places]
                scores[places] = evaluate(model, part, statistics=statistics or self.statistics, **how).scores
        return Evaluation(scores, *mean_ci95(scores), name_of(metric))

    def worth(self, metric: str, figures: Figures | None = None) -> str:
        """Its figures, or others, for people."""
        own = figures or self.figures
        assert own is not None
        factor, unit = (100, " points") if metric == ACCURACY else (1, "")
        gain, ci95 = (f"{factor * v:.3g}" if factor == 1 else f"{factor * v:.2f}" for v in (own.gain, own.ci95))
        return f"{own.time_ms:.3g} ms on average, {own.share:.0%} of tasks anew, gain {gain} ± {ci95}{unit}"

    def to_dict(self, places: Mapping[Trial, int], metric: str) -> dict[str, Any]:
        """The field of pattern.json: the two patterns as rows of the candidates."""
        assert self.figures is not None
        return {
            "cheap": places[self.cheap], "dear": places[self.dear], "statistic": self.statistic,
            "threshold": self.threshold, **self.figures.to_dict(metric),
            "test": None if self.test is None else self.test.to_dict(metric),
        }  # fmt: skip

    @classmethod
    def of(cls, selection: Mapping[str, Any]) -> PerTask | None:
        """The rule of a pattern.json that was read; None where it has none.

        >>> PerTask.of({"per_task": None}) is None
        True
        """
        own = selection.get("per_task")
        if own is None:
            return None
        rows = [selection["candidates"][own[key]] for key in ("cheap", "dear")]
        cheap, dear = (Trial(Pattern.parse(row["pattern"]), row.get("steps"), row.get("lr")) for row in rows)
        key = key_of(selection.get("metric", ACCURACY))

        def figures(of: Mapping[str, Any] | None) -> Figures | None:
            if of is None:
                return None
            ci95 = torch.inf if of["gain_ci95"] is None else of["gain_ci95"]
            return Figures(of["tasks"], of["share"], of["time_ms"], of[key], of["gain"], ci95)

        return cls(
            cheap, dear, own["statistic"], own["threshold"], selection.get("statistics", "batch"), figures(own),
            figures(own.get("test")),
        )  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Milliseconds: of adapting by each candidate, as the table has them, and of what a rule does besides: a pass over
    the query set and over the support set, and, where norms get the support set's statistics, that."""

    adapting: Mapping[Trial, float]
    query: float = 0.0
    support: float = 0.0
    freezing: float = 0.0

    def mean(self, rule: PerTask, share: float) -> float:
        """The mean time of a rule that adapts anew to this share of the tasks. The one pass over the query set that
        every adaptation is followed by is not in it, as it is in no adaptation time.

        >>> a, b = Trial(Pattern("01")), Trial(Pattern("11"))
        >>> Costs({a: 1.0, b: 4.0}, query=2.0).mean(PerTask(a, b, "entropy", 0.5), 0.25)
        2.5
        """
        always, anew = (0.0, self.query) if rule.statistic == ENTROPY else (self.support, 0.0)
        return self.adapting[rule.cheap] + always + share * (self.adapting[rule.dear] + anew + self.freezing)


@dataclass(frozen=True)
class Known:
    """What a rule is fitted on: the scores [T] of candidates on the same tasks, and the statistics [T] of those that
    adapt faster than the fixed choice. sign: as `Goal` has it."""

    scores: Mapping[Trial, Tensor]
    values: Mapping[tuple[Trial, str], Tensor]
    costs: Costs
    fixed: Trial
    statistics: str = "batch"
    sign: int = 1

    def scored(self, rule: PerTask, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of a rule on tasks, and to which of them it adapts anew."""
        again = self.values[rule.cheap, rule.statistic][rows] > rule.threshold
        return torch.where(again, self.scores[rule.dear][rows], self.scores[rule.cheap][rows]), again

    def best(self, rows: Tensor) -> PerTask | None:
        """The rule of the best mean score on these tasks within the fixed choice's time; None where there is none."""
        found, most, ms = None, -torch.inf, self.costs.adapting
        for (cheap, statistic), values in self.values.items():
            levels = values[rows].quantile(torch.tensor([1 - share for share in SHARES], dtype=values.dtype)).tolist()
            for dear in (trial for trial in self.scores if ms[trial] > ms[cheap]):
                for level in dict.fromkeys(levels):
                    rule = PerTask(cheap, dear, statistic, level, self.statistics)
                    scores, again = self.scored(rule, rows)
                    worth = self.sign * float(scores.mean())
                    if worth > most and self.costs.mean(rule, float(again.double().mean())) <= ms[self.fixed]:
                        found, most = rule, worth
        return found


def fit(known: Known) -> tuple[PerTask | None, bool]:
    """The rule that all tasks give, with cross-fitted figures, and whether it beats the fixed choice: the 95% interval
    of its paired gain lies above 0, at a mean time that is not above the fixed choice's.

    None where no two of the candidates fit into that time.
    """
    fixed = known.scores[known.fixed]
    n = len(fixed)
    halves = torch.arange(0, n, 2), torch.arange(1, n, 2)
    whole, parts = known.best(torch.arange(n)), [known.best(rows) for rows in halves]
    if whole is None:
        return None, False
    scores, ms, share = fixed.clone(), known.costs.adapting[known.fixed], 0.0
    times = torch.full((n,), ms, dtype=torch.float64)  # where a half has no rule that fits, the fixed choice stays
    for rule, rows in zip(parts, reversed(halves)):
        if rule is not None:
            scores[rows], again = known.scored(rule, rows)
            own = float(again.double().mean())
            times[rows] = known.costs.mean(rule, own)
            share += own * len(rows) / n
    gain, ci95 = mean_ci95(known.sign * (scores - fixed))
    time = float(times.mean())
    figures = Figures(n, share, time, float(scores.mean()), gain, ci95)
    return replace(whole, figures=figures), gain - ci95 > 0 and time <= ms * (1 + 1e-12)
