"""Accuracy of an adapted model, task by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapt import adapt_tasks
from .data.episodes import Task
from .inner.batch import alike
from .inner.rates import DEFAULT_LR, Rate
from .inner.rule import Rule
from .patterns import Pattern
from .ranks import ALONE, Ranks
from .stats import mean_ci95

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what): whole numbers of the same unit, and a few words on the last step."""


class Evaluation(NamedTuple):
    """Query accuracies of the adapted model: one per task, their mean and the half width of its 95% interval."""

    accuracies: Tensor
    mean: float
    ci95: float


def stack(tasks: Sequence[Task], model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tasks of equal shapes as xs [T, N, C, H, W], ys [T, N], xq [T, Q, C, H, W], yq [T, Q], on the model's device and
    in its dtype."""
    weight = next(model.parameters())
    xs, ys, xq, yq = (torch.stack(parts).to(weight.device) for parts in zip(*tasks, strict=True))
    return xs.to(weight.dtype), ys, xq.to(weight.dtype), yq


def evaluate(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    pattern: Pattern | str,
    steps: int,
    lr: Rate = DEFAULT_LR,
    rule: Rule | None = None,
    norm: str = "follow",
    statistics: str = "batch",
    batch: int = 16,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Adapt to each task's support set and classify its query set.

    The accuracies (fractions, float64, [len(tasks)]) stay in the order of `tasks`, so that two patterns can be compared
    task by task. Of `batch` tasks at a time, those of equal shapes are adapted together; they may differ in their
    numbers of images, ways and queries. `lr`, `rule` and `statistics` are those of `adapt`. The `ranks` divide the
    tasks and get the same accuracies. Raises ValueError without tasks.
    """
    if not tasks:
        raise ValueError("evaluate: there are no tasks")
    share = ranks.share(len(tasks))

    def fill(accuracies: Tensor) -> None:
        for begin in range(share.start, share.stop, batch):
            part = tasks[begin : min(begin + batch, share.stop)]
            for places in alike(part):
                xs, ys, xq, yq = stack([part[i] for i in places], model)
                with torch.no_grad():  # the query pass; adapt_tasks turns gradients on for itself
                    logits = adapt_tasks(
                        model, xs, ys, xq, pattern=pattern, steps=steps, lr=lr, rule=rule, norm=norm,
                        statistics=statistics,
                    )  # fmt: skip
                found = (logits.argmax(-1) == yq).double().mean(-1)
                accuracies[[begin + i for i in places]] = found.to(accuracies.device)
            if progress is not None:
                progress(begin - share.start + len(part), len(share), "tasks")

    accuracies = ranks.total(len(tasks), fill).cpu()
    return Evaluation(accuracies, *mean_ci95(accuracies))
