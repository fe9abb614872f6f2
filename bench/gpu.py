"""`make gpu`: build, test and measure on a machine with a GPU, in one command, without a network, within ten minutes.

Each stage is a process with a deadline; time that one leaves is the next one's. The results are rewritten whenever
there is something new, so that a run that is cut off keeps all but its last seconds. With OUT in the environment they
are copied there as well: JSON, table, page and log.
"""

from __future__ import annotations

import argparse
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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {  # module: what pip calls it
    "torch": "torch", "numpy": "numpy", "setuptools": "setuptools", "pytest": "pytest", "hypothesis": "hypothesis",
    "pytest_benchmark": "pytest-benchmark",
}  # fmt: skip
DEVICE = """
import json, torch
found = {"torch": torch.__version__, "name": None}
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability(0)
    found |= {"name": torch.cuda.get_device_name(0), "capability": f"{major}.{minor}"}
print(json.dumps(found))
"""
PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG
GRACE = 8.0  # seconds between asking a stage to end and ending it


class Skip(Exception):
    """A stage that cannot run here, and why."""


class Stage(NamedTuple):
    name: str
    share: float  # seconds of the default budget
    command: Callable[[Run], list[str]]  # Skip where there is nothing to run
    read: Callable[[Run], dict[str, Any]] = lambda run: {}  # what it has written so far, for the results
    without_build: bool = True


class Run:
    """One call of the script: its settings, its results, and where they lie."""

    def __init__(self, out: Path, work: Path, seconds: float, dry: bool, device: dict[str, str], commit: str) -> None:
        self.work, self.dry, self.device = work, dry, device
        self.start = time.monotonic()
        self.deadline = 0.0  # of the running stage, from the start
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

    def left(self) -> float:
        """Seconds till the running stage's deadline."""
        return self.deadline - (time.monotonic() - self.start)

    def program(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, *map(str, arguments)]

    def save(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.start, 1)
        write(self.path, json.dumps(self.document, indent=1) + "\n")

    def copy_to(self, folder: Path) -> None:
        """Results, timings, table and page, as far as they are there, and all logs in one file."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.timings, self.table, self.page):
            if path.exists():
                write(folder / path.name, path.read_text(encoding="utf-8"))
        logs = [(name, self.work / f"{name}.log") for name in self.document["stages"]]
        told = [f"== {name}\n{log.read_text(errors='replace')[-400_000:]}" for name, log in logs if log.exists()]
        write(folder / "log.txt", "\n".join(told))


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


def dry(run: Run) -> list[str]:
    return ["--dry-run"] if run.dry else []


def look(run: Run) -> list[str]:
    return run.program("bench/bench_gpu.py", "environment", "--result", run.work / "environment.json", *dry(run))


def build(run: Run) -> list[str]:
    if run.dry:  # beside the build that is there; objects are taken from it
        return run.program("setup.py", "--quiet", "build_ext", "--build-lib", run.work / "lib")
    return run.program("setup.py", "build_ext", "--inplace")


def tests(run: Run) -> list[str]:
    files = [
        str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py"))
        if path.name.startswith("test_triton") or "pytest.mark.gpu" in path.read_text(encoding="utf-8")
        if not (run.dry and "_aot" in path.name)  # a minute of compiling, which needs no device
    ]  # fmt: skip
    if not files:
        raise Skip("no test uses a device")
    options = ["-p", "journal", "--journal", str(run.work / "journal.jsonl"), "-p", "no:benchmark"]
    # another torch's warnings are no failures
    options += ["-p", "no:cacheprovider", "-W", "default", "-v", "--tb=short"]
    if run.dry:
        options += ["--per-file", "1"]
    elif importlib.util.find_spec("xdist"):
        options += ["-n", "6"]
    return run.program("-m", "pytest", *options, *files)


def read_tests(run: Run) -> dict[str, Any]:
    path = run.work / "journal.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    why = Counter(e["reason"] for e in entries if e["outcome"] == "skipped")
    return {
        "outcomes": dict(Counter(e["outcome"] for e in entries)),
        "failures": [{"test": e["test"], "reason": e["reason"]} for e in entries if e["outcome"] == "failed"],
        "skips": dict(why.most_common()),
        "files": dict(Counter(e["test"].partition("::")[0] for e in entries if e["outcome"] == "passed")),
    }


def sanitizer(tool: str) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        if run.dry:
            raise Skip("a dry run has no device to check")
        program = find_program("compute-sanitizer")
        if program is None:
            raise Skip("there is no compute-sanitizer on this machine (it comes with the CUDA toolkit)")
        if not (ROOT / "tests" / "sanitize_cuda.py").exists():
            raise Skip("there is no tests/sanitize_cuda.py to run in it")
        return [program, "--tool", tool, "--error-exitcode", "9", *run.program("tests/sanitize_cuda.py")]

    return command


def find_program(name: str) -> str | None:
    """On the PATH, or in the CUDA toolkit."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name) or next((p for f in folders if f and (p := shutil.which(name, path=f"{f}/bin"))), None)


def bench(run: Run) -> list[str]:
    facts = run.work / "environment.json"
    if not facts.exists():
        raise Skip("the stage environment, whose measured ceilings it needs, has failed")
    seconds = f"{max(5, run.left() - 20):.0f}"  # the last row that begins is to end as well
    result = run.work / "rows.json"
    given = ["--environment", facts, "--result", result, "--seconds", seconds]
    return run.program("bench/bench_gpu.py", "rows", *map(str, given), *dry(run))


def timings(run: Run) -> list[str]:
    options = ["--benchmark-only", f"--benchmark-json={run.work / 'timings.json'}", "-W", "default"]
    if run.dry:
        options += ["--device=cpu", "--bench-config=omniglot", "--patterns=00011 11111", "--benchmark-max-time=0.001"]
        options += ["--benchmark-min-rounds=2", "--image-size=16", "--width=4", "--ways=3", "--steps=2"]
    else:
        options += ["--device=cuda", "--bench-config=mini-imagenet-64", "--benchmark-max-time=0.1"]
    return run.program("-m", "pytest", "bench/bench_adapt.py", "-q", "-p", "no:cacheprovider", *options)


def read_timings(run: Run) -> dict[str, Any]:
    """A line a pattern; the file for `lambda-maml select --timings`, less every round's time and the machine's name."""
    found = read_json(run.work / "timings.json")
    rows = []
    for timed in found.get("benchmarks", []):
        timed["stats"].pop("data", None)
        extra, stats = timed["extra_info"], timed["stats"]
        rows.append({
            "kind": extra["kind"], "pattern": extra["pattern"], "speedup_over_stock": extra.get("speedup_over_stock"),
            **{key: 1e3 * stats[key] for key in ("median", "q1", "q3")},
        })  # fmt: skip
    if rows:
        found["machine_info"].pop("node", None)
        write(run.timings, json.dumps(found, indent=1) + "\n")
    return {"patterns": rows, "group": found["benchmarks"][0]["group"] if rows else ""}


def report(run: Run) -> list[str]:
    return run.program("bench/gpu_report.py", run.path, "--page", run.page, "--table", run.table)


STAGES = [
    Stage("environment", 30, look, lambda run: {"found": read_json(run.work / "environment.json")}),
    Stage("build", 80, build),
    Stage("tests", 130, tests, read_tests),
    Stage("memcheck", 45, sanitizer("memcheck"), without_build=False),
    Stage("racecheck", 45, sanitizer("racecheck"), without_build=False),
    Stage("bench", 185, bench, lambda run: read_json(run.work / "rows.json")),
    Stage("timings", 40, timings, read_timings),
    Stage("report", 5, report),
]


def perform(run: Run, stage: Stage) -> None:
    """Run a stage to its end or its deadline, and put what came of it into the results."""
    entry: dict[str, Any] = {"status": "running"}
    run.document["stages"][stage.name] = entry
    begin = time.monotonic()
    run.save()
    log = run.work / f"{stage.name}.log"
    try:
        if not stage.without_build and run.document["stages"].get("build", {}).get("status") in ("failed", "cut"):
            raise Skip("the build failed")
        code = wait(run, stage, stage.command(run), log)
        entry.update({"status": "cut"} if code is None else {"status": "failed" if code else "passed", "exit": code})
        if code is None:
            entry["reason"] = f"stopped at its deadline, {run.deadline:.0f} s after the start"
        elif code:
            entry["reason"] = last_words(log)
        if stage.name.endswith("check") and code and "Device not supported" in log.read_text(errors="replace"):
            entry.update(status="skipped", reason="compute-sanitizer says: Device not supported")
    except Skip as why:
        entry.update(status="skipped", reason=str(why))
    except BaseException as error:
        entry.update(status="cut", reason=f"interrupted ({type(error).__name__})")
        raise
    finally:
        entry.update(stage.read(run), seconds=round(time.monotonic() - begin, 1))
        run.save()


def wait(run: Run, stage: Stage, command: list[str], log: Path) -> int | None:
    """The exit status; None where the deadline came first."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings(run), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            preexec_fn=own_group,
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


def surroundings(run: Run) -> dict[str, str]:
    """The environment of the stages."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTHONPATH", "LAMBDA_KERNELS_BACKEND")}
    added = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "bench"))),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    stage = list(run.document["stages"])[-1]
    # tests share the device: what they measure is not what the benchmark is to choose by
    added["LAMBDA_KERNELS_CACHE"] = str(run.work / ("cache-tests" if stage == "tests" else "cache"))
    if run.dry:
        added.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        if find_program("nvcc") and stage == "build":
            added.update(LAMBDA_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    else:
        added["TORCH_CUDA_ARCH_LIST"] = kept.get("TORCH_CUDA_ARCH_LIST") or run.device["capability"]
    return {**kept, **added}


def last_words(log: Path) -> str:
    """The last line that says something, without paths of this machine."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    text = lines[-1] if lines else "no output"
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        text = text.replace(str(folder), "...")
    return text[:300]


def device_of(dry_run: bool) -> dict[str, str]:
    """Name and capability of the device; SystemExit with the remedy where this interpreter cannot do the work."""
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(
            f"make gpu: {sys.executable} lacks {', '.join(missing)}: add that with {Path(sys.executable).name} -m pip "
            f"install {' '.join(missing)}, or name an interpreter that has it, such as make gpu PYTHON=python3.12"
        )
    if dry_run:
        return {"name": "cpu", "capability": ""}
    done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, timeout=120, cwd=ROOT)
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=560.0, help="Budget of all stages together. Default: %(default)s")
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


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    device = device_of(given.dry_run)
    out = given.out or (Path(tempfile.mkdtemp(prefix="lambda-gpu-")) if given.dry_run else ROOT / "bench" / "results")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    work = out / "work" if given.dry_run else ROOT / "build" / "gpu"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run = Run(out, work, given.seconds, given.dry_run, device, given.commit or commit_here())
    copies = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    print(f"{'dry run on the CPU, not a measurement' if run.dry else device['name']}: {run.path}", flush=True)
    scale = given.seconds / sum(stage.share for stage in given.stages)
    with told_to_stop():
        for stage in given.stages:
            run.deadline += stage.share * scale
            try:
                perform(run, stage)
            except KeyboardInterrupt:
                print(f"interrupted in the stage {stage.name}; the results so far are in {run.path}", flush=True)
                return 130
            finally:
                entry = run.document["stages"][stage.name]
                said = f"{stage.name:<12} {entry['status']:<8} {entry['seconds']:6.1f} s  {entry.get('reason', '')}"
                print(said.rstrip(), flush=True)
                if copies is not None:
                    run.copy_to(copies)
    if (log := run.work / "report.log").exists():
        print(log.read_text(encoding="utf-8", errors="replace").rstrip())
    bad = [name for name, entry in run.document["stages"].items() if entry["status"] in ("failed", "cut")]
    if bad:
        print(f"not passed: {', '.join(bad)}; logs: {run.work}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
