"""Runs as one HTML page that holds everything: figures, tables, settings, commands and versions; nothing is fetched."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from . import data
from .files import atomic, written
from .report import named, speedups
from .report_cells import number, scale_of, table
from .report_figures import Line, Mark, chart
from .report_page import POLICY, SCRIPT, STYLE
from .report_runs import Run
from .report_selection import bits, by_steps, selection_parts, task_of
from .settings import Settings

__all__ = ["page", "write_page"]

_NETWORK = ("network", "ways", "in_channels", "image_size", "width")  # what has an option, or is as the images are
_NOT_METRICS = ("kind", "iteration", "ci95", "train_loss", "seconds")


def write_page(runs: Sequence[Run], path: str | Path) -> None:
    """Write `page` to a file, atomically. Raises OSError that names it, and what `page` raises."""
    text, path = page(runs), Path(path)
    with written(path), atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def page(runs: Sequence[Run]) -> str:
    """The whole page of some runs, as `report_runs.read_runs` gives them; every name in it is escaped.

    >>> "<script>alert" in page([Run("<script>alert(1)</script>", metrics=lines)])
    False
    """
    title = "Report: " + ", ".join(run.name for run in runs)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{escape(title)}</h1>",
    ]
    if len(runs) > 1:
        parts += _overview(runs)
    for index, run in enumerate(runs):
        parts += _run(run, f"run{index}")
    return "\n".join([*parts, f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"])


def _overview(runs: Sequence[Run]) -> Iterator[str]:
    rows = []
    for index, run in enumerate(runs):
        link = f'<a href="#run{index}">{escape(run.name)}</a>'
        if not run.selections:
            rows.append([(link, run.name), *[("", "")] * 7])
            continue
        selection = run.selections[0][1]
        scale, ratio, test = scale_of(selection), speedups(selection), selection["test"]
        score = test.get(f"chosen_{scale.key}")
        rows.append([
            (link, run.name), (escape(task_of(selection)), task_of(selection)),
            (f"<code>{escape(named(selection['chosen']))}</code>", named(selection["chosen"])),
            number(selection["chosen"]["time_ms"]), number(ratio["over_stock_full"]), number(ratio["over_full"]),
            (scale.text(score), "" if score is None else str(score)),
            (scale.text(test["drop"], test["drop_ci95"]), "" if test["drop"] is None else str(test["drop"])),
        ])  # fmt: skip
    head = [
        ("run", "text"), ("task", "text"), ("chosen", "text"), ("adapts in, ms", ""), ("x faster than stock", ""),
        ("x faster than ours", ""), ("score, test tasks", ""), ("cost", ""),
    ]  # fmt: skip
    caption = "Each run's choice beside all layers, in stock PyTorch and in this package. A name leads to the run."
    yield table("The runs", caption, head, rows)


def _run(run: Run, place: str) -> Iterator[str]:
    yield f'<section aria-labelledby="{place}">\n<h2 id="{place}">{escape(run.name)}</h2>'
    for index, (file, selection) in enumerate(run.selections):
        if index:
            yield f"<details>\n<summary>{escape(file)}: {escape(task_of(selection))}</summary>"
        yield from selection_parts(file, selection)
        yield "</details>" if index else ""
    if run.selections:
        yield from by_steps([selection for _, selection in run.selections])
        yield from bits(run.selections[0][1])
    yield from _curves(run.metrics)
    yield from _source(run)
    yield "</section>"


def _curves(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Validation and loss in the course of the training."""
    checked = [line for line in metrics if line["kind"] == "validation"]
    metric = next((key for line in checked for key in line if key not in _NOT_METRICS), None)
    trained = [line for line in metrics if line["kind"] == "train" and "loss" in line]
    losses = [(float(line["iteration"]), float(line["loss"])) for line in trained]
    if metric is None and not losses:
        return
    yield "<h3>Training</h3>"
    if metric is not None:
        factor = 100.0 if metric == "accuracy" else 1.0
        kept = [line for line in checked if metric in line]
        points = [(float(line["iteration"]), factor * line[metric]) for line in kept]
        band = [
            (y - factor * line.get("ci95", 0), y + factor * line.get("ci95", 0)) for (_, y), line in zip(points, kept)
        ]
        name = "accuracy, %" if metric == "accuracy" else metric
        drawn = chart(
            [Line(Mark("line", "blue", name), points, band)], title="Validation in the course of training",
            text=f"{name}, last {points[-1][1]:.4g} at iteration {points[-1][0]:.0f}", x_title="iterations",
            y_title=f"validation {name}", marks=len(points) == 1, most=100.0 if metric == "accuracy" else math.inf,
        )  # fmt: skip
        yield f"<figure>{drawn}<figcaption>Validation tasks; band: 95% interval.</figcaption></figure>"
    if losses:
        drawn = chart(
            [Line(Mark("line", "vermilion", "loss"), losses, dashed=True)], title="Loss in the course of training",
            text=f"last {losses[-1][1]:.4g} at iteration {losses[-1][0]:.0f}", x_title="iterations",
            y_title="training loss",
        )  # fmt: skip
        yield f"<figure>{drawn}<figcaption>Loss of the query sets of training tasks.</figcaption></figure>"


def _source(run: Run) -> Iterator[str]:
    """Commands, settings and versions."""
    yield "<h3>Commands, settings and versions</h3>"
    for said, command in _commands(run):
        yield f"<p>{escape(said)}</p>\n<pre>{escape(command)}</pre>"
    told: dict[str, Any] = {}
    if run.selections:
        told |= {f"selection: {key}": value for key, value in run.selections[0][1]["environment"].items()}
    for part in ("dataset", "images", "network", "metrics", "settings"):
        told |= {f"{part}: {key}": value for key, value in run.about.get(part, {}).items()}
    if told:
        rows = [[(escape(key), key), (escape(str(value)), str(value))] for key, value in told.items()]
        head = [("name", "text"), ("value", "text")]
        every = table("Settings and versions", "As the files say it.", head, rows, sorts=False)
        yield f"<details>\n<summary>All settings and versions</summary>\n{every}\n</details>"


def _commands(run: Run) -> Iterator[tuple[str, str]]:
    dataset, settings = run.about.get("dataset", {}).get("name"), run.about.get("settings", {})
    if dataset in data.NAMES and settings:
        iterations = max((line["iteration"] for line in run.metrics), default=None)
        yield "Training, from the checkpoint's settings:", _training(run, str(dataset), settings, iterations)
    for file, selection in run.selections:
        if isinstance(selection.get("command"), str):
            yield f"{file}, as it was called:", selection["command"]
        else:
            given = [f"--steps={selection['steps']}", f"--norm={selection['norm']}"]
            given += [f"--rule={selection['rule']}"]
            given += [f"--max-drop={selection['max_drop']}"] if selection["max_drop"] is not None else []
            given += [f"--lr={selection['lr']}"] if isinstance(selection["lr"], (int, float)) else []
            given += ["--relative"] * bool(selection.get("relative"))
            yield (
                f"{file}, from what it says (it does not hold its command):",
                shlex.join(["lambda-maml", "select", "best.safetensors", *given, f"--out={file}"]),
            )


def _training(run: Run, dataset: str, settings: Mapping[str, Any], iterations: int | None) -> str:
    """`lambda-maml train` with every setting that is not the default."""
    words = ["lambda-maml", "train", f"--dataset={dataset}", *([] if dataset == "glyphs" else ["--root=DATA"])]
    words.append("--out=RUN")
    network = run.about.get("network", {})
    words += [f"--network={network.get('network', 'conv4')}"]
    words += [f"--width={network['width']}"] if "width" in network else []
    more = {key: value for key, value in network.items() if key not in _NETWORK}
    given = more.get("args", more)
    words += [f"--network-args={k}={json.dumps(v)}" for k, v in (given.items() if isinstance(given, dict) else ())]
    default = asdict(Settings())
    for key, value in settings.items():
        if key == "second_order":
            words += [] if value else ["--first-order"]
        elif key == "flip":
            words += ["--flip"] if value else []
        elif key in default and value != default[key] and value is not None:
            words.append(f"--{key.replace('_', '-')}={value}")
    return shlex.join(words + ([] if iterations is None else [f"--iterations={iterations}"]))
