"""The outer gradient: what a meta-batch of tasks says about the network's parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import schedule
from .adapt import adapt, adapt_tasks
from .data.episodes import Task, as_tasks
from .evaluate import stack
from .inner.batch import alike, task
from .inner.checks import LEFT_OUT, Loss
from .inner.rates import DEFAULT_LR
from .inner.rule import Rule
from .maml import LambdaMAML
from .settings import Settings

__all__ = ["descent", "meta_gradient", "query_losses"]


def meta_gradient(
    model: nn.Module, tasks: list[Task], settings: Settings, *, rule: Rule | None = None, batched: bool = True,
    iteration: int = 0, loss: Loss = F.cross_entropy,
) -> float:  # fmt: skip
    """Add the gradient of the mean query loss after adaptation to the parameters' `.grad`; return that loss.

    tasks: `Task`s or plain tuples of the same parts; they may differ in their numbers of images, ways and queries. Each
        counts as much as any other.

    rule: how an inner step goes, in place of the settings' lr; its parameters get gradients too.
    batched: adapt tasks of equal shapes together, else all of them one after another, which needs less memory.
    loss: of the support and the query set.
    iteration: updates so far, on which the settings may let pattern, order and loss depend.

    After Finn et al. 2017, algorithm 2. Under `outer="reptile"` the gradient is the way from the mean of the adapted
    parameters to the present ones, and the loss that of the adapted networks on their tasks' images.
    """
    tasks = as_tasks(tasks, "meta_gradient")
    given: dict[str, Any] = {
        "pattern": schedule.training_pattern(settings, iteration, model), "norm": settings.norm,
        **descent(settings, rule),
    }  # fmt: skip
    if settings.outer == "reptile":
        return _towards_adapted(model, tasks, {**given, "steps": settings.steps, "loss": loss})
    second_order = schedule.second_order(settings, iteration)
    weights = schedule.importances(settings, iteration)
    if weights is not None:
        return _of_every_step(model, tasks, {**given, "first_order": not second_order}, weights, loss)
    given |= {"steps": settings.steps, "second_order": second_order, "loss": loss}
    return _of_query_loss(model, tasks, given, batched)


def _of_query_loss(model: nn.Module, tasks: list[Task], given: dict[str, Any], batched: bool) -> float:
    parts = [[tasks[i] for i in places] for places in alike(tasks)] if batched else [[task] for task in tasks]
    total = 0.0
    for part in parts:
        xs, ys, xq, yq = stack(part, model)
        results = adapt_tasks(model, xs, ys, xq, **given)
        loss = query_losses(given["loss"], results, yq).sum() / len(tasks)
        loss.backward()
        total += loss.item()
    return total


def query_losses(loss: Loss, results: Any, yq: Tensor) -> Tensor:
    """[T]: each stacked task's loss of its query set."""
    numbers = loss is F.cross_entropy and yq.dim() == 2 and not yq.is_floating_point()
    if numbers and not bool((yq == LEFT_OUT).any()):
        found = F.cross_entropy(results.flatten(0, 1), yq.flatten(), reduction="none")
        return found.view(len(yq), -1).mean(1)
    return torch.stack([loss(task(results, t), yq[t]) for t in range(len(yq))])


def _of_every_step(
    model: nn.Module, tasks: list[Task], given: dict[str, Any], weights: list[float], loss: Loss
) -> float:
    """The query losses after each inner step, weighted (MAML++); one task after another."""
    maml = LambdaMAML(model, **given)
    total = 0.0
    for one in tasks:
        xs, ys, xq, yq = (part[0] for part in stack([one], model))
        learner, losses = maml.clone(), []
        for weight in weights:
            learner.adapt(loss(learner(xs), ys))
            losses.append(weight * loss(learner(xq), yq))
        whole = torch.stack(losses).sum() / len(tasks)
        whole.backward()
        total += whole.item()
    return total


def _towards_adapted(model: nn.Module, tasks: list[Task], given: dict[str, Any]) -> float:
    """Reptile: the mean over tasks of theta - theta', theta' adapted to all images of a task, is the gradient (Nichol
    et al. 2018, algorithm 2: an SGD step of rate epsilon on it is the paper's update). The loss is that of theta'."""
    total = 0.0
    for one in tasks:
        xs, ys, xq, yq = (part[0] for part in stack([one], model))
        x, y = torch.cat([xs, xq]), torch.cat([ys, yq])
        with torch.no_grad():  # adapt turns gradients on for itself
            learner = adapt(model, x, y, **given)
            adapted = learner.parameters_dict()
            for name, p in model.named_parameters():
                if name in adapted:
                    towards = (p - adapted[name]) / len(tasks)
                    p.grad = towards if p.grad is None else p.grad + towards
            total += given["loss"](learner(x), y).item() / len(tasks)
    return total


def descent(settings: Settings, rule: Rule | None) -> dict[str, Any]:
    """The inner loop's rates: the rule's, else the settings'."""
    return {"lr": settings.lr if rule is None else DEFAULT_LR, "rule": rule}
