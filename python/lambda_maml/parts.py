"""The parts of a meta-training run, in the places around the inner step: how a task is solved, what is descended, what
the tasks weigh, and which ones are drawn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import schedule
from .adapt import adapt_tasks
from .data.episodes import Task
from .evaluate import stack
from .inner.batch import alike
from .inner.checks import Loss
from .inner.rule import Rule
from .inner.rules import rule_of
from .methods import descend, query_loss
from .outer import descent, query_losses
from .places import Learned, Objective, Solver, TaskSource, TaskWeights, Turn, descent_of
from .settings import Settings
from .solved import check_inner, learned_by, linked, posed

__all__ = ["Parts", "check_fit", "trained_with"]


class Parts(nn.Module):
    """What a run has in the places of MAML's own: solver, objective, task weights, task source; None for MAML's own.

    It is one module: the parameters of all parts are meta-trained with the network's, and both checkpoints hold their
    parameters and buffers (`checkpoint.load_rule(path, parts)`), so that a resumed run goes on as one without a break.

    >>> parts = Parts(solver=methods.ridge_head(1.0, learned=True), source=methods.pool(25))
    >>> [name for name, _ in parts.named_parameters()]
    ['solver.log_lam']

    Args:
        solver: the inner loop, see `places.Solver`; without it the settings' steps and rates.
        objective: one task's outer loss, see `places.Objective`; default: the run's loss on the query set.
        weights: how the tasks' losses become one, see `places.TaskWeights`; default: their mean.
        source: which tasks are drawn, see `places.TaskSource`; default: each once.
    """

    def __init__(
        self, *, solver: Solver | None = None, objective: Objective | None = None,
        weights: TaskWeights | None = None, source: TaskSource | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.solver, self.objective, self.weights, self.source = solver, objective, weights, source
        self.rule: Rule | None = None
        self._heard: tuple[list[int], Tensor] | None = None

    def __repr__(self) -> str:
        named = ("rule", "solver", "objective", "weights", "source")
        own = [f"{name}={getattr(self, name)!r}" for name in named if getattr(self, name) is not None]
        return f"Parts({', '.join(own)})"

    def of_run(self, rule: Rule | None, settings: Settings, processes: int) -> Parts:
        """These parts with the rule of a run, which they hold too.

        Raises:
            ValueError: the run's settings leave no place for them.
        """
        self.rule = rule
        if settings.outer == "reptile" or settings.multi_step_iterations:
            which = "outer='reptile'" if settings.outer == "reptile" else "multi_step_iterations"
            raise ValueError(f"{which} has an outer loss of its own: leave it out, or train without {self!r}")
        if self.solver is not None and (settings.learn_lr is not None or self.rule is not None):
            raise ValueError(f"{self.solver!r} is the whole inner loop: leave learn_lr and rule= out")
        if processes > 1:
            raise ValueError(
                f"{self!r} sees whole meta-batches and remembers: train it in one process, not {processes}"
            )
        if getattr(self.solver, "pooled", False) and (self.source is None or self.source.size is None):
            raise ValueError(f"{self.solver!r} remembers tasks that come back: draw them from methods.pool(size)")
        if self.source is not None and self.source.size is not None and self.source.size < settings.meta_batch:
            self.source.draw(0, settings.meta_batch)  # a pool says that it is too small; a cover is gone through anew
        if self.weights is not None:  # which say that they are for another number of tasks
            device = next((t.device for t in self.state_dict().values()), None)
            with torch.no_grad():
                self.weights.combine(torch.ones(settings.meta_batch, device=device), 0)
        return self

    def numbers(self, iteration: int, count: int) -> list[int]:
        """The numbers of an iteration's tasks."""
        first = iteration * count
        return list(range(first, first + count)) if self.source is None else self.source.draw(iteration, count)

    @property
    def listens(self) -> bool:
        """Whether the tasks of an iteration depend on the losses of the one before."""
        return self.source is not None and self.source.listens

    def gradient(
        self, model: nn.Module, tasks: list[Task], numbers: list[int], settings: Settings, iteration: int,
        batched: bool = True, loss: Loss = F.cross_entropy,
    ) -> float:  # fmt: skip
        """Add the gradient of the outer loss to the parameters' `.grad`; return that loss. `loss` is the inner one."""
        finite = self.source is not None and self.source.size is not None
        turns = [Turn(settings.seed, iteration, i, n if finite else None) for i, n in enumerate(numbers)]
        losses = self._losses(model, tasks, turns, settings, iteration, batched, loss)
        whole = losses.mean() if self.weights is None else self.weights.combine(losses, iteration)
        whole.backward()
        self._heard = numbers, losses.detach()
        return whole.item()

    def after_step(self, iteration: int) -> None:
        """Let the parts hear of the losses, once the network has moved."""
        assert self._heard is not None
        numbers, losses = self._heard
        if self.weights is not None:
            self.weights.update(losses, iteration)
        if self.source is not None:
            self.source.report(numbers, losses, iteration)

    def _losses(
        self, model: nn.Module, tasks: list[Task], turns: list[Turn], settings: Settings, iteration: int, batched: bool,
        loss: Loss,
    ) -> Tensor:  # fmt: skip
        """[T]: the tasks' outer losses."""
        given: dict[str, Any] = {
            "pattern": schedule.training_pattern(settings, iteration, model), "norm": settings.norm,
            "second_order": schedule.second_order(settings, iteration), "loss": loss,
        }  # fmt: skip
        plain = self.objective is None and loss is F.cross_entropy
        if plain and (self.solver is None or descent_of(self.solver) is not None):
            own: dict[str, Any] = {"solver": self.solver}
            if self.solver is None:
                own = {**descent(settings, self.rule), "steps": settings.steps}
            groups = alike(tasks) if batched else [[i] for i in range(len(tasks))]
            return _in_batches(model, tasks, groups, {**given, **own})
        rule = rule_of(**descent(settings, self.rule))
        solver = descend(rule, settings.steps) if self.solver is None else self.solver
        objective = query_loss(loss) if self.objective is None else self.objective
        found = []
        for task, turn in zip(tasks, turns):
            xs, ys, xq, yq = (part[0] for part in stack([task], model))
            _, problem = posed(model, xs, ys, solver=solver, turn=turn, **given)
            learned = linked(problem, learned_by(solver, problem)) if objective.adapts else Learned(problem.start)
            found.append(objective(problem, learned, xq, yq))
        return torch.stack(found)


def trained_with(rule: Rule | None, parts: Parts | None, settings: Settings, processes: int) -> Any:
    """What a run trains and keeps beside the network: the parts and the rule in them, or the rule alone."""
    return rule if parts is None else parts.of_run(rule, settings, processes)


def check_fit(
    model: nn.Module, task: Task, settings: Settings, rule: Rule | None, parts: Parts | None, pattern: Any, loss: Loss
) -> None:  # fmt: skip
    """ValueError where rule or solver do not fit the network, its patterns or the settings; nothing is adapted.

    pattern: that of validation.
    """
    xs, ys, _, _ = (part[0] for part in stack([task], model))
    solver = None if parts is None else parts.solver
    after = settings.evaluation_steps
    for bits, steps, second_order in (
        (schedule.training_pattern(settings, 0, model), settings.steps, settings.second_order), (pattern, after, False)
    ):  # fmt: skip
        own = rule_of(**descent(settings, rule))
        check_inner(model, xs, ys, bits, steps, settings.norm, second_order, loss, own, solver)


def _in_batches(model: nn.Module, tasks: list[Task], groups: list[list[int]], given: dict[str, Any]) -> Tensor:
    """[T]: the query losses after adaptation, of tasks of one form at once."""
    losses: dict[int, Tensor] = {}
    for places in groups:
        xs, ys, xq, yq = stack([tasks[i] for i in places], model)
        found = query_losses(given["loss"], adapt_tasks(model, xs, ys, xq, **given), yq)
        losses |= dict(zip(places, found))
    return torch.stack([losses[i] for i in range(len(tasks))])
