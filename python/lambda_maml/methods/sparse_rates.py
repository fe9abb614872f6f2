"""A schedule read off learned rates: what training drives to 0 need not be updated in that step.

A stand-in for Qu et al., *p-Meta: Towards On-device Deep Model Adaptation*, KDD 2022, arXiv 2206.12705, which learns by
layer and by channel what is worth updating and of which we know the abstract; the equations are ours. With learned
rates A_l,k of tensor l in step k (`lslr`) and c_l the share of its layer in the network's multiply-adds:

    outer loss + weight sum_l,k c_l |A_l,k|,   bit of a layer in step k = [max over its tensors of |A_l,k| > threshold]

A step without a bit keeps that of the largest rate: a pattern updates something. A rate of 0 and a bit of 0 give the
same adapted parameters, so the schedule is as good as the rule whose small rates are 0, and runs faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cost import layer_costs
from ..inner.rules import sgd
from ..network import layers_of
from ..patterns import Pattern
from ..places import Learned, Objective, Problem
from .catalogue import method

__all__ = ["schedule_of", "sparse_rates"]


@method(
    "objective", needs="the rule lslr", chain="no: tasks go one by one",
    fill={"rule": "rule", "model": "model", "sample": "sample"},
)  # fmt: skip
class sparse_rates(Objective):
    """weight sum of c_l |A_l,k|; added to `query_loss()`.

    >>> rule = lslr(Pattern("11111").parameters(model), steps=3, lr=0.05)
    >>> query_loss() + sparse_rates(rule, model, xs, weight=0.1)
    query_loss(cross_entropy) + sparse_rates(weight=0.1)

    Raises:
        ValueError: the rule's rates are not one per tensor and step, or the weight is below 0.
    """

    adapts = False

    def __init__(self, rule: sgd, model: nn.Module, sample: Any, weight: float) -> None:
        super().__init__()
        if not weight >= 0.0:
            raise ValueError(f"sparse_rates: weight must be at least 0, got {weight!r}")
        self.weight = weight
        self.__dict__["rates"] = rates = _rates(rule)  # the rule's own, which a run holds already
        costs = layer_costs(model, sample)
        share = {n: c / sum(costs) for layer, c in zip(layers_of(model), costs) for n in layer.adapted("follow")}
        self.shares = [share[n] for n in rates]

    def extra_repr(self) -> str:
        return f"weight={self.weight}"

    def forward(self, problem: Problem, learned: Learned, xq: Any, yq: Any) -> Tensor:
        rates: dict[str, Tensor] = self.__dict__["rates"]
        return self.weight * torch.stack([c * r.abs().sum() for c, r in zip(self.shares, rates.values())]).sum()


def schedule_of(rule: sgd, model: nn.Module, threshold: float) -> Pattern:
    """The schedule of the layers whose learned rates are above a threshold, step by step.

    >>> rates = {"block4.conv.weight": torch.tensor([0.3, 0.0]), "head.weight": torch.tensor([0.1, 0.2])}
    >>> schedule_of(rules.sgd(rates), model, threshold=0.01)
    Pattern('00011,00001')

    Raises:
        ValueError: the rule's rates are not one per tensor and step.
    """
    rates = {n: r.detach().abs() for n, r in _rates(rule).items()}
    steps, layers = len(next(iter(rates.values()))), layers_of(model)
    largest = torch.zeros(steps, len(layers), dtype=torch.float64)
    for at, layer in enumerate(layers):
        for own in (rates[n] for n in layer.adapted("follow") if n in rates):
            largest[:, at] = torch.maximum(largest[:, at], own.double())
    moves = (largest > threshold) | nn.functional.one_hot(largest.argmax(1), len(layers)).bool()
    return Pattern(",".join("".join("1" if bit else "0" for bit in row) for row in moves.tolist()))


def _rates(rule: sgd) -> dict[str, Tensor]:
    """By tensor, its rates [steps]."""
    value = rule.lr
    held = dict(value) if isinstance(value, (dict, nn.ParameterDict)) else {}
    if not held or not all(isinstance(r, Tensor) and r.dim() == 1 for r in held.values()):
        raise ValueError(f"one rate for each tensor and step expected, as lslr(names, steps) has them, got {rule!r}")
    return held
