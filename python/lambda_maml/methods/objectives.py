"""Outer losses: that of the query set after adaptation, and that of the network itself.

`query_loss` is that of Finn, Abbeel, Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, ICML
2017, algorithm 2. `direct` is that of Wang et al., *Rethinking Task Sampling for Few-shot Vision-Language Transfer
Learning* (MAMF), MMMPIE 2022, arXiv 2203.04904: no inner loop, plain fine-tuning on all images of a task, support and
query together.

What differs here: their head is made of the classes' names, so that labels mean the same in every task. With a linear
head and renumbered labels `direct` learns nothing from many tasks: it is for one head over all classes, or for labels
that mean the same; `query_loss` under `ridge_head` fits a head anew per task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lambda_kernels.program import flatten

from ..places import Learned, Objective, Problem
from .catalogue import method

__all__ = ["direct", "query_loss"]


@method("objective", chain="of cross-entropy: yes")
class query_loss(Objective):
    """The mean loss of the adapted network on the query set.

    >>> query_loss() + query_loss(torch.nn.functional.mse_loss)
    query_loss(cross_entropy) + query_loss(mse_loss)
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor] = F.cross_entropy) -> None:
        super().__init__()
        self.loss = loss

    def extra_repr(self) -> str:
        return getattr(self.loss, "__name__", repr(self.loss))

    def forward(self, problem: Problem, learned: Learned, xq: Any, yq: Any) -> Tensor:
        return self.loss(self.predictions(problem, learned, xq), yq)


@method("objective", needs="labels that mean the same in each task", chain="no inner loop")
class direct(query_loss):
    """The mean loss of the network as it is, on support and query images together; what was learned is not used.

    >>> direct()
    direct(cross_entropy)
    """

    adapts = False

    def forward(self, problem: Problem, learned: Learned, xq: Any, yq: Any) -> Tensor:
        return self.loss(
            problem.predict(problem.start, _joined(problem.inputs, xq)), _joined(problem.labels, yq)
        )  # fmt: skip


def _joined(one: Any, other: Any) -> Any:
    (a, rebuild), (b, _) = flatten(one), flatten(other)
    return rebuild([torch.cat(pair) for pair in zip(a, b, strict=True)])
