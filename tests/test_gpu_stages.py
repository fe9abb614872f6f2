"""The stages of `make gpu`: their order and time, what each runs on a device and in which environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benches import module
from machine import PATIENCE

ROOT = Path(__file__).resolve().parents[1]


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
