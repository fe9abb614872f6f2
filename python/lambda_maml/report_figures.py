"""A report's figures as inline SVG: marks differ in form and colour, and the page's style gives the colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Line", "Mark", "Point", "chart", "icon", "scatter"]

# In units of a phone's pixels, so that letters are readable there.
WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, BOTTOM = 46, 12, 44
SPACE = 18  # between the heights of labels
WIDEST = 6.6  # of a letter


class Mark(NamedTuple):
    """A kind of point: its form, the class that gives its colour, and what the legend says."""

    form: str
    style: str
    text: str


class Point(NamedTuple):
    """x and y with what lies around them; `label` stands above the figure, with a line down to the point."""

    x: float
    y: float
    mark: Mark
    text: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    label: str = ""


class Line(NamedTuple):
    """Points that a line joins; `band` are the lower and upper ends of their intervals."""

    mark: Mark
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    dashed: bool = False


def icon(mark: Mark) -> str:
    """The mark for a legend."""
    drawn = _form(mark, 10, 8) if mark.form != "line" else f'<path class="{mark.style} line" d="M1 8H19"/>'
    return f'<svg class="icon" viewBox="0 0 20 16" width="20" height="16" aria-hidden="true">{drawn}</svg>'


def _form(mark: Mark, x: float, y: float) -> str:
    """One mark at a place."""
    shape, style = mark.form, mark.style
    if shape == "circle":
        return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    if shape == "square":
        return f'<rect class="{style}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if shape == "cross":
        return f'<path class="{style} line" d="M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"/>'
    if shape == "triangle":
        return f'<path class="{style}" d="M{x - 4:.1f} {y - 3:.1f}h8l-4 7z"/>'
    if shape == "diamond":
        return f'<path class="{style}" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>'
    corners = (
        (x + r * math.sin(turn), y - r * math.cos(turn))
        for turn, r in ((k * math.pi / 5, 8.0 if k % 2 == 0 else 3.4) for k in range(10))
    )
    return f'<path class="{style}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in corners)}z"/>'


class _Axis(NamedTuple):
    """From values to places, and the ticks."""

    at: Callable[[float], float]
    ticks: list[float]


def _linear(low: float, high: float, start: float, end: float, most: int = 6) -> _Axis:
    span = high - low or abs(high) or 1.0
    raw = span / most
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first = math.ceil(low / step - 1e-9)
    ticks = [k * step for k in range(first, first + most + 3) if k * step <= high + 1e-9 * span]
    return _Axis(lambda value: start + (value - low) / span * (end - start), ticks)


def _log(low: float, high: float, start: float, end: float) -> _Axis:
    bottom, top = math.log10(low), math.log10(high)
    powers = range(math.floor(bottom), math.ceil(top) + 1)
    steps = (1, 2, 5) if top - bottom < 2.5 else (1,)
    ticks = [m * 10.0**k for k in powers for m in steps if low <= m * 10.0**k <= high]
    return _Axis(lambda value: start + (math.log10(value) - bottom) / (top - bottom) * (end - start), ticks)


def scatter(
    points: Sequence[Point], front: Sequence[tuple[float, float]], below: Sequence[Point], *, title: str, text: str,
    x_title: str, y_title: str, most: float = math.inf,
) -> str:  # fmt: skip
    """Points over a logarithmic x axis, with intervals both ways, and a staircase through `front`; points of `below`
    stand at the lower edge, whatever their y. `most` is the greatest y that can be."""
    labels = sorted((point for point in points if point.label), key=lambda point: point.x)
    top = 14 + SPACE * min(3, len(labels))
    times = [x for point in (*points, *below) for x in (point.x, *(point.x_range or ()))]
    x = _log(min(times) / 1.5, max(times) * 1.5, LEFT, WIDTH - RIGHT)
    values = [y for point in points for y in (point.y, *(point.y_range or ()))]
    span = max(values) - min(values) or 1.0
    low, high = min(values) - (0.14 if below else 0.06) * span, min(max(values) + 0.06 * span, most)
    y = _linear(low, high, HEIGHT - BOTTOM, top)
    drawn = [*_axes(x, y, top, x_title, y_title)]
    stairs = [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in front]
    if stairs:
        rest = [f"H{place.split()[0]}V{place.split()[1]}" for place in stairs[1:]]
        drawn.append(f'<path class="green line" d="M{stairs[0]}{"".join(rest)}"/>')
    for index, point in enumerate(labels):
        height = top - 8 - SPACE * (index % min(3, len(labels)))
        half = WIDEST * len(point.label) / 2
        place = min(max(x.at(point.x), 2 + half), WIDTH - 2 - half)
        drawn.append(
            f'<path class="lead line" d="M{place:.1f} {height + 3:.1f}L{x.at(point.x):.1f} {y.at(point.y):.1f}"/>'
        )
        drawn.append(f'<text x="{place:.1f}" y="{height:.1f}" text-anchor="middle">{escape(point.label)}</text>')
    drawn += [_interval(point, x, y) for point in points]
    drawn += [f"<g>{_form(p.mark, x.at(p.x), y.at(p.y))}<title>{escape(p.text)}</title></g>" for p in points]
    edge = HEIGHT - BOTTOM - 7
    drawn += [f"<g>{_form(p.mark, x.at(p.x), edge)}<title>{escape(p.text)}</title></g>" for p in below]
    return _figure(drawn, title, text)


def _interval(point: Point, x: _Axis, y: _Axis) -> str:
    """The lines of a point's intervals."""
    a, b = x.at(point.x), y.at(point.y)
    parts = []
    if point.y_range is not None:
        parts.append(f"M{a:.1f} {y.at(point.y_range[0]):.1f}V{y.at(point.y_range[1]):.1f}")
    if point.x_range is not None:
        parts.append(f"M{x.at(point.x_range[0]):.1f} {b:.1f}H{x.at(point.x_range[1]):.1f}")
    return f'<path class="{point.mark.style} line bar" d="{"".join(parts)}"/>' if parts else ""


def chart(
    lines: Sequence[Line], *, title: str, text: str, x_title: str, y_title: str, marks: bool = False,
    ticks: Sequence[float] = (), most: float = math.inf,
) -> str:  # fmt: skip
    """Lines over a linear x axis, with their bands; with `marks` also their points."""
    xs = [a for line in lines for a, _ in line.points]
    ys = [b for line in lines for _, b in line.points] + [b for line in lines for pair in line.band for b in pair]
    margin = 0.06 * (max(ys) - min(ys) or 1.0)
    x = _linear(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT, 5)
    x = x._replace(ticks=list(ticks)) if ticks else x
    y = _linear(min(ys) - margin, min(max(ys) + margin, most), HEIGHT - BOTTOM, 14)
    drawn = [*_axes(x, y, 14, x_title, y_title)]
    for line in lines:
        if line.band:
            upper = [f"{x.at(a):.1f} {y.at(ends[1]):.1f}" for (a, _), ends in zip(line.points, line.band)]
            lower = [f"{x.at(a):.1f} {y.at(ends[0]):.1f}" for (a, _), ends in zip(line.points, line.band)]
            drawn.append(f'<path class="{line.mark.style} band" d="M{"L".join([*upper, *reversed(lower)])}z"/>')
    for line in lines:
        places = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in line.points)
        drawn.append(f'<path class="{line.mark.style} line{" dashed" if line.dashed else ""}" d="M{places}"/>')
        drawn += [_form(line.mark, x.at(a), y.at(b)) for a, b in line.points] if marks else []
    return _figure(drawn, title, text)


def _axes(x: _Axis, y: _Axis, top: float, x_title: str, y_title: str) -> Iterator[str]:
    for value in x.ticks:
        yield f'<path class="grid" d="M{x.at(value):.1f} {top}V{HEIGHT - BOTTOM}"/>'
        yield f'<text x="{x.at(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:.6g}</text>'
    for value in y.ticks:
        yield f'<path class="grid" d="M{LEFT} {y.at(value):.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{y.at(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    down = (top + HEIGHT - BOTTOM) / 2
    yield f'<text transform="translate(11 {down:.1f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'


def _figure(drawn: Sequence[str], title: str, text: str) -> str:
    head = f'<svg class="figure" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}. {text}")}">'
    return "\n".join([head, *drawn, "</svg>"])
