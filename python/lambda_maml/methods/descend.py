"""Gradient descent as a solver, with places for the rule, the gradient's estimate and a prior.

Finn, Abbeel, Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, ICML 2017, algorithm 1:

    theta_0 = theta,  theta_{k+1} = theta_k + rule(g_k),  g_k = d/d theta_k [loss(theta_k) + penalty(theta_k)]

What differs here: only the layers that the pattern names move, step by step, and what lies in front of them is run
once. With a plain gradient and no penalty the core's loop runs the steps (`Solver.descent`), fused where it can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..inner import autograd
from ..inner.rates import DEFAULT_LR
from ..inner.rule import Rule, Step
from ..inner.rules import rule_of
from ..places import Estimator, Learned, Params, Penalty, Problem, Selector, checked
from .catalogue import method

__all__ = ["backward", "descend"]


@method("estimator", chain="without a selector: yes", fill={"select": "select"})
class backward(nn.Module):
    """The gradient by a backward pass, of the whole support set or of the rows that `select` chooses in each step.

    >>> solver = descend(rules.sgd(0.1), 5, estimator=backward(select=lambda problem, params, step: torch.arange(3)))
    >>> learner = adapt(model, xs, ys, pattern="00011", solver=solver)
    """

    def __init__(self, select: Selector | None = None) -> None:
        super().__init__()
        self.select = select

    def check(self, problem: Problem) -> None:
        checked(self.select, problem)

    def extra_repr(self) -> str:
        return "" if self.select is None or isinstance(self.select, nn.Module) else f"select={self.select!r}"

    def forward(self, problem: Problem, params: Params, step: int) -> tuple[Tensor, Params]:
        rows = None if self.select is None else self.select(problem, params, step)
        loss = problem.loss(params, rows)
        return loss, autograd.gradients(problem.pattern, params, loss, create_graph=problem.second_order)


@method("solver", chain="with a plain gradient: yes", fill={"rule": "rule", "steps": "steps"})
class descend(nn.Module):
    """`steps` steps of a rule: what `adapt(..., steps=steps, rule=rule)` does, open to an estimator and a penalty.

    >>> learner = adapt(model, xs, ys, pattern="00011", solver=descend(rules.sgd(0.1), 5))
    >>> decay = lambda params: 1e-3 * sum(p.square().sum() for p in params.values())
    >>> learner = adapt(model, xs, ys, pattern="00011", solver=descend(rules.sgd(0.1), 5, penalty=decay))

    Args:
        rule: how a step goes, see `rules`.
        steps: number of steps, K.
        estimator: estimator(problem, params, step) gives the loss and the gradients; default: a backward pass.
        penalty: penalty(params), added to the loss of every step.

    Raises:
        ValueError, TypeError: the rule takes no step, or `steps` is no whole number of at least 0.
    """

    def __init__(
        self, rule: Rule, steps: int, estimator: Estimator | None = None, penalty: Penalty | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.rule = rule_of(DEFAULT_LR, rule)
        self.steps, self.estimator, self.penalty = steps, estimator, penalty

    def extra_repr(self) -> str:
        return f"steps={self.steps}"

    @property
    def descent(self) -> tuple[Rule, int] | None:
        """The rule and the steps, where the core's loop does the same."""
        plain = self.estimator is None and self.penalty is None
        return (self.rule, self.steps) if plain else None

    def check(self, problem: Problem) -> None:
        problem.bound(self.rule, self.steps)
        checked(self.estimator, problem)

    def forward(self, problem: Problem) -> Learned:
        rule = problem.bound(self.rule, self.steps)
        estimator = backward() if self.estimator is None else self.estimator
        params, memory = problem.meta, rule.init({n: p.detach() for n, p in problem.meta.items()})
        path = [params]
        for names, first, steps in problem.stages(self.steps):
            stage = problem.at(params, names)
            for index in range(first, first + steps):
                now = stage.meta if index == first else {n: params[n] for n in names}
                if not problem.second_order:
                    now = {n: p.detach().requires_grad_() for n, p in now.items()}
                loss, grads = estimator(stage, now, index)
                if self.penalty is not None:
                    loss, grads = self._penalised(problem, now, loss, grads)
                own = now if problem.second_order else {n: params[n] for n in grads}
                step = Step(index, self.steps, loss.detach(), problem.second_order)
                with torch.set_grad_enabled(problem.in_graph):
                    new, memory = autograd.moved(rule, memory, own, grads, step)
                params = {**params, **new}
                path.append(params)
        return Learned(params, path=tuple(path))

    def _penalised(self, problem: Problem, now: Params, loss: Tensor, grads: Params) -> tuple[Tensor, Params]:
        assert self.penalty is not None
        prior = self.penalty(now)
        more = autograd.gradients(problem.pattern, now, prior, create_graph=problem.second_order, none=True)
        names = [n for n in now if n in grads or n in more]
        both: dict[str, Any] = {n: [g[n] for g in (grads, more) if n in g] for n in names}
        return loss + prior, {n: torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] for n, parts in both.items()}
