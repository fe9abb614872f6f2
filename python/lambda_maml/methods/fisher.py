"""A pattern per task: the layers that this task's gradients ask for, within a budget of computation.

Kwon, Li, Venieris, Chauhan, Lane, Mascolo, *TinyTrain: Resource-Aware Task-Adaptive Sparse Training of DNNs at the
Data-Scarce Edge*, ICML 2024, arXiv 2307.09988. One backward pass on the support set gives for channel o of layer i,
with its outputs a and the loss's gradients g by them, over N rows and the channel's positions d:

    D_o = 1 / (2 N) sum_n (sum_d a_nd g_nd)^2,   P_i = sum_o D_o        (the Fisher potential)

What differs here: TinyTrain fills its budget by P_i over the layer's share of memory and of multiply-adds, in a way
that we have not seen. Costs are not additive under patterns (an early bit needs the input gradients of all later
layers), so of all patterns whose step costs at most `budget` of a full one's (`Pattern.cost`) the one with the largest
sum of P_i is taken, of equal ones the cheapest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..patterns import Pattern
from ..places import Problem
from .catalogue import method

__all__ = ["fisher"]

_MOST = 12  # layers of which all patterns are looked at


@method("chooser", needs="at most 12 layers", chain="yes, under what it chooses")
class fisher(nn.Module):
    """A chooser of patterns, with a share of the full pattern's multiply-adds a step.

    >>> learner = adapt(model, xs, ys, pattern=fisher(budget=0.3), steps=5, lr=0.03)
    >>> learner(xq).shape
    torch.Size([75, 5])

    Where no pattern is so cheap, the cheapest one is taken.

    Raises:
        ValueError: the budget is not in (0, 1]; when it adapts: the network has more than 12 layers, or a layer's
        output
            is not one tensor [N, channels, ...].
    """

    def __init__(self, budget: float) -> None:
        super().__init__()
        if not 0.0 < budget <= 1.0:
            raise ValueError(f"fisher: budget must be in (0, 1], got {budget!r}")
        self.budget = budget

    def extra_repr(self) -> str:
        return f"budget={self.budget}"

    def potentials(self, problem: Problem) -> list[float]:
        """P_i of each layer."""
        twin, outputs = problem.twin(), dict.fromkeys(problem.layers.values())
        modules = dict(twin.named_modules())
        for name in outputs:
            modules.get(name, twin).register_forward_hook(partial(_keep, outputs, name))
        loss = problem.loss_of(twin(problem.inputs))
        for name, a in outputs.items():
            if not isinstance(a, Tensor) or a.dim() < 2:
                raise ValueError(f"fisher: layer {name} gives {a!r}, expected a tensor [N, channels, ...]")
        values: list[Any] = list(outputs.values())
        found = []
        for a, g in zip(values, torch.autograd.grad(loss, values, allow_unused=True)):
            pairs = (a * (torch.zeros_like(a) if g is None else g)).reshape(*a.shape[:2], -1)
            found.append(float(pairs.sum(2).square().sum().detach() / (2 * problem.rows)))
        return found

    def check(self, problem: Problem) -> None:
        count = len(set(problem.layers.values()))
        if count > _MOST:
            raise ValueError(
                f"fisher looks at all patterns of at most {_MOST} layers, {problem.network} has {count}: give a pattern"
            )

    def forward(self, problem: Problem) -> Pattern:
        self.check(problem)
        values = self.potentials(problem)
        costs = problem.costs(Pattern.all(len(values)))
        limit = self.budget * costs[Pattern.full(len(values))]
        fits = [p for p, cost in costs.items() if cost <= limit] or [min(costs, key=costs.__getitem__)]
        asked = {p: sum(value for bit, value in zip(p.at(0), values) if bit == "1") for p in fits}
        return max(fits, key=lambda p: (asked[p], -costs[p]))


def _keep(held: dict[str, Any], name: str, module: nn.Module, given: Any, output: Any) -> None:
    """A forward hook."""
    held[name] = output
