"""Cells and tables of a report, and how its scores are told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

__all__ = ["Scale", "number", "scale_of", "table"]


class Scale(NamedTuple):
    """How a selection's scores are told: accuracies in percent, another metric as it is."""

    key: str
    name: str
    factor: float
    unit: str  # of a drop
    most: float  # that a score can be

    def text(self, value: float | None, ci95: float | None = None) -> str:
        if value is None:
            return ""
        form = "{:.2f}" if self.factor == 100 else "{:.4g}"
        told = form.format(self.factor * value)
        return told if ci95 is None else f"{told} ± {form.format(self.factor * ci95)}"


def scale_of(selection: Mapping[str, Any]) -> Scale:
    if "metric" in selection:
        return Scale("score", str(selection["metric"]), 1.0, "", math.inf)
    return Scale("accuracy", "accuracy, %", 100.0, "points", 100.0)


def number(value: Any) -> tuple[str, str]:
    """A cell's text and what it is sorted by; empty for what is no number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return ("", "")
    return (f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}", str(value))


def table(
    label: str, caption: str, head: Sequence[tuple[str, str]], rows: Sequence[Sequence[tuple[str, str]]],
    chosen: Sequence[int] = (), sorts: bool = True,
) -> str:  # fmt: skip
    """Cells are HTML, and what they are sorted by; `head` has each column's title and kind."""
    lines = [f'<div class="scrolls" role="region" tabindex="0" aria-label="{escape(label)}">']
    lines.append(
        f"<table{' class=sorts' if sorts else ''}><caption><span>{escape(caption)}</span></caption><thead><tr>"
    )
    words = [" class=words" if kind == "text" else "" for _, kind in head]
    lines += [f'<th scope="col" data-kind="{k}"{w}>{escape(title)}</th>' for (title, k), w in zip(head, words)]
    lines.append("</tr></thead><tbody>")
    for index, row in enumerate(rows):
        lines.append(f"<tr{' class=chosen' if index in chosen else ''}>")
        for (cell, value), left in zip(row, words, strict=True):
            lines.append(f'<td data-v="{escape(value)}"{left}>{cell}</td>')
        lines.append("</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])
