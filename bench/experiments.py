"""The experiments of docs/experiments.md: trains, evaluates and times one configuration after another, and writes one
JSON file for each run and evaluation. What is done is left alone, and what was ended goes on: start it again.

Each job has a process of its own with one thread; --jobs says how many at a time. Adaptation times are taken first,
while nothing else runs: leave the machine alone as long as that lasts. Ctrl-C and SIGTERM save.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import experiments_page
import experiments_plan
from experiments_plan import Job

ROOT = Path(__file__).resolve().parents[1]
STOPPED = 3  # the exit status of a job that a signal ended


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    try:
        return {True: page, False: run}[given.page is not None](given)
    except (ValueError, OSError) as error:
        print(f"experiments: error: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="experiments.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the image sets, laid out as docs/data.md says")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="checkpoints [%(default)s]")
    parser.add_argument("--results", type=Path, default=Path("results"), help="JSON files [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each [%(default)s]")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="these runs or results, such as 'cifar_fs-5shot-maml-*'"
    )
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and do nothing")
    parser.add_argument("--page", type=Path, help="write the tables of the results to this file, and do nothing else")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds on glyphs, for a test: not a measurement")
    parser.add_argument("--do", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: expected at least 1")
    return given


def page(given: argparse.Namespace) -> int:
    found = experiments_page.read(given.results)
    experiments_page.write(given.page, experiments_page.markdown(found, list(experiments_plan.jobs(given.tiny))))
    print(f"wrote {given.page}")
    return 0


def run(given: argparse.Namespace) -> int:
    every = list(experiments_plan.jobs(given.tiny))
    if given.do:
        return one(next(job for job in every if job.name == given.do), given)
    wanted = experiments_plan.chosen(every, given.only)
    done = finished(wanted, given.results)
    if given.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
        for job in wanted:
            print(f"{'done' if job.name in done else progress(job, given.runs):>22}  {job.name}")
        return 0
    from lambda_maml.lock import locked

    with locked(given.runs, "experiments"):
        left = [job for job in wanted if job.name not in done]
        here, missing = there(left, given.data)
        for name, why in missing.items():
            print(f"left out: {name}: {why}", flush=True)
        if missing and not here:
            raise ValueError(f"{given.data}: no image set of these lies there: {'; '.join(missing.values())}")
        named = [name for name in missing if any(name in text for text in given.only)]
        if named:
            raise ValueError(missing[named[0]])
        given.results.mkdir(parents=True, exist_ok=True)
        print(f"{len(done)} of {len(wanted)} results are there, {len(here)} to do", flush=True)
        return Runner(here, done, given).run()


def finished(wanted: Iterable[Job], results: Path) -> set[str]:
    """The jobs whose results are there. ValueError for a result of another plan."""
    done = set()
    for job in wanted:
        path = results / f"{job.name}.json"
        if path.is_file():
            found = experiments_page.read_one(path)
            differs = difference(found.get("plan"), json.loads(json.dumps(job.plan)))
            if differs:
                raise ValueError(f"{path}: is of another plan, {differs}: move it away, or name another --results")
            done.add(job.name)
    return done


def difference(old: Any, new: Any, at: str = "") -> str:
    """Where two plans differ first, in words; "" where they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = (difference(old.get(key), new.get(key), f"{at} {key}".strip()) for key in {**old, **new})
        return next(filter(None, parts), "")
    return "" if old == new else f"{at or 'plan'} is {old} there and {new} here"


def progress(job: Job, runs: Path) -> str:
    """How far a training run is."""
    path = runs / str(job.experiment) / "metrics.jsonl"
    if job.kind != "training" or not path.is_file():
        return "not done"
    lines = path.read_text(encoding="utf-8").splitlines()
    last = max((json.loads(line)["iteration"] for line in lines if line.endswith("}")), default=0)
    return f"{last} of {job.experiment.iterations}"


def there(left: Iterable[Job], root: Path | None) -> tuple[list[Job], dict[str, str]]:
    """The jobs whose images lie under `root`, and by set why others' do not."""
    if root is not None and not root.is_dir():
        raise ValueError(f"--data {root}: is no folder; docs/data.md says how the image sets lie in it")
    from experiments_do import BUILT_IN

    from lambda_maml import data

    missing: dict[str, str] = {}
    for name in dict.fromkeys(job.experiment.case.dataset for job in left):
        if name not in BUILT_IN:
            try:
                data.load(name, root, "val")
            except FileNotFoundError as error:
                missing[name] = str(error)
            except ValueError as error:
                if root is not None:
                    raise
                missing[name] = str(error)
    return [job for job in left if job.experiment.case.dataset not in missing], missing


def command_of(job: Job) -> str:
    """What makes this result alone, and what it needs, wherever images and results lie."""
    tiny = " --tiny" if job.experiment.case is experiments_plan.TINY else ""
    return f"python bench/experiments.py --data DATA --results AGAIN --runs AGAIN --only {job.name}{tiny}"


def one(job: Job, given: argparse.Namespace) -> int:
    """In a child: a job, until it is done or the parent is gone."""
    import torch
    from experiments_do import Place, Stopped, do

    torch.set_num_threads(1)

    def watch() -> None:
        while os.read(0, 1):  # the pipe of the parent, which sends nothing
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        do(job, Place(given.data, given.runs, given.results), command_of(job))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    return 0


class Runner:
    """Starts jobs as they become ready."""

    def __init__(self, jobs: Sequence[Job], done: set[str], given: argparse.Namespace) -> None:
        self.waiting, self.done, self.given = list(jobs), set(done), given
        self.running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
        self.failed: list[str] = []
        self.stop = ""
        self.begun = time.monotonic()

    def run(self) -> int:
        """1 if a job failed, 130 or 143 after a signal."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        while True:
            while not self.stop and (job := self.next()) is not None:
                self.start(job)
            if not self.running:
                break
            time.sleep(0.1)
            for job, process, since in list(self.running.values()):
                if process.poll() is not None:
                    self.end(job, process, since)
        for job in self.waiting:
            if not self.stop:
                self.say(f"left: {job.name}, which needs what failed")
        if self.stop:
            self.say(f"stopped by {self.stop}; start it again to go on")
            return 128 + signal.Signals[self.stop]
        return 1 if self.failed else 0

    def next(self) -> Job | None:
        """The first job that can begin now."""
        if len(self.running) >= self.given.jobs or any(job.alone for job, *_ in self.running.values()):
            return None
        ready = next((job for job in self.waiting if self.done.issuperset(job.needs)), None)
        return None if ready is not None and ready.alone and self.running else ready

    def start(self, job: Job) -> None:
        self.waiting.remove(job)
        logs = self.given.runs / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--do", job.name]
        for key in ("data", "runs", "results"):
            if getattr(self.given, key) is not None:
                command += [f"--{key}", str(getattr(self.given, key))]
        command += ["--tiny"] if self.given.tiny else []
        with (logs / f"{job.name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self.running[job.name] = job, process, time.monotonic()
        self.say(f"begins: {job.name}")

    def end(self, job: Job, process: subprocess.Popen[bytes], since: float) -> None:
        del self.running[job.name]
        assert process.stdin is not None
        process.stdin.close()
        took = f"{(time.monotonic() - since) / 60:.1f} min"
        if process.returncode == 0:
            self.done.add(job.name)
            self.say(f"done in {took}: {job.name}")
        elif self.stop:
            self.say(f"ended: {job.name}")
        else:
            self.failed.append(job.name)
            log = self.given.runs / "logs" / f"{job.name}.log"
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no message"]
            self.say(f"failed (status {process.returncode}): {job.name}: {last[0]} (more in {log})")

    def on_signal(self, number: int, frame: Any) -> None:
        self.stop = signal.Signals(number).name
        for _, process, _ in self.running.values():
            process.terminate()

    def say(self, text: str) -> None:
        print(f"{(time.monotonic() - self.begun) / 60:7.1f} min  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
