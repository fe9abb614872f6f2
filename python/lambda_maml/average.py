"""An exponential average of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average:
    """a <- decay a + (1 - decay) p after each update of the parameters p, where a = p after the first. Computed as by
    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`.

    >>> p = nn.Parameter(torch.tensor([1.0]))
    >>> average = Average([p], decay=0.9)
    >>> average.update()
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values: list[Tensor] = []  # none before the first update

    @torch.no_grad()
    def update(self) -> None:
        if not self.values:
            self.values = [p.detach().clone() for p in self.parameters]
            return
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the places of the parameters' values, for as long as the block lasts."""
        held = [p.detach().clone() for p in self.parameters]
        self._put(self.values or held)
        try:
            yield
        finally:
            self._put(held)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)
