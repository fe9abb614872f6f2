"""`lambda-maml select`: what is compared, and by what it is chosen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from .cli_checkpoint import checkpoint_argument, data_options, episode_of, inner_loop, load, ways_option
from .cli_data import checkpoint_sets
from .cli_report import tables
from .cli_types import COUNT, PLACE, RATE, SEED, SELECT_SEED, TEST_SEED, Number
from .console import bar, device_option, json_option, options, print_json, say

__all__ = ["command_line", "publish", "select"]


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


@click.command()
@checkpoint_argument
@data_options
@click.option(
    "--tasks", type=COUNT, default=200, help="Validation tasks to choose on; as many test tasks to report on."
)
@ways_option
@choice_options
@click.option("--seed", type=SEED, default=0, help="Seed of the tasks.")
@click.option("--out", type=PLACE, help="Where to write.  [default: pattern.json by the checkpoint]")
@device_option
@json_option
def select(
    checkpoint: Path, dataset: str | None, root: Path | None, tasks: int, steps: list[int] | None, lr: float | None,
    rates: list[float] | None, norm: str | None, ways: int | None, seed: int, out: Path | None, device: str,
    as_json: bool, **others: Any,
) -> None:  # fmt: skip
    """Choose the fastest pattern whose accuracy is good enough.

    Evaluates patterns on the same validation tasks, measures how long each one adapts, and takes the fastest one within
    --max-drop of the full pattern, or the most accurate one within a budget. Patterns are judged with the norm
    statistics that --statistics says; the choice is reported on test tasks by both: of all query images of a task
    together, and of each image by itself (the support set's), as adapt and export have it. Writes pattern.json and,
    beside it, report.png (NAME.png by NAME.json).

    One that is ended before goes on from what it had evaluated, if it is started again in the same way.

    Several processes divide the tasks: torchrun --nproc-per-node 4 -m lambda_maml select ...
    """
    from . import data
    from .files import try_folder
    from .lock import locked
    from .processes import joined
    from .report import picture_of
    from .select import select_pattern

    path = out or checkpoint.parent / "pattern.json"
    _check_out(path)
    with joined(device) as ranks, ExitStack() as held:
        model, meta = load(checkpoint, str(ranks.device or device), ways)
        if ranks.rank == 0:
            held.enter_context(locked(path.parent, "select"))
            try_folder(path, picture_of(path))
        ranks.check_alike(model.state_dict())
        rate = rates[0] if lr is None and rates else lr
        one = inner_loop(checkpoint, model, meta, {}, max(steps) if steps else None, rate, norm)
        inner = compared(one, steps, rates)
        choice = {key: others.pop(key) for key in CHOICE}
        val_set, test_set = ranks.first_then_all(
            lambda: checkpoint_sets(meta, dataset, root, ("val", "test"), others, ranks)
        )
        episode = episode_of(meta)
        val_tasks = data.sample_tasks(val_set, tasks, seed=SELECT_SEED + seed, **episode)
        test_tasks = data.sample_tasks(test_set, tasks, seed=TEST_SEED + seed, **episode)
        with bar("selecting", ranks) as progress:
            chosen = select_pattern(
                model, val_tasks, test_tasks=test_tasks, **inner, **wanted(choice), progress=progress, plan=say,
                resume=path.with_suffix(".evaluated.json"), ranks=ranks,
            )  # fmt: skip
        if ranks.rank == 0:
            publish({**chosen.to_dict(), "command": command_line()}, chosen.warnings, path, as_json)


def _check_out(path: Path) -> None:
    """ValueError where a selection cannot be written to `path`: nothing but a selection is written over."""
    from .pattern_json import read_selection

    if path.suffix != ".json":
        raise ValueError(f"--out {path}: the name ends in .json")
    if path.exists():
        try:
            read_selection(path)
        except ValueError as error:
            raise ValueError(f"--out {path}: it holds something else, name another file ({error})") from error


def command_line() -> str:
    """The command line as it was given."""
    return shlex.join(["lambda-maml", *(click.get_current_context().obj or [])])


def publish(found: dict[str, Any], warnings: list[str], path: Path, as_json: bool) -> None:
    """Print the tables or the JSON, whether or not it can be written; write pattern.json and report.png."""
    from .files import write_json
    from .report import picture_of, plot

    for warning in warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(found)
    else:
        tables(found)
    write_json(path, found)
    picture, drawn = picture_of(path), True
    try:
        plot(found, picture)
    except ModuleNotFoundError as missing:
        say(f"warning: there is no picture: {missing}")
        drawn = False
    if not as_json:
        click.echo(f"wrote {path}{f' and {picture}' if drawn else ''}")
