"""bench/bench_peers.py, run small: whoever is timed gives the plain loop's result; what the page says was measured."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import module
from machine import PATIENCE
from torch.utils.flop_counter import FlopCounterMode

from lambda_maml import Pattern

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
harness, by_hand, peers, floor = (module(name) for name in ("harness", "by_hand", "peers", "floor"))
report = module("peers_report")
TINY = harness.Configuration(16, 3, 4, 3, 2, 3)
EVERYBODY = [(bits, name) for bits, own in peers.BY_HAND.items() for name in (*own, *peers.PACKAGES)]


def maker(bits: str, name: str) -> Any:
    if name == "compile":
        return functools.partial(peers.PACKAGES[name], backend="aot_eager")  # inductor takes its time
    return {**peers.BY_HAND[bits], **peers.PACKAGES}[name]


def gate(pattern: Pattern) -> Any:
    return harness.Gate(harness.make_problem(TINY, CPU), pattern, TINY.steps, by_hand.LR, by_hand.NORM)


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize(("bits", "name"), EVERYBODY, ids=lambda value: value)
def test_everybody_gives_the_result_of_the_plain_loop(bits, name):
    pattern = Pattern(bits)
    try:
        gate(pattern)(lambda problem: maker(bits, name)(problem, pattern, TINY.steps).result(), name)
    except harness.Skip as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("prefix", [False, True])
def test_the_residual_network_is_adapted_by_hand_as_by_us(prefix):
    options, pattern = module("peers_options"), Pattern("00000111")
    problem = harness.make_problem(TINY, CPU, by_hand.residual)
    held = harness.Gate(problem, pattern, TINY.steps, by_hand.LR, by_hand.NORM)
    for make in (peers.Ours, functools.partial(by_hand.Stock, prefix=prefix)):
        held(lambda given, make=make: make(given, pattern, TINY.steps).result())
    assert str(pattern) == options.RESIDUAL_PATTERN
    with pytest.raises(ValueError, match="updates a part of block3 only"):
        harness.updated_children(problem.model, "00000011")


@pytest.mark.parametrize("wrong", ["step", "rate"])
def test_a_wrong_result_is_red(wrong):
    pattern = Pattern("00011")

    def adapted(problem: Any) -> Any:
        loop = harness.PlainLoop(problem, pattern, TINY.steps + (wrong == "step"), by_hand.LR, by_hand.NORM)
        loop.lr *= 1.01 if wrong == "rate" else 1.0
        return loop.result()

    with pytest.raises(harness.Wrong, match="them 00011 in torch.float64: .* no time taken"):
        gate(pattern)(adapted, "them")


# Someone who breaks, and with "wrong" one whose inner rate is 1% off.
DRIVER = """
import sys, by_hand, peers
from peers import BY_HAND, PACKAGES

class Wrong(by_hand.Stock):
    def __call__(self):
        by_hand.LR = 0.0101
        super().__call__()
        by_hand.LR = 0.01

def breaks(*arguments):
    raise RuntimeError("cannot")

PACKAGES["higher"] = breaks
if sys.argv.pop(1) == "wrong":
    BY_HAND["00011"]["stock_prefix"] = lambda *arguments: Wrong(*arguments, prefix=True)
import bench_peers
sys.exit(bench_peers.main())
"""


def run(what: str, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", peers.SOURCE)}
    environment.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT / "bench"), *sys.path]))
    options = ["--tiny", "--rounds=2", "--seconds=0", "--compile-backend=aot_eager", f"--json={path}", *arguments]
    command = [sys.executable, "-c", DRIVER, what, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run of all kinds of rows but memory, which takes a process for each figure."""
    folder = tmp_path_factory.mktemp("peers")
    files = [f"--markdown={folder / 'peers.md'}", f"--plot={folder / 'peers.svg'}"]
    kinds = ",".join(kind for kind in module("peers_options").KINDS if kind != "memory")
    done = run("right", folder / "peers.json", "--configurations=omniglot", f"--kinds={kinds}", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    document = report.read(folder / "peers.json")
    assert (folder / "peers.md").read_text() == report.markdown(document)
    assert "<svg" in (folder / "peers.svg").read_text()
    return dict(document)


def is_spread(found: dict[str, float]) -> bool:
    return set(found) == {"median", "q1", "q3"} and 0 < found["q1"] <= found["median"] <= found["q3"]


def test_the_file_says_what_was_measured_and_where(results):
    assert set(results) == {
        "schema", "what", "started", "command", "tiny", "seconds", "machine", "ceilings", "rows",
    }  # fmt: skip
    assert (results["schema"], results["what"], results["tiny"]) == (1, "peers", True)
    assert results["command"].startswith("python bench/bench_peers.py --configurations=omniglot --kinds=adapt,")
    assert "/tmp" not in json.dumps(results)
    assert str(Path.home()) == "/" or str(Path.home()) not in json.dumps(results)
    assert results["machine"]["threads"] == results["ceilings"]["threads"] == 1
    assert results["machine"]["packages"]["torch"] == torch.__version__
    assert [row["name"] for row in results["rows"]] == [
        "adapt omniglot", "packages omniglot", "query omniglot", "growth omniglot", "tasks omniglot 00011",
        "tasks omniglot 11111", "general residual-84 00000111", "general residual-32 00000111",
        "odd odd-7-5-6 011",
    ]  # fmt: skip
    assert {row["status"] for row in results["rows"]} == {"passed"}


def test_every_contender_has_a_time_or_a_reason(results):
    adapt, packages = results["rows"][:2]
    assert {bits: set(columns) for bits, columns in adapt["columns"].items()} == {
        bits: set(own) for bits, own in peers.BY_HAND.items()
    }
    for row in (adapt, packages):
        for bits, columns in row["columns"].items():
            timed = {name for name, column in columns.items() if "skipped" not in column}
            assert all(is_spread(columns[name]) for name in timed)
            assert all(columns[name]["skipped"] for name in set(columns) - timed)
            assert set(row["ratios"][bits]) == (timed | {"stock_full"}) - {"ours"}
            assert all(map(is_spread, row["ratios"][bits].values()))
    for bits, columns in packages["columns"].items():
        assert columns.keys() >= peers.PACKAGES.keys()
        assert columns["higher"] == {"skipped": "RuntimeError: cannot"}
        assert columns["learn2learn"] == {"skipped": "LEARN2LEARN_SRC names no checkout"}
        assert ("skipped" in columns["compile"]) == (bits == "11111")


def test_a_wrong_contender_stops_its_configuration(tmp_path):
    done = run("wrong", tmp_path / "peers.json", "--configurations=omniglot,cifar", "--kinds=adapt,query")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: stock_prefix 00011 in torch.float64: " in done.stdout
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed"] * 4
    assert not any("columns" in row for row in rows)


def test_a_package_is_taken_from_the_checkout_without_its_own_imports(tmp_path, monkeypatch):
    folder = tmp_path / "learn2learn" / "algorithms"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('needs gym')\n")
    (folder.parent / "_version.py").write_text("__version__ = '9.9'\n")
    (folder / "__init__.py").write_text("")
    (folder / "maml.py").write_text("class MAML: pass\n")
    for name in [name for name in sys.modules if name.startswith("learn2learn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv(peers.SOURCE, str(tmp_path))
    try:
        assert peers.learn2learn_maml().__module__ == "learn2learn.algorithms.maml"
    finally:
        for name in [name for name in sys.modules if name.startswith("learn2learn")]:
            del sys.modules[name]
    assert peers.versions()["learn2learn"] == "9.9"
    monkeypatch.setenv(peers.SOURCE, str(folder))
    with pytest.raises(harness.Skip, match="names no folder that holds learn2learn"):
        peers.learn2learn_maml()


def blocks(c: Any) -> list[int]:
    """Operations of each convolution of conv4, forward."""
    inputs = [c.in_channels, *[c.width] * 3]
    images = c.ways * c.shots
    return [2 * images * c.width * i * 9 * (c.image_size >> layer) ** 2 for layer, i in enumerate(inputs)]


def test_the_operations_of_the_floor_are_those_by_hand():
    model, xs, _ = harness.make_problem(TINY, CPU)
    first, *rest = blocks(TINY)
    head = 2 * TINY.ways * TINY.shots * TINY.width * TINY.ways
    step = 2 * first + 3 * sum(rest) + 3 * head
    count = functools.partial(floor.operations, model, tuple(xs.shape))
    assert count(Pattern("11111"), 3) == 3 * step
    assert count(Pattern("00011"), 3) == first + sum(rest[:2]) + 3 * (2 * rest[2] + 3 * head)
    assert count(Pattern("11111,00001"), 3) == step + first + sum(rest) + 2 * 2 * head


@pytest.mark.parametrize("name", ["omniglot", "cifar-1-shot"])
@pytest.mark.parametrize("bits", ["11111", "00011", "01010"])
def test_the_operations_of_the_floor_are_those_that_torch_counts(name, bits):
    c = harness.CONFIGURATIONS[name]._replace(width=4, steps=2)
    problem = harness.make_problem(c, CPU)
    stock = by_hand.Stock(problem, Pattern(bits), c.steps, prefix=True)
    with FlopCounterMode(display=False) as counter:
        stock()
    assert floor.operations(problem.model, tuple(problem.xs.shape), Pattern(bits), c.steps) == counter.get_total_flops()


def test_without_a_compiler_the_peak_is_that_of_the_matrix_product(monkeypatch):
    monkeypatch.setattr(floor, "SIDES", (64,))
    monkeypatch.setattr(floor.shutil, "which", lambda name: None)
    found = floor.ceilings(0.0)
    assert found["flops"] == found["mm_flops"] > 0 and "fma_flops" not in found
    assert "no C++ compiler" in found["remark"]


def test_the_peak_of_memory_is_that_of_the_call():
    peak = functools.partial(module("memory").peak, harness.Configuration(84, 3, 16, 5, 5, 1), threads=1)
    first_layer = 4 * 25 * 16 * 84 * 84 / 2**20  # MiB, of which stock PyTorch holds several
    assert min(peak("11111", "stock_full")) > 2 * first_layer
    with pytest.raises(harness.Skip, match="KeyError"):
        peak("11111", "nobody")


def measured(results: dict[str, Any]) -> dict[str, Any]:
    """The results with some figures made up, as of a real run."""
    found = copy.deepcopy({**results, "tiny": False})
    adapt = found["rows"][0]
    adapt["ratios"]["11111"]["stock_full"] = {"median": 2.6, "q1": 2.5, "q3": 2.7}
    adapt["ratios"]["00011"]["stock_full"] = {"median": 14.0, "q1": 13.0, "q3": 16.0}
    found["rows"][1]["columns"]["11111"]["higher"] = {"skipped": "no | reason"}
    found["rows"][2] = {**found["rows"][2], "status": "failed", "reason": "0.2 away"}
    columns = {"11111": {"ours": 2.0, "stock_full": 5.0}, "00011": {"ours": 1.0, "stock_masked": 2.5}}
    memory = {"kind": "memory", "name": "memory omniglot", "configuration": "omniglot", "network": "28x28x1"}
    found["rows"].append({**memory, "status": "passed", "columns": columns})
    return found


def test_the_page_states_each_goal_with_what_was_found(results):
    lines = report.page(measured(results), None).splitlines()
    (goals,) = [line for line in lines if "goal 2.5x" in line]
    assert "| 2.60x (2.50 to 2.70); goal 2.5x: reached | 14.0x (13.0 to 16.0); goal 15x: not reached |" in goals
    assert any("| no \\| reason |" in line for line in lines)
    assert "| query omniglot | failed | 0.2 away |" in lines
    assert "| omniglot: 28x28x1 | `11111` | 2.00 | stock, all layers | 5.00 | 2.50x; goal 2x: reached |" in lines
    assert "| omniglot: 28x28x1 | `00011` | 1.00 | stock, same mask | 2.50 | 2.50x; goal 3x: not reached |" in lines
    assert "not a measurement" not in "\n".join(lines)


def test_tiny_shapes_reach_nothing(results):
    text = report.page(results, None)
    assert "**Tiny shapes: not a measurement.**" in text and ": reached" not in text and ": not reached" not in text


def test_the_page_is_that_of_the_results_in_the_checkout():
    document = report.read(report.RESULTS) if report.RESULTS.exists() else None
    training = report.read(report.TRAINING, "training") if report.TRAINING.exists() else None
    assert report.PAGE.read_text() == report.page(document, training), "run python3 bench/peers_report.py"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--configurations=omniglt"], "no omniglt: choose from omniglot, "),
        (["--kinds=adapt,speed"], "no speed: choose from adapt, "),
    ],
)
def test_bad_options(arguments, words):
    done = subprocess.run(
        [sys.executable, "bench/bench_peers.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
