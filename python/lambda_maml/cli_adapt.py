"""`lambda-maml adapt`: a checkpoint and images of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_checkpoint import checkpoint_argument, in_json, inner_options, pattern_option, read_run
from .cli_export import line, predictions
from .cli_types import PLACE
from .console import device_option, json_option, print_json, say

if TYPE_CHECKING:
    import torch

__all__ = ["adapt"]


@click.command()
@checkpoint_argument
@click.option("--support", type=PLACE, required=True, help="Folder with one sub-folder of images per class.")
@click.option("--query", type=PLACE, help="Folder of images to classify, or one sub-folder a class.")
@pattern_option
@inner_options
@click.option(
    "--invert/--no-invert", default=None,
    help="Dark ink on light paper becomes high.  [default: as in training, else --invert for one-channel networks]",
)  # fmt: skip
@click.option(
    "--statistics", type=click.Choice(["support", "batch"]), default="support",
    help="Classify each image by itself, by the support set's norm statistics, or all together, by their own.",
)  # fmt: skip
@click.option("--out", type=PLACE, help="Write the adapted network here (.safetensors), for predict and export.")
@device_option
@json_option
def adapt(
    checkpoint: Path, support: Path, query: Path | None, pattern: str | None, steps: int | None, lr: float | None,
    norm: str | None, invert: bool | None, statistics: str, out: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Adapt a checkpoint to your own images, and classify others."""
    import torch

    from . import checkpoint as files
    from .adapt import adapt as adapt_model
    from .files import try_folder
    from .images import class_folders, inverted, query_files, read_images
    from .learned_rates import load_learned_rule
    from .models import image_shape
    from .statistics import StatisticsError

    if out is not None:
        if out.suffix != ".safetensors":
            raise ValueError(f"--out {out}: the name ends in .safetensors")
        if statistics == "batch":
            raise ValueError(
                f"--out {out}: an adapted checkpoint holds the support set's statistics, by which predict classifies "
                "each image: leave out --statistics batch, or --out"
            )
        if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
            raise ValueError(f"--out {out}: this is the checkpoint itself: name another file")
        try_folder(out)
    classes = class_folders(support)
    if not classes:
        raise ValueError(f"{support}: no class folder: give one with a sub-folder of images per class")
    try:
        model, meta, bits, rule, inner = read_run(checkpoint, device, pattern, steps, lr, norm, len(classes))
    except files.WaysError as error:
        raise ValueError(f"{support}: {len(classes)} class folders ({', '.join(classes)}); {error}") from error
    shape = image_shape(meta["network"])
    dark = inverted(shape, meta["dataset"]) if invert is None else invert

    def read(paths: list[Path]) -> torch.Tensor:
        return read_images(paths, shape, meta["dataset"], invert=dark).to(device)

    labels = [index for index, paths in enumerate(classes.values()) for _ in paths]
    xs, ys = read([path for paths in classes.values() for path in paths]), torch.tensor(labels, device=device)
    queries = [] if query is None else query_files(query)
    xq = read(queries) if queries else None

    if rule is not None and xq is None:
        say(f"a rule per task needs the images to classify (--query): adapting by the fixed choice, {bits}")
        rule = None
    try:
        if rule is None:
            learner = adapt_model(model, xs, ys, pattern=bits, statistics=statistics, **inner)
        else:
            learner, trial, _ = rule.adapt(model, xs, ys, xq, statistics=statistics, **inner)
            bits, inner = str(trial.pattern), rule.inner(trial, inner)
    except StatisticsError as error:
        raise ValueError(f"{error}; --statistics batch classifies query images together, by their own") from error
    if statistics == "support":
        learner.eval()  # as predict has it: without dropout
    classified = []
    if xq is not None:
        with torch.no_grad():
            classified = predictions(queries, list(classes), learner(xq).cpu())
    told = in_json(inner)
    if out is not None:
        adapted = {"pattern": str(bits), **told, "classes": list(classes), "images": list(shape), "invert": dark}
        rates = load_learned_rule(checkpoint, model, meta)
        trained = {key: value for key, value in meta.items() if key != "parts"}
        files.save(out, model, {**trained, "adapted": adapted}, rates, learner.state_dict())
        say(f"wrote {out}")
    if as_json:
        print_json(
            {
                "pattern": str(bits),
                "statistics": statistics,
                **told,
                "classes": list(classes),
                "support": len(labels),
                "predictions": classified,
            }
        )
        return
    click.echo(f"adapted under {bits} to {len(labels)} support images of {', '.join(classes)}")
    for prediction in classified:
        click.echo(line(prediction))
