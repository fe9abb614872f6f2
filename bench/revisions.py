"""Adaptation time of this checkout beside another one's: is a change slower, and does it change a bit of a result?

    git worktree add ../before COMMIT && (cd ../before && python setup.py build_ext --inplace)
    python bench/revisions.py ../before --configurations glyphs,cifar-1-shot --patterns 11111,00011

Two checkouts cannot be loaded into one process: both register the same operators. Each has a process of its own, which
waits while the other one measures; calls alternate in short rounds, so that drift of the machine hits both alike; idle
threads sleep (OMP_WAIT_POLICY), so that they do not disturb the other side. The last row of each pattern is of this
checkout alone: a rate per layer and step beside one rate for all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
# What a process does, by public names that both checkouts have; one line of JSON in, one out.
WORKER = """
import hashlib, json, sys, time
import torch
from lambda_maml import LambdaMAML, adapt, adapt_tasks, models
torch.set_num_threads(int(sys.argv[1]))
calls = {}

def make(kind, c, pattern, rates):
    torch.manual_seed(0)
    model = models.conv4(c["ways"], c["in_channels"], c["width"], c["image_size"])
    n, size = c["ways"] * c["shots"], (c["in_channels"], c["image_size"], c["image_size"])
    xs, ys = torch.randn(n, *size), torch.arange(c["ways"]).repeat_interleave(c["shots"])
    given = dict(pattern=pattern, steps=c["steps"], lr=rates)
    if kind == "adapt":
        return lambda: list(adapt(model, xs, ys, **given).parameters_dict().values())
    if kind == "query":
        learner = adapt(model, xs, ys, **given)
        return lambda: [learner(xs)]
    if kind == "tasks":
        many = [torch.stack([t] * 4) for t in (xs, ys, xs)]
        return lambda: [adapt_tasks(model, *many, **given)]

    def verbs():
        task = LambdaMAML(model, rates, pattern=pattern, first_order=kind == "verbs-1").clone()
        for _ in range(c["steps"]):
            task.adapt(torch.nn.functional.cross_entropy(task(xs), ys))
        return list(task.parameters_dict().values())

    return verbs

for line in sys.stdin:
    job = json.loads(line)
    if "make" in job:
        call = calls[job["name"]] = make(*job["make"])
        for _ in range(3):
            result = call()
        data = b"".join(t.detach().numpy().tobytes() for t in result)
        print(json.dumps(hashlib.sha256(data).hexdigest()), flush=True)
        continue
    call, times = calls[job["name"]], []
    for _ in range(job["count"]):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    print(json.dumps(times), flush=True)
"""


class Checkout:
    """A process with one checkout's packages."""

    def __init__(self, folder: Path, threads: int) -> None:
        paths = os.pathsep.join([str(folder), str(folder / "python")])
        variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=folder, env={**os.environ, **variables},
        )  # fmt: skip

    def ask(self, **job: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("a checkout's process ended: its error stands above")
        return json.loads(answer)

    def measure(self, row: str, count: int) -> list[int]:
        """The times of so many calls, in ns."""
        times: list[int] = self.ask(name=row, count=count)
        return times


def rounds(sides: Sequence[Callable[[int], list[int]]], seconds: float) -> list[list[float]]:
    """Each side's medians of short rounds, in ms, the order shuffled in each round."""
    first = [statistics.median(side(3)) for side in sides]
    count = max(1, int(10e6 / max(first)))  # calls of a round: about 10 ms
    medians: list[list[float]] = [[] for _ in sides]
    end, order = time.monotonic() + seconds, list(range(len(sides)))
    while time.monotonic() < end or len(medians[0]) < 5:
        random.shuffle(order)
        for i in order:
            medians[i].append(statistics.median(sides[i](count)) / 1e6)
    return medians


def told(name: str, medians: list[list[float]], note: str) -> str:
    """One line: both times, and the ratio of the two sides with its quartiles over the rounds."""
    before, now = medians
    q1, middle, q3 = statistics.quantiles([b / a for a, b in zip(before, now)], n=4)
    times = f"{statistics.median(before):8.3f} ms {statistics.median(now):8.3f} ms"
    return f"{name:44} {times}   {middle:.3f} ({q1:.3f}-{q3:.3f})   {note}"


def main() -> None:
    sys.path[:0] = [str(HERE), str(HERE / "python"), str(HERE / "bench")]
    from harness import CONFIGURATIONS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout, with its extension built in place")
    parser.add_argument(
        "--configurations", default=",".join(CONFIGURATIONS), help="names of bench/harness.py, with commas"
    )
    parser.add_argument("--patterns", default="11111,00011,00010")
    parser.add_argument(
        "--kinds", default="adapt", help="adapt, query, tasks, verbs-1, verbs-2 (the order), with commas"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="per row")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    before, now = Checkout(given.before.resolve(), given.threads), Checkout(HERE, given.threads)
    print(f"{'':44} {'before':>11} {'now':>11}   now/before (quartiles)", flush=True)
    for name in given.configurations.split(","):
        c = CONFIGURATIONS[name]._asdict()
        for pattern in given.patterns.split(","):
            for kind in given.kinds.split(","):
                row = f"{name} {pattern} {kind}"
                made = [side.ask(name=row, make=[kind, c, pattern, 0.01]) for side in (before, now)]
                note = "same bits" if made[0] == made[1] else "OTHER BITS"
                sides = [partial(side.measure, row) for side in (before, now)]
                print(told(row, rounds(sides, given.seconds), note), flush=True)
            many = [[0.01 + 0.001 * ((i + k) % 3) for i in range(5)] for k in range(c["steps"])]
            rows = [f"{name} {pattern} one rate", f"{name} {pattern} rates"]
            for row, rates in zip(rows, (0.01, many)):
                now.ask(name=row, make=["adapt", c, pattern, rates])
            sides = [partial(now.measure, row) for row in rows]
            print(told(f"{name} {pattern}, rates over one rate", rounds(sides, given.seconds), ""), flush=True)


if __name__ == "__main__":
    main()
