"""The options of `select`: what is compared, and by what it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .cli_types import COUNT, PLACE, RATE, Number
from .console import options

__all__ = ["CHOICE", "choice_options", "compared", "wanted"]


class Several(click.ParamType):
    """Values of a kind, separated by commas."""

    name = "list"

    def __init__(self, kind: click.ParamType, metavar: str) -> None:
        self.kind, self.metavar = kind, metavar

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        return [self.kind.convert(part.strip() if isinstance(part, str) else part, param, ctx) for part in parts]


choice_options = options(
    click.option(
        "--steps", type=Several(COUNT, "K[,K...]"),
        help="Gradient steps of adaptation; of several, such as 1,5,10, each pattern is tried with each.  "
        "[default: the checkpoint's]",
    ),
    click.option("--lr", type=RATE, help="Rate of these steps.  [default: the checkpoint's]"),
    click.option(
        "--rates", type=Several(RATE, "RATE[,RATE...]"), help="Rates to try with each pattern, in place of --lr."
    ),
    click.option(
        "--norm", type=click.Choice(["follow", "never"]),
        help="Do a layer's norm weights follow its bit, or never adapt.  [default: the checkpoint's]",
    ),
    click.option(
        "--max-drop", type=Number(0, 1),
        help="Allowed drop of accuracy against the full pattern, a fraction.  [default: 0.01, without a budget]",
    ),
    click.option(
        "--max-time-ms", type=Number(0, 1e9, min_open=True),
        help="A budget in place of --max-drop: the most accurate pattern that adapts within so many milliseconds.",
    ),
    click.option(
        "--max-memory-mb", type=Number(0, 1e9, min_open=True),
        help="The same for memory above parameters and images, in MB (Linux, CUDA).",
    ),
    click.option(
        "--patterns",
        help="Candidates, separated by semicolons, as in 'ANIL; stages:00011'.  [default: all; by parts of the network "
        "where it has more than 8 layers]",
    ),
    click.option(
        "--search", type=click.Choice(["all", "race"]),
        help="Judge every candidate on all tasks, or rule out early what cannot be chosen.  [default: all; race for "
        "networks of more than 12 layers]",
    ),
    click.option("--relative", is_flag=True, help="The drop is a fraction of the full pattern's accuracy."),
    click.option(
        "--rule", type=click.Choice(["bound", "point"]), default="bound",
        help="Compare the drop's one-sided 95% bound over paired tasks, or the estimate itself.",
    ),
    click.option(
        "--statistics", type=click.Choice(["batch", "support"]), default="batch",
        help="Judge with the query images normalised together, or each by itself, by the support set's statistics.",
    ),
    click.option(
        "--per-task", is_flag=True,
        help="Also look for a rule that adapts by a cheap pattern and, where its result looks unsure, anew by a dearer "
        "one; kept if it beats the choice at equal time.",
    ),
    click.option("--timings", type=PLACE, help="Take times from pytest-benchmark's JSON instead."),
    click.option("--seconds", type=Number(0), default=30.0, help="Time to spend on measuring adaptation times."),
)  # fmt: skip


CHOICE = (
    "max_drop", "max_time_ms", "max_memory_mb", "patterns", "search", "relative", "rule", "statistics", "per_task",
    "timings", "seconds",
)  # fmt: skip
"""The names of those that are no part of the inner loop."""


def wanted(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `select_pattern` from the options, less those of the inner loop."""
    patterns = given["patterns"]
    return {
        "patterns": None if patterns is None else [pattern.strip() for pattern in patterns.split(";")],
        "decide": given["rule"],
        "max_time": given["max_time_ms"],
        "max_memory": given["max_memory_mb"],
        **{
            key: given[key]
            for key in ("max_drop", "relative", "search", "statistics", "per_task", "timings", "seconds")
        },
    }


def compared(inner: Mapping[str, Any], steps: list[int] | None, rates: list[float] | None) -> dict[str, Any]:
    """The inner loop's arguments, with all numbers of steps and rates that are compared.

    Raises:
        ValueError: there are several numbers of steps, and the checkpoint's learned rates are for one.
    """
    found = dict(inner)
    if steps is not None and len(steps) > 1:
        if "rule" in inner or not isinstance(inner.get("lr"), float):
            raise ValueError(
                f"--steps {','.join(map(str, steps))}: the checkpoint's learned rates are for one number of steps: "
                "give --lr, --rates or one number"
            )
        found["steps"] = steps
    if rates is not None:
        found["rates"] = rates
    return found
