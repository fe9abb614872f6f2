"""What changes in the course of a run: functions of the settings and the iteration alone, so that resume is exact."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from .network import layers_of
from .patterns import Pattern
from .settings import Settings, stages

__all__ = [
    "along_cosine", "check_zero_head", "importances", "meta_rate", "second_order", "training_pattern",
    "validation_pattern",
]  # fmt: skip


def second_order(settings: Settings, iteration: int) -> bool:
    """Whether an iteration, counted from 0, differentiates through the inner gradients (MAML++'s annealing of the
    order: Antoniou et al. 2019, section 4)."""
    return settings.second_order and iteration >= settings.first_order_iterations


def importances(settings: Settings, iteration: int) -> list[float] | None:
    """How much the query loss after each inner step counts; None: the last one alone (MAML++: Antoniou et al. 2019,
    equation 4, with the annealing of the authors' code).

    >>> importances(Settings(steps=2, multi_step_iterations=100), 50)
    [0.25, 0.75]
    """
    steps, last = settings.steps, settings.multi_step_iterations
    if iteration >= last:
        return None
    share = iteration / last
    each = max((1 - share) / steps, 0.03 / steps)
    final = min((1 + share * (steps - 1)) / steps, 1 - 0.03 * (steps - 1) / steps)
    return [each] * (steps - 1) + [final]


def meta_rate(settings: Settings, iteration: int) -> float:
    """The optimiser's rate: meta_lr, or along half a cosine from it to meta_lr_end (Loshchilov, Hutter 2017,
    equation 5, without restarts)."""
    if settings.cosine is None:
        return settings.meta_lr
    return along_cosine(min(iteration / settings.cosine, 1.0), settings.meta_lr, settings.meta_lr_end)


def along_cosine(share: float, first: float, last: float = 0.0) -> float:
    """A rate that falls from `first` to `last` along half a cosine, of which this share is over.

    >>> along_cosine(0.5, 0.1)
    0.05
    """
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def training_pattern(settings: Settings, iteration: int, model: nn.Module) -> Pattern:
    """What an iteration adapts: a pattern that is drawn for it, that of the schedule, or the one of all iterations."""
    if settings.patterns == "sampled":
        return _sampled(settings, iteration, len(layers_of(model)))
    begun = [pattern for start, pattern in stages(settings.patterns) if start <= iteration]
    return Pattern.of(model, begun[-1]) if begun else validation_pattern(settings, model)


def _sampled(settings: Settings, iteration: int, layers: int) -> Pattern:
    """One of the 2^layers - 1 patterns, each as likely as any other, for a seed and an iteration; with a zero head one
    of those that end in 1, as the others leave the last layer at zero."""
    words = np.random.PCG64(np.random.SeedSequence(settings.seed, spawn_key=(iteration, 2)))
    while True:
        bits = "".join("1" if word % 2 else "0" for word in words.random_raw(layers).tolist())
        if settings.zero_head:
            bits = bits[:-1] + "1"
        if "1" in bits:
            return Pattern(bits)


def validation_pattern(settings: Settings, model: nn.Module) -> Pattern:
    """What validation adapts, in all iterations, so that checkpoints are compared by one measure.

    Raises:
        ValueError: a pattern of the settings does not fit the network.
    """
    scheduled = [Pattern.of(model, pattern) for _, pattern in stages(settings.patterns)]
    last = scheduled[-1] if scheduled else Pattern.of(model, "MAML")
    return last if settings.pattern is None else Pattern.of(model, settings.pattern)


def check_zero_head(settings: Settings, model: nn.Module) -> None:
    """ValueError where a pattern of a run whose last layer begins at zero would leave it there."""
    found = [validation_pattern(settings, model), *(Pattern.of(model, p) for _, p in stages(settings.patterns))]
    steps = min(settings.steps, settings.evaluation_steps)
    frozen = [p for p in found if all(p.at(step).endswith("0") for step in range(steps))]
    if frozen:
        raise ValueError(
            f"zero_head: pattern {frozen[0]} leaves the last layer at zero, where all classes are one: choose patterns "
            "that end in 1, or leave zero_head out"
        )
