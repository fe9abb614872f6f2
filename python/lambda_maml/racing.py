"""Racing: candidates are judged on as many of the tasks as it takes to rule them out, the fastest candidate first.

After O. Maron, A. Moore, Hoeffding Races, NIPS 1994, with paired differences and Student's t in place of Hoeffding's
bound, and for a fixed number N of tasks: what is asked is whether a candidate would be admitted on all N of them, of
which n were seen. Of the mean over all N, given the first n with mean d and standard deviation s,

    (mean_N - d) / (s * sqrt(1/n - 1/N))   is Student's t with n - 1 degrees of freedom.

A candidate is dropped at a look where this makes its admission less likely than error / looks. So with a probability of
at least 1 - error (where differences are normal) the candidate that all N tasks would choose is not lost, whichever it
is. The probabilities of all that are dropped sum up to at most `error`, too. None is taken before all N tasks have
judged it: what a race chooses is admitted by the same figures as without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .stats import t_quantile, t_tail

__all__ = ["ERROR", "chance", "fastest", "looks", "most_accurate"]

Key = TypeVar("Key", bound=Hashable)
Scores = Callable[[Key, int], Tensor]
"""The scores of a candidate on the first so many tasks, better where higher; computed as they are asked for."""

ERROR = 0.05
FIRST_LOOK = 10


class Allowance:
    """The error that a race of so many looks may still make."""

    def __init__(self, error: float, looks: int) -> None:
        self.most, self.left = error / looks, error

    def covers(self, chance: float) -> bool:
        """Whether a candidate may be dropped that all tasks would choose with this probability, which is then spent.

        >>> allowance = Allowance(0.05, looks=2)
        >>> allowance.covers(0.02), allowance.covers(0.026), round(allowance.left, 3)
        (True, False, 0.03)
        """
        may = chance <= min(self.most, self.left)
        self.left -= chance if may else 0.0
        return may


def looks(tasks: int) -> list[int]:
    """After how many tasks a race looks: 10, and half as many again each time, to all.

    >>> looks(100)
    [10, 15, 22, 33, 49, 73, 100]
    """
    found, n = list[int](), FIRST_LOOK
    while n < tasks:
        found.append(n)
        n += n // 2
    return [*found, tasks]


def chance(excess: Tensor, tasks: int, *, bound: bool, equal: float = 0.0) -> float:
    """The probability that the mean of `tasks` values is at most 0, or with `bound` the one-sided 95% bound of that
    mean, given the first [n] of them.

    >>> round(chance(torch.tensor([1.0, -1.0] * 5), 20, bound=False), 2)
    0.5
    >>> chance(torch.tensor([0.9, 1.1] * 5), 20, bound=False) < 1e-4
    True

    equal: the value of a task on which a candidate is as good as the reference. One such is counted with the others, so
    that few equal values are not taken for a certainty. With all values there, the answer is 0 or 1.
    """
    n = excess.numel()
    if n >= tasks:
        mean, spread = float(excess.double().mean()), float(excess.double().std()) if n > 1 else math.inf
        return float(mean + (_margin(spread, tasks) if bound else 0.0) <= 1e-12)
    values = torch.cat([excess.double(), torch.tensor([equal], dtype=torch.float64)])
    mean, spread = float(values.mean()), float(values.std())
    if spread == 0:
        return float(mean <= 0)
    short = -mean - (_margin(spread, tasks) if bound else 0.0)
    return t_tail(-short / (spread * math.sqrt(1 / n - 1 / tasks)), n)


def _margin(spread: float, tasks: int) -> float:
    """How far a mean's one-sided 95% bound lies above it."""
    return t_quantile(0.95, tasks - 1) * spread / math.sqrt(tasks) if spread else 0.0


def fastest(
    order: Sequence[Key],
    scores: Scores[Key],
    excess: Callable[[Key, int], Tensor],
    tied: Callable[[Key], Iterable[Key]],
    tasks: int,
    *,
    bound: bool,
    equal: float = 0.0,
    spared: Key | None = None,
    error: float = ERROR,
) -> Key | None:
    """The candidate that is admitted on all tasks and comes first in `order`; None where none is.

    One after another they go through the looks until they are dropped or have seen all tasks. Behind the one that is
    admitted only those run whose times are a tie with it; of these and itself the most accurate is taken.

    >>> drops = {"a": [0.3, 0.5] * 20, "b": [-0.1, 0.1] * 20, "c": [0.0] * 40}
    >>> seen = {}
    >>> def scores(name, n):
    ...     seen[name] = n
    ...     return -torch.tensor(drops[name][:n])
    >>> fastest("abc", scores, lambda name, n: -scores(name, n), lambda name: [], 40, bound=False), seen
    ('b', {'a': 10, 'b': 40})

    order: candidates, the fastest first. excess: by how much each of the first so many tasks goes beyond what is
    allowed, as `chance` takes it, and `equal`. tied: candidates whose time is a tie with one's. spared: one that is
    admitted as it is, the reference of the others; what is slower does not run.
    """
    allowance = Allowance(error, len(looks(tasks)))

    def admitted(key: Key, better: Callable[[int], float] = lambda _: 1.0) -> bool:
        for n in looks(tasks):
            likely = 1.0 if key == spared else chance(excess(key, n), tasks, bound=bound, equal=equal)
            if n < tasks and allowance.covers(min(likely, better(n))):
                return False
        return likely == 1.0

    first = next((key for key in order if admitted(key)), None)
    if first is None:
        return None
    best, place = first, {key: i for i, key in enumerate(order)}
    for key in tied(first):
        if place[key] <= place[first]:
            continue
        lead = scores(best, tasks)

        def better(n: int, key: Key = key, lead: Tensor = lead) -> float:
            return chance(lead[:n] - scores(key, n), tasks, bound=False)

        if admitted(key, better) and float(scores(key, tasks).double().mean()) > float(lead.double().mean()):
            best = key
    return best


def most_accurate(candidates: Sequence[Key], scores: Scores[Key], tasks: int, *, error: float = ERROR) -> Key:
    """The candidate of the highest mean over all tasks; of equal ones the first.

    All go from look to look together, and those drop out that hardly can be better than the one that leads.

    >>> worth = {"a": [0.1, 0.2] * 20, "b": [0.7, 0.9] * 20}
    >>> most_accurate("ab", lambda name, n: torch.tensor(worth[name][:n]), 40)
    'b'
    """
    allowance, left = Allowance(error, len(looks(tasks))), list(candidates)
    for n in looks(tasks):
        means = [float(scores(key, n).double().mean()) for key in left]
        leader = left[max(range(len(left)), key=means.__getitem__)]
        if n < tasks:
            lead = scores(leader, n)
            left = [k for k in left if k == leader or not _is_beaten(lead, scores(k, n), tasks, allowance)]
    return leader


def _is_beaten(lead: Tensor, own: Tensor, tasks: int, allowance: Allowance) -> bool:
    return allowance.covers(chance(lead - own, tasks, bound=False))
