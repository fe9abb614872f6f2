"""`lambda-maml eval`: the accuracy of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_checkpoint import (
    checkpoint_argument,
    data_options,
    episode_of,
    in_json,
    inner_loop,
    inner_options,
    load,
    pattern_of,
    pattern_option,
    rule_of,
)
from .cli_data import checkpoint_sets
from .cli_types import COUNT, SEED, TEST_SEED
from .console import bar, device_option, json_option, print_json

if TYPE_CHECKING:
    import torch

__all__ = ["evaluate_command"]


@click.command("eval")
@checkpoint_argument
@pattern_option
@data_options
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", help="Part of the set.")
@click.option("--tasks", type=COUNT, default=400, help="Number of tasks.")
@inner_options
@click.option("--seed", type=SEED, default=0, help="Seed of the tasks.")
@device_option
@json_option
def evaluate_command(
    checkpoint: Path, pattern: str | None, dataset: str | None, root: Path | None, split: str, tasks: int,
    steps: int | None, lr: float | None, norm: str | None, seed: int, device: str, as_json: bool,
    **pictures: int | None,
) -> None:  # fmt: skip
    """Accuracy of a checkpoint on new tasks, under a pattern.

    Said twice: with the norms' statistics taken from all query images of a task together ("batch"), as published
    results have it, and from the support set ("support"), so that each image is classified by itself, as adapt, predict
    and export do. What the latter costs is a mean of differences on the same tasks, with its 95% interval.
    """
    from . import data
    from .adapt import STATISTICS
    from .evaluate import evaluate
    from .ranks import ALONE
    from .statistics import StatisticsError
    from .stats import mean_ci95

    model, meta = load(checkpoint, device)
    bits, report = pattern_of(model, pattern)
    rule = rule_of(report, steps, lr, norm)
    inner = inner_loop(checkpoint, model, meta, report, steps, lr, norm)
    (images,) = checkpoint_sets(meta, dataset, root, (split,), pictures, ALONE)
    episodes = data.sample_tasks(images, tasks, seed=TEST_SEED + seed, **episode_of(meta))
    found: dict[str, dict[str, Any]] = {}
    scores: dict[str, torch.Tensor] = {}
    together = getattr(inner.get("solver"), "linearises", False)  # its predictions are those of no network
    again = None if rule is None else rule.decide(model, episodes, **inner)
    for statistics in STATISTICS[:1] if together else STATISTICS:
        try:
            with bar(f"evaluating, statistics of the {statistics}") as progress:
                given = {"statistics": statistics, **inner, "progress": progress}
                if rule is None or again is None:
                    mean = evaluate(model, episodes, pattern=bits, **given)
                else:
                    mean = rule.evaluate(model, episodes, again, **given)
        except StatisticsError as error:
            found[statistics] = {"accuracy": None, "ci95": None, "refused": str(error)}
            continue
        found[statistics] = {"accuracy": mean.mean, "ci95": mean.ci95 if tasks > 1 else None}
        scores[statistics] = mean.scores
    if "support" in scores:
        drop, ci95 = mean_ci95(scores["batch"] - scores["support"])
        found["support"] |= {"drop": drop, "drop_ci95": ci95 if tasks > 1 else None}
    if as_json:
        told = {**in_json(inner), "statistics": found}
        used: dict[str, Any] = {"pattern": str(bits)}
        if rule is not None and again is not None:
            own_rows = {"cheap": str(rule.cheap), "dear": str(rule.dear), "share": float(again.double().mean())}
            used = {"pattern": None, "per_task": own_rows}
        print_json({**used, "split": split, "tasks": tasks, **found["batch"], **told})
        return
    own = inner.get("solver", inner.get("rule"))
    told_of = f"{inner['steps']} steps" if own is None else " ".join(repr(own).split())
    if rule is not None and again is not None:
        bits, told_of = f"{rule},", f"{again.double().mean():.0%} of them anew, {told_of}"
    click.echo(f"{bits} on {tasks} {split} tasks, {told_of}:")
    for statistics, how in (("batch", "query images together"), ("support", "each image by itself"))[: len(found)]:
        row = found[statistics]
        if "refused" in row:
            click.echo(f"  no figure, {how} (statistics of the {statistics}): {row['refused']}")
            continue
        interval = "% (no interval from one task)" if row["ci95"] is None else f"± {100 * row['ci95']:.2f} %"
        cost = (
            f", costs {100 * row['drop']:.2f} ± {100 * row['drop_ci95']:.2f} points"
            if row.get("drop_ci95") is not None
            else ""
        )
        click.echo(f"  {100 * row['accuracy']:.2f} {interval}, {how} (statistics of the {statistics}){cost}")
