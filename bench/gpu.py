"""`make gpu`: build, test and measure on a machine with a GPU, in one command, without a network, within ten minutes.

Each stage is a process with a deadline; time that one leaves is the next one's. The results are rewritten whenever
there is something new, so that a run that is cut off keeps all but its last seconds. With OUT in the environment they
are copied there each time: JSON, table, page and log.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gpu_run import ROOT, Run, perform
from gpu_stages import STAGES

NEEDED = ("torch", "numpy")  # without which no stage has anything to do
DEVICE = """
import json, torch
found = {"torch": torch.__version__, "name": None}
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability(0)
    found |= {"name": torch.cuda.get_device_name(0), "capability": f"{major}.{minor}"}
print(json.dumps(found))
"""


def device_of(dry_run: bool) -> dict[str, str]:
    """Name and capability of the device; SystemExit with the remedy where this interpreter cannot do the work."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"make gpu: {sys.executable} lacks {', '.join(missing)}: add that with {Path(sys.executable).name} -m pip "
            f"install {' '.join(missing)}, or name an interpreter that has it, such as make gpu PYTHON=python3.12"
        )
    if dry_run:
        return {"name": "cpu", "capability": "9.0"}  # what is compiled is for an H200
    done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, timeout=600, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"make gpu: torch of {sys.executable} does not import: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    if not found["name"]:
        raise SystemExit(
            f"make gpu: torch {found['torch']} of {sys.executable} sees no CUDA device: run it on a machine with a GPU "
            "and a CUDA build of torch; make gpu GPU_ARGS=--dry-run shows on any machine that every stage starts"
        )
    return found


def commit_here() -> str:
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"


@contextmanager
def told_to_stop() -> Iterator[None]:
    """SIGTERM, as from timeout(1) or Slurm, ends the running stage like Ctrl-C."""

    def stop_now(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = list(dict.fromkeys(stage.name for stage in STAGES))
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=520.0, help="Budget from the start on. Default: %(default)s")
    add("--out", type=Path, help="Folder for the results. Default: bench/results; a new temporary one in a dry run")
    add("--only", default=",".join(names), metavar="STAGES", help="Run only these, separated by commas, of %(default)s")
    add("--commit", default="", help="What to note as the commit. Default: git's, or unknown without a repository")
    add("--dry-run", action="store_true", help="Every stage in tiny shapes on the CPU; nothing of it is a measurement.")
    found = parser.parse_args(arguments)
    wanted = found.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only: no stage {', '.join(unknown)}: choose from {', '.join(names)}")
    if found.seconds <= 0:
        parser.error(f"--seconds: {found.seconds} is not above 0")
    found.stages = [stage for stage in STAGES if stage.name in wanted]
    return found


def main(arguments: list[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    start = clock()  # torch's first import from a cold disk counts
    given = parse(arguments)
    device = device_of(given.dry_run)
    out = given.out or (Path(tempfile.mkdtemp(prefix="lambda-gpu-")) if given.dry_run else ROOT / "bench" / "results")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    work = out / "work" if given.dry_run else ROOT / "build" / "gpu"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    copies = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    run = Run(out, work, given.seconds, given.dry_run, device, given.commit or commit_here(), clock, start, copies)
    print(f"{'dry run on the CPU, not a measurement' if run.dry else device['name']}: {run.path}", flush=True)
    scale = max(0.0, given.seconds - run.passed()) / sum(stage.share for stage in given.stages)
    with told_to_stop():
        for stage in given.stages:
            run.deadline = max(run.deadline + stage.share * scale, stage.least and run.passed() + stage.least)
            try:
                perform(run, stage)
            except KeyboardInterrupt:
                print(f"interrupted in the stage {stage.name}; the results so far are in {run.path}", flush=True)
                return 130
            finally:
                entry = run.document["stages"][stage.name]
                said = f"{stage.name:<12} {entry['status']:<8} {entry['seconds']:6.1f} s  {entry.get('reason', '')}"
                print(said.rstrip(), flush=True)
    if (log := run.work / "report.log").exists():
        print(log.read_text(encoding="utf-8", errors="replace").rstrip())
    bad = [name for name, entry in run.document["stages"].items() if entry["status"] in ("failed", "cut")]
    if bad:
        print(f"not passed: {', '.join(bad)}; logs: {run.work}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
