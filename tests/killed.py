"""A training run that is killed twenty times and goes on each time; for a process of its own, which forks before it has
used autograd, whose threads a fork does not take along."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # an optimiser's first step imports it: once here, not in each child
from small_runs import network, run, small, state

from lambda_maml.train import LAST

SETTINGS = small(learn_lr="layer", average=0.9, val_tasks=2, val_every=2)


def part(folder: Path) -> None:
    """Begin the run of a folder, or go on with it."""
    goes_on = (folder / LAST).is_file()
    model = network(seed=9 if goes_on else 0)
    run(folder, 44, SETTINGS, model, resume=goes_on, overwrite=True, log_every=3)


def in_a_child(work: Callable[[], None], killed_after: float | None = None) -> int:
    """The exit status of a forked process that does `work`; -9 where it was killed after so many seconds."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def twenty_times(folder: str) -> None:
    """Two runs: `whole` without a break, and `parts`, killed at twenty random moments."""
    torch.set_num_threads(1)
    whole, parts = Path(folder) / "whole", Path(folder) / "parts"
    assert in_a_child(partial(part, whole)) == 0
    draw, kills, seconds = random.Random(0), 0, 0.1
    while kills < 20:
        before = done(parts)
        status = in_a_child(partial(part, parts), killed_after=seconds * (0.5 + draw.random()))
        assert status in (0, -signal.SIGKILL), status
        kills += status != 0
        seconds *= 1.3 if done(parts) == before else 0.8  # so that about every second part gets on, on any machine
        if status == 0:  # it ended before it was killed: begin anew
            shutil.rmtree(parts)
    assert in_a_child(partial(part, parts)) == 0


def done(folder: Path) -> int:
    return state(folder)[2] if (folder / LAST).is_file() else 0
