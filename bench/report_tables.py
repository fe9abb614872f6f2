"""What the pages of results share: tables, the lines on the machine, and rows beside their goals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gpu_report import cell, digits, met, times

Row = Mapping[str, Any]


class Table(NamedTuple):
    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(document: Row, tables: Iterable[Table]) -> str:
    parts = [*machine(document), ""]
    for table in tables:
        lines = [f"| {' | '.join(cells)} |" for cells in (table.head, ["---"] * len(table.head), *table.rows)]
        parts += [f"### {table.title}", "", *([table.note, ""] if table.note else []), *lines, ""]
    return "\n".join(parts)


def machine(document: Row) -> Iterator[str]:
    m, c = document["machine"], document["ceilings"]
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    what = {"peers": "Adaptation", "training": "Training"}[document["what"]]
    yield f"## {what}: {m['processor']}, {document['started'][:10]}"
    yield ""
    if document["tiny"]:
        yield "**Tiny shapes: not a measurement.**"
        yield ""
    yield f"`{document['command']}` at commit {m['commit'] or 'unknown'}, {document['seconds']:.0f} s."
    where = f"{m['cores']} cores, {m['threads']} threads, instruction set {m['instruction_set']}"
    yield f"{where}; Python {m['python']}, {packages}."
    peak = f"peak {digits(c['flops'] / 1e9)} GFLOP/s, matrix product {digits(c['mm_flops'] / 1e9)} GFLOP/s"
    yield f"Measured: {peak}, copy {digits(c['copy_bytes_per_s'] / 1e9)} GB/s read and written." + (
        f" {c['remark']}." if c["remark"] else ""
    )


class Rows:
    """The rows of some results, for their tables."""

    def __init__(self, document: Row) -> None:
        self.rows: list[Row] = document["rows"]
        self.tiny: bool = document["tiny"]

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind and row["status"] == "passed"]

    def against(self, ratio: Mapping[str, float] | None, goal: float | None) -> str:
        if ratio is None:
            return "no figure"
        return times(ratio) + self.verdict(ratio["median"], goal)

    def verdict(self, value: float, goal: float | None, unit: str = "{:g}x") -> str:
        return "" if goal is None else f"; goal {unit.format(goal)}: {met(value, goal, self.tiny)}"

    def missing(self) -> Table:
        found = [[row["name"], row["status"], cell(row["reason"])] for row in self.rows if row["status"] != "passed"]
        return Table("Rows without figures", "", ["row", "", "reason"], found)


def named(row: Row) -> str:
    return f"{row['configuration']}: {row['network']}"
