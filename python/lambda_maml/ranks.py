"""Several processes of one run: the places where they differ or wait for each other.

Each process has a rank, and all run the same program. `ALONE` is one process by itself; `processes.joined` gives those
that torchrun started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Lost(RuntimeError):
    """Another rank ended, or does not answer.

    >>> Lost("rank 1 died", [1]).ranks
    (1,)

    ranks: those that are known to be the cause. told: another rank says so to the person who waits.
    """

    def __init__(self, message: str, ranks: Sequence[int] = (), *, told: bool = False) -> None:
        super().__init__(message)
        self.ranks, self.told = tuple(ranks), told


class Stopped(Exception):
    """What is computed in parts was left, since the run is to end; the message says why: "SIGTERM".

    >>> str(Stopped("SIGTERM"))
    'SIGTERM'
    """


class Ranks:
    """One process by itself, rank 0 of 1: it computes all tasks and waits for nobody.

    >>> [range(rank * 5 // 2, (rank + 1) * 5 // 2) for rank in (0, 1)]      # what `share(5)` is on each of two ranks
    [range(0, 2), range(2, 5)]
    """

    rank, count = 0, 1
    device: torch.device | None = None  # where a rank of several computes

    def share(self, tasks: int) -> range:
        """The tasks, of 0 to `tasks` - 1, that this rank computes; none where there are more ranks than tasks.

        >>> ALONE.share(5)
        range(0, 5)
        """
        return range(self.rank * tasks // self.count, (self.rank + 1) * tasks // self.count)

    def first(self, compute: Callable[[], T]) -> T:
        """What `compute` gives on rank 0, on every rank; it runs there alone, and the others sleep until it is done.

        >>> ALONE.first(lambda: 3)
        3

        Tensors come on the CPU, except to rank 0. What it raises, rank 0 raises; the others raise `Lost`.
        """
        return compute()

    def first_then_all(self, compute: Callable[[], T]) -> T:
        """What `compute` gives on each rank; rank 0 is done before the others begin, so that they find its cache.

        >>> ALONE.first_then_all(lambda: 3)
        3
        """
        return compute()

    def total(self, size: int, fill: Callable[[Tensor], object], dtype: torch.dtype = torch.float64) -> Tensor:
        """The sum over all ranks of a vector [size], the same on each of them.

        >>> ALONE.total(2, lambda own: own.add_(1)).tolist()
        [1.0, 1.0]

        `fill` gets zeros of `dtype` and adds the rank's own part in place.

        Raises:
            FloatingPointError, Stopped: `fill` raised it on some rank; all ranks raise it, with the text of the first.
            Lost: another rank ended, or does not answer.
        """
        own = torch.zeros(size, dtype=dtype)
        fill(own)
        return own

    def mean_gradient(self, parameters: Sequence[Tensor], weight: float, compute: Callable[[], float]) -> float:
        """The loss and, in every parameter's `.grad`, the gradient of a meta-batch that the ranks divide.

        >>> ALONE.mean_gradient([], 1.0, lambda: 0.5)
        0.5

        `compute` puts the gradient of the mean loss of this rank's tasks into `.grad`, which is None before, and gives
        that loss. `weight` is their number over that of all tasks; with 0 it is not called. One all-reduce. Raises as
        `total`.
        """
        return compute()

    def agreed(self, reason: Callable[[], str | None]) -> str | None:
        """Why the ranks stop now, by what any of them says, or None: the same answer on all of them.

        >>> ALONE.agreed(lambda: "interrupt")
        'interrupt'

        With several ranks it is what `reason` said on one of them during a `total` or `mean_gradient`, and stays so
        until another `reason` is given.
        """
        return reason()

    def start_alike(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the named tensors of every rank the values of rank 0, in place.

        >>> ALONE.start_alike({"weight": torch.zeros(2)})
        """

    def check_alike(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise RuntimeError, on every rank, where the named tensors are not the same bits on all ranks.

        >>> ALONE.check_alike({"weight": torch.zeros(2)})
        """

    def own_random_numbers(self, *numbers: int) -> None:
        """Seed torch on every rank but the first by its rank and `numbers`: a dropout's masks differ among ranks.

        >>> ALONE.own_random_numbers(0, 5)
        """

    def is_heir(self, lost: Sequence[int]) -> bool:
        """Whether this rank is the first of those that are left: it saves where rank 0 cannot.

        >>> ALONE.is_heir([])
        True
        """
        return True


ALONE = Ranks()
