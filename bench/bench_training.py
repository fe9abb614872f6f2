"""Meta-training on the CPU beside stock PyTorch and the packages that do the same: meta-gradients in second and first
order, the query pass, with frozen norms too, the memory of the graph, `lambda-maml train` beside its loop in other
packages, and on two ranks.

All columns of a row alternate in one process; a ratio is taken inside each round. Nothing of a configuration is timed
before everybody's gradients were compared with the plain loop's in float64 and in float32. Whoever is not installed, or
breaks, is a column that says so; whoever gives another result stops the configuration, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import floor
import memory
import meta
import torch
import training
import training_report
import two_ranks
from bench_peers import machine, ratio, show
from by_hand import LR, NORM, LogitsGate, Tasks
from gpu_report import write as write_text
from harness import (
    CONFIGURATIONS,
    Column,
    Configuration,
    Row,
    Wrong,
    check_adapt,
    compare,
    each_round,
    fill_rows,
    make_problem,
    reason,
    spread,
    write,
)
from peers import FULL, LAST, Ours, StockFull
from peers_options import command, names_of
from rich.console import Console

import lambda_kernels as lk
from lambda_maml import Pattern, adapt

CPU = torch.device("cpu")
STEPS = 5
KINDS = ("adapt", "meta", "forward", "frozen", "frozen-one", "train", "ranks", "graph")
# Where the rows that are not taken everywhere are taken.
PLACES = {"train": ("cifar",), "ranks": ("cifar",), "graph": ("cifar", "omniglot")}


class Options(NamedTuple):
    configurations: Mapping[str, Configuration]
    kinds: Sequence[str]
    seconds: float
    rounds: int
    packages: bool
    places: Mapping[str, Sequence[str]]


class Ready(NamedTuple):
    """A configuration behind its gate: who can be timed by case and name, and why others cannot."""

    problem: meta.MetaProblem
    made: dict[meta.Case, dict[str, meta.Contender]]
    skipped: dict[meta.Case, dict[str, str]]


class Bench:
    def __init__(self, options: Options, flops: float) -> None:
        self.options, self.flops = options, flops
        self.latest: tuple[str, Ready | Exception] | None = None

    def rows(self) -> Iterator[Row]:
        o = self.options
        fills: dict[str, Callable[[str, Configuration], dict[str, Any]]] = {
            "adapt": self.adapt,
            "forward": self.forward,
            "frozen": self.frozen,
            "frozen-one": functools.partial(self.frozen, images=1),
            "train": self.train,
            "ranks": self.ranks,
            "graph": self.graph,
        }
        for name, c in o.configurations.items():
            for kind in o.kinds:
                if name not in o.places.get(kind, [name]):
                    continue
                row = {"kind": kind, "configuration": name, "network": str(c)}
                if kind in fills:
                    yield {"name": f"{kind} {name}", **row}, functools.partial(fills[kind], name, c)
                    continue
                for case in meta.CASES:
                    of = {"name": f"{kind} {name} {case}", **row, **case._asdict()}
                    yield of, functools.partial(self.meta, name, c, case)

    def ready(self, name: str, c: Configuration) -> Ready:
        """The configuration once its gate is passed; the gate's error for all of its rows otherwise."""
        if self.latest is None or self.latest[0] != name:
            self.latest = None  # frees the one before
            try:
                self.latest = name, self.gate(c)
            except Exception as error:  # raised below, for this row and for those to come
                self.latest = name, error
        found = self.latest[1]
        if isinstance(found, Exception):
            raise found
        return found

    def gate(self, c: Configuration) -> Ready:
        problem = meta.make_meta_problem(c)
        ready = Ready(problem, {}, {})
        for case in meta.CASES:
            gate = meta.MetaGate(problem, case, c.steps)
            made, skipped = ready.made.setdefault(case, {}), ready.skipped.setdefault(case, {})
            own, packages = meta.contenders(case), meta.PACKAGES if self.options.packages else {}
            for name, make in {**own, **packages}.items():
                if make is meta.Stock:  # the plain loop itself
                    made[name] = make(problem.model, case, c.steps)
                    continue
                try:
                    made[name] = gate(name, make)
                except Exception as error:  # what others' code cannot do is a note
                    if name in own or isinstance(error, Wrong):
                        raise
                    skipped[name] = reason(error)
        return ready

    def time(self, columns: Mapping[str, Column], share: float = 1.0) -> dict[str, list[float]]:
        """Milliseconds of every column in each round; `share` of a row's seconds."""
        o = self.options
        return each_round(columns, seconds=share * o.seconds, rounds=o.rounds, warmup=1)

    def adapt(self, name: str, c: Configuration) -> dict[str, Any]:
        """Adaptation of one task, for its place beside training."""
        problem, full = make_problem(c, CPU), Pattern(FULL)
        check_adapt(problem, full, c.steps, LR, NORM)
        stock = StockFull(problem, full, c.steps)
        each = self.time({"ours": Column(Ours(problem, full, c.steps)), "stock": Column(stock, reset=stock.reset)}, 0.2)
        return compared(each)

    def meta(self, name: str, c: Configuration, case: meta.Case) -> dict[str, Any]:
        """A meta-gradient of all tasks. Beside patterns stands stock PyTorch under the full pattern, in the same
        order."""
        ready = self.ready(name, c)
        made, full = dict(ready.made[case]), meta.Case(FULL, case.second_order)
        if case != full:
            made["stock_full"] = ready.made[full]["stock"]
        batch = ready.problem.batch
        columns = {n: Column(functools.partial(m, batch), reset=m.network.zero_grad) for n, m in made.items()}
        found = compared(self.time(columns))
        found["columns"].update({n: {"skipped": why} for n, why in ready.skipped[case].items()})
        support, query = (tuple(t.shape[1:]) for t in (batch.xs, batch.xq))
        count = len(batch.xs) * floor.meta_operations(
            ready.problem.model, support, query, Pattern(case.pattern), c.steps, case.second_order
        )
        return {**found, "flops": count, "floor_ms": 1e3 * count / self.flops}

    @torch.no_grad()
    def forward(self, name: str, c: Configuration) -> dict[str, Any]:
        """The query pass alone: the logits of one task's query images by adapted weights, no gradient."""
        model, batch = meta.make_meta_problem(c, tasks=3)  # as many as the gate compares
        full = Pattern(FULL)
        tasks = Tasks(model, batch.xs, batch.ys, batch.xq)
        learners = [
            adapt(*tasks.problem(t), pattern=full, steps=c.steps, lr=LR, norm=NORM) for t in range(len(batch.xs))
        ]
        gate = LogitsGate(tasks, full, c.steps)
        gate("the learner", torch.stack([learner(xq) for learner, xq in zip(learners, batch.xq)]))
        stock = StockFull(tasks.problem(0), full, c.steps)
        stock()
        each = self.time(
            {
                "ours": Column(functools.partial(learners[0], batch.xq[0])),
                "stock": Column(functools.partial(stock.network, batch.xq[0])),
            },
            0.2,
        )
        return {**compared(each), "query": len(batch.xq[0])}

    @torch.no_grad()
    def frozen(self, name: str, c: Configuration, images: int | None = None) -> dict[str, Any]:
        """The logits of a task's query images, or of some, by the norms' statistics of its support set: the learner,
        its folded network, and the network that was not converted, in torch's modules with the same statistics."""
        model, batch = meta.make_meta_problem(c, tasks=1)
        problem, xq = Tasks(model, batch.xs, batch.ys, batch.xq).problem(0), batch.xq[0, :images]
        learner = adapt(*problem, pattern=FULL, steps=c.steps, lr=LR, norm=NORM, statistics="support")
        stock = lk.to_torch(learner.to_module()).eval()
        run = {"ours": learner, "folded": learner.to_module(fold=True), "stock": stock}
        truth = copy.deepcopy(stock).double()(xq.double())
        for who in ("ours", "folded"):
            compare(f"the logits of {who}", [run[who](xq)], [stock(xq)], [truth], float(truth.norm()))
        each = self.time({who: Column(functools.partial(network, xq)) for who, network in run.items()}, 0.2)
        found = compared(each)
        found["ratios"]["stock over folded"] = spread(ratio(each["stock"], each["folded"]))
        return {**found, "query": len(xq)}

    def train(self, name: str, c: Configuration) -> dict[str, Any]:
        """`lambda-maml train` in second order, beside its loop in stock PyTorch and the packages; milliseconds a
        task."""
        self.ready(name, c)
        o = self.options
        with tempfile.TemporaryDirectory() as folder:
            each, skipped = training.alternating(
                c, Path(folder), seconds=o.seconds, rounds=o.rounds, packages=o.packages
            )
        found = compared(each)
        found["columns"].update({n: {"skipped": why} for n, why in skipped.items()})
        return found

    def ranks(self, name: str, c: Configuration) -> dict[str, Any]:
        """The trainer in second order on two ranks, beside it on one of them: a thread each, milliseconds a task."""
        self.ready(name, c)
        rounds = max(3, min(self.options.rounds, round(self.options.seconds)))
        return compared(two_ranks.alternating(c, rounds=rounds))

    def graph(self, name: str, c: Configuration) -> dict[str, Any]:
        """Peaks in MiB of one task's meta-gradient of second order: with all query images (also of the first call), and
        with one per class, which leaves the graph of the steps; and that with twice the steps."""
        self.ready(name, c)
        twice, threads = c._replace(steps=2 * c.steps), torch.get_num_threads()
        columns: dict[str, dict[str, float]] = {}
        for bits in (FULL, LAST):
            peak = functools.partial(memory.peak, pattern=bits, threads=threads)
            found = columns[bits] = {}
            for who in ("ours", "stock"):
                found[f"{who}_first"], found[who] = peak(c, contender=who, query=meta.QUERY)
                found[f"{who}_steps"] = peak(c, contender=who, query=1).later
            found["ours_twice"] = peak(twice, contender="ours", query=1).later
            found["kept"] = (twice.steps - c.steps) * kept(c, bits)
        return {"columns": columns, "steps": c.steps}


def kept(c: Configuration, bits: str) -> float:
    """MiB of the parameters that a step under the pattern updates."""
    model = make_problem(c, CPU).model
    return sum(model.get_parameter(n).nbytes for n in Pattern(bits).parameters(model)) / 2**20


def compared(each: Mapping[str, list[float]]) -> dict[str, Any]:
    """Spreads of the columns, and of how often faster ours was in each round."""
    ours = each["ours"]
    return {
        "columns": {name: spread(values) for name, values in each.items()},
        "ratios": {name: spread(ratio(values, ours)) for name, values in each.items() if name != "ours"},
        "rounds": len(ours),
    }


def parse(arguments: Sequence[str] | None, description: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    add, goals = parser.add_argument, list(training_report.GOALS)
    add("--configurations", type=names_of(list(CONFIGURATIONS)), default=goals, metavar="NAMES",
        help=f"Separated by commas, each with {STEPS} steps. Default: {','.join(goals)}")  # fmt: skip
    add("--kinds", type=names_of(KINDS), default=list(KINDS), metavar="NAMES",
        help=f"Kinds of rows, separated by commas, of {','.join(KINDS)}. Default: all")  # fmt: skip
    add("--seconds", type=float, default=10.0,
        help="Of a meta-gradient's row; others take a part. At least three rounds. Default: %(default)s")  # fmt: skip
    add("--rounds", type=int, default=200, help="Rounds of a row at most. Default: %(default)s")
    add("--threads", type=int, help="Threads of torch. Default: torch's own choice")
    add("--no-packages", action="store_true", help="Without higher and learn2learn.")
    add("--json", type=Path, metavar="FILE", help="Results, rewritten after each row.")
    add("--markdown", type=Path, metavar="FILE", help="The tables.")
    add("--tiny", action="store_true", help="Tiny shapes, to see that everything runs; nothing of it is a measurement.")
    return parser.parse_args(arguments)


def options_of(given: argparse.Namespace) -> Options:
    configurations = {name: CONFIGURATIONS[name]._replace(steps=STEPS) for name in given.configurations}
    places = PLACES
    if given.tiny:
        small = {"image_size": 16, "width": 4, "ways": 3, "shots": 2, "steps": 2}
        configurations = {name: c._replace(**small) for name, c in configurations.items()}
        places = {}
    return Options(configurations, given.kinds, given.seconds, given.rounds, not given.no_packages, places)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments, (__doc__ or "").partition("\n\n")[0])
    if given.threads:
        torch.set_num_threads(given.threads)
    start = time.perf_counter()
    document: dict[str, Any] = {
        "schema": 1, "what": "training", "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command("bench_training.py", given, parse([])), "tiny": given.tiny, "seconds": 0.0,
        "machine": machine(), "ceilings": floor.ceilings(0.01 if given.tiny else 0.5),
    }  # fmt: skip
    failed = fill_rows(Bench(options_of(given), document["ceilings"]["flops"]).rows(), document, given.json)
    document["seconds"] = round(time.perf_counter() - start, 1)
    if given.json:
        write(given.json, document)
    if given.markdown:
        write_text(given.markdown, training_report.markdown(document))
    show(document, training_report.tables(document), Console(width=None if sys.stdout.isatty() else 160))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
