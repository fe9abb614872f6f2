"""Which patterns of a deep network are compared, and what a selection is expected to take before it starts.

n layers have 2^n - 1 patterns. Of those whose first updated layer is the same, all run the same forward passes and
send gradients back to that layer: the fewer layers behind it are updated, the cheaper. So a search goes from the
cheapest patterns up: those that update the last k layers, and, of a network of few stages, the parts of it
("stages:..."); then it freezes one layer more of what was chosen, for as long as that is admitted, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import racing
from .choice import FEW_BITS, Limit
from .cost import operations_of
from .groups import parts_of
from .network import layers_of
from .patterns import Pattern
from .progress import spoken
from .timing import COUNTED, WARMUP, Timing, is_tie
from .trials import Trial

__all__ = ["Counted", "Plan", "cheaper", "planned", "race_among", "search_deep", "suffixes_and_stages"]

Scores = Callable[[Trial, int], Tensor]
"""The scores of a candidate on the first so many tasks, evaluated as they are asked for."""


def suffixes_and_stages(model: nn.Module) -> list[Pattern]:
    """The patterns that update the last k layers, k = 1..n, and those by parts of the network where these are few.

    >>> [str(p) for p in suffixes_and_stages(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))]
    ['01', '11', '10']
    """
    names = [layer.name for layer in layers_of(model)]
    n = len(names)
    found = [Pattern("0" * (n - k) + "1" * k) for k in range(1, n + 1)]
    if 1 < (parts := len(parts_of(names)[1])) <= FEW_BITS:
        found += [Pattern.of(model, f"stages:{bits}") for bits in Pattern.all(parts)]
    return list(dict.fromkeys(found))


def cheaper(pattern: Pattern) -> dict[tuple[int, int], Pattern]:
    """The patterns that freeze one layer more, behind the first updated one of each stage of a schedule; by stage and
    layer, counted from 0.

    >>> {layer: str(p) for (_, layer), p in cheaper(Pattern("00111")).items()}
    {3: '00101', 4: '00110'}
    """
    found = {}
    for at, bits in enumerate(pattern.stages):
        first = bits.index("1")
        for layer in range(first + 1, len(bits)):
            if bits[layer] == "1":
                less = bits[:layer] + "0" + bits[layer + 1 :]
                found[at, layer] = Pattern(",".join([*pattern.stages[:at], less, *pattern.stages[at + 1 :]]))
    return found


def race_among(
    trials: Sequence[Trial], reference: Trial, limit: Limit, scores: Scores, times: Mapping[Trial, Timing],
    memory_mb: Mapping[Trial, float] | None, tasks: int, error: float,
) -> None:  # fmt: skip
    """Score candidates on as many of the tasks as it takes to tell which one `limit` chooses; see `racing`."""
    order = sorted(trials, key=lambda trial: (times[trial].median, str(trial)))
    if limit.budget is not None:
        within = [t for t in order if limit.budget.holds(times[t].median, None if memory_mb is None else memory_mb[t])]
        if within:
            racing.most_accurate(within, lambda t, n: limit.sign * scores(t, n), tasks, error=error)
        return

    def tied(one: Trial) -> list[Trial]:
        return [other for other in order if is_tie(times[one], times[other])]

    _fastest(order, reference, limit, scores, tied, tasks, error)


def _fastest(
    order: Sequence[Trial], reference: Trial, limit: Limit, scores: Scores, tied: Callable[[Trial], Sequence[Trial]],
    tasks: int, error: float,
) -> Trial | None:  # fmt: skip
    base = scores(reference, tasks)
    return racing.fastest(
        order,
        lambda trial, n: limit.sign * scores(trial, n),
        lambda trial, n: limit.excess(base[:n], scores(trial, n)),
        tied,
        tasks,
        bound=limit.decide == "bound",
        equal=float(limit.excess(base, base).mean()),
        spared=reference,
        error=error,
    )


def search_deep(
    trials: Sequence[Trial], reference: Trial, limit: Limit, scores: Scores, counted: Counted | None, tasks: int,
    error: float,
) -> None:  # fmt: skip
    """Score the candidates of a deep network, the cheapest first by its multiply-adds, then what is cheaper than the
    one that is admitted, for as long as something is. A layer whose freezing was ruled out is not frozen later, where
    more layers are frozen: n layers take at most n such candidates. Half of `error` is for the candidates, half for the
    rest."""

    def cost(trial: Trial) -> float:
        return 0.0 if counted is None else counted(trial)

    best = _fastest(sorted(trials, key=cost), reference, limit, scores, lambda _: [], tasks, error / 2)
    left = error / 2
    done: set[tuple[int, int]] = set()  # layers that were tried
    while best is not None:
        less = {at: best._replace(pattern=p) for at, p in cheaper(best.pattern).items() if at not in done}
        less = {at: trial for at, trial in less.items() if trial not in trials}
        order = sorted(less, key=lambda at: cost(less[at]))
        left /= 2
        tried = [less[at] for at in order]
        best = _fastest(tried, reference, limit, scores, lambda _: [], tasks, left) if tried else None
        done |= set(order[: len(order) if best is None else tried.index(best)])


class Counted:
    """Multiply-adds of adaptations to a support set, counted without running them.

    >>> counted = Counted(model, tasks[0].xs, steps=5, norm="follow")
    >>> counted(Trial(Pattern("00001"))) < counted(Trial(Pattern("11111")))
    True

    Raises ValueError where the network cannot be counted; see `cost.operations_of`.
    """

    def __init__(self, model: nn.Module, xs: Any, steps: int, norm: str) -> None:
        self._model, self._steps, self._norm = model, steps, norm
        self._operations = operations_of(model, xs)

    def __call__(self, trial: Trial) -> int:
        steps = self._steps if trial.steps is None else trial.steps
        total, done = 0, 0
        for _, length in trial.pattern.segments(steps):
            updated = trial.pattern.parameters(self._model, self._norm, done)
            once, step, _ = self._operations.costs(updated)
            total, done = total + once + length * step, done + length
        return total


def counted_or_none(model: nn.Module, xs: Any, steps: int, norm: str) -> Counted | None:
    """`Counted`, or None where the network cannot be counted."""
    try:
        return Counted(model, xs, steps, norm)
    except ValueError:
        return None


class Plan(NamedTuple):
    """What a selection is to do, and how many seconds that is likely to take, and at most."""

    candidates: int
    tasks: int
    likely: float | None
    most: float | None
    race: bool

    def __str__(self) -> str:
        what = f"{self.candidates} candidates, {'a race' if self.race else 'each'} on {self.tasks} tasks"
        if self.likely is None or self.most is None:
            return f"{what}: what was evaluated before is taken up"
        return f"{what}: about {spoken(self.likely)}" + (f", at most {spoken(self.most)}" if self.race else "")


def planned(
    each: float | None, trials: Sequence[Trial], fulls: Sequence[Trial], counted: Counted | None, race: bool,
    tasks: int, test_tasks: int, seconds: float | None,
) -> Plan:  # fmt: skip
    """How long a selection will take, by the seconds that a task takes under the full pattern and the other patterns'
    costs.

    A race is expected to see twenty tasks of each candidate, and all tasks of one in the middle. Where a network cannot
    be counted, all patterns are taken to cost as much as the full one. Timing takes `seconds`, or as long as the rounds
    that are counted in any case. No `each`: what was evaluated before is taken up, and no time is foretold.
    """
    if each is None:
        return Plan(len(trials), tasks, None, None, race)
    base = 1 if counted is None else counted(fulls[0])
    own = sorted(each * (1.0 if counted is None else counted(trial) / base) for trial in trials)
    middle = own[len(own) // 2]
    most = tasks * sum(own)
    looked = min(tasks, 2 * racing.FIRST_LOOK)
    likely = (tasks * len(fulls) * each + looked * sum(own) + tasks * middle) if race else most
    timed = max(1.25 * (seconds or 0.0), (WARMUP + COUNTED) * sum(own))
    after = 2 * test_tasks * (each + middle) + timed
    return Plan(len(trials), tasks, min(likely, most) + after, most + after, race)
