"""What a selection compares: a pattern or schedule with a number of steps and an inner rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .patterns import Pattern

__all__ = ["Trial", "counts_of", "rates_of", "trials_of"]


class Trial(NamedTuple):
    """A candidate. `steps` and `rate` are None where all candidates have the one that was given.

    >>> str(Trial(Pattern("00011"), 5, 0.1)), str(Trial(Pattern("00011")))
    ('00011, 5 steps, rate 0.1', '00011')
    """

    pattern: Pattern
    steps: int | None = None
    rate: float | None = None

    @property
    def timed(self) -> str:
        """What timings call it: a rate costs no time.

        >>> Trial(Pattern("00011"), 5, 0.1).timed
        '00011, 5 steps'
        """
        return str(self._replace(rate=None))

    def __str__(self) -> str:
        parts = [] if self.steps is None else [f"{self.steps} step{'s' * (self.steps != 1)}"]
        return ", ".join([str(self.pattern), *parts, *([] if self.rate is None else [f"rate {self.rate:g}"])])


def trials_of(
    patterns: Iterable[Pattern], steps: Sequence[int | None] = (None,), rates: Sequence[float | None] = (None,)
) -> list[Trial]:
    """Each pattern with each number of steps and each rate.

    >>> [str(trial) for trial in trials_of([Pattern("001")], steps=[1, 5])]
    ['001, 1 step', '001, 5 steps']
    """
    return [Trial(pattern, k, rate) for pattern in patterns for k in steps for rate in rates]


def counts_of(steps: int | Sequence[int]) -> list[int]:
    """The numbers of steps to compare.

    >>> counts_of(5), counts_of([1, 5])
    ([5], [1, 5])

    Raises ValueError for what is none, and for equal ones.
    """
    counts = list(steps) if isinstance(steps, Sequence) else [steps]
    wrong = [k for k in counts if not isinstance(k, int) or isinstance(k, bool) or k < 1]
    if not counts or wrong or len(set(counts)) < len(counts):
        raise ValueError(f"steps is {steps!r}, expected a whole number of at least 1, or several different ones")
    return counts


def rates_of(rates: Sequence[float] | None, lr: Any, rule: object = None) -> list[Any]:
    """The inner rates to compare: `rates`, or else `lr` alone. Raises ValueError beside an inner rule.

    >>> rates_of(None, 0.1), rates_of([0.1, 0.4], 0.1)
    ([0.1], [0.1, 0.4])
    """
    if rates is None:
        return [lr]
    found = list(rates)
    wrong = [r for r in found if isinstance(r, bool) or not isinstance(r, (int, float)) or not 0 < r < math.inf]
    if not found or wrong or len(set(found)) < len(found):
        raise ValueError(f"rates is {rates!r}, expected different numbers above 0")
    if rule is not None:
        raise ValueError(f"rates are given beside the inner rule {rule!r}, which has its own: give one of the two")
    return [float(r) for r in found]
