"""What changes in the course of a run: functions of the settings and the iteration alone, so that resume is exact."""

from __future__ import annotations

from torch import nn

from .patterns import Pattern
from .settings import Settings

__all__ = ["second_order", "training_pattern", "validation_pattern"]


def second_order(settings: Settings, iteration: int) -> bool:
    """Whether an iteration, counted from 0, differentiates through the inner gradients (MAML++'s annealing of the
    order: Antoniou et al. 2019, section 4)."""
    return settings.second_order and iteration >= settings.first_order_iterations


def training_pattern(settings: Settings, iteration: int, model: nn.Module) -> Pattern:
    """What an iteration adapts."""
    return validation_pattern(settings, model)


def validation_pattern(settings: Settings, model: nn.Module) -> Pattern:
    """What validation adapts, in all iterations, so that checkpoints are compared by one measure.

    Raises:
        ValueError: the settings' pattern does not fit the network.
    """
    return Pattern.of(model, settings.pattern or "MAML")
