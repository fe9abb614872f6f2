"""`make gpu` without a GPU: its dry run, what a run that fails or is killed leaves; a wrong result gets no time."""

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
import torch
from benches import module
from machine import PATIENCE

from lambda_kernels.backends import current
from lambda_kernels.backends.native import Native
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


@pytest.fixture
def settled(tmp_path: Path) -> Any:
    """A run on an H200, of which no stage has begun."""
    device = {"name": "NVIDIA H200", "capability": "9.0"}
    return module("gpu_run").Run(tmp_path, tmp_path, 520.0, False, device, "abc", lambda: 5.0, 0.0)


def stages() -> dict[str, Any]:
    return {stage.name: stage for stage in module("gpu_stages").STAGES}


def test_the_default_budget_fits_a_call_of_600_seconds():
    """With a stage that has to be killed, the report behind it, and the time that both take to end."""
    gpu, gpu_run = module("gpu"), module("gpu_run")
    budget = gpu.parse([]).seconds
    assert sum(stage.share for stage in gpu.STAGES) <= budget
    grace = 2 * (gpu_run.GRACE + stages()["report"].least)
    assert budget + grace <= 600 - 30


def test_the_stages_begin_with_what_shows_most_and_end_with_what_may_do_harm():
    names = [stage.name for stage in module("gpu_stages").STAGES]
    assert names[:4] == ["cuda", "smoke", "build", "replays"]
    assert names.index("rows") < names.index("tests") < names.index("memcheck") < names.index("slow")
    assert names[-3:] == ["report", "capture", "report"]


def test_the_clock_starts_ahead_of_torchs_import(monkeypatch, tmp_path):
    """Which takes 20 to 40 seconds from a cold disk."""
    gpu = module("gpu")
    times, seen = iter([100.0]), []
    monkeypatch.setattr(gpu, "device_of", lambda dry: {"name": "cpu", "capability": "9.0"})
    monkeypatch.setattr(gpu.Run, "save", lambda self: None)
    monkeypatch.setattr(gpu, "STAGES", [stages()["smoke"]])

    def perform(run: Any, stage: Any) -> None:
        run.document["stages"][stage.name] = {"status": "passed", "seconds": 0.0}
        seen.append((run.passed(), run.left()))

    monkeypatch.setattr(gpu, "perform", perform)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)], lambda: next(times, 140.0)) == 0
    assert seen == [(40.0, 480.0)]


def test_the_environment_of_a_stage(monkeypatch, settled):
    gpu_run = module("gpu_run")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 8.0+PTX")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for stage in stages():
        around = gpu_run.surroundings(settled, stage)
        assert "TRITON_INTERPRET" not in around
        assert around["TORCH_CUDA_ARCH_LIST"] == "9.0"  # that of an image may name chips that nvcc lacks
        assert (around.get("LAMBDA_KERNELS_MEASURE") == "0") is (stage in ("smoke", "tests", "capture"))
    # what cannot be built is left out of the extension's build
    monkeypatch.setattr(gpu_run, "find_program", lambda name: name)
    for status, wanted in (("passed", "1"), ("failed", "0"), ("cut", "0")):
        settled.document["stages"]["cuda"] = {"status": status}
        assert gpu_run.surroundings(settled, "build")["LAMBDA_KERNELS_CUDA"] == wanted
    monkeypatch.setattr(gpu_run, "find_program", lambda name: None)
    settled.document["stages"]["cuda"] = {"status": "passed"}
    assert gpu_run.surroundings(settled, "build")["LAMBDA_KERNELS_CUDA"] == "0"


def test_a_missing_package_ends_its_stage_alone(monkeypatch, settled):
    gpu_run = module("gpu_run")
    settled.deadline = 100.0
    needed = {name: stage.modules for name, stage in stages().items()}
    assert "hypothesis" in needed["tests"] and needed["timings"] == ("pytest", "pytest_benchmark")
    assert needed["rows"] == needed["smoke"] == ()
    stage = stages()["timings"]._replace(modules=("json", "pytest_benchmark", "no_such_module"))
    monkeypatch.setattr(gpu_run, "PACKAGES", {"no_such_module": "no-such-package"})
    gpu_run.perform(settled, stage)
    entry = settled.document["stages"]["timings"]
    assert entry["status"] == "failed" and "lacks no-such-package: " in entry["reason"]
    assert entry["reason"].endswith("-m pip install no-such-package adds that")


def test_a_machine_without_git_has_no_commit(monkeypatch):
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    gpu = module("gpu")
    monkeypatch.setattr(gpu.subprocess, "run", missing)
    assert gpu.commit_here() == "unknown"


def test_what_the_stages_of_a_device_run(monkeypatch, settled):
    gpu_stages = module("gpu_stages")
    monkeypatch.setattr(gpu_stages, "find_program", lambda name: f"/there/{name}")
    monkeypatch.setattr(gpu_stages.os, "sched_getaffinity", lambda _: range(16))
    command = {name: list(map(str, stage.command(settled)[1:])) for name, stage in stages().items()}
    assert command["cuda"] == ["setup.py", "build_ext", "--cuda-only", "--inplace"]
    tests, capture, memcheck = command["tests"], command["capture"], command["memcheck"]
    assert tests[tests.index("-n") + 1] == "12" and not [word for word in tests if "_aot" in word]
    assert not [name for name in gpu_stages.test_files(lambda text: "triton" in text) if "_aot" in name]
    assert "not test_a_function_that_waits" in tests and "tests/test_recorded.py" in tests
    assert capture[-3:-1] == ["-k", "test_a_function_that_waits"] and "-n" not in capture
    assert "def test_a_function_that_waits" in (ROOT / capture[-1]).read_text()
    assert memcheck[memcheck.index("--kernel-regex") + 1] == "kns=_ZN2lk"
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):  # all kernels have a name that begins so
        kernels = path.read_text().partition("namespace lk {")[2].count("__global__")
        assert kernels == path.read_text().count("__global__")
    # without the ceilings of the stage environment the rows measure them
    assert "--environment" not in command["rows"]
    (settled.work / "environment.json").write_text("{}")
    assert "--environment" in stages()["rows"].command(settled)


@pytest.mark.slow
def test_every_test_for_a_device_is_in_a_stage(settled):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:benchmark", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    marked = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert len(marked) >= 5, done.stdout + done.stderr
    assert marked <= set(stages()["tests"].command(settled))


def test_tests_of_the_compiler_come_last(tmp_path):
    names = {"test_compiled": True, "test_unmarked": False, "test_marked": True}
    text = "import pytest\n" + "".join(f"{'@pytest.mark.gpu' * on}\ndef {n}(): pass\n" for n, on in names.items())
    (tmp_path / "test_triton_some.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: g\n")
    options = ["-p", "journal", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "bench")},
    )  # fmt: skip
    found = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert found == ["test_marked", "test_unmarked", "test_compiled"], done.stdout + done.stderr


def tiny(
    rows: int, monkeypatch: pytest.MonkeyPatch, path: Path, which: str = "rows"
) -> tuple[int, list[dict[str, Any]]]:
    """(rows that failed, what was written) of the benchmark's first rows on the CPU."""
    bench_gpu = module("bench_gpu")
    every = getattr(bench_gpu.Bench, which)
    monkeypatch.setattr(bench_gpu.Bench, which, lambda self: list(every(self))[:rows])
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_float32_flops": 1e9}
    failed = bench_gpu.run_rows(bench_gpu.Bench(bench_gpu.TINY, torch.device("cpu"), ceilings), path, 60.0, which)
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return failed, found


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_adaptation_gets_no_time(monkeypatch, tmp_path):
    bench_gpu, harness = module("bench_gpu"), module("harness")
    right = harness.adapt
    for where in (bench_gpu, harness):
        monkeypatch.setattr(where, "adapt", lambda *a, lr, **k: right(*a, lr=1.01 * lr, **k))
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json")
    assert failed == 1 and row["status"] == "failed" and "00011 in torch.float64: 0.00" in row["reason"]
    assert "columns" not in row and "ratios" not in row


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_batch_of_tasks_gets_no_time(monkeypatch, tmp_path):
    bench_gpu = module("bench_gpu")
    right = bench_gpu.adapt_tasks
    monkeypatch.setattr(bench_gpu, "adapt_tasks", lambda *a, **k: right(*a, **k) * 1.01)
    failed, rows = tiny(3, monkeypatch, tmp_path / "rows.json")
    assert failed == 1 and [row["status"] for row in rows] == ["passed", "passed", "failed"]
    assert "the logits of adapt_tasks: 0.01 away" in rows[2]["reason"] and "columns" not in rows[2]


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_backend_gets_no_time_and_does_not_hide_the_others(monkeypatch, tmp_path):
    bench_gpu = module("bench_gpu")
    right = Native.block
    monkeypatch.setattr(Native, "block", lambda self, x, w, gamma, *more: right(self, x, w, 1.01 * gamma, *more))
    every = bench_gpu.Bench.rows
    monkeypatch.setattr(bench_gpu.Bench, "rows", lambda self: [r for r in every(self) if r[0]["kind"] == "kernel"])
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json")
    assert failed == 1 and row["status"] == "failed"
    found = row["passes"]["forward"]["backends"]
    assert "conv_block forward on native: 0.0" in found["native"]["failed"] and "median" not in found["native"]
    assert found["reference"]["median"] > 0


@pytest.mark.usefixtures("one_thread")
def test_a_competitor_that_computes_something_else_is_not_timed(monkeypatch, tmp_path):
    by_hand = module("by_hand")
    right = by_hand.Stock.result
    monkeypatch.setattr(by_hand.Stock, "result", lambda self: [1.01 * t for t in right(self)])
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json")
    assert failed == 0 and "stock_prefix: " in row["columns"]["stock_prefix"]["skipped"]
    assert set(row["ratios"]) == {"stock_full"}


@pytest.mark.usefixtures("one_thread")
def test_the_gate_in_float64_asks_the_reference_alone(monkeypatch, tmp_path):
    """The other backends would compile all their kernels for a type that is not timed."""
    bench_gpu, harness = module("bench_gpu"), module("harness")
    asked: set[tuple[torch.dtype, str]] = set()
    right = harness.adapt

    def adapt(model: Any, xs: torch.Tensor, *more: Any, **given: Any) -> Any:
        asked.add((xs.dtype, current()))
        return right(model, xs, *more, **given)

    monkeypatch.setattr(harness, "adapt", adapt)
    assert tiny(1, monkeypatch, tmp_path / "rows.json")[0] == 0
    assert asked == {(torch.float64, "reference"), (torch.float32, "auto")}
    assert bench_gpu.Bench(bench_gpu.TINY, torch.device("cpu"), {"copy": 1.0}).ceilings == {"copy": 1.0}


def test_without_the_stage_environment_the_rows_measure_the_ceilings():
    bench_gpu = module("bench_gpu")
    found = bench_gpu.Bench(bench_gpu.TINY, torch.device("cpu")).kernels.ceilings
    assert found.keys() > {"copy_bytes_per_s", "matmul_tf32_flops"} and min(found.values()) > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_a_replay_that_gives_something_else_has_no_kernels(monkeypatch, tmp_path, factor):
    bench_gpu = module("bench_gpu")
    right = bench_gpu.adapt
    calls: list[Any] = []

    class Wrong:
        def parameters_dict(self) -> dict[str, torch.Tensor]:
            return {name: factor * t for name, t in calls[-1].parameters_dict().items()}

    def adapt(*task: Any, **given: Any) -> Any:
        calls.append(right(*task, **given))
        return Wrong() if len(calls) == 3 else calls[-1]

    monkeypatch.setattr(bench_gpu, "adapt", adapt)
    failed, (row,) = tiny(1, monkeypatch, tmp_path / "rows.json", "replays")
    assert failed == 1 and row["status"] == "failed" and "kernels" not in row
    assert row["reason"].endswith(" of its length away from the eager call")
