"""Training runs, selections and demos that are killed at random moments and go on each time; for a process of its own,
which forks before it has used autograd, whose threads a fork does not take along. `python tests/killed.py KILLS SEED`
kills each kind so often."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimiser's first step imports it: once here, not in each child
from small_runs import VAL, assert_same_bits, network, run, small, state

from lambda_maml import checkpoint, cli, cli_demo, data
from lambda_maml.files import write_json
from lambda_maml.select import select_pattern
from lambda_maml.train import BEST, LAST

SETTINGS = small(learn_lr="layer", average=0.9, val_tasks=2, val_every=2)


def part(folder: Path) -> None:
    """Begin the run of a folder, or go on with it."""
    goes_on = (folder / LAST).is_file()
    model = network(seed=9 if goes_on else 0)
    run(folder, 44, SETTINGS, model, resume=goes_on, log_every=3)


def selection(folder: Path) -> None:
    """A selection, whose result is written as the command does it."""
    tasks = data.sample_tasks(VAL, 8, ways=3, shots=1, query=2, seed=1)
    kept = folder / "pattern.evaluated.json"
    chosen = select_pattern(network(), tasks, steps=2, lr=0.1, seconds=0.0, resume=kept)
    write_json(folder / "pattern.json", chosen.to_dict())


def demo(folder: Path) -> None:
    """A small demo, which begins anew each time."""
    tiny = {**cli_demo.DEMO["settings"], "steps": 1, "query": 2, "val_tasks": 2, "val_every": 2}
    few: dict[str, Any] = {"width": 4, "settings": tiny, "iterations": 4, "select_tasks": 3, "test_tasks": 3}
    cli_demo.DEMO.update(few, timing_seconds=0.0)
    assert cli.run(["demo", "--out", str(folder)]) == 0


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


def killed(folder: Path, work: Callable[[Path], None], done: Callable[[Path], int], kills: int, seed: int = 0) -> None:
    """Two folders: `whole`, where `work` was done without a break, and `parts`, where it was killed at random."""
    torch.set_num_threads(1)
    whole, parts = folder / "whole", folder / "parts"
    assert in_a_child(partial(work, whole)) == 0
    draw, count, seconds = random.Random(seed), 0, 0.1
    while count < kills:
        before = done(parts)
        status = in_a_child(partial(work, parts), killed_after=seconds * (0.5 + draw.random()))
        assert status in (0, -signal.SIGKILL), status
        count += status != 0
        # so that about every second part gets on, on any machine, and few end before they are killed
        seconds *= 1.3 if status != 0 and done(parts) == before else 0.8
        if status == 0:  # it ended before it was killed: begin anew
            shutil.rmtree(parts)
    assert in_a_child(partial(work, parts)) == 0
    assert sorted(p.name for p in parts.iterdir()) == sorted(p.name for p in whole.iterdir())


def iterations(folder: Path) -> int:
    return state(folder)[2] if (folder / LAST).is_file() else 0


def evaluated(folder: Path) -> int:
    kept = folder / "pattern.evaluated.json"
    return len(json.loads(kept.read_text())["scores"]) if kept.is_file() else 0


def twenty_times(folder: str) -> None:
    """A training run."""
    killed(Path(folder), part, iterations, 20)


def scores(path: Path) -> list[Any]:
    """What a selection found, without times and what follows from them."""
    rows = json.loads(path.read_text())["candidates"]
    return sorted((row["pattern"], row["accuracy"], row["drop"], row["drop_bound"]) for row in rows)


def same_best(a: Path, b: Path) -> None:
    """Equal runs write equal bytes."""
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in (BEST, "best.json"))
    checkpoint.load(a / BEST)


if __name__ == "__main__":
    often, first = map(int, sys.argv[1:])
    for kind, how_far in ((part, iterations), (selection, evaluated), (demo, iterations)):
        home = Path(tempfile.mkdtemp())
        killed(home, kind, how_far, often, first)
        pair = home / "whole", home / "parts"
        if kind is part:
            assert_same_bits(*pair)
        if kind is not selection:
            same_best(*pair)
        if kind is not part:
            assert scores(pair[0] / "pattern.json") == scores(pair[1] / "pattern.json")
        shutil.rmtree(home)
        print(f"{kind.__name__}: killed {often} times, resumed to equal results", flush=True)
