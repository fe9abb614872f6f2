"""A selection (the form of pattern.json) as tables for a terminal and as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate import ACCURACY
from .extras import wanted
from .files import atomic, written
from .patterns import Pattern
from .per_task import PerTask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

Report = Mapping[str, Any]

# Colours of Okabe and Ito, which colour-blind eyes tell apart.
BLUE, SKY, GREEN, VERMILION = "#0072b2", "#56b4e9", "#009e73", "#d55e00"
LIGHT = {"figure.facecolor": "white", "axes.facecolor": "white"}
DARK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#14181f"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#e6e6e6"),
}


def picture_of(path: Path) -> Path:
    """Where the picture of a selection in `path` lies: report.png for pattern.json, NAME.png for another NAME.json."""
    return path.with_name("report.png") if path.name == "pattern.json" else path.with_suffix(".png")


def names(report: Report) -> dict[str, str]:
    """Well-known patterns among the candidates, by their text: MAML, ANIL, BOIL."""
    n = len(str(report["full"]["pattern"]).split(",")[0])
    known = {"1" * n: "MAML", "0" * (n - 1) + "1": "ANIL", "1" * (n - 1) + "0": "BOIL"}
    there = {row["pattern"] for row in report["candidates"]}
    return {pattern: name for pattern, name in known.items() if pattern in there}


def pareto(report: Report) -> list[dict[str, Any]]:
    """The candidates of which no faster one has as low a drop, the fastest first. Drops are of paired tasks, so that
    candidates stand side by side that were judged on different numbers of them."""
    if report.get("front") is not None:
        return [report["candidates"][at] for at in report["front"]]
    front: list[dict[str, Any]] = []
    least = math.inf
    for row in sorted(report["candidates"], key=lambda row: (row["time_ms"], drop_of(row))):
        if drop_of(row) < least:
            front.append(row)
            least = drop_of(row)
    return front


def drop_of(row: Mapping[str, Any]) -> float:
    """A row's drop; infinite where a relative one is of a full pattern that scores nothing."""
    return math.inf if row["drop"] is None else float(row["drop"])


def same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows are of one candidate: pattern, and steps and rate where several were compared."""
    return all(row.get(key) == other.get(key) for key in ("pattern", "steps", "lr"))


def admissible(report: Report, row: Mapping[str, Any]) -> bool:
    """Whether the pattern's drop, by the report's rule, is within max_drop, or the pattern within the budget."""
    if row.get("admissible") is not None:
        return bool(row["admissible"])
    if row["pattern"] == report["full"]["pattern"]:
        return True
    drop = row["drop"] if report["rule"] == "point" else row["drop_bound"]
    return drop is not None and drop <= report["max_drop"] + 1e-12


def speedups(report: Report) -> dict[str, float | None]:
    """How many times faster the chosen pattern adapts than the full one, in plain PyTorch and in this package."""
    chosen, full, stock = (report[key]["time_ms"] for key in ("chosen", "full", "stock_full"))
    return {"over_stock_full": stock / chosen if stock else None, "over_full": full / chosen}


def _points(value: float | None, ci95: float | None = None) -> str:
    """A fraction as percentage points."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}" + ("" if ci95 is None else f" ± {100 * ci95:.2f}")


def named(row: Mapping[str, Any]) -> str:
    """A row's pattern, with its steps and rate where several were compared."""
    steps = [f"{row['steps']} steps"] if isinstance(row.get("steps"), int) else []
    rate = [f"rate {row['lr']:g}"] if isinstance(row.get("lr"), (int, float)) else []
    return ", ".join([str(row["pattern"]), *steps, *rate])


def _quartiles(row: Mapping[str, Any]) -> str:
    """The quartiles of a row's time."""
    time = row.get("time")
    return "-" if time is None else f"{_ms(time['low'])}-{_ms(time['high'])}"


def limit_of(report: Report, factor: float = 100.0, unit: str = "points") -> str:
    """What a candidate may cost: a budget, or a drop, which is told `factor` times in a unit; a relative one in percent
    of the full pattern's score."""
    budget = report.get("budget")
    if budget is not None:
        parts = [(budget["time_ms"], "ms"), (budget["memory_mb"], "MB")]
        return " and ".join(f"{value:g} {name}" for value, name in parts if value is not None)
    if report.get("relative"):
        factor, unit = 100.0, _unit(report)
    rule = "drop" if report["rule"] == "point" else "95% bound of the drop"
    return f"{rule} at most {factor * report['max_drop']:g} {unit}".strip()


def allowed(report: Report) -> str:
    """What a candidate may cost, and how many tasks it was judged on."""
    told = f"Allowed: {limit_of(report)}."
    search = report.get("search")
    if search is not None and search["kind"] == "race":
        whole = search["candidates"] * search["tasks"]
        told += (
            f" A race: {search['adaptations']} adaptations of {whole}, on {search['tasks']} tasks where not ruled out."
        )
    return told


def _unit(report: Report) -> str:
    return "% of full" if report.get("relative") else "points"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def headline(report: Report) -> Table:
    """The choice beside the full pattern, in this package and in plain PyTorch: times, and accuracy on test tasks."""
    with wanted("cli", "a table"):
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

    chosen, full, stock, test = (report[key] for key in ("chosen", "full", "stock_full", "test"))
    tested = test["tasks"] > 0
    accuracy = ("full_accuracy", "chosen_accuracy") if tested else (None, None)
    values = [
        test[key] if key else report[part]["accuracy"] for key, part in zip(accuracy, ("full", "chosen"), strict=True)
    ]
    drop, ci95 = (test["drop"], test["drop_ci95"]) if tested else (chosen["drop"], None)
    alone = test.get("support") if tested else None
    by_itself = (
        ""
        if alone is None
        else (
            f"; each image by itself, by the support set's statistics: {_points(alone['full_accuracy'])}% and "
            f"{_points(alone['chosen_accuracy'])}%, cost {_points(alone['drop'], alone['drop_ci95'])}"
        )
    )
    where = f"{test['tasks']} test tasks" if tested else "validation tasks it was chosen on"
    table = Table(
        title=f"{escape(report['network'])}, {report['ways']}-way {report['shots']}-shot, {report['steps']} steps: "
        f"{chosen['pattern']} beside MAML",
        caption=f"adapt: support tensors to adapted parameters; stock: plain PyTorch layers and autograd, same run; "
        f"accuracy: {where}; cost: mean of paired differences ± 95%{by_itself}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for title in ("adapt\nms", "+ query\nms", "x faster\nvs stock", "x faster\nvs ours", "accuracy\n%", "cost\npoints"):
        table.add_column(title, justify="right", no_wrap=True)
    rows = [
        (f"MAML {named(full)}, stock", stock, values[0], "0"),
        (f"MAML {named(full)}, ours", full, values[0], "0"),
        (f"chosen {named(chosen)}, ours", chosen, values[1], _points(drop, ci95)),
    ]
    for title, row, value, cost in rows:
        time = row["time_ms"]
        ratios = [f"{base['time_ms'] / time:.1f}x" if time and base["time_ms"] else "-" for base in (stock, full)]
        bold = "bold" if row is chosen else None
        table.add_row(title, _ms(time), _ms(row.get("end_to_end_ms")), *ratios, _points(value), cost, style=bold)
    return table


def candidates(report: Report, *, every: bool = False) -> Table:
    """Candidates, the fastest first: the Pareto front and the well-known ones, or with `every` all of them."""
    with wanted("cli", "a table"):
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

    known, front = names(report), pareto(report)
    too_much = "costs too much" if report.get("budget") is None else "beyond the budget"
    rows = sorted(report["candidates"], key=lambda row: (row["time_ms"], -row["accuracy"]))
    marked = [*front, report["chosen"], report["full"]]
    shown = [row for row in rows if every or row["pattern"] in known or any(same(row, other) for other in marked)]
    more = len(rows) - len(shown)
    table = Table(
        title="Candidates on validation tasks",
        caption=allowed(report) + (f" {more} more candidates are in pattern.json." if more else ""),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    unit = _unit(report)
    columns: list[tuple[str, Callable[[Any], str]]] = [
        ("steps", lambda row: str(row.get("steps", ""))),
        ("rate", lambda row: f"{row['lr']:g}" if "lr" in row else ""),
        ("adapt\nms", lambda row: _ms(row["time_ms"])),
        ("quartiles\nms", _quartiles),
        ("memory\nMB", lambda row: _ms(row.get("memory_mb"))),
        ("tasks", lambda row: str(row.get("tasks", ""))),
        ("accuracy\n%", lambda row: _points(row["accuracy"], row["ci95"])),
        (f"drop\n{unit}", lambda row: _points(row["drop"])),
        ("drop, 95%\nbound", lambda row: _points(row["drop_bound"])),
    ]
    optional = {"steps": "steps", "rate": "lr", "quartiles\nms": "time", "memory\nMB": "memory_mb"}
    columns = [c for c in columns if c[0] not in optional or any(optional[c[0]] in row for row in rows)]
    if len({row.get("tasks") for row in rows}) == 1:
        columns = [column for column in columns if column[0] != "tasks"]
    table.add_column("pattern", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for row in shown:
        pattern, chosen = row["pattern"], same(row, report["chosen"])
        notes = [known[pattern]] if pattern in known else []
        notes += ["chosen"] if chosen else []
        notes += ["Pareto"] if any(same(row, other) for other in front) else []
        notes += [] if admissible(report, row) else [too_much]
        cells = (cell(row) for _, cell in columns)
        table.add_row(pattern, *cells, ", ".join(notes), style="bold" if chosen else None)
    return table


def per_task(report: Report) -> str | None:
    """A rule per task that beat the choice at its time, and its figures; None where there is none."""
    rule, metric = PerTask.of(report), report.get("metric", ACCURACY)
    if rule is None:
        return None
    told = f"Per task: {rule}: {rule.worth(metric)} over {named(report['chosen'])}"
    return told + (f"; on {rule.test.tasks} test tasks {rule.worth(metric, rule.test)}." if rule.test else ".")


def plot(report: Report, path: str | Path, *, dark: bool = False) -> None:
    """Write a PNG or SVG: validation accuracy (95% bars) against adaptation time (quartiles), the Pareto front, the
    choice, MAML, ANIL and plain PyTorch's full pattern. Marks differ in their forms too, for colour-blind eyes; `dark`
    is for a dark page. Raises ValueError for another file type."""
    with wanted("report", "the picture"):
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    path = Path(path)
    form = path.suffix.lower()
    if form not in (".png", ".svg"):
        raise ValueError(f"{path}: the picture's name ends in .png or .svg")
    # In inches: as wide as a phone shows with 10 pixels for a letter.
    with matplotlib.rc_context({**(DARK if dark else LIGHT), "font.size": 11, "svg.hashsalt": "report"}):
        figure = Figure(figsize=(5.4, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(report, figure.add_subplot(), *(("white", SKY) if dark else ("black", BLUE)))
        figure.suptitle(_title(report), fontsize=11)
        figure.legend(fontsize=10, loc="outside lower center", ncols=2, frameon=False, columnspacing=1.2)
        with written(path), atomic(path) as part:
            figure.savefig(part, format=form[1:], dpi=200, metadata={"Date": None} if form == ".svg" else None)


def _draw(report: Report, axes: Axes, ink: str, blue: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    rows, chosen, full = report["candidates"], report["chosen"], report["full"]
    known, front = names(report), pareto(report)

    def bars(chosen_rows: list[Any], **style: Any) -> None:
        if not chosen_rows:  # nor is there anything for the legend
            return
        middles = [row["time_ms"] for row in chosen_rows]
        spans = [row.get("time") or {"low": ms, "high": ms} for row, ms in zip(chosen_rows, middles, strict=True)]
        low = [max(0.0, ms - span["low"]) for ms, span in zip(middles, spans, strict=True)]
        high = [max(0.0, span["high"] - ms) for ms, span in zip(middles, spans, strict=True)]
        axes.errorbar(
            middles, [100 * row["accuracy"] for row in chosen_rows], xerr=[low, high],
            yerr=[100 * (row["ci95"] or 0) for row in chosen_rows], linestyle="none", capsize=2, elinewidth=1, **style,
        )  # fmt: skip

    # Patterns that fail altogether (a frozen head that was trained to adapt) would flatten all the rest: they are
    # marked at the lower edge.
    important = [chosen, full, *(row for row in rows if row["pattern"] in known and known[row["pattern"]] != "BOIL")]
    floor = min(full["accuracy"] - 0.15, *(row["accuracy"] for row in important)) - 1e-9
    above = [row for row in rows if row["accuracy"] >= floor]
    below = [row for row in rows if row["accuracy"] < floor]
    stock = report["stock_full"]["time_ms"]
    drawn = [*above, full]
    low = min(row["accuracy"] - (row["ci95"] or 0) for row in drawn)
    high = max(row["accuracy"] + (row["ci95"] or 0) for row in drawn)
    span = max(high - low, 0.01)
    bottom = 100 * (low - (0.14 if below else 0.06) * span)

    within, beyond = "within the allowed drop", "costs too much accuracy"
    if report.get("budget") is not None:
        within, beyond = "within the budget", "beyond the budget"
    others = [row for row in above if not same(row, chosen)]
    bars(
        [row for row in others if not admissible(report, row)],
        fmt="x", color="0.55", markersize=5, label=beyond,
    )  # fmt: skip
    bars(
        [row for row in others if admissible(report, row)],
        fmt="o", color=blue, markersize=6, label=within,
    )  # fmt: skip
    axes.plot(
        [row["time_ms"] for row in front], [100 * row["accuracy"] for row in front], drawstyle="steps-post",
        color=GREEN, linewidth=1.5, label="Pareto front", zorder=1,
    )  # fmt: skip
    bars([chosen], fmt="*", color=VERMILION, markersize=17, label=f"chosen: {chosen['pattern']}", zorder=5)
    if stock:
        bars(
            [{**full, "time_ms": stock, "time": report["stock_full"].get("time")}],
            fmt="s",
            color=ink,
            markersize=7,
            label="stock PyTorch, all layers",
        )
    if below:
        best = 100 * max(row["accuracy"] for row in below)
        axes.plot(
            [row["time_ms"] for row in below], [bottom + 100 * 0.04 * span] * len(below), "v", color="0.55",
            markersize=5, label=f"{len(below)} lower down, up to {best:.0f}%",
        )  # fmt: skip

    named = {row["pattern"]: row for row in [*important, full, chosen]}
    points = [
        (row["time_ms"], row["accuracy"], f"{known.get(pattern, '')} {pattern}".strip())
        for pattern, row in named.items()
        if pattern in known or pattern == chosen["pattern"]
    ]
    if stock:
        points.append((stock, full["accuracy"], f"stock {full['pattern']}"))
    for index, (time, accuracy, text) in enumerate(sorted(points)):
        # Neighbours get labels at different heights above the points, with a line down to the point they belong to,
        # which passes behind the labels of others.
        height = 100 * (high + (0.08 + 0.08 * (index % 2)) * span)
        axes.annotate(
            "", (time, 100 * accuracy), xytext=(time, height), zorder=3,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.7, "shrinkB": 6},
        )  # fmt: skip
        axes.text(
            time, height, text, ha="center", fontsize=10, zorder=6,
            fontweight="bold" if chosen["pattern"] in text else "normal",
            bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    times = [row["time_ms"] for row in rows] + ([stock] if stock else [])
    axes.set_xscale("log")
    axes.set_xlim(min(times) / 2.2, max(times) * 2.2)  # room for labels
    axes.set_ylim(bottom, 100 * (high + 0.25 * span))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 100])
    axes.set_xlabel("adaptation time, ms (log scale; bars: quartiles)")
    axes.set_ylabel("validation accuracy, % (95% interval)")
    axes.grid(alpha=0.25)


def _title(report: Report) -> str:
    ratio = speedups(report)
    factor = ratio["over_stock_full"]
    text = f"{report['network']}, {report['ways']}-way {report['shots']}-shot, {report['steps']} steps\n"
    text += f"{report['chosen']['pattern']}: {ratio['over_full']:.3g}x faster than our {report['full']['pattern']}"
    return text + (f", {factor:.3g}x than stock PyTorch's" if factor else "")


def summary(report: Report) -> dict[str, Any]:
    """The figures that answer the question, for a program: the choice, its speed-ups, its cost on test tasks."""
    return {"pattern": report["chosen"]["pattern"], **speedups(report), "test": dict(report["test"])}


def pattern_of(report: Report) -> Pattern:
    """The chosen pattern."""
    return Pattern.parse(report["chosen"]["pattern"])
