"""`lambda-maml eval`: the accuracy of a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_checkpoint import (
    checkpoint_argument,
    data_options,
    episode_of,
    in_json,
    inner_options,
    pattern_option,
    read_run,
    ways_option,
)
from .cli_data import checkpoint_sets
from .cli_types import COUNT, SEED, TEST_SEED
from .console import bar, device_option, json_option, print_json

if TYPE_CHECKING:
    from .evaluate import Evaluation

__all__ = ["evaluate_command"]


@click.command("eval")
@checkpoint_argument
@pattern_option
@data_options
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", help="Part of the set.")
@click.option("--tasks", type=COUNT, default=400, help="Number of tasks.")
@ways_option
@inner_options
@click.option("--seed", type=SEED, default=0, help="Seed of the tasks.")
@device_option
@json_option
def evaluate_command(
    checkpoint: Path, pattern: str | None, dataset: str | None, root: Path | None, split: str, tasks: int,
    ways: int | None, steps: int | None, lr: float | None, norm: str | None, seed: int, device: str, as_json: bool,
    **pictures: int | None,
) -> None:  # fmt: skip
    """Accuracy of a checkpoint on new tasks, under a pattern.

    Said twice: with the norms' statistics taken from all query images of a task together ("batch"), as published
    results have it, and from the support set ("support"), so that each image is classified by itself, as adapt, predict
    and export do. What the latter costs is a mean of differences on the same tasks, with its 95% interval.
    """
    from . import data
    from .evaluate import evaluate, evaluate_both
    from .ranks import ALONE

    model, meta, bits, rule, inner = read_run(checkpoint, device, pattern, steps, lr, norm, ways)
    (images,) = checkpoint_sets(meta, dataset, root, (split,), pictures, ALONE)
    episodes = data.sample_tasks(images, tasks, seed=TEST_SEED + seed, **episode_of(meta))
    if rule is None:
        given = functools.partial(evaluate, model, episodes, pattern=bits)
        found = _by_both(given, inner, functools.partial(evaluate_both, model, episodes, pattern=bits))
        used: dict[str, Any] = {"pattern": str(bits)}
        subject, how = str(bits), ""
    else:
        again = rule.decide(model, episodes, **inner)
        found = _by_both(functools.partial(rule.evaluate, model, episodes, again), inner)
        share = float(again.double().mean())
        used = {"pattern": None, "per_task": {"cheap": str(rule.cheap), "dear": str(rule.dear), "share": share}}
        subject, how = f"{rule},", f"{share:.0%} of them anew, "
    if as_json:
        told = {**in_json(inner), "statistics": found}
        print_json({**used, "split": split, "tasks": tasks, **found["batch"], **told})
        return
    own = inner.get("solver", inner.get("rule"))
    how += f"{inner['steps']} steps" if own is None else " ".join(repr(own).split())
    click.echo(f"{subject} on {tasks} {split} tasks, {how}:")
    for statistics, row in found.items():
        click.echo(_line(statistics, row))


def _by_both(
    evaluated: Callable[..., Evaluation], inner: Mapping[str, Any],
    at_once: Callable[..., dict[str, Evaluation]] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Accuracies by the statistics of either kind, and why there is none; what the second one costs. `at_once` gives
    both, with one adaptation to each task."""
    from .adapt import STATISTICS
    from .statistics import StatisticsError
    from .stats import mean_ci95

    found: dict[str, dict[str, Any]] = {}
    known: dict[str, Evaluation] = {}
    together = getattr(inner.get("solver"), "linearises", False)  # its predictions are those of no network
    if at_once is not None and not together:
        with suppress(StatisticsError), bar("evaluating") as progress:
            known = at_once(**inner, progress=progress)
    for statistics in STATISTICS[:1] if together else STATISTICS:
        try:
            if statistics not in known:
                with bar(f"evaluating, statistics of the {statistics}") as progress:
                    known[statistics] = evaluated(statistics=statistics, **inner, progress=progress)
        except StatisticsError as error:
            found[statistics] = {"accuracy": None, "ci95": None, "refused": str(error)}
            continue
        mean = known[statistics]
        found[statistics] = {"accuracy": mean.mean, "ci95": mean.ci95 if len(mean.scores) > 1 else None}
    scores = {statistics: mean.scores for statistics, mean in known.items()}
    if "support" in scores:
        drop, ci95 = mean_ci95(scores["batch"] - scores["support"])
        found["support"] |= {"drop": drop, "drop_ci95": ci95 if len(scores["batch"]) > 1 else None}
    return found


def _line(statistics: str, row: Mapping[str, Any]) -> str:
    """An accuracy for people."""
    how = {"batch": "query images together", "support": "each image by itself"}[statistics]
    said = f"{how} (statistics of the {statistics})"
    if "refused" in row:
        return f"  no figure, {said}: {row['refused']}"
    interval = "% (no interval from one task)" if row["ci95"] is None else f"± {100 * row['ci95']:.2f} %"
    has_cost = row.get("drop_ci95") is not None
    cost = f", costs {100 * row['drop']:.2f} ± {100 * row['drop_ci95']:.2f} points" if has_cost else ""
    return f"  {100 * row['accuracy']:.2f} {interval}, {said}{cost}"
