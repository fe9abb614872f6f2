"""A stage of `make gpu`: a process with a deadline, and what comes of it in the file of results.

The results are rewritten whenever there is something new, so that a run that is cut off keeps all but its last seconds.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG
GRACE = 8.0  # seconds between asking a stage to end and ending it
DROPPED = ("PYTEST_ADDOPTS", "PYTHONPATH", "LAMBDA_KERNELS_BACKEND", "TRITON_INTERPRET")  # from a stage's environment
UNMEASURED = ("smoke", "tests", "capture")  # stages that ask whether results are right: the first tile will do
PACKAGES = {"pytest_benchmark": "pytest-benchmark"}  # what pip calls a module, where it calls it otherwise


class Skip(Exception):
    """A stage that cannot run here, and why."""


class Missing(Exception):
    """A stage that cannot run here though it should, and the remedy."""


class Stage(NamedTuple):
    name: str
    share: float  # seconds of the default budget
    command: Callable[[Run], list[str]]  # Skip where there is nothing to run
    read: Callable[[Run], dict[str, Any]] = lambda run: {}  # what it has written so far, for the results
    needs: tuple[str, ...] = ()  # stages without which it has nothing to work on
    least: float = 0.0  # seconds that it gets however late it is
    modules: tuple[str, ...] = ()  # that this interpreter must have for it


class Run:
    """One call of the script: its settings, its results, and where they lie."""

    def __init__(
        self, out: Path, work: Path, seconds: float, dry: bool, device: dict[str, str], commit: str,
        clock: Callable[[], float], start: float, copies: Path | None = None,
    ) -> None:  # fmt: skip
        self.work, self.dry, self.device, self.clock, self.start, self.copies = work, dry, device, clock, start, copies
        self.deadline = self.passed()  # of the running stage, from the start
        now = datetime.datetime.now(datetime.timezone.utc)
        slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
        self.path = out / f"{'dry-run-' if dry else ''}{slug}-{now.date()}.json"
        self.page = self.path.with_suffix(".md") if dry else ROOT / "docs" / "gpu.md"
        self.table = work / "table.txt"
        self.timings = self.path.with_name(self.path.stem + "-timings.json")
        self.document: dict[str, Any] = {
            "schema": 1, "dry_run": dry, "gpu": device["name"], "started": now.isoformat(timespec="seconds"),
            "commit": commit, "budget_s": seconds, "stages": {},
        }  # fmt: skip

    def passed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def left(self) -> float:
        """Seconds till the running stage's deadline."""
        return self.deadline - self.passed()

    def program(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, *map(str, arguments)]

    def save(self) -> None:
        self.document["seconds"] = round(self.passed(), 1)
        write(self.path, json.dumps(self.document, indent=1) + "\n")
        if self.copies is not None:
            self.copy_to(self.copies)

    def copy_to(self, folder: Path) -> None:
        """All logs in one file; timings, table and page, as far as they are there; the results last: whoever sees a row
        there finds what belongs to it."""
        folder.mkdir(parents=True, exist_ok=True)
        logs = [(name, self.work / f"{name}.log") for name in self.document["stages"]]
        told = [f"== {name}\n{log.read_text(errors='replace')[-400_000:]}" for name, log in logs if log.exists()]
        write(folder / "log.txt", "\n".join(told))
        for path in (self.timings, self.table, self.page, self.path):
            if path.exists():
                write(folder / path.name, path.read_text(encoding="utf-8"))


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """What a stage has written so far; nothing where it has not come to that."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def perform(run: Run, stage: Stage) -> None:
    """Run a stage to its end or its deadline, and put what came of it into the results."""
    entry: dict[str, Any] = {"status": "running"}
    run.document["stages"][stage.name] = entry
    begin = run.passed()
    run.save()
    log = run.work / f"{stage.name}.log"
    try:
        for name in stage.needs:
            status = run.document["stages"].get(name, {}).get("status", "passed")
            if status != "passed":
                raise Skip(f"it needs the stage {name}, whose status is {status}")
        if lacking := [PACKAGES.get(m, m) for m in stage.modules if importlib.util.find_spec(m) is None]:
            names, python = " ".join(lacking), Path(sys.executable).name
            raise Missing(f"this interpreter lacks {', '.join(lacking)}: {python} -m pip install {names} adds that")
        if run.left() <= 0:
            raise Skip(f"no time was left of {run.document['budget_s']:g} s")
        code = wait(run, stage, stage.command(run), log)
        entry.update({"status": "cut"} if code is None else {"status": "failed" if code else "passed", "exit": code})
        if code is None:
            entry["reason"] = f"stopped at its deadline, {run.deadline:.0f} s after the start"
        elif code:
            entry["reason"] = last_words(log)
        if stage.name.endswith("check") and code and "Device not supported" in log.read_text(errors="replace"):
            entry.update(status="skipped", reason="compute-sanitizer says: Device not supported")
    except (Skip, Missing) as why:
        entry.update(status="skipped" if isinstance(why, Skip) else "failed", reason=str(why))
    except BaseException as error:
        entry.update(status="cut", reason=f"interrupted ({type(error).__name__})")
        raise
    finally:
        entry.update(stage.read(run), seconds=round(run.passed() - begin, 1))
        run.save()


def wait(run: Run, stage: Stage, command: list[str], log: Path) -> int | None:
    """The exit status; None where the deadline came first."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings(run, stage.name), stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, preexec_fn=own_group,
        )  # fmt: skip
        saved = ""
        try:
            while True:
                try:
                    return process.wait(timeout=min(1.0, max(0.05, run.left())))
                except subprocess.TimeoutExpired:
                    pass
                found = stage.read(run)
                if (text := json.dumps(found)) != saved:
                    saved = text
                    run.document["stages"][stage.name].update(found)
                    run.save()
                if run.left() <= 0:
                    return None
        finally:
            stop(process)


def own_group() -> None:
    """In the child: a process group to be ended as one, which does not outlive this script."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C first, after which pytest still writes its files."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            if process.poll() is None or sign == signal.SIGKILL:
                os.killpg(process.pid, sign)
        except ProcessLookupError:
            pass
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            continue


def surroundings(run: Run, stage: str) -> dict[str, str]:
    """The environment of a stage."""
    kept = {k: v for k, v in os.environ.items() if k not in DROPPED}
    added = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "bench"))),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    added["LAMBDA_KERNELS_CACHE"] = str(run.work / "cache")
    if stage in UNMEASURED:
        added["LAMBDA_KERNELS_MEASURE"] = "0"
    added["TORCH_CUDA_ARCH_LIST"] = run.device["capability"]  # an image's own list may name chips that nvcc lacks
    if stage in ("cuda", "build"):
        # what failed once, or is not there, does not take the extension with it
        before = run.document["stages"].get("cuda", {}).get("status", "passed")
        wanted = stage == "cuda" or (before == "passed" and find_program("nvcc") is not None)
        added["LAMBDA_KERNELS_CUDA"] = "1" if wanted else "0"
    if run.dry:
        added.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        if stage != "build":  # which compiles kernels
            added["TRITON_INTERPRET"] = "1"
    return {**kept, **added}


def last_words(log: Path) -> str:
    """The last line that says something, without paths of this machine."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    text = lines[-1] if lines else "no output"
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        text = text.replace(str(folder), "...")
    return text[:300]


def find_program(name: str) -> str | None:
    """On the PATH, or in the CUDA toolkit."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name) or next((p for f in folders if f and (p := shutil.which(name, path=f"{f}/bin"))), None)
