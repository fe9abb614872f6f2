"""What training brings down, and what validation judges by."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from .evaluate import ACCURACY, Metric, name_of
from .inner.checks import Loss

__all__ = ["Goal"]


@dataclass(frozen=True)
class Goal:
    """The loss of support and query sets; a metric, as in `evaluate`, and whether less of it is better.

    >>> Goal(F.mse_loss, F.mse_loss, lower_is_better=True).better(0.1, 0.2)
    True

    Raises:
        ValueError: the metric is none, or accuracy of which less would be better.
    """

    loss: Loss = F.cross_entropy
    metric: Metric = ACCURACY
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        if self.name == ACCURACY and self.lower_is_better:
            raise ValueError("lower_is_better is set, but the metric is accuracy: give metric=, a function")

    @property
    def name(self) -> str:
        """The metric's."""
        return name_of(self.metric)

    @property
    def loss_name(self) -> str:
        return str(getattr(self.loss, "__name__", type(self.loss).__name__))

    @property
    def sign(self) -> int:
        """Of a difference of scores that is positive where the first one is better."""
        return -1 if self.lower_is_better else 1

    def better(self, score: float, than: float) -> bool:
        return self.sign * (score - than) > 0
