"""Learned rates: one per tensor and step, which descend the outer loss with the network.

Antoniou, Edwards, Storkey, *How to train your MAML*, ICLR 2019, section 4 (LSLR), and the first of the two parts of
Nguyen et al., *Robust MAML*, ICASSP 2021, arXiv 2103.08233, of which we know abstract and introduction: inner rates
found by descending the outer loss in them.

    theta_l <- theta_l - A_l,k g_l,   A <- A - eta d(outer loss) / dA

What differs here: nothing but the pattern. The rule is `rules.sgd` with rates that are parameters, so it stays on the
chain (`explain` says so); `Settings(learn_lr=...)` has the same per layer. A rate that training drives to 0 says that a
bit of the pattern may be 0 in that step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..inner.rules import sgd
from .catalogue import method

__all__ = ["lslr"]


@method(
    "rule", needs="the pattern and the steps that it was made for", chain="yes",
    fill={"names": "names", "steps": "steps", "lr": "lr"},
)  # fmt: skip
def lslr(names: Sequence[str], steps: int, lr: float = 0.01) -> sgd:
    """Gradient descent with a learned rate for each of these tensors and steps, `lr` at the start.

    >>> rule = lslr(Pattern("00011").parameters(model), steps=5, lr=0.05)
    >>> loss_fn(adapt(model, xs, ys, pattern="00011", steps=5, rule=rule, second_order=True)(xq), yq).backward()
    >>> rule.get_parameter("rate0").grad.shape                              # of block4.conv.weight, for each step
    torch.Size([5])

    Raises:
        ValueError: there are no names or steps.
    """
    if not names or steps < 1:
        raise ValueError(f"lslr: at least one name and one step expected, got {len(names)} and {steps}")
    return sgd({name: nn.Parameter(torch.full((steps,), lr)) for name in names})
