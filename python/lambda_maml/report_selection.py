"""A selection in a report: the answer in words, its figures, its tables, and what the bits mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .report import admissible, drop_of, limit_of, named, names, pareto, per_task, same, speedups
from .report_cells import number, scale_of, table
from .report_figures import Line, Mark, Point, chart, icon, scatter

__all__ = ["bits", "by_steps", "selection_parts", "task_of"]

Selection = Mapping[str, Any]
Row = Mapping[str, Any]
WITHIN = Mark("circle", "blue", "within the allowed drop")
BEYOND = Mark("cross", "grey", "costs too much")
CHOSEN = Mark("star", "vermilion", "chosen")
STOCK = Mark("square", "ink", "all layers in stock PyTorch")
BELOW = Mark("triangle", "grey", "far lower down")
FRONT = Mark("line", "green", "Pareto front")


def _quartiles(row: Row) -> tuple[float, float] | None:
    time = row.get("time")
    low, high = (time.get("low"), time.get("high")) if isinstance(time, dict) else (None, None)
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and 0 < low <= high:
        return float(low), float(high)
    return None


def task_of(selection: Selection) -> str:
    ways = "" if selection["ways"] is None else f"{selection['ways']}-way "
    return f"{selection['network']}, {ways}{selection['shots']}-shot, {selection['steps']} steps"


def _sentence(selection: Selection) -> str:
    """The answer in words."""
    ratio, test, scale = speedups(selection), selection["test"], scale_of(selection)
    full, stock = selection["full"]["pattern"], ratio["over_stock_full"]
    told = f"{named(selection['chosen'])} adapts {ratio['over_full']:.3g} times as fast as {full} in this package"
    told += f" and {stock:.3g} times as fast as {full} in stock PyTorch" if stock else ""
    if test["tasks"] and test["drop"] is not None:
        told += f". On {test['tasks']} test tasks it costs {scale.text(test['drop'], test['drop_ci95'])} {scale.unit}"
        alone = test.get("support")
        if alone is not None and alone["drop"] is not None:
            cost = scale.text(alone["drop"], alone["drop_ci95"])
            told += f"; with each image by itself, by the support set's statistics, {cost} {scale.unit}"
    return f"{told.strip()}."


def selection_parts(file: str, selection: Selection) -> Iterator[str]:
    yield f"<h3>{escape(task_of(selection))}</h3>\n<p>{escape(_sentence(selection))}</p>"
    if (rule := per_task(selection)) is not None:
        yield f"<p>{escape(rule)}</p>"
    yield _protocols(file, selection)
    yield _picture(selection)
    yield _candidates(file, selection)


def _protocols(file: str, selection: Selection) -> str:
    """The choice beside the full pattern: times, and scores on test tasks by both protocols."""
    scale, test = scale_of(selection), selection["test"]
    alone = test.get("support") or {}
    chosen, full = selection["chosen"], selection["full"]
    scores = {
        which: [of.get(f"{which}_{scale.key}") for of in (test, alone)] for which in ("full", "chosen")
    }  # fmt: skip
    known: tuple[tuple[str, Row, str, Row, Row], ...] = (
        (f"{full['pattern']}, stock PyTorch", selection["stock_full"], "full", {}, {}),
        (f"{full['pattern']}, ours", full, "full", {}, {}),
        (f"{named(chosen)}, chosen", chosen, "chosen", test, alone),
    )
    rows = []
    for title, row, which, together, by_itself in known:
        costs = [scale.text(of.get("drop"), of.get("drop_ci95")) for of in (together, by_itself)]
        cells = [scores[which][0], scores[which][1]]
        rows.append([
            (escape(title), title), number(row["time_ms"]), number(row.get("end_to_end_ms")),
            (scale.text(cells[0]), ""), (costs[0], ""), (scale.text(cells[1]), ""), (costs[1], ""),
        ])  # fmt: skip
    head = [
        ("layers", "text"), ("adapts in, ms", ""), ("with the query, ms", ""), (f"{scale.name}, together", ""),
        ("cost", ""), (f"{scale.name}, by itself", ""), ("cost", ""),
    ]  # fmt: skip
    caption = (
        f"{test['tasks']} test tasks. Together: query images are normalised by their own statistics; by itself: each "
        "by the support set's. Cost: mean of paired differences ± 95%."
    )
    return table(f"The choice of {file} beside all layers", caption, head, rows, chosen=(2,), sorts=False)


def _picture(selection: Selection) -> str:
    """Scores over time, with intervals both ways."""
    scale, known = scale_of(selection), names(selection)
    rows, full = selection["candidates"], selection["full"]
    key, factor = scale.key, scale.factor
    # Patterns that fail altogether would flatten the rest, as in report.plot.
    floor = -math.inf
    if "metric" not in selection:
        kept = [row[key] for row in rows if known.get(row["pattern"]) in ("MAML", "ANIL")]
        kept.append(selection["chosen"][key])
        floor = min([full[key] - 0.15, *kept]) - 1e-9

    def point(row: Row, mark: Mark, label: str = "") -> Point:
        half = row["ci95"] or 0.0
        score = f"{scale.name} {scale.text(row[key], row['ci95'])}"
        return Point(
            row["time_ms"], factor * row[key], mark, f"{named(row)}: {row['time_ms']:.3g} ms, {score}",
            _quartiles(row), (factor * (row[key] - half), factor * (row[key] + half)), label,
        )  # fmt: skip

    shown: list[Point] = []
    for row in sorted(rows, key=lambda row: same(row, selection["chosen"])):  # the chosen one on top
        if row[key] < floor:
            continue
        if same(row, selection["chosen"]):
            label = f"{known.get(row['pattern'], 'chosen')} {row['pattern']}"
            shown.append(point(row, CHOSEN, label))
        else:
            label = known.get(row["pattern"], "")
            is_labelled = label in ("MAML", "ANIL") and not isinstance(row.get("steps"), int)
            mark = WITHIN if admissible(selection, row) else BEYOND
            shown.append(point(row, mark, f"{label} {row['pattern']}" if is_labelled else ""))
    stock = selection["stock_full"]["time_ms"]
    if stock:
        timed = {"time_ms": stock, "time": selection["stock_full"].get("time")}
        shown.append(point({**full, **timed}, STOCK, f"stock {full['pattern']}"))
    below = [point(row, BELOW) for row in rows if row[key] < floor]
    stairs = [(row["time_ms"], factor * row[key]) for row in pareto(selection) if row[key] >= floor]
    marks = list(dict.fromkeys([*(p.mark for p in shown), FRONT, *(p.mark for p in below)]))
    legend = "".join(f"<li>{icon(mark)} {escape(mark.text)}</li>" for mark in marks)
    spread = "bars: 95% intervals of the score" + (
        ", quartiles of the time" if any(p.x_range for p in shown) else "; this file has no quartiles of times"
    )
    drawn = scatter(
        shown, stairs, below, title=f"{scale.name} over adaptation time", text=_sentence(selection),
        x_title="adaptation time, ms (log scale)", y_title=f"validation {scale.name}", most=scale.most,
    )  # fmt: skip
    return (
        f'<figure>{drawn}<ul class="legend">{legend}</ul><figcaption>Validation tasks; {spread}.</figcaption></figure>'
    )


def _candidates(file: str, selection: Selection) -> str:
    scale, known = scale_of(selection), names(selection)
    edge = pareto(selection)
    ordered = sorted(selection["candidates"], key=lambda row: row["time_ms"])
    counts = [row["tasks"] if isinstance(row.get("tasks"), int) else None for row in ordered]
    raced = len(set(counts)) > 1
    head = [("pattern", "text"), ("adapts in, ms", ""), ("quartiles, ms", ""), (f"{scale.name} ± 95%", "")]
    head += [("drop", ""), ("95% bound", ""), *[("tasks", "")] * raced, ("notes", "text")]
    rows = []
    for row, count in zip(ordered, counts):
        ends, score = _quartiles(row), scale.text(row[scale.key], row["ci95"])
        notes = [known[row["pattern"]]] if row["pattern"] in known else []
        notes += ["chosen"] if same(row, selection["chosen"]) else []
        notes += ["Pareto front"] if any(same(row, other) for other in edge) else []
        notes += [] if admissible(selection, row) else ["costs too much"]
        drops = [(scale.text(row[k]), "" if row[k] is None else str(row[k])) for k in ("drop", "drop_bound")]
        rows.append([
            (f"<code>{escape(named(row))}</code>", named(row)), number(row["time_ms"]),
            ("", "") if ends is None else (f"{ends[0]:.3g} to {ends[1]:.3g}", str(ends[1] - ends[0])),
            (score, str(row[scale.key])), *drops, *[number(count)] * raced,
            (escape(", ".join(notes)), ", ".join(notes)),
        ])  # fmt: skip
    chosen = [place for place, row in enumerate(ordered) if same(row, selection["chosen"])]
    limit = limit_of(selection, scale.factor, scale.unit)
    caption = f"{file}: all candidates on validation tasks. Allowed: {limit}. A title sorts."
    return table(f"Candidates of {file}", caption, head, rows, chosen)


def by_steps(selections: Sequence[Selection]) -> Iterator[str]:
    """The scores of well-known patterns and of the choice by the number of steps."""
    scale, first = scale_of(selections[0]), selections[0]
    found: dict[str, dict[int, Row]] = {}
    for selection in selections:
        if scale_of(selection) == scale and len(selection["full"]["pattern"]) == len(first["full"]["pattern"]):
            for row in selection["candidates"]:
                steps, of = row.get("steps", selection["steps"]), found.setdefault(row["pattern"], {})
                if isinstance(steps, int) and (steps not in of or drop_of(row) < drop_of(of[steps])):
                    of[steps] = row
    counts = sorted({steps for of in found.values() for steps in of})
    yield "<h3>By the number of steps</h3>"
    if len(counts) < 2:
        yield (
            '<p class="muted">All was evaluated with one number of steps. A selection of another one in the same '
            "folder (<code>lambda-maml select --steps 1 --out RUN/pattern-k1.json</code>) stands beside it here.</p>"
        )
        return
    known = {name: bits for bits, name in names(first).items() if name in ("MAML", "ANIL")}
    wanted = {"chosen": first["chosen"]["pattern"], **known}
    styles = {"chosen": ("star", "vermilion"), "MAML": ("circle", "blue"), "ANIL": ("diamond", "green")}
    lines = []
    for name, bits in wanted.items():
        rows = sorted(found[bits].items())
        points = [(float(steps), scale.factor * row[scale.key]) for steps, row in rows]
        halves = [scale.factor * (row["ci95"] or 0.0) for _, row in rows]
        band = [(y - half, y + half) for (_, y), half in zip(points, halves)]
        lines.append(Line(Mark(*styles[name], f"{name} {bits}"), points, band, dashed=name == "ANIL"))
    drawn = chart(
        lines, title=f"{scale.name} by the number of steps", text="; ".join(line.mark.text for line in lines),
        x_title="inner steps", y_title=f"validation {scale.name}", marks=True, ticks=list(map(float, counts)),
        most=scale.most,
    )  # fmt: skip
    legend = "".join(f"<li>{icon(line.mark)} {escape(line.mark.text)}</li>" for line in lines)
    yield (
        f'<figure>{drawn}<ul class="legend">{legend}</ul><figcaption>Validation tasks; bands: 95% intervals.'
        "</figcaption></figure>"
    )


def bits(selection: Selection) -> Iterator[str]:
    """What each bit is for, and what the well-known patterns and the choice have there."""
    stages = str(selection["chosen"]["pattern"]).split(",")
    layers = len(stages[0])
    chosen = {"chosen" + (f", from step {k + 1} on" if len(stages) > 1 else ""): bits for k, bits in enumerate(stages)}
    columns = {
        "MAML": "1" * layers, "ANIL": "0" * (layers - 1) + "1", "BOIL": "1" * (layers - 1) + "0", **chosen
    }  # fmt: skip
    is_conv4 = selection["network"] == "conv4" and layers == 5
    rows = []
    for layer in range(layers):
        last = "the linear layer (head)" if is_conv4 else "the last layer"
        inside = f"block {layer + 1}: convolution and norm" if is_conv4 else f"layer {layer + 1} from the image"
        words = last if layer == layers - 1 else inside
        cells = [("1 updated" if bits[layer] == "1" else "0 frozen", bits[layer]) for bits in columns.values()]
        rows.append([(str(layer + 1), str(layer)), (words, words), *cells])
    yield "<h3>What the bits mean</h3>"
    yield table(
        "The bits of a pattern", "One bit per layer, input first: 0 frozen, 1 updated while adapting.",
        [("bit", ""), ("layer", "text"), *((name, "text") for name in columns)], rows, sorts=False,
    )  # fmt: skip
