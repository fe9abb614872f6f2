"""bench/bench_training.py, run small: whoever is timed gives the plain loop's meta-gradient; the page says what was
measured."""

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
from benches import module
from machine import PATIENCE
from torch.utils.flop_counter import FlopCounterMode

import lambda_maml
from lambda_maml import Pattern

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
harness, meta, floor, peers = (module(name) for name in ("harness", "meta", "floor", "peers"))
training, report, page = (module(name) for name in ("training", "training_report", "peers_report"))
TINY = harness.Configuration(16, 3, 4, 3, 2, 2)
EVERYBODY = [(case, name) for case in meta.CASES for name in (*meta.contenders(case), *meta.PACKAGES)]


@functools.cache
def gate(case: Any) -> Any:
    return meta.MetaGate(meta.make_meta_problem(TINY, tasks=2, query=2), case, TINY.steps)


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize(("case", "name"), EVERYBODY, ids=str)
def test_everybody_gives_the_meta_gradient_of_the_plain_loop(case, name):
    try:
        gate(case)(name, {**meta.contenders(case), **meta.PACKAGES}[name])
    except harness.Skip as why:
        pytest.skip(str(why))


@pytest.mark.parametrize(
    ("case", "change"),
    [(meta.CASES[0], {"second_order": False}), (meta.CASES[1], {"pattern": "00001"}), (meta.CASES[2], {"steps": 3})],
    ids=["order", "pattern", "steps"],
)
def test_another_gradient_is_red(case, change):
    def make(model: Any, case: Any, steps: int) -> Any:
        settings = {**case._asdict(), "steps": steps, **change}
        return meta.Ours(model, meta.Case(settings["pattern"], settings["second_order"]), settings["steps"])

    with pytest.raises(harness.Wrong, match=f"meta-gradient of them, {case}, in torch.float64: .* no time taken"):
        gate(case)("them", make)


def counted(case: Any, name: str) -> int:
    """Operations of one task as torch counts them."""
    problem = meta.make_meta_problem(TINY, tasks=1, query=2)
    contender = {"stock_prefix": meta.stock_prefix, **meta.contenders(case)}[name](problem.model, case, TINY.steps)
    with FlopCounterMode(display=False) as counter:
        contender(problem.batch)
    return int(counter.get_total_flops())


def floor_of(pattern: str, second_order: bool, steps: int = TINY.steps) -> int:
    model, batch = meta.make_meta_problem(TINY, tasks=1, query=2)
    shapes = (tuple(t.shape[1:]) for t in (batch.xs, batch.xq))
    return int(floor.meta_operations(model, *shapes, Pattern(pattern), steps, second_order))


def layers(images: int) -> list[int]:
    """Operations of each layer of conv4, forward."""
    inputs = [TINY.in_channels, *[TINY.width] * 3]
    blocks = [2 * images * TINY.width * i * 9 * (TINY.image_size >> layer) ** 2 for layer, i in enumerate(inputs)]
    return [*blocks, 2 * images * TINY.width * TINY.ways]


def test_the_operations_of_a_meta_gradient_are_those_by_hand():
    first, *rest = layers(TINY.ways * TINY.shots)
    query_first, *query = layers(TINY.ways * 2)
    outer = 2 * query_first + 3 * sum(query)
    assert floor_of("11111", False, 3) == outer + 3 * (2 * first + 3 * sum(rest))
    assert floor_of("11111", True, 3) == outer + 3 * (4 * first + 9 * sum(rest))
    front = 2 * first + 3 * sum(rest[:2])
    assert floor_of("00011", True, 3) == outer + front + 3 * (6 * rest[2] + 9 * rest[3])
    assert floor_of("10001", True, 3) == outer + 3 * (4 * first + 6 * sum(rest[:3]) + 9 * rest[3])
    head = 2 * first + 3 * sum(rest[:3]) + 2 * 6 * rest[3]
    assert floor_of("11111,00001", True, 3) == outer + 4 * first + 9 * sum(rest) + head


def test_the_operations_of_a_meta_gradient_are_those_that_torch_counts():
    assert floor_of("11111", False) == counted(meta.Case("11111", False), "stock")
    assert floor_of("00011", True) == counted(meta.Case("00011", True), "stock_prefix")
    images = TINY.steps * layers(TINY.ways * TINY.shots)[0]  # torch makes the gradient by the images too in each step
    assert floor_of("11111", True) == counted(meta.Case("11111", True), "stock") - images


# With "wrong" the verbs adapt by a rate that is 1% off; with "breaks" a package does not run.
DRIVER = """
import sys, meta

class Wrong(meta.Verbs):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.maml.lr = 0.0101

def breaks(*arguments):
    raise RuntimeError("cannot")

meta.PACKAGES["higher"] = breaks
if sys.argv.pop(1) == "wrong":
    meta.Verbs = Wrong
import bench_training
sys.exit(bench_training.main())
"""


def run(what: str, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", peers.SOURCE)}
    environment.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT / "bench"), *sys.path]))
    options = ["--tiny", "--rounds=2", "--seconds=0", "--configurations=omniglot", f"--json={path}", *arguments]
    command = [sys.executable, "-c", DRIVER, what, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run of all kinds of rows but the graph's memory, which takes a process for each figure."""
    folder = tmp_path_factory.mktemp("training")
    kinds = "--kinds=adapt,meta,forward,train,ranks,frozen,frozen-one"
    done = run("right", folder / "t.json", kinds, f"--markdown={folder / 't.md'}")
    assert done.returncode == 0, done.stdout + done.stderr
    document = page.read(folder / "t.json", "training")
    assert (folder / "t.md").read_text() == report.markdown(document)
    return dict(document)


def is_spread(found: dict[str, float]) -> bool:
    return set(found) == {"median", "q1", "q3"} and 0 < found["q1"] <= found["median"] <= found["q3"]


def test_every_row_is_there_with_times_or_reasons(results):
    assert (results["schema"], results["what"], results["tiny"]) == (1, "training", True)
    assert results["command"].startswith("python bench/bench_training.py --configurations=omniglot --kinds=adapt,")
    assert [row["name"] for row in results["rows"]] == [
        "adapt omniglot", "meta omniglot second order 11111", "meta omniglot second order 00011",
        "meta omniglot first order 11111", "forward omniglot", "train omniglot", "ranks omniglot",
        "frozen omniglot", "frozen-one omniglot",
    ]  # fmt: skip
    assert {row["status"] for row in results["rows"]} == {"passed"}
    for row in results["rows"]:
        timed = {name for name, column in row["columns"].items() if "skipped" not in column}
        assert all(is_spread(row["columns"][name]) for name in timed)
        assert set(row["ratios"]) - {"stock over folded"} == timed - {"ours"} and all(
            map(is_spread, row["ratios"].values())
        )
    for row in results["rows"][1:4]:
        assert {"ours", "verbs", "stock", "higher", "learn2learn"} <= set(row["columns"])
        assert row["columns"]["higher"] == {"skipped": "RuntimeError: cannot"}
        assert row["columns"]["learn2learn"] == {"skipped": "LEARN2LEARN_SRC names no checkout"}
        assert row["floor_ms"] == 1e3 * row["flops"] / results["ceilings"]["flops"]
    assert {"stock_full", "stock_prefix"} <= set(results["rows"][2]["columns"])
    assert set(results["rows"][5]["columns"]) == {"ours", "stock", "higher", "learn2learn"}
    assert set(results["rows"][6]["columns"]) == {"ours", "one"}
    assert [row["query"] for row in results["rows"][7:]] == [45, 1]


def test_a_wrong_gradient_stops_its_configuration(tmp_path):
    done = run("wrong", tmp_path / "t.json", "--kinds=meta,train")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: the meta-gradient of verbs, second order 11111, in torch.float64: " in done.stdout
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed"] * 4
    assert not any("columns" in row for row in rows)


def test_a_trainer_with_another_rate_gets_no_figure(monkeypatch, tmp_path):
    right = training.train
    more = {"rule": lambda_maml.rules.sgd(0.5)}
    monkeypatch.setattr(training, "train", lambda *given, **options: right(*given, **options, **more))
    with pytest.raises(harness.Wrong, match="loss of lambda-maml train in the first 2 iterations: .* no time taken"):
        training.alternating(TINY, tmp_path, seconds=0.0, rounds=1, packages=False)


def test_ranks_that_train_otherwise_get_no_figure(monkeypatch):
    ranks = module("two_ranks")
    runs = iter([(1.0, 0.5), (1.0, 0.6)])
    monkeypatch.setattr(ranks, "run", lambda *_: next(runs))
    with pytest.raises(harness.Wrong, match="the mean loss is 0.5 on two ranks, 0.6 on one: no time taken"):
        ranks.measure(lambda_maml.ranks.ALONE, TINY, Path(), rounds=1, iterations=4)


def test_the_memory_of_a_meta_gradient_is_that_of_its_graph():
    c = harness.Configuration(84, 3, 16, 5, 1, 3)
    first_layer = 4 * 5 * 16 * 84 * 84 / 2**20  # MiB, of which stock PyTorch keeps several in each step
    assert min(module("memory").peak(c, "11111", "stock", threads=1, query=1)) > 3 * 2 * first_layer


def measured(results: dict[str, Any]) -> dict[str, Any]:
    """The results with some figures made up, as of a real run."""
    found = copy.deepcopy({**results, "tiny": False})
    adapted, second, last, first, forward, trained, ranks, frozen, _ = found["rows"]
    second["ratios"]["stock"] = {"median": 3.1, "q1": 3.0, "q3": 3.2}
    last["ratios"]["stock_full"] = {"median": 6.0, "q1": 5.5, "q3": 6.5}
    second.update(floor_ms=30.0, flops=7e9)
    for name, time in {"ours": 40.0, "verbs": 60.0, "stock": 120.0}.items():
        second["columns"][name] = {"median": time, "q1": time, "q3": time}
    ranks["ratios"]["one"] = {"median": 1.8, "q1": 1.6, "q3": 1.9}
    frozen["ratios"]["stock over folded"] = {"median": 4.5, "q1": 4.4, "q3": 4.6}
    trained["columns"]["ours"] = {"median": 20.0, "q1": 16.0, "q3": 25.0}
    found["rows"][4] = {**forward, "status": "failed", "reason": "0.2 away"}
    mib = {"ours": 10.0, "stock": 25.0, "ours_steps": 2.0, "stock_steps": 7.0, "ours_twice": 2.5, "kept": 0.4}
    mib.update(ours_first=12.0, stock_first=26.0)
    graph = {"kind": "graph", "name": "graph omniglot", "configuration": "omniglot", "network": "28x28x1"}
    found["rows"].append({**graph, "status": "passed", "columns": {"11111": mib}})
    return found


def test_the_page_leads_with_training_and_its_goals(results):
    lines = page.page(None, measured(results)).splitlines()
    heads = [line for line in lines if line.startswith("## ")]
    assert heads[0].startswith("## Training: ") and heads[1] == "## Adaptation: no results in this checkout"
    (goals,) = [line for line in lines if "goal 3.5x" in line]
    assert "| 3.10x (3.00 to 3.20); goal 3x: reached | 6.00x (5.50 to 6.50); goal 5x: reached |" in goals
    assert any("| second order `11111` | 7 | 30.0 | 75% | 50% | 25% |" in line for line in lines)
    assert any("| 1.80x (1.60 to 1.90); goal 1.7x: reached |" in line for line in lines)
    assert any("| the trainer | 50.0 (40.0 to 62.5) |" in line for line in lines)
    assert any(line.endswith("| 4.50x (4.40 to 4.60); goal 4x: reached |") for line in lines)
    memory = "10.0, 25.0: 2.50x; goal 3x: not reached | 2.00, 7.00: 3.50x; goal 3x: reached | 12.0, 26.0 | 0.50 | 0.40"
    assert any(f"| `11111` | {memory} |" in line for line in lines)
    assert "| forward omniglot | failed | 0.2 away |" in lines


def test_tiny_shapes_reach_nothing(results):
    text = page.page(None, results)
    assert "**Tiny shapes: not a measurement.**" in text and ": reached" not in text and ": not reached" not in text


def test_a_file_of_another_benchmark_is_refused(results, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="t.json: not the results of bench_peers.py"):
        page.read(tmp_path / "t.json")
