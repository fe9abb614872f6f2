"""Query results of an adapted model, judged task by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapt import STATISTICS, adapt, adapt_tasks
from .data.episodes import Task, as_tasks
from .inner import batch as batches
from .inner.checks import LEFT_OUT, Loss
from .inner.problem import Turn
from .inner.rates import DEFAULT_LR, Rate
from .inner.rule import Rule
from .patterns import Pattern
from .places import PatternChooser, Solver
from .progress import Progress, shown
from .ranks import ALONE, Ranks
from .stats import mean_ci95

__all__ = [
    "ACCURACY",
    "Evaluation",
    "Metric",
    "check_metric",
    "evaluate",
    "evaluate_both",
    "name_of",
    "stack",
    "worded",
]

ACCURACY = "accuracy"
"""The share of a task's query images that are classified right, a fraction."""

Metric = str | Callable[[Any, Any], Any]
"""`ACCURACY`, or a function of one task's query result and target that gives a number, such as F.mse_loss."""


class Evaluation(NamedTuple):
    """A score per task, their mean and the half width of its 95% interval, and the metric's name."""

    scores: Tensor
    mean: float
    ci95: float
    metric: str = ACCURACY

    @property
    def accuracies(self) -> Tensor:
        """The scores, by their name where the metric is accuracy."""
        return self.scores

    def __repr__(self) -> str:
        return f"Evaluation({self.metric} {self.mean:.4g} ± {self.ci95:.2g} over {len(self.scores)} tasks)"


def stack(tasks: Sequence[Task], model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tasks of equal shapes as xs [T, N, C, H, W], ys [T, N], xq [T, Q, C, H, W], yq [T, Q], on the model's device;
    inputs, and targets that are no whole numbers, in its dtype."""
    weight = next(model.parameters())
    xs, ys, xq, yq = (torch.stack(parts).to(weight.device) for parts in zip(*tasks, strict=True))
    ys, yq = (y.to(weight.dtype) if y.is_floating_point() else y for y in (ys, yq))
    return xs.to(weight.dtype), ys, xq.to(weight.dtype), yq


def name_of(metric: Metric) -> str:
    """What tables and files call a metric.

    >>> name_of(F.mse_loss)
    'mse_loss'

    Raises ValueError for what is none.
    """
    if metric == ACCURACY:
        return ACCURACY
    if isinstance(metric, str) or not callable(metric):
        raise ValueError(
            f"metric is {metric!r}, expected {ACCURACY!r} or a function (result, target) -> a number, such as "
            "torch.nn.functional.mse_loss"
        )
    return str(getattr(metric, "__name__", type(metric).__name__))


def worded(score: float, metric: str) -> str:
    """A score for people.

    >>> worded(0.975, "accuracy"), worded(0.0123456, "mse_loss")
    ('97.5%', 'mse_loss 0.01235')
    """
    return f"{score:.1%}" if metric == ACCURACY else f"{metric} {score:.4g}"


def check_metric(metric: Metric, tasks: Sequence[Task]) -> None:
    """ValueError for what is no metric, and for accuracy where targets are no class numbers."""
    if name_of(metric) == ACCURACY and tasks and tasks[0].yq.is_floating_point():
        raise ValueError(
            f"the targets are {str(tasks[0].yq.dtype).removeprefix('torch.')}, which have no accuracy: give "
            "loss= and metric=, functions such as torch.nn.functional.mse_loss"
        )


def evaluate(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    pattern: Pattern | str | PatternChooser,
    steps: int = 5,
    lr: Rate = DEFAULT_LR,
    rule: Rule | None = None,
    norm: str = "follow",
    loss: Loss = F.cross_entropy,
    metric: Metric = ACCURACY,
    statistics: str = "batch",
    batch: int = 16,
    progress: Progress | bool | None = None,
    ranks: Ranks = ALONE,
    solver: Solver | None = None,
    first: int = 0,
) -> Evaluation:
    """Adapt to each task's support set and judge the result for its query set; a task is a `Task`, or a plain tuple of
    its parts.

    The scores (float64, [len(tasks)]) stay in the order of `tasks`, so that two patterns can be compared task by task.
    Of `batch` tasks at a time, those of equal shapes are adapted together; they may differ in their numbers of images,
    ways and queries. `lr`, `rule`, `loss`, `statistics` and `solver` are those of `adapt`. The `ranks` divide the tasks
    and get the same scores.

    >>> evaluate(model, tasks, pattern="00011", steps=5, lr=0.03)
    Evaluation(accuracy ... ± ... over 2 tasks)

    metric: "accuracy", a fraction, or a function that is called for one task with its query result and target, and
        gives a number: `loss=F.mse_loss, metric=F.mse_loss` for regression.
    progress: called as progress(done, total, what); True shows a bar, or lines, on stderr.
    first: the number of the first task, where `tasks` are the later part of a list; what is random goes by it.

    Raises ValueError without tasks, for an unknown metric, or one that gives an infinite number or NaN.
    """
    tasks = _checked(tasks, metric)
    share = ranks.share(len(tasks))

    def fill(scores: Tensor) -> None:
        for begin in range(share.start, share.stop, batch):
            part = tasks[begin : min(begin + batch, share.stop)]
            for places in batches.alike(part):
                xs, ys, xq, yq = stack([part[i] for i in places], model)
                with torch.no_grad():  # the query pass; adapt_tasks turns gradients on for itself
                    results = adapt_tasks(
                        model, xs, ys, xq, pattern=pattern, steps=steps, lr=lr, rule=rule, norm=norm, loss=loss,
                        statistics=statistics, solver=solver, turns=[Turn(task=first + begin + i) for i in places],
                    )  # fmt: skip
                    found = _judged(metric, results, yq)
                scores[[begin + i for i in places]] = found.to(scores.device)
            if told is not None:
                told(begin - share.start + len(part), len(share), "tasks")

    with shown(progress, "evaluating", here=ranks.rank == 0) as told:
        scores = ranks.total(len(tasks), fill).cpu()
    return Evaluation(scores, *mean_ci95(scores), name_of(metric))


def evaluate_both(
    model: nn.Module, tasks: Sequence[Task], *, metric: Metric = ACCURACY, progress: Progress | bool | None = None,
    ranks: Ranks = ALONE, **how: Any,
) -> dict[str, Evaluation]:  # fmt: skip
    """`evaluate` by the statistics of either kind, by their names in `STATISTICS`; each task is adapted to once for
    both. `how` are the options of `adapt`.

    Raises what `evaluate` does, and StatisticsError where images cannot be classified each by itself.
    """
    tasks, count = _checked(tasks, metric), len(tasks)
    share = ranks.share(count)

    def fill(scores: Tensor) -> None:
        for place in share:
            xs, ys, xq, yq = (part[0] for part in stack(tasks[place : place + 1], model))
            learner = adapt(model, xs, ys, **how, turn=Turn(task=place))
            with torch.no_grad():
                together = learner(xq)
                alone = learner.freeze_statistics()(xq)
            for first, results in ((0, together), (count, alone)):
                scores[first + place] = _judged(metric, batches.stacked([results]), yq[None])[0]
            if told is not None:
                told(place + 1 - share.start, len(share), "tasks")

    with shown(progress, "evaluating", here=ranks.rank == 0) as told:
        scores = ranks.total(len(STATISTICS) * count, fill).cpu()
    found = {}
    for name, own in zip(STATISTICS, scores.split(count)):
        found[name] = Evaluation(own, *mean_ci95(own), name_of(metric))
    return found


def _checked(tasks: Sequence[Task], metric: Metric) -> Sequence[Task]:
    """Tasks as they are evaluated, by a metric that fits them."""
    if not tasks:
        raise ValueError("evaluate: there are no tasks")
    tasks = as_tasks(tasks, "evaluate")
    check_metric(metric, tasks)
    return tasks


def _accuracies(logits: Tensor, yq: Tensor) -> Tensor:
    """[T]: the share of right classes of logits [T, Q, ways, ...], over the labels that cross-entropy does not leave
    out."""
    if logits.dim() < 3 or yq.is_floating_point() or logits[:, :, 0].shape != yq.shape:
        raise ValueError(
            f"accuracy compares logits [Q, ways, ...] with class numbers [Q, ...], the network gives "
            f"{list(logits.shape[1:])}, the labels are {list(yq.shape[1:])} of {yq.dtype}: give a metric of your own, "
            "a function of the network's result and yq"
        )
    known = (yq != LEFT_OUT).flatten(1)
    if not bool(known.any(1).all()):
        raise ValueError("a task's query set has no label that counts: all are -100, which cross-entropy leaves out")
    right = (logits.argmax(2) == yq).flatten(1) & known
    return right.sum(1).double() / known.sum(1)


def _judged(metric: Metric, results: Any, yq: Tensor) -> Tensor:
    """The scores of stacked tasks, float64 [T]."""
    if isinstance(metric, str):
        return _accuracies(results, yq)
    scores = [float(metric(batches.task(results, t), yq[t])) for t in range(len(yq))]
    wrong = [score for score in scores if not math.isfinite(score)]
    if wrong:
        raise ValueError(f"metric {name_of(metric)} of a task is {wrong[0]}, expected a finite number")
    return torch.tensor(scores, dtype=torch.float64)
