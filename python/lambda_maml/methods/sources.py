"""Which tasks a meta-batch has: endless ones, a finite pool, a cover of all classes, those that matter.

`endless`: Finn, Abbeel, Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, ICML 2017.

`pool`: Wang, Yuan, Ying, Yang, *Memory-Based Optimization Methods for Model-Agnostic Meta-Learning and Personalized
Federated Learning* (MOML), JMLR 2023, arXiv 2106.04911, whose memory needs tasks that come back.

`covering`: Wang et al., *Rethinking Task Sampling for Few-shot Vision-Language Transfer Learning* (MAMF), MMMPIE 2022,
arXiv 2203.04904: K tasks of n of N classes, drawn uniformly, one after another, so many that a class stays unseen with
probability `miss`: K = round(ln(miss) / ln(1 - n / N)).

`prioritised`: a stand-in for the task buffer of Nguyen et al., *Robust MAML*, ICASSP 2021, arXiv 2103.08233, whose
rules we have not seen; the equations are ours. A buffer of task numbers with scores s, the outer losses after
adaptation; a draw takes `share` of the batch from it, without repetition, with probabilities proportional to exp(s /
tau), the rest fresh; what is reported enters it, the lowest scores leave.

A task is its number in an endless sequence (`data.sample_tasks(first=...)`), so a source's state is numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..inner.problem import Turn, generator
from .catalogue import method

__all__ = ["covering", "endless", "pool", "prioritised"]


@method("source", chain="yes")
class endless(nn.Module):
    """Task after task, no one twice.

    >>> endless().draw(iteration=3, count=4)
    [12, 13, 14, 15]
    """

    size: int | None = None
    listens = False

    def draw(self, iteration: int, count: int) -> list[int]:
        return list(range(iteration * count, (iteration + 1) * count))

    def report(self, numbers: Sequence[int], losses: Tensor, iteration: int) -> None:
        return None


@method("source", needs="at least a meta-batch of tasks", chain="yes")
class pool(endless):
    """The first `size` tasks again and again; those of an iteration are distinct, all as likely.

    >>> sorted(pool(3).draw(iteration=0, count=3))
    [0, 1, 2]

    Raises:
        ValueError: there is no task, or a meta-batch has more tasks than the pool.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"pool: size is {size}, expected at least 1")
        self.size: int = size
        self.seed = seed

    def extra_repr(self) -> str:
        return f"{self.size}, seed={self.seed}"

    def draw(self, iteration: int, count: int) -> list[int]:
        if count > self.size:
            raise ValueError(f"a meta-batch of {count} tasks is more than the pool has, {self.size}: make it larger")
        order: list[int] = torch.randperm(self.size, generator=generator(Turn(self.seed, iteration), 0)).tolist()
        return order[:count]


@method("source", chain="yes", fill={"classes": "classes", "ways": "ways"})
class covering(endless):
    """So many tasks of `ways` of `classes` classes that each class is unseen with probability `miss`, in turn.

    >>> covering(classes=64, ways=5, miss=1e-3).size
    85

    The tasks of the endless sequence draw their classes uniformly, so the first `size` ones are such a cover.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, classes: int, ways: int, miss: float = 1e-3) -> None:
        super().__init__()
        if not 1 <= ways <= classes or not 0.0 < miss < 1.0:
            raise ValueError(
                f"covering: 1 to {classes} ways and miss in (0, 1) expected, got {ways} ways and miss {miss}"
            )
        rest = 1 - ways / classes
        self.size: int = 1 if rest == 0 else max(1, round(math.log(miss) / math.log(rest)))

    def extra_repr(self) -> str:
        return f"{self.size} tasks"

    def draw(self, iteration: int, count: int) -> list[int]:
        return [number % self.size for number in super().draw(iteration, count)]


@method("source", chain="yes")
class prioritised(endless):
    """Fresh tasks, and those of a buffer that were hard.

    >>> source = prioritised(size=8, share=0.5)
    >>> source.report([0, 1], torch.tensor([0.2, 3.0]), iteration=0)
    >>> source.draw(iteration=1, count=2)[1] in (0, 1)                  # one fresh, one of the buffer
    True

    Args:
        size: of the buffer.
        share: of a meta-batch that comes from the buffer, rounded down.
        temperature: tau; large for draws that are all as likely.
        seed: of the draws, with the iteration.

    Raises:
        ValueError: a number is out of range.
    """

    listens = True
    numbers: Tensor
    scores: Tensor
    fresh: Tensor

    def __init__(self, size: int, share: float = 0.5, temperature: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if size < 1 or not 0.0 <= share <= 1.0 or temperature <= 0:
            raise ValueError(
                f"prioritised: size of at least 1, share in [0, 1] and temperature above 0 expected, got {size}, "
                f"{share} and {temperature}"
            )
        self.share, self.temperature, self.seed = share, temperature, seed
        self.register_buffer("numbers", torch.full((size,), -1))  # -1: an empty place
        self.register_buffer("scores", torch.full((size,), -math.inf, dtype=torch.float64))
        self.register_buffer("fresh", torch.tensor(0))  # the next task that was never drawn

    def extra_repr(self) -> str:
        return f"{len(self.numbers)}, share={self.share}, temperature={self.temperature}"

    def probabilities(self) -> Tensor:
        """[size]: of each place of the buffer to be drawn first."""
        return torch.softmax(self.scores / self.temperature, 0)

    def draw(self, iteration: int, count: int) -> list[int]:
        held = int((self.numbers >= 0).sum())
        old = min(int(self.share * count), held)
        first = int(self.fresh)
        found = list(range(first, first + count - old))
        self.fresh += count - old
        if old:
            places = torch.multinomial(
                self.probabilities(), old, generator=generator(Turn(self.seed, iteration), 0)
            )  # fmt: skip
            found += self.numbers[places].tolist()
        return found

    def report(self, numbers: Sequence[int], losses: Tensor, iteration: int) -> None:
        for number, loss in zip(numbers, losses.tolist()):
            same = (self.numbers == number).nonzero().flatten()
            place = int(same[0]) if len(same) else int(self.scores.argmin())
            if len(same) or loss > float(self.scores[place]):
                self.numbers[place], self.scores[place] = number, loss
