"""`make gpu` without a GPU: its dry run, what a run that fails or is killed leaves, its report; docs/clusters.md."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from benches import module
from machine import PATIENCE

from lambda_kernels.backends.native import Native
from lambda_maml import cli
from lambda_maml.timing import STOCK, read_timings

ROOT = Path(__file__).resolve().parents[1]
CLUSTERS = ROOT / "docs" / "clusters.md"
BATCH = ROOT / "docs" / "bench.sbatch"
UNHURRIED = ["--seconds", str(PATIENCE)]  # no stage is cut, however slow the machine
STAGES = ["environment", "build", "tests", "memcheck", "racecheck", "bench", "timings", "report"]


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
    assert set(status.values()) == {"passed"}, status
    assert all(value > 0 for value in stages["environment"]["found"]["ceilings"].values())
    assert stages["tests"]["outcomes"].get("passed", 0) >= 1 and stages["tests"]["failures"] == []
    assert list((dry[0] / "work" / "lib" / "lambda_kernels").glob("_C*.so"))


@pytest.mark.slow
def test_a_dry_run_times_every_kind_of_row_after_its_check(dry):
    rows = results(dry[0])["stages"]["bench"]["rows"]
    assert {row["kind"] for row in rows} == {"adapt", "tasks", "kernel", "compile", "calls", "query"}
    assert [row["name"] for row in rows if row["status"] != "passed"] == ["calls 00011", "calls 11111"]
    first = rows[0]
    assert (first["kind"], first["pattern"], first["main"]) == ("adapt", "00011", True)
    assert first["columns"]["stock_graph"] == {"skipped": "CUDA graphs need a CUDA device"}
    timed = {name for name, column in first["columns"].items() if "median" in column}
    assert timed == {"ours", "stock_full", "stock_masked", "stock_prefix"} == {*first["ratios"], "ours"}
    against = {"compile": {"compile_default", "compile_reduce_overhead"}, "tasks": {"vmap"}, "query": set[str]()}
    for row in rows:
        if row["kind"] in against:
            assert set(row["ratios"]) >= {"stock_full"} | against[row["kind"]], row["columns"]
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
    assert "== bench\n" in (copies / "log.txt").read_text()


@pytest.mark.slow
def test_a_stage_that_fails_is_reported_and_the_others_run(tmp_path):
    compiler = str(tmp_path / "no-compiler")
    only = ["--only", "build,timings,report"]
    code, printed, _ = run("--dry-run", *UNHURRIED, "--out", str(tmp_path), *only, CXX=compiler)
    assert code == 1 and "not passed: build;" in printed
    stages = results(tmp_path)["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "build": "failed", "timings": "passed", "report": "passed",
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


def driven(program: str, folder: Path) -> subprocess.Popen[str]:
    return start(str(folder), script=["-c", DRIVER + program])


def test_a_stage_ends_at_its_deadline(tmp_path):
    """It may leave a file behind that the next one would take: that one is not begun, nor one for which no time is."""
    program = """
gpu.STAGES[:] = [kept["environment"]._replace(command=waits), kept["bench"], kept["timings"], kept["report"]]
sys.exit(gpu.main(["--dry-run", "--out", sys.argv[1]], an_hour_later_once_it_waits))
"""
    with driven(program, tmp_path) as process:
        out, errors = process.communicate(timeout=PATIENCE)
    stages = results(tmp_path)["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "environment": "cut", "bench": "skipped", "timings": "skipped", "report": "passed",
    }, out + errors  # fmt: skip
    assert process.returncode == 1 and "not passed: environment;" in out
    assert stages["environment"]["reason"].startswith("stopped at its deadline, ")
    assert stages["bench"]["reason"] == "it needs the stage environment, whose status is cut"
    assert stages["timings"]["reason"] == "no time was left of 560 s"
    assert not (tmp_path / "work" / "bench.log").exists() and not (tmp_path / "work" / "timings.log").exists()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL], ids=lambda sign: sign.name)
def test_a_killed_run_keeps_what_it_had(tmp_path, sign):
    program = """
gpu.STAGES[:] = [kept["environment"]._replace(command=writes), kept["bench"]._replace(command=a_row_then_waits),
                 kept["report"]]
sys.exit(gpu.main(["--dry-run", "--out", sys.argv[1]], lambda: 0.0))
"""

    def bench() -> dict[str, Any]:
        found = results(tmp_path)["stages"] if list(tmp_path.glob("*.json")) else {}
        stage: dict[str, Any] = found.get("bench", {})
        return stage

    with driven(program, tmp_path) as process:
        try:
            wait_for(lambda: bool(bench().get("rows")) or process.poll() is not None)
            assert process.poll() is None and bench()["status"] == "running"
            assert processes_of(tmp_path)
            process.send_signal(sign)
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    stages = results(tmp_path)["stages"]
    assert stages["environment"]["status"] == "passed"
    assert stages["environment"]["found"] == {"ceilings": {"copy": 1.0}}
    assert stages["bench"]["rows"] == [{"name": "first"}]
    assert stages["bench"]["status"] == ("cut" if sign == signal.SIGTERM else "running") and "report" not in stages
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
    assert code == 2 and "no stage bnech: choose from environment, build" in errors


def tiny(rows: int, monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[int, list[dict[str, Any]]]:
    """(rows that failed, what was written) of the benchmark's first rows on the CPU."""
    bench_gpu = module("bench_gpu")
    every = bench_gpu.Bench.rows
    monkeypatch.setattr(bench_gpu.Bench, "rows", lambda self: list(every(self))[:rows])
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_float32_flops": 1e9}
    failed = bench_gpu.run_rows(bench_gpu.Bench(bench_gpu.TINY, torch.device("cpu"), ceilings), path, 60.0)
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


def ratio(median: float) -> dict[str, float]:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}


def recorded(**more: Any) -> dict[str, Any]:
    """Results as `make gpu` writes them, with figures made up for these tests."""
    common = {"network": "84x84x3", "dtype": "float32", "main": True, "status": "passed"}
    adapt = {"kind": "adapt", "name": "adapt 00011", "pattern": "00011", **common}
    columns = {"ours": ratio(0.5), "stock_full": ratio(20.0), "stock_graph_tuned": {"skipped": "no | memory"}}
    backends = {"triton": {**ratio(2.0), "fraction_of_floor": 0.75, "bytes_per_s": 1e12, "flops_per_s": 1e13}}
    passed = {"floor_ms": 1.5, "bound": "memory", "backends": {**backends, "cuda": {"failed": "0.1 away"}}}
    rows = [
        {**adapt, "columns": columns, "ratios": {"stock_full": ratio(40.0), "stock_graph": ratio(1.7)}},
        {**adapt, "kind": "compile", "columns": {}, "ratios": {"compile_default": ratio(1.4)}},
        {**adapt, "kind": "adapt", "pattern": "11111", "name": "adapt 11111", "status": "failed", "reason": "0.2 away"},
        {"kind": "kernel", "name": "block 1", "pattern": "", **common, "passes": {"forward": passed}},
    ]
    stages = {
        "tests": {
            "status": "failed", "seconds": 7.0, "reason": "1 failed", "outcomes": {"passed": 3, "failed": 1},
            "failures": [{"test": "tests/test_x.py::test_y", "reason": "assert 1 == 2"}],
        },
        "bench": {"status": "failed", "seconds": 100.0, "rows": rows},
    }  # fmt: skip
    return {
        "schema": 1, "dry_run": False, "gpu": "NVIDIA X", "started": "2026-01-02T03:04:05+00:00", "commit": "abc",
        "seconds": 107.0, "stages": stages, **more,
    }  # fmt: skip


def test_the_report_states_each_goal_with_what_was_found():
    lines = module("gpu_report").page(recorded()).splitlines()
    split = [line.removesuffix(" |").split(" | ") for line in lines if "x | `adapt" in line]
    goal = {tuple(cells[:3]): cells[3] for cells in split}
    best = "the best of graph and `torch.compile`"
    assert goal["| 30x", "`adapt`, `00011`", "eager stock, all layers"] == "40.0x (36.0 to 44.0), reached"
    assert goal["| 1.5x", "`adapt`, `00011`", best].startswith("1.40x (1.26 to 1.54), not reached (without ")
    assert goal["| 8x", "`adapt`, `11111`", "eager stock, all layers"] == "no figure: 0.2 away"
    assert goal["| 1.5x", "`adapt`, `11111`", best] == "no figure: 0.2 away"
    assert goal["| 200x", "`adapt_tasks`, 64 tasks, per task, `00011`", "eager stock, all layers"] == "open"
    assert "| 70% of the floor | fused block 1, forward, 64 tasks | | 75% (triton), reached |" in lines
    assert "| 70% of the floor | fused block, backward, 64 tasks | | open |" in lines


def test_the_report_shows_failures_and_skips():
    text = module("gpu_report").page(recorded())
    assert "| tests | failed | 7 | 3 passed, 1 failed; 1 failed |" in text
    assert "`tests/test_x.py::test_y`: assert 1 == 2" in text
    assert "| CUDA graph, tuned | | no \\| memory |" in text
    assert "| block 1 | forward | 1.50 (memory) | cuda | wrong: 0.1 away | | | |" in text
    assert "- adapt 11111: failed, 0.2 away" in text
    assert "Nothing has run on a GPU" not in text and "not a measurement" not in text.replace("nothing of that is", "")
    assert all("\n" not in line and line.count(" |") >= 2 for line in text.splitlines() if line.startswith("|"))


def test_a_recorded_dry_run_reaches_nothing():
    report = module("gpu_report")
    text = report.page(recorded(dry_run=True))
    assert "**A dry run in tiny shapes on the CPU" in text and ", reached" not in text and "not reached" not in text
    assert "not a measurement" in report.summary(recorded(dry_run=True)).splitlines()[-1]


def test_the_newest_results_of_a_gpu_are_reported(tmp_path):
    report = module("gpu_report")
    assert report.newest(tmp_path) is None
    written: dict[str, dict[str, Any]] = {
        "nvidia-x-2026-01-02.json": {},
        "nvidia-y-2026-01-04.json": {"gpu": "NVIDIA Y", "started": "2026-01-04T00:00:00+00:00"},
        "dry-run-cpu-2026-01-09.json": {"dry_run": True, "started": "2026-01-09T00:00:00+00:00"},
    }
    for name, more in written.items():
        (tmp_path / name).write_text(json.dumps(recorded(**more)))
    (tmp_path / "nvidia-y-2026-01-04-timings.json").write_text("{}")
    (tmp_path / "local.json").write_text("{}")
    assert report.newest(tmp_path)["gpu"] == "NVIDIA Y"
    assert "## NVIDIA Y, 2026-01-04" in report.page(report.newest(tmp_path))


def test_without_results_the_page_says_so():
    text = module("gpu_report").page(None)
    assert "## Nothing has run on a GPU yet" in text and text.count("| open |") == 8


def test_the_page_is_that_of_the_newest_results():
    report = module("gpu_report")
    expected = report.page(report.newest(ROOT / "bench" / "results"))
    assert (ROOT / "docs" / "gpu.md").read_text() == expected, "run python3 bench/gpu_report.py"


def shell(text: str) -> list[list[str]]:
    """The words of each command; variables in ${NAME:-default} are their defaults, others stay."""
    joined = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text.replace("\\\n", " "))
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def cluster_commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", CLUSTERS.read_text(), re.MULTILINE | re.DOTALL)
    every = shell("\n".join([*blocks, BATCH.read_text()]))
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in every]


@pytest.mark.parametrize("path", ["docs/bench.sbatch", "docs/clusters.md"])
def test_the_shell_of_the_cluster_pages_parses(path):
    text = (ROOT / path).read_text()
    code = text if path.endswith("sbatch") else "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S))
    done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
    assert code and done.returncode == 0, done.stderr


def test_the_pip_commands_of_the_cluster_page_have_their_options():
    calls = [words[words.index("pip") + 1 :] for words in cluster_commands() if "pip" in words]
    assert {words[0] for words in calls} == {"wheel", "download", "install"}
    for verb, *words in calls:
        done = subprocess.run([sys.executable, "-m", "pip", verb, "--help"], capture_output=True, text=True, check=True)
        known = set(re.findall(r"(--[a-z-]+)", done.stdout))
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, (verb, words)


def test_the_lambda_maml_command_of_the_batch_file_has_its_options():
    calls = [words[1:] for words in cluster_commands() if words[0] == "lambda-maml"]
    assert ["select"] == [words[0] for words in calls]
    for name, *words in calls:
        try:
            context = cli.cli.commands[name].make_context(name, words)
        except click.UsageError as error:
            pytest.fail(f"lambda-maml {name} {' '.join(words)}: {error.format_message()}")
        assert context.params["timings"] is not None


def test_the_benchmark_command_of_the_batch_file_collects_every_pattern():
    (call,) = [words for words in cluster_commands() if words[0] == "pytest"]
    assert "--device=cuda" in call
    words = ["--device=cpu" if word == "--device=cuda" else word for word in call[1:] if "benchmark-json" not in word]
    command = [sys.executable, "-m", "pytest", *words, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "32 tests collected" in done.stdout, done.stdout + done.stderr


def test_environment_variables_of_the_cluster_page_are_read_by_the_build():
    named = set(re.findall(r"\b((?:LAMBDA_KERNELS|TORCH_CUDA)_[A-Z_]+)=", CLUSTERS.read_text()))
    assert named == {"LAMBDA_KERNELS_CUDA", "LAMBDA_KERNELS_LOCAL_VERSION", "TORCH_CUDA_ARCH_LIST"}
    build = (ROOT / "setup.py").read_text()
    assert [name for name in sorted(named) if name not in build] == []


def test_the_recipe_installs_from_the_wheelhouse_that_the_page_makes():
    recipe = (ROOT / "docs" / "lambda.def").read_text()
    sections = re.findall(r"^%(\w+)", recipe, re.MULTILINE)
    assert sections == ["files", "post", "environment", "test", "runscript"]
    assert "--dest wheelhouse" in CLUSTERS.read_text() and re.search(r"^    wheelhouse /opt/wheelhouse$", recipe, re.M)
    post = recipe.partition("%post\n")[2].partition("\n%")[0]
    assert subprocess.run(["bash", "-n"], input=post, text=True).returncode == 0
