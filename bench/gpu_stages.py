"""The stages of `make gpu`: what each runs, and what it leaves for the results."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_run import ROOT, Run, Skip, Stage, find_program, read_json, write

FAILING_CAPTURE = "test_a_function_that_waits"
# What the text of a test file has that uses a device: a mark, the operands of the CUDA kernels' tests, or the backend.
OF_A_DEVICE = "pytest.mark.gpu", "from cuda_checks import", "backends.triton"
OURS = "_ZN2lk"  # how the mangled names of csrc/cuda's kernels begin, and of no other library's


def dry(run: Run) -> list[str]:
    return ["--dry-run"] if run.dry else []


def kernels(run: Run) -> list[str]:
    if run.dry and find_program("nvcc") is None:
        raise Skip("there is no nvcc on this machine")
    return run.program("setup.py", "build_ext", "--cuda-only", *destination(run))


def destination(run: Run) -> list[str]:
    """Of a dry run: beside the build that is there, whose objects are taken."""
    return ["--build-lib", str(run.work / "lib")] if run.dry else ["--inplace"]


def build(run: Run) -> list[str]:
    return run.program("bench/gpu_build.py", *(destination(run) if run.dry else []), *dry(run))


def writes(script: str, *words: str) -> Callable[[Run], list[str]]:
    """A script that writes `<last word>.json`."""

    def command(run: Run) -> list[str]:
        return run.program(script, *words[:-1], "--result", run.work / f"{words[-1]}.json", *dry(run))

    return command


def written(name: str) -> Callable[[Run], dict[str, Any]]:
    return lambda run: read_json(run.work / f"{name}.json")


def tests(run: Run) -> list[str]:
    files = test_files(lambda text: any(word in text for word in OF_A_DEVICE))
    if run.dry:
        options = ["--per-file", "1"]
    elif importlib.util.find_spec("xdist"):
        options = ["-n", str(min(12, len(os.sched_getaffinity(0))))]
    else:
        options = []
    return pytest(run, "tests", *options, "-k", f"not {FAILING_CAPTURE}", *files)


def test_files(wanted: Callable[[str], bool]) -> list[str]:
    """Those whose text is wanted, less minutes of compiling ahead of time, which need no device."""
    paths = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "_aot" not in path.name]
    found = [str(p.relative_to(ROOT)) for p in paths if wanted(p.read_text(encoding="utf-8"))]
    if not found:
        raise Skip("no test is for this stage")
    return found


def capture(run: Run) -> list[str]:
    """Alone, and at the end: a capture that fails may leave the process, and the device, damaged."""
    return pytest(run, "capture", "-k", FAILING_CAPTURE, *test_files(lambda text: f"\ndef {FAILING_CAPTURE}" in text))


def pytest(run: Run, stage: str, *more: str) -> list[str]:
    journal = str(run.work / f"{stage}.jsonl")
    options = ["-p", "journal", "--journal", journal, "-p", "no:benchmark", "-p", "no:cacheprovider"]
    # another torch's warnings are no failures
    return run.program("-m", "pytest", *options, "-W", "default", "-v", "--tb=short", *more)


def outcomes(stage: str) -> Callable[[Run], dict[str, Any]]:
    return lambda run: read_tests(run.work / f"{stage}.jsonl")


def read_tests(path: Path) -> dict[str, Any]:
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
        options = ["--tool", tool, "--kernel-regex", f"kns={OURS}", "--error-exitcode", "9"]
        return [program, *options, *run.program("tests/sanitize_cuda.py")]

    return command


def rows(name: str) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        facts, result = run.work / "environment.json", run.work / f"{name}.json"
        seconds = f"{max(5, run.left() - 20):.0f}"  # the last row that begins is to end as well
        given = ["--result", str(result), "--seconds", seconds]
        if facts.exists():
            given += ["--environment", str(facts)]
        return run.program("bench/bench_gpu.py", name, *given, *dry(run))

    return command


def found(run: Run) -> dict[str, Any]:
    return {"found": read_json(run.work / "environment.json")}


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


REPORT = Stage("report", 5, report, least=5)
STAGES = [  # the default budget in seconds; what shows most comes first
    Stage("cuda", 40, kernels, modules=("setuptools",)),
    Stage("smoke", 25, writes("bench/gpu_smoke.py", "smoke"), written("smoke")),
    Stage("build", 75, build, modules=("setuptools",)),
    Stage("replays", 40, rows("replays"), written("replays")),
    Stage("environment", 20, writes("bench/bench_gpu.py", "environment", "environment"), found),
    Stage("rows", 125, rows("rows"), written("rows")),
    Stage("tests", 70, tests, outcomes("tests"), modules=("pytest", "hypothesis")),
    Stage("memcheck", 20, sanitizer("memcheck"), needs=("cuda",)),
    Stage("racecheck", 20, sanitizer("racecheck"), needs=("cuda",)),
    Stage("slow", 30, rows("slow"), written("slow")),
    Stage("timings", 30, timings, read_timings, modules=("pytest", "pytest_benchmark")),
    REPORT,
    Stage("capture", 15, capture, outcomes("capture"), modules=("pytest", "hypothesis")),
    REPORT,
]
