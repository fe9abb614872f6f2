"""The trainer on two ranks beside the trainer on one of them, a thread each; started by torchrun, and rank 0 prints the
milliseconds a task of both in each round as JSON.

A round is a run of each, one after the other in turn, in the same two processes. While one rank trains alone the other
one sleeps.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import meta
import torch
import training
from harness import Configuration, Skip, Wrong, make_problem

from lambda_maml.processes import joined
from lambda_maml.ranks import ALONE, Ranks
from lambda_maml.train import train

ITERATIONS, WARMUP = 14, 2  # of a run; the first ones are off the clock
ALIKE = 1e-3  # of the loss: rounding of float32 gradients, which a few updates carry on


def alternating(c: Configuration, *, rounds: int, iterations: int = ITERATIONS) -> dict[str, list[float]]:
    """Milliseconds a task of one rank ("one") and of two ("ours") in each round, from processes of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command += [*map(str, c), f"--rounds={rounds}", f"--iterations={iterations}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise Skip(f"no ranks: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def run(ranks: Ranks, c: Configuration, out: Path, iterations: int) -> tuple[float, float]:
    """Milliseconds a task, the median of the iterations, and the mean loss of all."""
    model, images = make_problem(c, torch.device("cpu")).model, training.random_set(c)
    ends = []
    result = train(
        copy.deepcopy(model), images, images, out=out, settings=training.settings_of(c), iterations=iterations,
        ranks=ranks, overwrite=True, progress=lambda *_: ends.append(time.perf_counter()),
    )  # fmt: skip
    each = [later - earlier for earlier, later in zip(ends[WARMUP - 1 :], ends[WARMUP:])]
    loss = result.history[-1].train_loss
    assert loss is not None
    return 1e3 * statistics.median(each) / meta.TASKS, loss


def measure(ranks: Ranks, c: Configuration, folder: Path, *, rounds: int, iterations: int) -> dict[str, list[float]]:
    """What `alternating` gives; of rank 0."""
    each: dict[str, list[float]] = {"ours": [], "one": []}
    for index in range(rounds + 1):  # the first round is none
        losses = {}
        for name in ("one", "ours") if index % 2 else ("ours", "one"):
            if name == "ours":
                taken, losses[name] = run(ranks, c, folder, iterations)
            else:
                taken, losses[name] = ranks.first(lambda: run(ALONE, c, folder, iterations))
            if index:
                each[name].append(taken)
        if not abs(losses["ours"] - losses["one"]) <= ALIKE * losses["one"]:
            raise Wrong(f"the mean loss is {losses['ours']} on two ranks, {losses['one']} on one: no time taken")
    return each


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    for name in Configuration._fields:
        parser.add_argument(name, type=int)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    given = parser.parse_args()
    c = Configuration(*(getattr(given, name) for name in Configuration._fields))
    torch.set_num_threads(1)
    with joined() as ranks, tempfile.TemporaryDirectory() as folder:
        each = measure(ranks, c, Path(folder), rounds=given.rounds, iterations=given.iterations)
        if ranks.rank == 0:
            print(json.dumps(each), flush=True)


if __name__ == "__main__":
    main()
