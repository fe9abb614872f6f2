"""The stages of `make gpu`: what each runs, and what it leaves for the results."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from gpu_run import ROOT, Run, Skip, Stage, find_program, read_json, write


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


def bench(run: Run) -> list[str]:
    facts = run.work / "environment.json"
    if not facts.exists():
        raise Skip("it needs the measured ceilings of the stage environment, which has not run")
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
    """One line per pattern; the file for `select --timings`, without every round's time and the machine's name."""
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
    Stage("memcheck", 45, sanitizer("memcheck"), needs=("build",)),
    Stage("racecheck", 45, sanitizer("racecheck"), needs=("build",)),
    Stage("bench", 185, bench, lambda run: read_json(run.work / "rows.json"), needs=("environment",)),
    Stage("timings", 40, timings, read_timings),
    Stage("report", 5, report, least=5),
]
