"""The tables of bench_training.py's results: the part of docs/performance.md that leads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import report_tables
from gpu_report import ROOT, cell, digits, span
from report_tables import Row, Rows, Table, named

RESULTS = ROOT / "bench" / "results" / "training.json"
FULL, LAST = "11111", "00011"
# Of the issue: how often faster ours is, in the order of OVER.
OVER = ((FULL, True, "stock"), (LAST, True, "stock_full"), (LAST, True, "stock"), (FULL, False, "stock"))
GOALS = {
    "cifar": (3.2, 12.0, 5.0, 3.5),
    "cifar-1-shot": (3.5, 7.0, 5.0, 3.5),
    "omniglot": (3.0, 5.0, 3.5, 3.0),
    "mini-imagenet": (4.0, 7.0, 6.0, 4.0),
}
FORWARD_GOAL, TRAIN_GOAL, RANKS_GOAL = 3.0, 3.0, 1.7
FROZEN_GOALS = {"frozen-one": 3.0, "frozen": 4.0}
MEMORY_GOALS = {FULL: 3.0, LAST: 10.0}
NAMES = {
    "ours": "ours",
    "verbs": "ours by `LambdaMAML`'s verbs",
    "stock_full": "stock, all layers",
    "stock": "stock",
    "stock_prefix": "the same, prefix by hand",
    "higher": "higher",
    "learn2learn": "learn2learn",
}


def markdown(document: Row) -> str:
    return report_tables.markdown(document, tables(document))


def tables(document: Row) -> Iterator[Table]:
    """Those that have rows."""
    found = Found(document)
    cases = (found.case(bits, second) for bits, second in ((FULL, True), (LAST, True), (FULL, False)))
    others = (found.floors(), found.forward(), found.frozen(), found.train(), found.ranks(), found.graph())
    yield from (table for table in (found.goals(), *cases, *others, found.missing()) if table.rows)


def order(second: bool) -> str:
    return "second order" if second else "first order"


class Found(Rows):
    def cases(self, configuration: str) -> Mapping[tuple[str, bool], Row]:
        rows = [row for row in self.of("meta") if row["configuration"] == configuration]
        return {(row["pattern"], row["second_order"]): row for row in rows}

    def goals(self) -> Table:
        """The issue's table, adaptation in front."""
        found = []
        adapted = {row["configuration"]: row["ratios"]["stock"] for row in self.of("adapt")}
        for name, row in {row["configuration"]: row for row in self.of("meta")}.items():
            wanted, cases = GOALS.get(name, (None,) * len(OVER)), self.cases(name)
            said = []
            for (bits, second, beside), goal in zip(OVER, wanted, strict=True):
                ratios = cases[bits, second]["ratios"] if (bits, second) in cases else {}
                said.append(self.against(ratios.get(beside), goal))
            found.append([named(row), self.against(adapted.get(name), None), *said])
        head = ["network", f"adaptation, `{FULL}` over stock"]
        head += [
            f"{order(second)} `{bits}` over stock"
            + (f" `{FULL if beside == 'stock_full' else bits}`" if second else "")
            for bits, second, beside in OVER
        ]
        note = "A meta-gradient of 4 tasks with 15 query images per class, beside an adaptation of one task."
        return Table("Training beside adaptation: how often faster, and the goals", note, head, found)

    def case(self, bits: str, second: bool) -> Table:
        rows = [row for row in self.of("meta") if (row["pattern"], row["second_order"]) == (bits, second)]
        names = [name for name in NAMES if any(name in row["columns"] for row in rows)]
        found = []
        for row in rows:
            said = []
            for name in names:
                column = row["columns"].get(name, {"skipped": ""})
                if "skipped" in column:
                    said.append(cell(column["skipped"]))
                elif name == "ours":
                    said.append(f"{span(column)} ms")
                else:
                    said.append(f"{digits(column['median'])} ms, {self.against(row['ratios'][name], None)}")
            found.append([named(row), *said])
        note = "How often faster ours is stands behind the time."
        return Table(f"Meta-gradient, {order(second)} `{bits}`", note, ["network", *(NAMES[n] for n in names)], found)

    def floors(self) -> Table:
        found = []
        for row in self.of("meta"):
            floor = row["floor_ms"]
            shares = [f"{floor / row['columns'][n]['median']:.0%}" for n in ("ours", "verbs", "stock")]
            what = f"{order(row['second_order'])} `{row['pattern']}`"
            found.append([named(row), what, f"{row['flops'] / 1e9:.3g}", digits(floor), *shares])
        head = ["network", "meta-gradient", "GFLOP", "floor, ms", "floor over ours", "over the verbs", "over stock"]
        return Table("Share of a meta-gradient's floor", "", head, found)

    def forward(self) -> Table:
        found = [
            [named(row), *(span(row["columns"][n]) for n in ("ours", "stock")),
             self.against(row["ratios"]["stock"], FORWARD_GOAL)]
            for row in self.of("forward")
        ]  # fmt: skip
        note = (
            "The logits of one task's query images, 15 per class, by adapted weights, without gradient; milliseconds."
        )
        return Table("The query pass alone", note, ["network", "ours", "stock", "ours is faster by"], found)

    def frozen(self) -> Table:
        found = [
            [named(row), str(row["query"]), *(span(row["columns"][n]) for n in ("ours", "folded", "stock")),
             *(self.against(row["ratios"][n], goal) for n in ("stock", "stock over folded"))]
            for kind, goal in FROZEN_GOALS.items() for row in self.of(kind)
        ]  # fmt: skip
        note = (
            "Logits by norms with the support set's statistics, without gradient; milliseconds. Stock is the network "
            "in torch's modules with the same statistics."
        )
        head = ["network", "images", "learner", "folded", "stock", "the learner is faster by", "folded is faster by"]
        return Table("Classification with frozen norms", note, head, found)

    def train(self) -> Table:
        found = []
        for row in self.of("train"):
            for name, column in row["columns"].items():
                who = "the trainer" if name == "ours" else NAMES[name]
                if "skipped" in column:
                    found.append([named(row), who, cell(column["skipped"]), ""])
                else:
                    said = "" if name == "ours" else self.against(row["ratios"][name], TRAIN_GOAL)
                    found.append([named(row), who, span(per_second(column)), said])
        note = "Second order, all layers; tasks per second, their sampling and Adam's step in it."
        return Table("The trainer", note, ["network", "loop", "tasks per second", "ours is faster by"], found)

    def ranks(self) -> Table:
        found = [
            [named(row), *(span(per_second(row["columns"][n])) for n in ("ours", "one")),
             self.against(row["ratios"]["one"], RANKS_GOAL)]
            for row in self.of("ranks")
        ]  # fmt: skip
        note = "The trainer with a thread per rank; tasks per second. While one rank trains alone the other one sleeps."
        return Table("Two ranks", note, ["network", "two ranks", "one rank", "two are faster by"], found)

    def graph(self) -> Table:
        found = []
        for row in self.of("graph"):
            for bits, mib in row["columns"].items():
                said = [
                    f"{digits(mib[f'ours{of}'])}, {digits(mib[f'stock{of}'])}: "
                    f"{digits(mib[f'stock{of}'] / mib[f'ours{of}'])}x"
                    + self.verdict(mib[f"stock{of}"] / mib[f"ours{of}"], MEMORY_GOALS[bits])
                    for of in ("", "_steps")
                ]
                said.append(f"{digits(mib['ours_first'])}, {digits(mib['stock_first'])}")
                grown = f"{mib['ours_twice'] - mib['ours_steps']:.2f}"
                found.append([named(row), f"`{bits}`", *said, grown, f"{mib['kept']:.2f}"])
        head = [
            "network", "pattern", "15 query images per class: ours, stock", "1 query image per class: ours, stock",
            "first call with 15", "more with twice the steps", "parameters of these steps",
        ]  # fmt: skip
        note = (
            "MiB at the peak of one task's meta-gradient of second order, above parameters and inputs. The first "
            "call for its shapes also runs the network itself, against which the chain is checked."
        )
        return Table("Memory of a meta-gradient", note, head, found)


def per_second(milliseconds: Mapping[str, float]) -> dict[str, float]:
    """A rate from the spread of times; the quartiles change places."""
    times = {"median": "median", "q1": "q3", "q3": "q1"}
    return {name: 1e3 / milliseconds[time] for name, time in times.items()}
