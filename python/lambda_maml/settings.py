"""What a training run is trained by."""

from __future__ import annotations

from dataclasses import dataclass

from .data.augment import Augment

__all__ = ["LEARNED", "Settings", "stages"]

LEARNED = ("one", "layer", "step", "layer-step", "weight")
"""Forms of learned inner rates: one for all; per layer, per step or both (MAML++); per weight (Meta-SGD)."""
_MOST_OF_A_TASK, _MOST_RATE = 100_000, 1e6  # beyond these a number is a slip, or a damaged file


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
        learn_lr: learn the inner rates with the network, from `lr` on: one of `LEARNED` (None: they stay). zero_head:
        the last layer is zero at the start of each task and is not meta-learned, so that no class has a start of its
        own (Kao, Chiu, Chen 2022, "zeroing trick").

    The outer gradient:
        outer: "maml", or "reptile" (Nichol et al. 2018, algorithm 2): adapt to support and query images together, in
        first order, and go towards the mean of the adapted weights. second_order: differentiate through the inner
        gradients; first_order_iterations: not in so many iterations at the start. multi_step_iterations: in so many
        iterations at the start the query loss after every inner step counts (MAML++, Antoniou et al. 2019, equation 4).

    What a meta-batch has:
        patterns: "sampled": a pattern drawn anew for each meta-batch, each of all as likely, so that one set of weights
        serves all of them (with zero_head, of those that update the last layer); or a schedule over iterations, "MAML;
        2000: 00111; 5000: ANIL" (None: `pattern` in all). `pattern` is then that of validation alone (None: all layers,
        or the schedule's last). flip, crop, jitter: of the training images, see `data.Augment`.

    The update:
        optimizer: "adam" or "sgd". meta_lr: its rate; cosine: it falls to `meta_lr_end` within so many iterations,
        along half a cosine (None: it stays). weight_decay: of the network's weights, as in AdamW (Loshchilov, Hutter
        2019). clip_norm, clip_value: bound the gradient's norm, or each of its numbers. average: decay of an
        exponential average of the weights, which validation and the best checkpoint have (None: the weights
        themselves).

    Validation:
        val_tasks: fixed tasks that the best checkpoint is chosen by, every `val_every` iterations. patience: stop after
        so many validations without a better one (None: go on).

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
    outer: str = "maml"
    first_order_iterations: int = 0
    multi_step_iterations: int = 0
    optimizer: str = "adam"
    cosine: int | None = None
    meta_lr_end: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    clip_value: float | None = None
    average: float | None = None
    patience: int | None = None
    patterns: str | None = None
    flip: bool = False
    crop: int = 0
    jitter: float = 0.0
    zero_head: bool = False

    def __post_init__(self) -> None:
        for name in ("shots", "query", "steps", "test_steps", "meta_batch", "val_tasks"):
            self._from(1, name, _MOST_OF_A_TASK)
        self._from(2, "ways", _MOST_OF_A_TASK)
        for name in ("val_every", "cosine", "patience"):
            self._from(1, name)
        for name in ("first_order_iterations", "multi_step_iterations", "meta_lr_end", "weight_decay"):
            self._from(0, name)
        for name in ("lr", "meta_lr", "clip_norm", "clip_value", "average"):
            self._above_0(name)
        if self.average is not None and self.average >= 1:
            raise ValueError(f"average is {self.average}, expected below 1: 0.999 keeps about 1,000 iterations")
        self._one_of(("follow", "never"), "norm")
        self._one_of(("maml", "reptile"), "outer")
        self._one_of(("adam", "sgd"), "optimizer")
        if self.learn_lr is not None:
            self._one_of(LEARNED, "learn_lr")
        Augment(self.flip, self.crop, self.jitter)
        stages(self.patterns)
        self._together()

    def _together(self) -> None:
        """ValueError for settings of which one says what another one excludes."""
        only_maml = [n for n in ("learn_lr", "first_order_iterations", "multi_step_iterations") if getattr(self, n)]
        if self.outer == "reptile" and only_maml:
            raise ValueError(
                f"outer is 'reptile', which has no gradient through the inner steps: leave {only_maml[0]} out"
            )
        if self.first_order_iterations and not self.second_order:
            raise ValueError(
                "first_order_iterations is set, but no iteration is of second order: leave one of them out"
            )
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError("clip_norm and clip_value are both set: choose one bound")
        if self.meta_lr_end and self.cosine is None:
            raise ValueError("meta_lr_end is set, but the rate stays: say within how many iterations it falls (cosine)")
        if self.meta_lr_end > self.meta_lr:
            raise ValueError(f"meta_lr_end is {self.meta_lr_end}, expected at most meta_lr, {self.meta_lr}")

    def _above_0(self, name: str) -> None:
        if getattr(self, name) is not None and not 0 < getattr(self, name) <= _MOST_RATE:
            raise ValueError(f"{name} is {getattr(self, name)}, expected above 0 and at most {_MOST_RATE}")

    def _from(self, least: int, name: str, most: int = 10**9) -> None:
        if getattr(self, name) is not None and not least <= getattr(self, name) <= most:
            raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least} and at most {most}")

    def _one_of(self, values: tuple[str, ...], name: str) -> None:
        if getattr(self, name) not in values:
            told = f"{', '.join(map(repr, values[:-1]))} or {values[-1]!r}"
            raise ValueError(f"{name} is {getattr(self, name)!r}, expected {told}")

    @property
    def evaluation_steps(self) -> int:
        return self.steps if self.test_steps is None else self.test_steps

    @property
    def augment(self) -> Augment:
        return Augment(self.flip, self.crop, self.jitter)


def stages(patterns: str | None) -> list[tuple[int, str]]:
    """A schedule over iterations: from which one on, counted from 0, each pattern holds; none where it is no schedule.

    >>> stages("MAML; 2000: 00111")
    [(0, 'MAML'), (2000, '00111')]

    Raises:
        ValueError: the text is neither "sampled" nor a schedule.
    """
    if patterns is None or patterns == "sampled":
        return []
    found: list[tuple[int, str]] = []
    for place, part in enumerate(patterns.split(";")):
        start, colon, pattern = part.partition(":")
        numbered = bool(colon) and start.strip().isdigit()
        if place and not numbered or place and int(start) <= found[-1][0]:
            raise ValueError(
                f"patterns is {patterns!r}, expected 'sampled', or patterns with the iterations from which they hold, "
                "in order: 'MAML; 2000: 00111; 5000: ANIL'"
            )
        found.append((int(start), pattern.strip()) if numbered else (0, part.strip()))
    if found[0][0] != 0:
        raise ValueError(f"patterns is {patterns!r}, which has no pattern for iteration 0: begin with one")
    return found
