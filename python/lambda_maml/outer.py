"""The outer gradient: what a meta-batch of tasks says about the network's parameters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from . import schedule
from .adapt import adapt_tasks
from .data.episodes import Task
from .evaluate import stack
from .inner.batch import alike
from .inner.rates import DEFAULT_LR
from .inner.rule import Rule
from .settings import Settings

__all__ = ["descent", "meta_gradient"]


def meta_gradient(
    model: nn.Module, tasks: list[Task], settings: Settings, *, rule: Rule | None = None, batched: bool = True,
    iteration: int = 0,
) -> float:  # fmt: skip
    """Add the gradient of the mean query loss after adaptation to the parameters' `.grad`; return that loss.

    tasks: they may differ in their numbers of images, ways and queries; each counts as much as any other.

    rule: how an inner step goes, in place of the settings' lr; its parameters get gradients too.
    batched: adapt tasks of equal shapes together, else all of them one after another, which needs less memory.
    iteration: updates so far, on which the settings may let pattern and order depend.

    After Finn et al. 2017, algorithm 2.
    """
    given: dict[str, Any] = {
        "pattern": schedule.training_pattern(settings, iteration, model),
        "steps": settings.steps, "norm": settings.norm, "second_order": schedule.second_order(settings, iteration),
        **descent(settings, rule),
    }  # fmt: skip
    return _of_query_loss(model, tasks, given, batched)


def _of_query_loss(model: nn.Module, tasks: list[Task], given: dict[str, Any], batched: bool) -> float:
    parts = [[tasks[i] for i in places] for places in alike(tasks)] if batched else [[task] for task in tasks]
    total = 0.0
    for part in parts:
        xs, ys, xq, yq = stack(part, model)
        logits = adapt_tasks(model, xs, ys, xq, **given)
        loss = F.cross_entropy(logits.flatten(0, 1), yq.flatten()) / (len(tasks) / len(part))
        loss.backward()
        total += loss.item()
    return total


def descent(settings: Settings, rule: Rule | None) -> dict[str, Any]:
    """The inner loop's rates: the rule's, else the settings'."""
    return {"lr": settings.lr if rule is None else DEFAULT_LR, "rule": rule}
