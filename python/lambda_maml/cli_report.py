"""`lambda-maml report`: tables and a picture of one selection, or a page of several runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .cli_types import PLACE
from .console import json_option, print_json

__all__ = ["report", "tables"]


@click.command()
@click.argument("runs", type=PLACE, nargs=-1, required=True)
@click.option(
    "--out",
    type=PLACE,
    help="The page, .html, or the picture, .png or .svg.  [default: report.html in the first folder; of a file alone "
    "report.png by pattern.json, NAME.png by NAME.json]",
)
@click.option("--dark", is_flag=True, help="A picture for a dark page. A page is as its reader's screen.")
@click.option("--all", "every", is_flag=True, help="List every candidate, not the front and the well-known ones alone.")
@json_option
def report(runs: tuple[Path, ...], out: Path | None, dark: bool, every: bool, as_json: bool) -> None:  # fmt: skip
    """Tables and picture of a selection that was made before, or a page of runs.

    RUNS are pattern.json files, or folders of train, select and demo. One file alone gives tables and a picture, unless
    --out names a page. Folders, or several files, give a page: accuracy against time, learning curves, tables, commands
    and versions in one HTML file that needs no network.
    """
    first = runs[0]
    is_page = out.suffix.lower() in (".html", ".htm") if out is not None else len(runs) > 1 or first.is_dir()
    if is_page:
        _page(runs, out or (first if first.is_dir() else first.parent) / "report.html", as_json)
        return
    if len(runs) > 1 or first.is_dir():
        raise ValueError(f"--out {out}: a picture is of one pattern.json: name a page (.html), or one file")
    _picture(first, out, dark, every, as_json)


def _page(runs: tuple[Path, ...], path: Path, as_json: bool) -> None:
    from .report_html import write_page
    from .report_runs import read_runs

    found = read_runs(runs)
    write_page(found, path)
    if as_json:
        print_json({"page": str(path), "runs": [run.name for run in found]})
    else:
        click.echo(f"page: {path}")


def _picture(pattern_json: Path, out: Path | None, dark: bool, every: bool, as_json: bool) -> None:
    from .pattern_json import read_selection
    from .report import picture_of, plot, summary

    found = read_selection(pattern_json)
    if "metric" in found:
        raise ValueError(
            f"{pattern_json}: its scores are {found['metric']}, tables and picture are of accuracies: "
            "print(selection.table) in Python shows them, and --out NAME.html"
        )
    picture = out or picture_of(pattern_json)
    if as_json:
        print_json({**summary(found), "picture": str(picture)})
    else:
        tables(found, every)
    plot(found, picture, dark=dark)
    if not as_json:
        click.echo(f"picture: {picture}")


def tables(found: Mapping[str, Any], every: bool = False) -> None:
    """Print the tables of a selection."""
    from rich.console import Console

    from .report import candidates, headline, per_task

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(candidates(found, every=every))
    console.print(headline(found))
    if (rule := per_task(found)) is not None:
        console.print(rule, markup=False, highlight=False, soft_wrap=True)
