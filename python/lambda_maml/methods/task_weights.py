"""Weights on the tasks of a meta-batch: even ones, and those of a shared uncertainty, by gradient or by SPSA.

Boiarov, Khabarlak, Yastrebov, *Simultaneous Perturbation Method for Multi-Task Weight Optimization in One-Shot
Meta-Learning*, arXiv 2110.13188, after Kendall, Gal, Cipolla, CVPR 2018. With losses L_i of T tasks and weights w:

    J(w) = mean_i (L_i / w_i^2 + ln w_i^2)           the network descends J; for fixed losses its least is w_i^2 = L_i
    SPSA (iteration n = 1, 2, .., Delta in {-1, 1}^T):
        w <- w - a_n Delta (J(w + b_n Delta) - J(w - b_n Delta)) / (2 b_n),   a_n = a / n^(1/6), b_n = b / n^(1/24)
    Track: J(w + b_n Delta) on the losses of the iteration before, J(w - b_n Delta) on this one's

What differs here: the published gains, a = 0.25 and b = 15 from w = 1/T, do not find that least: J is even in w, and
for |w| << b its difference hardly depends on the losses. So the default is a = b = 0.05 from w = 1, |w| at least 0.1;
`spsa.published(T)` has theirs. The mean over tasks, as in their MAML code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..inner.problem import Turn, generator
from .catalogue import method

__all__ = ["spsa", "spsa_track", "uncertainty", "uniform"]


@method("weights", chain="yes")
class uniform(nn.Module):
    """The mean of the tasks' losses: plain MAML.

    >>> uniform().combine(torch.tensor([1.0, 3.0]), iteration=0)
    tensor(2.)
    """

    def combine(self, losses: Tensor, iteration: int) -> Tensor:
        return losses.mean()

    def update(self, losses: Tensor, iteration: int) -> None:
        return None


def _shared(losses: Tensor, weights: Tensor) -> Tensor:
    """J of losses [T] under weights [T]."""
    if losses.shape != weights.shape:
        raise ValueError(
            f"task weights are for {len(weights)} tasks, the meta-batch has {len(losses)}: make them for as many tasks"
        )
    squares = weights.to(losses).square()
    return (losses / squares + squares.log()).mean()


@method("weights", chain="yes", fill={"tasks": "meta_batch"})
class uncertainty(nn.Module):
    """Weights that are meta-parameters: the outer optimiser moves them along dJ/dw_i = (2 / w_i - 2 L_i / w_i^3) / T.

    >>> uncertainty(2).combine(torch.tensor([1.0, 3.0]), iteration=0).item()
    2.0

    Raises:
        ValueError: the meta-batch has another number of tasks.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(tasks))

    def combine(self, losses: Tensor, iteration: int) -> Tensor:
        return _shared(losses, self.weights)

    def update(self, losses: Tensor, iteration: int) -> None:
        return None


@method("weights", chain="yes", fill={"tasks": "meta_batch"})
class spsa(nn.Module):
    """Weights that move by simultaneous perturbation, from two values of J an iteration.

    >>> weights = spsa(4)
    >>> weights.update(torch.tensor([0.5, 1.0, 1.5, 2.0]), iteration=0)
    >>> weights.weights.shape
    torch.Size([4])

    Args:
        tasks: T, tasks of a meta-batch.
        gains: a and b, above 0.
        start: all weights at the start.
        floor: the least absolute value of a weight; 0 for none.
        renormalise: every so many iterations w <- w / |w|_2, None for never.
        seed: of Delta, with the iteration.

    Raises:
        ValueError: a number is out of range; the meta-batch has another number of tasks.
    """

    weights: Tensor

    def __init__(
        self, tasks: int, gains: tuple[float, float] = (0.05, 0.05), start: float = 1.0, floor: float = 0.1,
        renormalise: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if tasks < 1 or min(gains) <= 0 or start <= 0 or floor < 0 or (renormalise is not None and renormalise < 1):
            raise ValueError(
                f"{type(self).__name__}: tasks and renormalise of at least 1, gains and start above 0 and floor of at "
                f"least 0 expected, got {tasks}, {renormalise}, {gains}, {start} and {floor}"
            )
        self.gains, self.floor, self.renormalise, self.seed = gains, floor, renormalise, seed
        self.register_buffer("weights", torch.full((tasks,), start, dtype=torch.float64))

    @classmethod
    def published(cls, tasks: int, **more: Any) -> spsa:
        """With the gains and the start of the paper's code."""
        return cls(tasks, gains=(0.25, 15.0), start=1 / tasks, floor=0.0, **more)

    def extra_repr(self) -> str:
        return f"tasks={len(self.weights)}, gains={self.gains}"

    def combine(self, losses: Tensor, iteration: int) -> Tensor:
        return _shared(losses, self.weights)

    def update(self, losses: Tensor, iteration: int) -> None:
        with torch.no_grad():
            self._move(losses.detach().to(self.weights), losses.detach().to(self.weights), iteration + 1)

    def _move(self, before: Tensor, now: Tensor, n: int) -> None:
        """One step by J(w + b Delta) on the losses `before` and J(w - b Delta) on `now`."""
        a, b = self.gains[0] / n ** (1 / 6), self.gains[1] / n ** (1 / 24)
        coins = torch.randint(2, self.weights.shape, generator=generator(Turn(self.seed, n), 0))
        delta = (2.0 * coins - 1).to(self.weights)
        difference = _shared(before, self.weights + b * delta) - _shared(now, self.weights - b * delta)
        self.weights -= a * delta * difference / (2 * b)
        signs = torch.where(self.weights < 0, -1.0, 1.0)
        self.weights.copy_(signs * self.weights.abs().clamp(min=self.floor))
        if self.renormalise is not None and n % self.renormalise == 0:
            self.weights /= self.weights.norm()


@method("weights", chain="yes", fill={"tasks": "meta_batch"})
class spsa_track(spsa):
    """SPSA that tracks: one of its two values of J is on the losses of the iteration before.

    >>> weights = spsa_track(2)
    >>> weights.update(torch.tensor([0.5, 1.0]), iteration=0)            # keeps the losses
    >>> weights.previous
    tensor([0.5000, 1.0000], dtype=torch.float64)

    Args and errors as in `spsa`.
    """

    previous: Tensor

    def __init__(self, tasks: int, **more: Any) -> None:
        super().__init__(tasks, **more)
        self.register_buffer("previous", torch.full((tasks,), torch.nan, dtype=torch.float64))

    def update(self, losses: Tensor, iteration: int) -> None:
        now = losses.detach().to(self.weights)
        with torch.no_grad():
            if not self.previous.isnan().any():
                self._move(self.previous, now, iteration + 1)
            self.previous.copy_(now)
