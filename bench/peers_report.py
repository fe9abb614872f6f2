"""docs/performance.md from the results of `make bench`: `python3 bench/peers_report.py [RESULTS.json]`. Training, which
leads it, has results of its own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report_tables
import training_report
from gpu_report import ROOT, cell, digits, span, times, write
from report_tables import Row, Rows, Table, machine, named

__all__ = ["Table", "machine", "markdown", "page", "plot", "read", "tables"]
FULL, LAST = "11111", "00011"
COLOURS = ("#0072b2", "#d55e00", "#56b4e9", "#e69f00")  # of Okabe and Ito, in the order of OVER
RESULTS, PAGE = ROOT / "bench" / "results" / "peers.json", ROOT / "docs" / "performance.md"
TRAINING = training_report.RESULTS
# Of the issue: how often faster ours is, in the order of OVER.
OVER = ((FULL, "stock_full"), (LAST, "stock_full"), (LAST, "stock_masked"), (LAST, "stock_prefix"))
GOALS = {
    "mini-imagenet-64": (4.0, 40.0, 20.0, 3.0),
    "mini-imagenet-5-shot": (4.0, 40.0, 20.0, 3.0),
    "mini-imagenet": (3.0, 20.0, 10.0, 2.5),
    "cifar": (3.0, 30.0, 15.0, 2.5),
    "cifar-1-shot": (3.0, 15.0, 8.0, 3.0),
    "omniglot": (2.5, 15.0, 8.0, 3.0),
}
FLOOR_GOAL = {"mini-imagenet-64": 0.6}  # of the full pattern's time
MEMORY_GOALS = {(FULL, "stock_full"): 2.0, (LAST, "stock_masked"): 3.0}
ODD = ("stock_masked", "stock_prefix", "stock_full")
GROWTH_GOAL, CALLS_GOAL, VMAP_GOAL, RESIDUAL_GOAL = 40.0, 1.3, 5.0, 1.3
NAMES = {
    "ours": "ours",
    "stock_full": "stock, all layers",
    "stock_masked": "stock, same mask",
    "stock_prefix": "the same, prefix by hand",
    "stock_channels_last": "stock, channels-last",
    "stock_prefix_channels_last": "prefix by hand, channels-last",
    "func": "`torch.func`",
    "compile": "`torch.compile`",
    "higher": "higher",
    "torchopt": "TorchOpt",
    "learn2learn": "learn2learn",
}
TITLES = {
    "adapt": "Adaptation time",
    "packages": "Beside torch.func, torch.compile and other packages",
    "query": "With the logits of 15 query images per class",
}
HEAD = """# Training and adaptation on a CPU

```sh
make bench
```

compares this project's meta-training and its adaptation with stock PyTorch, with what one could write by hand, and with
the packages that do the same, then times every pattern for `select --timings`. It writes `training.json`, `peers.json`,
tables and a picture to the folder of results, and this page (`bench/peers_report.py` writes it anew from these files;
each part says of which commit and day it is). The packages in `bench/requirements-peers.txt` are installed beside the
others where a package index can be reached; learn2learn is compared where `LEARN2LEARN_SRC` names a checkout of it. A
part of it alone: `.venv/bin/python bench/bench_training.py` and `bench/bench_peers.py` with the options that `--help`
lists; the floors alone: `.venv/bin/python bench/floor.py`.

"""
NONE = """## {}: no results in this checkout

There is no `{}`, and so no figures.

"""
PICTURE = """![How often faster ours adapts, and the goals](../bench/results/peers.svg)

"""
HOW = """
## How it is measured

- A meta-gradient runs from the images of 4 tasks to the `.grad` of all parameters: adaptation, the loss of 15 query
  images per class, and the way back. Ours takes all tasks in one call of `adapt_tasks`; the verbs, stock PyTorch
  (`torch.func.functional_call` and `torch.autograd.grad`) and the packages a task at a time, with a backward pass each.
  Under `00011` the packages have the frozen layers in front outside of MAML, as in learn2learn's example of ANIL.
- The trainer is one run of `lambda_maml.train`; between two of its iterations each of the others has one of its own,
  with the same tasks, Adam and meta-batch. It samples its next tasks ahead, which is then in the others' time.
- The floor of a meta-gradient counts the way back too: in second order nine passes of a layer a step, four of the
  network's first.
- Adaptation time runs from support tensors to adapted parameters, wall clock, the query forward not in it. All columns
  of a row alternate in one process, in shuffled order; a ratio is taken inside each round and given as its median with
  the quartiles.
- Before anything of a configuration is timed, all adapted parameters are compared with the plain loop's in float64 and
  in float32. Where one differs, the configuration has no times and the command fails.
- Stock parameters are put back off the clock; ours and the packages pay for their own copies. "Same mask": frozen
  parameters require no gradient. "Prefix by hand": the layers ahead of the first updated one run once. `torch.func` and
  `torch.compile` (inductor, compiled off the clock) have the prefix by hand too, the packages cannot.
- The packages run as in their own examples, in first order. TorchOpt: its functional optimiser, as `MetaSGD` always
  records the graph of second order.
- The floor is the count of floating-point operations of convolutions and linear layers that the pattern needs, the
  prefix once, over the processor's peak measured in the same process. Faster algorithms than the direct convolution can
  fall below it.
- Memory is the peak of the resident set above parameters and inputs in a process of its own, so that buffers beyond
  torch's allocator count.
- Networks have random weights, images are random pixels; float32, 5-way, inner rate 0.01, norms follow the pattern.

## Where the time went

[The house on one page](architecture.md) says how an adaptation runs on a CPU. What each part is for:

- The frozen prefix once, and each of its blocks in one pass without a convolution output: what is left of it is its
  convolutions.
- Winograd's F(2x2, 3x3) in float32 and float64, forward and both gradients: 16 products in place of 36. It is taken by
  the rule in `csrc/winograd.h`; with few channels ATen's direct convolution is faster and is called.
- The first block's statistics from the moments of its patches; the last block's steps in the space of its few pixels.
- No step allocates, and the second adaptation of a network is one call from Python: the prepared call is kept
  with the network.
- At 28x28 the scratch of Winograd's algorithm, which does not shrink with the images, is most of the memory in use.
"""


def page(document: Row | None, training: Row | None) -> str:
    """The whole of docs/performance.md."""
    trained = NONE.format("Training", "training.json") if training is None else training_report.markdown(training)
    adapted = NONE.format("Adaptation", "peers.json") if document is None else PICTURE + markdown(document)
    return HEAD + trained + ("\n" if training is not None else "") + adapted + HOW


def markdown(document: Row) -> str:
    return report_tables.markdown(document, tables(document))


def tables(document: Row) -> Iterator[Table]:
    """Those that have rows."""
    found = Found(document)
    several = (found.timed(kind, pattern) for kind in ("adapt", "packages", "query") for pattern in (FULL, LAST))
    others = (found.floors(), found.growth(), found.tasks(), found.memory(), found.residual(), found.odd())
    yield from (table for table in (found.goals(), *several, *others, found.missing()) if table.rows)


class Found(Rows):
    """The tables of some results."""

    def goals(self) -> Table:
        """The issue's table."""
        found = []
        for row in self.of("adapt"):
            wanted = GOALS.get(row["configuration"], (None,) * len(OVER))
            pairs = zip(OVER, wanted, strict=True)
            found.append([named(row), *(self.against(row["ratios"][p].get(name), goal) for (p, name), goal in pairs)])
        head = ["network", *(f"`{pattern}` over {NAMES[name]}" for pattern, name in OVER)]
        return Table("How often faster, and the goals", "", head, found)

    def timed(self, kind: str, pattern: str) -> Table:
        rows = self.of(kind)
        names = [name for name in NAMES if any(name in row["columns"][pattern] for row in rows)]
        found = []
        for row in rows:
            columns, ratios = row["columns"][pattern], row["ratios"][pattern]
            cells = [columns.get(name, {"skipped": ""}) for name in names]
            said = [
                cell(column["skipped"]) if "skipped" in column
                else f"{digits(column['median'])} ms, {times(ratios[name])}" if name in ratios
                else f"{span(column)} ms"
                for name, column in zip(names, cells)
            ]  # fmt: skip
            found.append([named(row), *said])
        note = "How often faster ours is stands behind the time."
        return Table(f"{TITLES[kind]}, `{pattern}`", note, ["network", *(NAMES[name] for name in names)], found)

    def floors(self) -> Table:
        found = []
        for row in self.of("adapt"):
            for pattern, floor in row["floor_ms"].items():
                columns = row["columns"][pattern]
                shares = {name: floor / columns[name]["median"] for name in ("ours", "stock_full") if name in columns}
                goal = FLOOR_GOAL.get(row["configuration"]) if pattern == FULL else None
                said = f"{shares['ours']:.0%}{self.verdict(shares['ours'], goal, '{:.0%}')}"
                stock = f"{shares['stock_full']:.0%}" if "stock_full" in shares else ""
                count = f"{row['flops'][pattern] / 1e9:.3g}"
                found.append([named(row), f"`{pattern}`", count, digits(floor), said, stock])
        head = ["network", "pattern", "GFLOP", "floor, ms", "floor over ours", "floor over stock"]
        return Table("Share of the floor", "", head, found)

    def growth(self) -> Table:
        found = [
            [named(row), *(span(row["columns"][name]) for name in ("ours_step", "stock_full_step")),
             self.against(row["ratios"]["stock_full_step"], GROWTH_GOAL)]
            for row in self.of("growth")
        ]  # fmt: skip
        note = "Milliseconds. Ours: (time of 25 steps - time of 5) / 20. Stock: a fifth of 5 steps of all layers."
        return Table("One more step of `00011`", note, ["network", "ours", "stock, all layers", "ratio"], found)

    def tasks(self) -> Table:
        found = []
        for row in self.of("tasks"):
            columns, ratios = row["columns"], row["ratios"]
            vmap = columns["vmap"].get("skipped") or self.against(ratios["vmap"], VMAP_GOAL)
            found.append([
                named(row), f"`{row['pattern']}`", *(span(columns[f"tasks_{n}"]) for n in (4, 8, 16)),
                self.against(ratios["calls"], CALLS_GOAL), cell(vmap),
            ])  # fmt: skip
        note = "`adapt_tasks` to the logits of one query image per task; milliseconds per task."
        head = ["network", "pattern", "4 tasks", "8 tasks", "16 tasks", "16 over 16 calls of `adapt`", "16 over `vmap`"]
        return Table("Many tasks", note, head, found)

    def memory(self) -> Table:
        found = []
        for row in self.of("memory"):
            for pattern, columns in row["columns"].items():
                ours = columns["ours"]
                for name, mib in columns.items():
                    if name != "ours":
                        said = f"{digits(mib / ours)}x{self.verdict(mib / ours, MEMORY_GOALS.get((pattern, name)))}"
                        found.append([named(row), f"`{pattern}`", digits(ours), NAMES[name], digits(mib), said])
        head = ["network", "pattern", "ours", "beside", "its", "ours is smaller by"]
        return Table("Peak memory", "MiB above parameters and inputs.", head, found)

    def residual(self) -> Table:
        found = []
        for row in self.of("general"):
            for name, ratio in row["ratios"].items():
                said = self.against(ratio, RESIDUAL_GOAL if name == "stock_prefix" else None)
                ours, its = (span(row["columns"][n]) for n in ("ours", name))
                found.append([named(row), f"`{row['pattern']}`", ours, NAMES[name], its, said])
        head = ["network", "pattern", "ours, ms", "beside", "its, ms", "ours is faster by"]
        return Table("A network with skip connections", "", head, found)

    def odd(self) -> Table:
        found = []
        for row in self.of("odd"):
            ratios = (self.against(row["ratios"][n], 1.0 if n == "stock_prefix" else None) for n in ODD)
            found.append([row["network"], f"`{row['pattern']}`", span(row["columns"]["ours"]), *ratios])
        head = ["network", "pattern", "ours, ms", *(f"faster than {NAMES[n]}" for n in ODD)]
        return Table("Odd sizes", "As conv4, with fewer blocks for the smallest images.", head, found)


def plot(document: Row, path: Path) -> None:
    """The issue's ratios as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    matplotlib.rcParams["svg.hashsalt"] = "peers"  # the same file for the same results
    rows = Found(document).of("adapt")
    figure, axes = pyplot.subplots(figsize=(5.4, 1.6 + 1.1 * len(rows)), layout="constrained")
    for turn, (pattern, name) in enumerate(OVER):
        places = [line + 0.2 * (turn - 1.5) for line in range(len(rows))]
        ratios = [row["ratios"][pattern][name] for row in rows]
        medians = [r["median"] for r in ratios]
        whiskers = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
        label = f"{pattern} over {NAMES[name]}"
        bars = axes.barh(places, medians, 0.18, xerr=whiskers, color=COLOURS[turn], ecolor="0.4", label=label)
        axes.bar_label(bars, [digits(m) for m in medians], padding=3, fontsize=9)
        for row, place in zip(rows, places):
            if row["configuration"] in GOALS:
                axes.plot(GOALS[row["configuration"]][turn], place, "|", color="black", markersize=12)
    axes.set_xscale("log")
    axes.set_xlim(1, 1.5 * max(r["q3"] for row in rows for of in row["ratios"].values() for r in of.values()))
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 30, 50, 100]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(rows)), [row["network"].replace(", ", ",\n") for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("how often faster ours adapts; |: goal")
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    temporary.replace(path)


def read(path: Path, what: str = "peers") -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("schema") != 1 or document.get("what") != what:
        raise SystemExit(f'{path.name}: not the results of bench_{what}.py (no "what": "{what}", "schema": 1)')
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("results", type=Path, nargs="?", default=RESULTS, help="Of bench_peers.py. Default: bench/results/peers.json")
    add("--training", type=Path, default=TRAINING,
        help="Of bench_training.py. Default: bench/results/training.json")  # fmt: skip
    add("--page", type=Path, default=PAGE, help="Where to write. Default: docs/performance.md")
    add("--markdown", type=Path, help="File for the tables alone.")
    add("--plot", type=Path, help="File for the picture, .svg or .png.")
    given = parser.parse_args()
    document = read(given.results) if given.results.exists() or given.results != RESULTS else None
    trained = given.training.exists() or given.training != TRAINING
    write(given.page, page(document, read(given.training, "training") if trained else None))
    if document is not None and given.markdown:
        write(given.markdown, markdown(document))
    if document is not None and given.plot:
        plot(document, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
