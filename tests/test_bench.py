"""The benchmarks, run small in their own process: their file chooses a pattern, and a wrong result gets no figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import PATIENCE

from lambda_maml import Pattern, data, models, select_pattern
from lambda_maml.choice import tied
from lambda_maml.timing import STOCK, read_timings

ROOT = Path(__file__).resolve().parents[1]
NETWORK = {"ways": 3, "in_channels": 1, "width": 4, "image_size": 16}
SIZES = [f"--{name.replace('_', '-')}={value}" for name, value in NETWORK.items()]
SMALL = ["--bench-config=omniglot", "--shots=2", "--steps=2", *SIZES]
QUICK = ["--device=cpu", "--benchmark-max-time=0.001", "--benchmark-min-rounds=2"]
EVERY = [str(p) for p in Pattern.all(5)]


def bench(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    # interpreted Triton kernels take minutes here
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "TRITON_INTERPRET")}
    environment.update(PYTHONPATH=os.pathsep.join(filter(None, [path, *sys.path])), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def configuration(**more: Any) -> dict[str, Any]:
    """What read_timings is to find."""
    found = {"network": {"network": "conv4", **NETWORK}, "shots": 2, "steps": 2, "norm": "follow", "patterns": EVERY}
    return {**found, **more}


@pytest.fixture(scope="module")
def timings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a run over all patterns."""
    path = tmp_path_factory.mktemp("bench") / "timings.json"
    done = bench("bench/bench_adapt.py", "--benchmark-only", f"--benchmark-json={path}", *SMALL, *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 passed" in done.stdout
    return path


def without(timings: Path, out: Path, *patterns: str) -> Path:
    """The file less some patterns' benchmarks."""
    document = json.loads(timings.read_text())
    document["benchmarks"] = [b for b in document["benchmarks"] if b["extra_info"]["pattern"] not in patterns]
    out.write_text(json.dumps(document))
    return out


def test_every_pattern_and_the_stock_loop_are_read_back(timings):
    found, environment = read_timings(timings, **configuration())
    assert set(found) == {*EVERY, STOCK}
    assert all(0 < t.q1 <= t.median <= t.q3 for t in found.values())
    assert {"torch", "device", "threads", "backend", "commit"} <= environment.keys()


def test_each_pattern_has_its_spread_and_a_stock_loop_of_the_same_rounds(timings):
    document = json.loads(timings.read_text())
    assert document["machine_info"]["lambda_kernels"]["versions"]["torch"] == torch.__version__
    for benchmark in document["benchmarks"]:
        stats, extra = benchmark["stats"], benchmark["extra_info"]
        assert stats["rounds"] >= 2 and stats["iqr"] >= 0
        assert ("speedup_over_stock" in extra) == (extra["kind"] == "adapt")
        if extra["kind"] == "adapt":
            beside = extra["stock_alternating_ms"]
            assert 0 < beside["q1"] <= beside["median"] <= beside["q3"]
            assert extra["speedup_over_stock"] == pytest.approx(beside["median"] / (1e3 * stats["median"]))


def test_the_file_chooses_a_pattern(timings):
    torch.manual_seed(0)
    images, labels = torch.rand(2, 6, 1, 16, 16), torch.arange(3).repeat_interleave(2)
    tasks = [data.Task(xs, labels, xs.clone(), labels) for xs in images]
    wanted = ["00001", "00011", "01010", "11111"]
    options: dict[str, Any] = {"patterns": wanted, "max_drop": 1.0, "rule": "point", "timings": timings}
    chosen = select_pattern(models.conv4(**NETWORK), tasks, steps=2, lr=0.01, **options)
    found, _ = read_timings(timings, **configuration())
    times, score = {Pattern(p): found[p] for p in wanted}, {c.pattern: c.score for c in chosen.table}
    fastest = tied(sorted(times, key=lambda p: times[p].median), times)
    assert chosen.pattern == max(fastest, key=lambda p: score[p])
    assert {str(c.pattern): c.time_ms for c in chosen.table} == {p: found[p].median for p in wanted}


def test_a_file_that_lacks_a_pattern_is_refused(timings, tmp_path):
    part = without(timings, tmp_path / "part.json", "00011", "10101")
    with pytest.raises(ValueError, match="no timing for pattern 00011, 10101 "):
        read_timings(part, **configuration())


def test_a_file_of_another_network_is_refused(timings):
    with pytest.raises(ValueError, match=r"network width \(4 in the file, 8 here\)"):
        read_timings(timings, **configuration(network={"network": "conv4", **NETWORK, "width": 8}))
    with pytest.raises(ValueError, match=r"shots \(2 in the file, 1 here\)"):
        read_timings(timings, **configuration(shots=1))


def test_operations_agree_with_stock_torch():
    on_a_cpu = "28x28-64 and not cuda and not triton"
    done = bench("bench/bench_ops.py", "--benchmark-disable", "--device=cpu", "-k", on_a_cpu)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


# An inner rate that is 1 % off, and statistics whose eps is.
BROKEN = """
import lambda_maml
from lambda_kernels.backends.native import Native

right_adapt, right_block = lambda_maml.adapt, Native.block
lambda_maml.adapt = lambda *a, lr, **k: right_adapt(*a, lr=1.01 * lr, **k)
Native.block = lambda self, x, w, g, b, spec: right_block(self, x, w, g, b, spec._replace(eps=1.01 * spec.eps))
"""


def test_a_wrong_result_gets_no_figure(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    path = tmp_path / "timings.json"
    arguments = ["-p", "broken", f"--benchmark-json={path}", "--patterns=00011", *SMALL, *QUICK]
    done = bench("bench", "-k", "test_adapt or (conv_block-5x64 and forward)", *arguments, path=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "00011 in torch.float64: 0.01 away from plain PyTorch" in done.stdout
    assert "conv_block forward on native in torch.float64" in done.stdout
    assert "2 failed, 2 passed" in done.stdout and "error" not in done.stdout.splitlines()[-1]
    timed = [b["extra_info"]["backend"] for b in json.loads(path.read_text())["benchmarks"]]
    assert sorted(timed) == ["reference", "torch"]


def test_help_lists_the_options_of_the_benchmarks():
    done = bench("bench", "--help")
    assert done.returncode == 0 and "--bench-config=NAMES" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bench-config=omniglt"], "no configuration omniglt: choose from omniglot, "),
        (["--bench-config=omniglot,glyphs", "--width=32"], "two of these are the same"),
        (["--patterns=00000"], "updates no layer"),
        (["--shots=0"], "0 is not at least 1"),
    ],
    ids=["unknown", "twice", "pattern", "shots"],
)
def test_bad_options(arguments, words):
    done = bench("bench", "--collect-only", *arguments)
    assert done.returncode == 4 and words in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
