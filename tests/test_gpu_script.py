"""`make gpu` without a GPU: its dry run, and what a run that fails or is killed leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from machine import PATIENCE

from lambda_maml.timing import STOCK, read_timings

ROOT = Path(__file__).resolve().parents[1]
UNHURRIED = ["--seconds", str(PATIENCE)]  # no stage is cut, however slow the machine
STAGES = [
    "cuda", "smoke", "build", "replays", "environment", "rows", "tests", "memcheck", "racecheck", "slow", "timings",
    "report", "capture",
]  # fmt: skip


def start(*arguments: str, script: Sequence[str] = ("bench/gpu.py",), **environment: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if k != "OUT"}
    return subprocess.Popen(
        [sys.executable, *script, *arguments], cwd=ROOT, env={**kept, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def results(folder: Path) -> dict[str, Any]:
    (path,) = [p for p in folder.glob("dry-run-cpu-*.json") if "timings" not in p.name]
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def kept() -> dict[str, bytes]:
    """What only a run on a GPU may write."""
    paths = [ROOT / "docs" / "gpu.md", *(ROOT / "bench" / "results").glob("*")]
    return {path.name: path.read_bytes() for path in paths if path.is_file() and not path.name.startswith("local")}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(folder of the results, folder named by OUT, what was printed) of a whole dry run."""
    out, copies, before = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("copies"), kept()
    code, printed, errors = run("--dry-run", *UNHURRIED, "--out", str(out), OUT=str(copies))
    assert code == 0, printed + errors
    assert kept() == before
    return out, copies, printed


@pytest.mark.slow
def test_every_stage_of_a_dry_run_starts_and_leaves_its_result(dry):
    stages = results(dry[0])["stages"]
    assert list(stages) == STAGES
    status = {name: stage["status"] for name, stage in stages.items()}
    assert status.pop("memcheck") == status.pop("racecheck") == "skipped"
    assert stages["memcheck"]["reason"] == "a dry run has no device to check"
    if status.pop("cuda") == "skipped":
        assert stages["cuda"]["reason"] == "there is no nvcc on this machine"
    else:
        assert stages["cuda"]["status"] == "passed" and (dry[0] / "work/lib/lambda_kernels/_cuda.so").exists()
    assert set(status.values()) == {"passed"}, status
    assert all(value > 0 for value in stages["environment"]["found"]["ceilings"].values())
    assert stages["tests"]["outcomes"].get("passed", 0) >= 1 and stages["tests"]["failures"] == []
    assert sum(stages["capture"]["outcomes"].values()) == 1 and not stages["capture"]["outcomes"].get("failed")
    assert not any("test_triton_aot" in name for name in stages["tests"]["files"])
    assert list((dry[0] / "work" / "lib" / "lambda_kernels").glob("_C*.so"))
    assert " Triton kernels for sm_90, 0 failed, " in (dry[0] / "work" / "build.log").read_text()
    checks = {(row["backend"], row.get("operation")): row["status"] for row in stages["smoke"]["checks"]}
    assert checks.pop(("cuda", None)) == "skipped"  # no device
    assert len(checks) >= 9 and set(checks.values()) == {"right"}


@pytest.mark.slow
def test_a_dry_run_shows_what_a_replay_runs(dry):
    rows = results(dry[0])["stages"]["replays"]["rows"]
    assert [(row["pattern"], row["tasks"]) for row in rows] == [("11111", 1), ("11111", 2), ("00011", 1), ("00011", 2)]
    for row in rows:
        assert row["status"] == "passed" and row["span_us"] > 0
        assert row["nodes"] == sum(entry["count"] for entry in row["kernels"]) > 0
        times = [entry["us"] for entry in row["kernels"]]
        assert times == sorted(times, reverse=True) and times[0] > 0
    assert " us  " in (dry[0] / "work" / "replays.log").read_text()


@pytest.mark.slow
def test_a_dry_run_times_every_kind_of_row_after_its_check(dry):
    stages = results(dry[0])["stages"]
    rows, slow = stages["rows"]["rows"], stages["slow"]["rows"]
    assert {row["kind"] for row in rows} == {"adapt", "tasks", "kernel", "calls", "query"}
    assert {row["kind"] for row in slow} == {"compile", "vmap"}
    assert [row["name"] for row in rows if row["status"] != "passed"] == ["calls 00011", "calls 11111"]
    first = rows[0]
    assert (first["kind"], first["pattern"], first["main"]) == ("adapt", "00011", True)
    assert first["columns"]["stock_graph"] == {"skipped": "CUDA graphs need a CUDA device"}
    timed = {name for name, column in first["columns"].items() if "median" in column}
    assert timed == {"ours", "stock_full", "stock_masked", "stock_prefix"} == {*first["ratios"], "ours"}
    against = {"compile": {"compile_default", "compile_reduce_overhead"}, "vmap": {"vmap"}}
    for row in [*rows, *slow]:
        if row["kind"] in ("tasks", "query", *against):
            assert set(row["ratios"]) >= {"stock_full"} | against.get(row["kind"], set()), row["columns"]
        for spread in [*row.get("ratios", {}).values(), *row.get("columns", {}).values()]:
            assert "skipped" in spread or 0 < spread["q1"] <= spread["median"] <= spread["q3"]
    for done in (done for row in rows if row["kind"] == "kernel" for done in row["passes"].values()):
        assert done["floor_ms"] == max(done["memory_floor_ms"], done["arithmetic_floor_ms"])
        assert {"auto", "native", "reference"} <= {n for n, f in done["backends"].items() if "median" in f}


@pytest.mark.slow
def test_the_timings_of_a_dry_run_choose_a_pattern(dry):
    (path,) = dry[0].glob("dry-run-cpu-*-timings.json")
    network = {"network": "conv4", "ways": 3, "in_channels": 1, "width": 4, "image_size": 16}
    found, _ = read_timings(path, patterns=["00011", "11111"], network=network, shots=1, steps=2, norm="follow")
    assert set(found) == {"00011", "11111", STOCK}
    document = json.loads(path.read_text())
    assert "node" not in document["machine_info"] and "data" not in document["benchmarks"][0]["stats"]


@pytest.mark.slow
def test_a_dry_run_is_called_one_everywhere(dry):
    out, copies, printed = dry
    assert "not a measurement" in printed.splitlines()[0] and "not a measurement" in printed.splitlines()[-1]
    (page,) = out.glob("*.md")
    assert "not a measurement" in page.read_text() and results(out)["dry_run"] is True
    assert " reached" not in page.read_text()
    names = sorted(path.name for path in copies.iterdir())
    assert len(names) == 5 and {"log.txt", "table.txt", page.name} < set(names)
    assert (copies / page.name).read_text() == page.read_text()
    assert "== rows\n" in (copies / "log.txt").read_text()


@pytest.mark.slow
def test_a_stage_that_fails_is_reported_and_the_others_run(tmp_path):
    compiler = str(tmp_path / "no-compiler")
    only = ["--only", "build,environment,report"]
    code, printed, _ = run("--dry-run", *UNHURRIED, "--out", str(tmp_path), *only, CXX=compiler)
    assert code == 1 and "not passed: build;" in printed
    stages = results(tmp_path)["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "build": "failed", "environment": "passed", "report": "passed",
    }  # fmt: skip
    assert "does not run: install one" in stages["build"]["reason"] and stages["build"]["exit"] == 1


# `make gpu` with stages made for a test; STAGES and argv are the test's. A stage says "on" and waits until it is ended.
DRIVER = """
import sys
sys.path.insert(0, "bench")
import gpu

WAITS = "import signal\\nprint('on', flush=True)\\nsignal.pause()"
kept = {stage.name: stage for stage in gpu.STAGES}
here = []

def waits(run):
    here.append(run)
    (run.work / "environment.json").write_text("{}")
    return run.program("-c", WAITS)

def writes(run):
    text = 'print(open(sys.argv[1], "w").write(sys.argv[2]))'
    return run.program("-c", "import sys\\n" + text, run.work / "environment.json", '{"ceilings": {"copy": 1.0}}')

def a_row_then_waits(run):
    (run.work / "rows.json").write_text('{"rows": [{"name": "first"}]}')
    return run.program("-c", WAITS, run.work)

def an_hour_later_once_it_waits():
    log = here[0].work / "environment.log" if here else None
    return 3600.0 if log and log.exists() and log.read_text() else 0.0

"""


def driven(program: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return start(str(folder), script=["-c", DRIVER + program], **environment)


def test_a_stage_ends_at_its_deadline(tmp_path):
    """One that needs it is not begun, nor one for which no time is left; the report has its seconds all the same."""
    program = """
waiting = kept["environment"]._replace(command=waits)
gpu.STAGES[:] = [waiting, kept["memcheck"]._replace(needs=("environment",)), kept["timings"], kept["report"]]
sys.exit(gpu.main(["--dry-run", "--out", sys.argv[1]], an_hour_later_once_it_waits))
"""
    with driven(program, tmp_path) as process:
        out, errors = process.communicate(timeout=PATIENCE)
    stages = results(tmp_path)["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "environment": "cut", "memcheck": "skipped", "timings": "skipped", "report": "passed",
    }, out + errors  # fmt: skip
    assert process.returncode == 1 and "not passed: environment;" in out
    assert stages["environment"]["reason"].startswith("stopped at its deadline, ")
    assert stages["memcheck"]["reason"] == "it needs the stage environment, whose status is cut"
    assert stages["timings"]["reason"] == "no time was left of 520 s"
    assert not (tmp_path / "work" / "memcheck.log").exists() and not (tmp_path / "work" / "timings.log").exists()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL], ids=lambda sign: sign.name)
def test_a_killed_run_keeps_what_it_had(tmp_path, sign):
    program = """
gpu.STAGES[:] = [kept["environment"]._replace(command=writes), kept["rows"]._replace(command=a_row_then_waits),
                 kept["report"]]
sys.exit(gpu.main(["--dry-run", "--out", sys.argv[1]], lambda: 0.0))
"""

    def rows() -> dict[str, Any]:
        found = results(copies)["stages"] if list(copies.glob("*.json")) else {}
        stage: dict[str, Any] = found.get("rows", {})
        return stage

    copies = tmp_path / "copies"
    with driven(program, tmp_path, OUT=str(copies)) as process:
        try:
            # a row that is there is copied while its stage goes on
            wait_for(lambda: bool(rows().get("rows")) or process.poll() is not None)
            assert process.poll() is None and rows()["status"] == "running"
            assert "== rows" in (copies / "log.txt").read_text()
            assert processes_of(tmp_path)
            process.send_signal(sign)
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    stages = results(tmp_path)["stages"]
    assert stages["environment"]["status"] == "passed"
    assert stages["environment"]["found"] == {"ceilings": {"copy": 1.0}}
    assert stages["rows"]["rows"] == [{"name": "first"}]
    assert stages["rows"]["status"] == ("cut" if sign == signal.SIGTERM else "running") and "report" not in stages
    assert process.returncode == (130 if sign == signal.SIGTERM else -signal.SIGKILL)
    wait_for(lambda: not processes_of(tmp_path))


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"nothing after {PATIENCE:.0f} s"
        time.sleep(0.1)


def test_an_interpreter_that_lacks_packages_is_told_which():
    done = subprocess.run([sys.executable, "-S", "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "lacks torch, " in done.stderr and "make gpu PYTHON=" in done.stderr


def test_without_a_device_it_says_so():
    code, _, errors = run(CUDA_VISIBLE_DEVICES="")
    assert code == 1 and "sees no CUDA device" in errors and "GPU_ARGS=--dry-run" in errors
    assert "Traceback" not in errors


def test_unknown_stages_are_refused():
    code, _, errors = run("--only", "build,bnech")
    assert code == 2 and "no stage bnech: choose from cuda, smoke, build" in errors
