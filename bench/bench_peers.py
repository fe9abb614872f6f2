"""Our adaptation on the CPU beside stock PyTorch, what one could write by hand, and the packages that do the same.

All columns of a row alternate in one process; a ratio is taken inside each round. Nothing of a configuration is timed
before everybody's result was compared with the plain loop's in float64 and in float32. Whoever is not installed, or
breaks, is a column that says so; whoever gives another result stops the configuration, and the exit status is 1.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import floor
import memory
import peers_report
import torch
from by_hand import LR, NORM, Compiled, LogitsGate, Stock, Tasks, Vmapped, convolutional, residual
from gpu_report import write as write_text
from harness import (
    Build,
    Column,
    Configuration,
    Gate,
    Problem,
    Row,
    Skip,
    Wrong,
    check_adapt,
    each_round,
    fill_rows,
    make_problem,
    reason,
    spread,
    write,
)
from peers import BY_HAND, FULL, LAST, PACKAGES, Contender, Make, Ours, StockFull, versions
from peers_options import MANY, QUERY, RESIDUAL_PATTERN, Options, command, options_of, parse
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lambda_kernels import info
from lambda_maml import Pattern, adapt, adapt_tasks

CPU = torch.device("cpu")


class Ready(NamedTuple):
    """A configuration behind its gate: who can be timed by pattern and name, and why others cannot."""

    problem: Problem
    made: dict[str, dict[str, Contender]]
    skipped: dict[str, dict[str, str]]


class Bench:
    def __init__(self, options: Options, flops: float) -> None:
        self.options, self.flops = options, flops
        self.compiling = 0.0  # seconds
        self.latest: tuple[str, Ready | Exception] | None = None

    def rows(self) -> Iterator[Row]:
        o = self.options

        def of(kind: str, name: str, c: Configuration, pattern: str = "") -> dict[str, Any]:
            row = {"name": " ".join(filter(None, [kind, name, pattern])), "kind": kind, "configuration": name}
            return {**row, "network": str(c), **({"pattern": pattern} if pattern else {})}

        fills = {"adapt": self.adapt, "packages": self.packages, "query": self.query, "growth": self.growth,
                 "memory": self.memory}  # fmt: skip
        for name, c in o.configurations.items():
            for kind in o.kinds:
                if name not in o.places.get(kind, [name]):
                    continue
                if kind in fills:
                    yield of(kind, name, c), functools.partial(fills[kind], name, c)
                elif kind == "tasks":
                    for pattern in (LAST, FULL):
                        yield of(kind, name, c, pattern), functools.partial(self.tasks, name, c, pattern)
        if "general" in o.kinds:
            for name, c in o.residual.items():
                network = {"network": f"residual, {c}"}
                fill = functools.partial(self.general, c, residual, RESIDUAL_PATTERN, 0.25)
                yield {**of("general", name, c, RESIDUAL_PATTERN), **network}, fill
        if "odd" in o.kinds:
            for name, c in o.odd.items():
                pattern = "0" * (min(4, c.image_size.bit_length() - 1) - 1) + "11"
                yield of("odd", name, c, pattern), functools.partial(self.general, c, convolutional, pattern, 0.05)

    def ready(self, name: str, c: Configuration) -> Ready:
        """The configuration once its gate is passed; the gate's error for all of its rows otherwise."""
        if self.latest is None or self.latest[0] != name:
            self.latest = None  # frees the one before
            torch._dynamo.reset()  # it gives up on a function after some networks
            try:
                self.latest = name, self.gate(c)
            except Exception as error:  # raised below, for this row and for those to come
                self.latest = name, error
        found = self.latest[1]
        if isinstance(found, Exception):
            raise found
        return found

    def gate(self, c: Configuration) -> Ready:
        problem = make_problem(c, CPU)
        ready = Ready(problem, {}, {})
        for bits, by_hand in BY_HAND.items():
            gate = Gate(problem, Pattern(bits), c.steps, LR, NORM)
            made, skipped = ready.made.setdefault(bits, {}), ready.skipped.setdefault(bits, {})
            for name, make in {**by_hand, **(self.makers(bits) if "packages" in self.options.kinds else {})}.items():
                start = time.perf_counter()
                try:
                    made[name] = passed(gate, name, make, problem, c.steps)
                except Exception as error:  # what others' code cannot do is a note
                    if name == "ours" or isinstance(error, Wrong):
                        raise
                    skipped[name] = reason(error)
                if name == "compile":
                    self.compiling += time.perf_counter() - start
        return ready

    def makers(self, bits: str) -> dict[str, Make]:
        """The packages, torch.compile within its time."""
        o = self.options

        def compiled(problem: Problem, pattern: Pattern, steps: int) -> Contender:
            if bits == FULL and not o.compile_full:
                raise Skip("left out, as it compiles for a minute: --compile-full")
            if self.compiling > o.compile_seconds:
                raise Skip(f"compilation took {self.compiling:.0f} s by then: --compile-seconds")
            return Compiled(problem, pattern, steps, backend=o.compile_backend)

        return {**PACKAGES, "compile": compiled}

    def time(self, columns: Mapping[str, Column], share: float = 1.0) -> dict[str, list[float]]:
        """Milliseconds of every column in each round; `share` of a row's seconds."""
        o = self.options
        return each_round(columns, seconds=share * o.seconds, rounds=o.rounds, warmup=1)

    def compared(self, ready: Ready, names: Mapping[str, Iterable[str]]) -> dict[str, Any]:
        """A row of some contenders by pattern; ratios are over ours of the same pattern."""
        columns = {
            f"{bits} {name}": Column(made.__call__, reset=made.reset)
            for bits, wanted in names.items()
            for name in wanted
            if (made := ready.made[bits].get(name)) is not None
        }
        each = self.time(columns)
        row: dict[str, Any] = {"columns": {}, "ratios": {}, "rounds": len(each[f"{FULL} ours"])}
        for bits, wanted in names.items():
            taken = {name: each[f"{bits} {name}"] for name in wanted if f"{bits} {name}" in each}
            missing = {name: {"skipped": ready.skipped[bits][name]} for name in wanted if name not in taken}
            row["columns"][bits] = {**{name: spread(values) for name, values in taken.items()}, **missing}
            others = {**taken, "stock_full": each[f"{FULL} stock_full"]}
            row["ratios"][bits] = {n: spread(ratio(v, taken["ours"])) for n, v in others.items() if n != "ours"}
        return row

    def adapt(self, name: str, c: Configuration) -> dict[str, Any]:
        """Support tensors to adapted parameters, beside what can be written by hand."""
        ready = self.ready(name, c)
        shape = tuple(ready.problem.xs.shape)
        counts = {bits: floor.operations(ready.problem.model, shape, Pattern(bits), c.steps) for bits in BY_HAND}
        floors = {bits: 1e3 * count / self.flops for bits, count in counts.items()}
        return {**self.compared(ready, BY_HAND), "flops": counts, "floor_ms": floors}

    def packages(self, name: str, c: Configuration) -> dict[str, Any]:
        beside = ("ours", "stock_full", "stock_prefix")
        names = {bits: [*(n for n in by_hand if n in beside), *PACKAGES] for bits, by_hand in BY_HAND.items()}
        return self.compared(self.ready(name, c), names)

    @torch.no_grad()
    def query(self, name: str, c: Configuration) -> dict[str, Any]:
        """Adaptation, and the logits of the query images."""
        problem = self.ready(name, c).problem
        xq = some_images(c, 1, QUERY * c.ways)[0]
        stock = StockFull(problem, Pattern(FULL), c.steps)

        def stock_end_to_end() -> None:
            stock()
            stock.network(xq)

        columns = {bits: Column(functools.partial(end_to_end, problem, xq, bits, c.steps)) for bits in BY_HAND}
        each = self.time({**columns, "stock_full": Column(stock_end_to_end, reset=stock.reset)}, 0.25)
        beside = spread(each["stock_full"])
        return {
            "columns": {bits: {"ours": spread(each[bits]), "stock_full": beside} for bits in BY_HAND},
            "ratios": {bits: {"stock_full": spread(ratio(each["stock_full"], each[bits]))} for bits in BY_HAND},
            "query": len(xq),
            "rounds": len(each["stock_full"]),
        }

    def growth(self, name: str, c: Configuration) -> dict[str, Any]:
        """What one more step costs."""
        problem, few, many = self.ready(name, c).problem, 5, 25
        stock = StockFull(problem, Pattern(FULL), few)
        columns = {str(k): Column(Ours(problem, Pattern(LAST), k)) for k in (few, many)}
        each = self.time({**columns, "stock": Column(stock, reset=stock.reset)}, 0.5)
        steps = {
            "ours_step": [(b - a) / (many - few) for a, b in zip(each[str(few)], each[str(many)])],
            "stock_full_step": [t / few for t in each["stock"]],
        }
        return {
            "columns": {column: spread(values) for column, values in steps.items()},
            "ratios": {"stock_full_step": spread(ratio(steps["stock_full_step"], steps["ours_step"]))},
            "rounds": len(each["stock"]),
        }

    @torch.no_grad()
    def tasks(self, name: str, c: Configuration, bits: str) -> dict[str, Any]:
        """Query logits of many tasks: all in one call, one call of `adapt` each, and by vmap."""
        problem, pattern = self.ready(name, c).problem, Pattern(bits)
        xs, xq = some_images(c, MANY, c.ways * c.shots), some_images(c, MANY, 1)
        every = Tasks(problem.model, xs, problem.ys.repeat(MANY, 1), xq)
        gate = LogitsGate(every, pattern, c.steps)

        def together(count: int) -> Tensor:
            model, *rest = every
            return adapt_tasks(model, *(t[:count] for t in rest), pattern=pattern, steps=c.steps, lr=LR, norm=NORM)

        def one_by_one() -> Tensor:
            return torch.stack([end_to_end(every.problem(t), xq[t], bits, c.steps) for t in range(MANY)])

        gate("adapt_tasks", together(MANY))
        gate("adapt", one_by_one())
        columns = {f"tasks_{n}": Column(functools.partial(together, n), n) for n in (MANY // 4, MANY // 2, MANY)}
        columns["calls"] = Column(one_by_one, MANY)
        skipped = {}
        try:
            vmapped = Vmapped(every, pattern, c.steps)
            found = vmapped()
        except Exception as error:  # as in `gate`
            skipped["vmap"] = {"skipped": reason(error)}
        else:
            gate("vmap", found)
            columns["vmap"] = Column(vmapped, MANY)
        each = self.time(columns, 0.25)
        ours = each[f"tasks_{MANY}"]
        return {
            "columns": {**{column: spread(values) for column, values in each.items()}, **skipped},
            "ratios": {column: spread(ratio(values, ours)) for column, values in each.items()},
            "rounds": len(ours),
        }

    def memory(self, name: str, c: Configuration) -> dict[str, Any]:
        """Peaks in MiB."""
        self.ready(name, c)
        wanted = {FULL: ("ours", "stock_full"), LAST: ("ours", "stock_masked", "stock_prefix")}
        threads = torch.get_num_threads()
        return {
            "columns": {
                bits: {contender: memory.peak(c, bits, contender, threads).first for contender in contenders}
                for bits, contenders in wanted.items()
            }
        }

    def general(self, c: Configuration, build: Build, bits: str, share: float) -> dict[str, Any]:
        """Another network, the early layers frozen; `share` of a row's seconds."""
        problem, pattern = make_problem(c, CPU, build), Pattern(bits)
        makers: dict[str, Make] = {
            "ours": Ours,
            "stock_masked": functools.partial(Stock, prefix=False),
            "stock_prefix": functools.partial(Stock, prefix=True),
        }
        gate = Gate(problem, pattern, c.steps, LR, NORM)
        for name, make in makers.items():
            gate(lambda given, make=make: make(given, pattern, c.steps).result(), name)  # type: ignore[misc]
        made = {name: make(problem, pattern, c.steps) for name, make in makers.items()}
        full = Pattern.full(pattern.layers)
        check_adapt(problem, full, c.steps, LR, NORM)
        made["stock_full"] = StockFull(problem, full, c.steps)
        each = self.time({name: Column(one.__call__, reset=one.reset) for name, one in made.items()}, share)
        return {
            "columns": {name: spread(values) for name, values in each.items()},
            "ratios": {name: spread(ratio(each[name], each["ours"])) for name in each if name != "ours"},
            "rounds": len(each["ours"]),
        }


def passed(gate: Gate, name: str, make: Make, problem: Problem, steps: int) -> Contender:
    """The contender for the problem, once its results are right."""
    made: dict[int, Contender] = {}

    def adapted(given: Problem) -> list[Tensor]:
        contender = made[id(given)] = make(given, gate.pattern, steps)
        return contender.result()

    gate(adapted, name)
    return made[id(problem)]


def end_to_end(problem: Problem, xq: Tensor, bits: str, steps: int) -> Tensor:
    """Our query logits."""
    logits: Tensor = adapt(*problem, pattern=bits, steps=steps, lr=LR, norm=NORM)(xq)
    return logits


def some_images(c: Configuration, tasks: int, images: int) -> Tensor:
    """[tasks, images, C, H, W], random pixels."""
    generator = torch.Generator().manual_seed(images)
    return torch.randn(tasks, images, c.in_channels, c.image_size, c.image_size, generator=generator)


def ratio(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    return [s / f for s, f in zip(slower, faster, strict=True)]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    found = info.collect()
    cpu, own = found["cpu"], {name: found["versions"][name] for name in ("torch", "numpy")}
    return {
        "processor": cpu["model"], "cores": cpu["usable_cores"], "instruction_set": cpu["instruction_set"],
        "threads": torch.get_num_threads(), "python": found["versions"]["python"], "packages": {**own, **versions()},
        "commit": found["commit"], "backend": info.environment()["backend"],
    }  # fmt: skip


def show(document: Mapping[str, Any], tables: Iterable[peers_report.Table], console: Console) -> None:
    for line in peers_report.machine(document):
        console.print(line, markup=False)
    for table in tables:
        shown = Table(*(title.replace("`", "") for title in table.head), title=table.title, caption=table.note)
        for cells in table.rows:
            shown.add_row(*(escape(text.replace("`", "")) for text in cells))
        console.print(shown)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments, (__doc__ or "").partition("\n\n")[0])
    if given.threads:
        torch.set_num_threads(given.threads)
    start = time.perf_counter()
    document: dict[str, Any] = {
        "schema": 1, "what": "peers", "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command("bench_peers.py", given, parse([])), "tiny": given.tiny, "seconds": 0.0,
        "machine": machine(), "ceilings": floor.ceilings(0.01 if given.tiny else 0.5),
    }  # fmt: skip
    bench = Bench(options_of(given), document["ceilings"]["flops"])
    failed = fill_rows(bench.rows(), document, given.json)
    document["seconds"] = round(time.perf_counter() - start, 1)
    if given.json:
        write(given.json, document)
    if given.markdown:
        write_text(given.markdown, peers_report.markdown(document))
    if given.plot:
        peers_report.plot(document, given.plot)
    show(document, peers_report.tables(document), Console(width=None if sys.stdout.isatty() else 160))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
