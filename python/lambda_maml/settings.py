"""What a training run is trained by."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LEARNED", "Settings"]

LEARNED = ("one", "layer", "step", "layer-step", "weight")
"""Forms of learned inner rates: one for all; per layer, per step or both (MAML++); per weight (Meta-SGD)."""


@dataclass(frozen=True)
class Settings:
    """What a run is trained by; a resumed run must have the same. The defaults are the paper's protocol.

    >>> settings = Settings(ways=5, shots=5, learn_lr="layer-step", first_order_iterations=2000, average=0.999)
    >>> settings.evaluation_steps
    5

    Tasks and the inner loop:
        query: query images per class. steps, lr: the inner loop's steps and rate in training. test_steps: inner steps
        in validation and, by default, in all that is later done with the checkpoint (None: as in training). pattern:
        what is adapted (None: all layers). norm: "follow" or "never", as in `adapt`. meta_batch: tasks per iteration.
        learn_lr: learn the inner rates with the network, from `lr` on: one of `LEARNED` (None: they stay).

    The outer gradient:
        meta_lr: Adam's rate. second_order: differentiate through the inner gradients; first_order_iterations: not in
        so many iterations at the start.

    Validation:
        val_tasks: fixed tasks that the best checkpoint is chosen by, every `val_every` iterations.

    Raises:
        ValueError: a number is out of range, or two settings do not go together.
    """

    ways: int = 5
    shots: int = 1
    query: int = 15
    steps: int = 5
    test_steps: int | None = None
    lr: float = 0.01
    meta_lr: float = 1e-3
    meta_batch: int = 4
    pattern: str | None = None
    norm: str = "follow"
    second_order: bool = True
    seed: int = 0
    val_tasks: int = 100
    val_every: int = 250
    learn_lr: str | None = None
    first_order_iterations: int = 0

    def __post_init__(self) -> None:
        for name in ("shots", "query", "steps", "meta_batch", "val_tasks", "val_every"):
            self._at_least(1, name)
        self._at_least(2, "ways")
        self._at_least(0, "first_order_iterations")
        for name in ("lr", "meta_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0")
        self._one_of(("follow", "never"), "norm")
        if self.learn_lr is not None:
            self._one_of(LEARNED, "learn_lr")

    def _at_least(self, least: float, name: str) -> None:
        if not least <= getattr(self, name) < math.inf:
            raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")

    def _one_of(self, values: tuple[str, ...], name: str) -> None:
        if getattr(self, name) not in values:
            told = f"{', '.join(map(repr, values[:-1]))} or {values[-1]!r}"
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {told}")

    @property
    def evaluation_steps(self) -> int:
        return self.steps if self.test_steps is None else self.test_steps
