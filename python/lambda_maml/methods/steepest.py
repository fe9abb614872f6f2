"""An outer loss without an inner loop: how much one step of steepest descent will gain, to first order.

Zhou et al., *Meta-Learning with Neural Tangent Kernels*, ICLR 2021 (arXiv 2102.03909), method I. With g the gradient of
a task's loss L at the meta-parameters theta, whose norm is the functional one in the tangent kernel's space (theorem
2):

    L(theta) - alpha |g|^2  =  L(theta - alpha g) + O(alpha^2)

What differs here: g is by the parameters that the pattern updates, and L is on support and query set together. It is
unbounded below: take alpha of the inner rate's size, and a bound of the outer gradient (`clip_norm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..places import Learned, Problem
from .catalogue import method
from .objectives import direct

__all__ = ["steepest"]


@method("objective", chain="no inner loop")
class steepest(direct):
    """The network's own loss, less alpha times its gradient's square.

    >>> steepest(alpha=0.05)
    steepest(alpha=0.05, cross_entropy)

    Args:
        alpha: the rate of the step that is foreseen; k alpha for k steps.
        loss: from the network's result and the labels to their mean.

    Raises:
        ValueError: alpha is not above 0.
    """

    def __init__(self, alpha: float, loss: Callable[[Any, Any], Tensor] = F.cross_entropy) -> None:
        super().__init__(loss)
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"steepest: alpha must be above 0, got {alpha!r}")
        self.alpha = alpha

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, {super().extra_repr()}"

    def forward(self, problem: Problem, learned: Learned, xq: Any, yq: Any) -> Tensor:
        loss = super().forward(problem, learned, xq, yq)
        grads = torch.autograd.grad(loss, list(problem.start.values()), create_graph=True, allow_unused=True)
        squares = [g.square().sum() for g in grads if g is not None]
        return loss - self.alpha * torch.stack(squares).sum()
