"""`lambda-maml train` beside the same loop by others: one run of the trainer, and between its iterations an iteration
of each of the others, which sample the same tasks and step by the same Adam."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from pathlib import Path

import meta
import numpy as np
import torch
from by_hand import LR, NORM
from harness import Configuration, Wrong, clock, make_problem, reason
from torch import nn

from lambda_kernels import agreement
from lambda_maml import data
from lambda_maml.data import ImageSet
from lambda_maml.evaluate import stack
from lambda_maml.train import Settings, train

COMPARED = 2  # iterations whose losses have to agree; they are off the clock


def random_set(c: Configuration) -> ImageSet:
    """Twice as many classes as a task has, of random pixels."""
    classes, each = 2 * c.ways, c.shots + meta.QUERY
    shape = (classes * each, c.image_size, c.image_size, c.in_channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    channels = (0.5,) * c.in_channels
    return ImageSet("random", "train", pixels, (each,) * classes, tuple(map(str, range(classes))), channels, channels)


def settings_of(c: Configuration) -> Settings:
    return Settings(
        ways=c.ways, shots=c.shots, query=meta.QUERY, steps=c.steps, lr=LR, meta_batch=meta.TASKS, norm=NORM,
        second_order=True, val_tasks=1, val_every=10**9,
    )  # fmt: skip


class Loop:
    """The trainer's loop by another's meta-gradient: a call is an iteration and gives its loss."""

    def __init__(self, model: nn.Module, make: meta.Make, c: Configuration, images: ImageSet) -> None:
        self.images, self.settings = images, settings_of(c)
        self.contender = make(model, meta.CASES[0], c.steps)
        self.optimizer = torch.optim.Adam(self.contender.network.parameters(), lr=self.settings.meta_lr)
        self.iteration = 0

    def __call__(self) -> float:
        s = self.settings
        tasks = data.sample_tasks(
            self.images, s.meta_batch, ways=s.ways, shots=s.shots, query=s.query, seed=s.seed,
            first=self.iteration * s.meta_batch,
        )  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.contender(meta.Batch(*stack(tasks, self.contender.network))).item()
        self.optimizer.step()
        self.iteration += 1
        return loss


class Enough(Exception):
    """Ends the trainer's run: there are as many rounds as there is time for."""


def first_loss(model: nn.Module, images: ImageSet, c: Configuration, folder: Path) -> float:
    """The mean loss of the trainer's first iterations."""
    run = train(model, images, images, out=folder, settings=settings_of(c), iterations=COMPARED)
    loss = run.history[-1].train_loss
    assert loss is not None
    return loss


def check(name: str, found: float, stock: float, truth: float) -> None:
    """Wrong unless the mean loss of the first iterations is right by the rule of `lambda_kernels.agreement`."""
    off, tolerance = abs(found - truth), agreement.TOLERANCES[torch.float32].loop
    limit = agreement.FACTOR * abs(stock - truth) + tolerance
    if not off <= limit:
        raise Wrong(
            f"the loss of {name} in the first {COMPARED} iterations: {off:.3g} away from plain PyTorch in float64, "
            f"{limit:.3g} allowed: no time taken"
        )


def alternating(
    c: Configuration, folder: Path, *, seconds: float, rounds: int, packages: bool
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds a task of the trainer ("ours") and of the others in each round, and why some have none.

    Rounds are as those of `harness.interleaved`, less the shuffling.
    """
    model, images = make_problem(c, torch.device("cpu")).model, random_set(c)

    def losses_of(loop: Loop) -> float:
        return statistics.fmean(loop() for _ in range(COMPARED))

    truth = losses_of(Loop(copy.deepcopy(model).double(), meta.Stock, c, images))
    loops = {"stock": Loop(model, meta.Stock, c, images)}
    stock = losses_of(loops["stock"])
    skipped: dict[str, str] = {}
    for name, make in meta.PACKAGES.items() if packages else ():
        try:
            loop = Loop(model, make, c, images)
            found = losses_of(loop)
        except Exception as error:  # what others' code cannot do is a note
            skipped[name] = reason(error)
        else:
            check(name, found, stock, truth)
            loops[name] = loop
    check("lambda-maml train", first_loss(copy.deepcopy(model), images, c, folder / "checked"), stock, truth)

    each: dict[str, list[float]] = {name: [] for name in ("ours", *loops)}
    begun = last = 0.0  # of the first round, of the trainer's present iteration

    def between(iteration: int, total: int, what: str) -> None:
        """What the trainer calls after each iteration; the first ones are no measure."""
        nonlocal begun, last
        if iteration > COMPARED:
            each["ours"].append(1e3 * (time.perf_counter() - last) / meta.TASKS)
            for name, loop in loops.items():
                each[name].append(1e3 * clock(loop, lambda: None) / meta.TASKS)
            done = len(each["ours"])
            if done >= rounds or (done >= 3 and time.perf_counter() - begun > seconds):
                raise Enough
        else:
            begun = time.perf_counter()
        last = time.perf_counter()

    with contextlib.suppress(Enough):
        train(model, images, images, out=folder / "timed", settings=settings_of(c), iterations=10**9, progress=between)
    return each, skipped
