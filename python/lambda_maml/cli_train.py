"""`lambda-maml train`: its options, and the run with a progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_data import FOLDER_KEYS, SETS, folder_options, image_sets, root_option, split_options
from .cli_methods import OPTIONS, method_options, parts_for
from .cli_types import COUNT, PLACE, RATE, SEED, Number
from .console import bar, device_of, device_option, json_option, options, print_json, say

if TYPE_CHECKING:
    from torch import nn

    from .data import ImageSet
    from .ranks import Ranks
    from .settings import Settings
    from .train import Result

__all__ = [
    "augment_options",
    "built",
    "config_of",
    "exit_if_stopped",
    "network_options",
    "say_if_stopped",
    "set_options",
    "train",
    "train_with_progress",
]

set_options = options(
    click.option("--dataset", default="glyphs", help=SETS),
    root_option,
    folder_options,
    split_options,
    click.option(
        "--out", type=PLACE, required=True, help="Folder for the checkpoint and the state."
    ),
)  # fmt: skip
episode_options = options(
    click.option("--ways", type=COUNT, default=5, help="Classes in a task."),
    click.option("--shots", type=COUNT, default=1, help="Support images per class."),
    click.option("--query", type=COUNT, default=15, help="Query images per class."),
)
augment_options = options(
    click.option("--flip", is_flag=True, help="Turn every other training image left for right."),
    click.option(
        "--crop", type=click.IntRange(0), default=0,
        help="Pad training images by so many pixels and cut their size out at random.",
    ),
    click.option(
        "--jitter", type=Number(0, 1), default=0.0,
        help="Change brightness, contrast and saturation of training images by up to this share (colour sets).",
    ),
)  # fmt: skip
network_options = options(
    click.option(
        "--network", default="conv4",
        help="conv4, resnet12, or MODULE:FUNCTION: a function of your own, called with ways, in_channels and, if it "
        "has such a parameter, image_size.",
    ),
    click.option(
        "--network-args", "network_args", multiple=True, metavar="KEY=VALUE",
        help="One more argument of the function, or of resnet12, as in widths=[64,128,256,512]; may be repeated. "
        "Values are JSON, or else text.",
    ),
    click.option("--width", type=click.IntRange(1), help="Channels of each of conv4's convolutions.  [default: 32]"),
)  # fmt: skip
inner_options = options(
    click.option("--steps", type=COUNT, default=5, help="Inner gradient steps in training."),
    click.option(
        "--test-steps", type=click.IntRange(1), help="Inner steps in validation and after.  [default: as --steps]"
    ),
    click.option("--lr", type=RATE, default=0.01, help="Inner rate, or where learned rates start."),
    click.option(
        "--learn-lr", type=click.Choice(["one", "layer", "step", "layer-step", "weight"]),
        help="Learn the inner rates with the network: one, one per layer, per step, per layer and step (MAML++), or "
        "per weight (Meta-SGD). select, eval and adapt use them.  [default: --lr stays]",
    ),
    click.option(
        "--pattern", help="Pattern of training and validation, e.g. 00011 or ANIL.  [default: all layers]"
    ),
    click.option(
        "--patterns",
        help="Patterns of training, where they change: sampled (one drawn anew for each meta-batch, for weights that "
        "serve all patterns), or from which iteration on each holds, as in 'MAML; 2000: 00111; 5000: ANIL'. --pattern "
        "is then that of validation.  [default: --pattern]",
    ),
    click.option(
        "--norm", type=click.Choice(["follow", "never"]), default="follow",
        help="Do a layer's norm weights follow its bit, or never adapt.",
    ),
    click.option(
        "--zero-head", is_flag=True,
        help="Let the last layer be zero at the start of each task; it is not meta-learned.",
    ),
)  # fmt: skip
outer_options = options(
    click.option(
        "--outer", type=click.Choice(["maml", "reptile"]), default="maml",
        help="MAML, or Reptile, which goes towards the weights adapted to support and query images together.",
    ),
    click.option("--first-order/--second-order", "first_order", default=False, help="Leave out second derivatives."),
    click.option(
        "--first-order-iterations", default=0,
        help="Leave out second derivatives in so many iterations at the start (MAML++).",
    ),
    click.option(
        "--multi-step-iterations", default=0,
        help="Count the query loss after every inner step in so many iterations at the start (MAML++).",
    ),
    click.option("--meta-batch", type=COUNT, default=4, help="Tasks an iteration."),
    click.option(
        "--optimizer", type=click.Choice(["adam", "sgd"]), default="adam", help="What makes a step of the gradient."
    ),
    click.option("--meta-lr", type=RATE, default=1e-3, help="The optimiser's rate."),
    click.option(
        "--cosine", type=click.IntRange(1),
        help="Let it fall along half a cosine within so many iterations.  [default: it stays]",
    ),
    click.option("--meta-lr-end", type=RATE, default=0.0, help="Where it falls to."),
    click.option("--weight-decay", type=RATE, default=0.0, help="Decay of the network's weights, as in AdamW."),
    click.option("--clip-norm", type=RATE, help="Bound the gradient's norm.  [default: no bound]"),
    click.option("--clip-value", type=RATE, help="Bound each number of the gradient.  [default: no bound]"),
    click.option(
        "--average", type=RATE,
        help="Validate and keep an exponential average of the weights, of this decay, e.g. 0.999.  "
        "[default: the weights]",
    ),
)  # fmt: skip
run_options = options(
    click.option(
        "--start-from", type=PLACE, metavar="CHECKPOINT",
        help="Begin with the weights of this checkpoint, of pretrain or of an earlier run.  [default: drawn by --seed]",
    ),
    click.option("--iterations", type=COUNT, default=10000, help="Meta-updates in all, earlier runs included."),
    click.option("--minutes", type=Number(0, min_open=True), help="Stop this run after so many minutes."),
    click.option("--val-tasks", type=COUNT, default=100, help="Validation tasks that choose the best checkpoint."),
    click.option("--val-every", type=COUNT, default=250, help="Iterations between validations."),
    click.option(
        "--patience", type=click.IntRange(1),
        help="Stop after so many validations without a better one.  [default: go on]",
    ),
    click.option(
        "--batched/--one-by-one", default=True, help="Adapt the tasks of an iteration together, or save memory."
    ),
    click.option("--log-every", type=click.IntRange(1), default=50, help="Iterations between lines of metrics.jsonl."),
    click.option("--tensorboard", is_flag=True, help="Write the same numbers for TensorBoard, if it is installed."),
    click.option("--seed", type=SEED, default=0, help="Seed of the network and of the tasks."),
    click.option(
        "--resume", is_flag=True, help="Continue the run in --out; the result is the same as without the break."
    ),
)  # fmt: skip


@click.command()
@set_options
@episode_options
@augment_options
@network_options
@inner_options
@method_options
@outer_options
@run_options
@device_option
@json_option
def train(
    dataset: str, root: Path | None, out: Path, network: str, network_args: tuple[str, ...], width: int | None,
    start_from: Path | None, iterations: int, minutes: float | None, first_order: bool, batched: bool, log_every: int,
    tensorboard: bool, resume: bool, device: str, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Meta-train a network (MAML). Ctrl-C saves; --resume continues.

    In the folder: best.safetensors with best.json, the checkpoint of the best validation accuracy; last.safetensors,
    the state to resume from; metrics.jsonl, losses and accuracies as the run goes, of all query images of a task
    together (see eval). SIGTERM, SIGHUP and SIGUSR1 (Slurm's --signal=USR1@120) save as Ctrl-C does. The exit status is
    then 130 (Ctrl-C), 143, 129 or 138.

    Several processes divide the tasks: torchrun --nproc-per-node 4 -m lambda_maml train ...
    """
    from .processes import joined
    from .settings import Settings

    pictures = {key: settings.pop(key) for key in FOLDER_KEYS}
    asked = {key: settings.pop(key) for key in OPTIONS}
    with joined(device) as ranks:
        chosen = Settings(**settings, second_order=not first_order)
        config = config_of(network, network_args, width)
        train_set, val_set = ranks.first_then_all(
            lambda: image_sets(dataset, root, ("train", "val"), settings, pictures, ranks)
        )
        result = train_with_progress(
            train_set, val_set, out, chosen, config, start=start_from, iterations=iterations, minutes=minutes,
            resume=resume, batched=batched, log_every=log_every, tensorboard=tensorboard, device=device, ranks=ranks,
            parts_of=parts_for(asked, chosen, train_set),
        )  # fmt: skip
        if ranks.rank == 0:
            _tell(result, out, chosen, as_json)
            say_if_stopped(result, "continue with --resume")
    exit_if_stopped(result.stopped)


def _tell(result: Result, out: Path, chosen: Settings, as_json: bool) -> None:
    """What came of the run."""
    from .train import BEST

    best = result.best
    if as_json:
        line = best._asdict() if best else None
        print_json(
            {
                "checkpoint": str(out / BEST) if best else None,
                "iteration": result.iteration,
                "stopped": result.stopped,
                "best": line,
            }
        )
    elif best:
        click.echo(
            f"{out / BEST}: {100 * best.accuracy:.2f} ± {100 * best.ci95:.2f} % on {chosen.val_tasks} validation tasks "
            f"at iteration {best.iteration}"
        )


def say_if_stopped(result: Result, remedy: str) -> None:
    """Say which signal ended the run, if one did."""
    from .stopping import SIGNALS

    if result.stopped in SIGNALS.values():
        told = "" if result.stopped == "interrupt" else f" by {result.stopped}"
        say(f"stopped{told} at iteration {result.iteration} and saved; {remedy}")


def exit_if_stopped(stopped: str) -> None:
    """End the command where a signal ended the run, by its word: the status is 128 and the signal's number."""
    from .stopping import SIGNALS

    for number, reason in SIGNALS.items():
        if stopped == reason:
            raise click.exceptions.Exit(128 + number)


def train_with_progress(
    train_set: Any, val_set: Any, out: Path, settings: Any, config: Mapping[str, Any], *, device: str = "cpu",
    ranks: Ranks | None = None, parts_of: Callable[[Any], Mapping[str, Any]] = lambda model: {}, **more: Any,
) -> Result:  # fmt: skip
    """Build the network of `config` for the set and train it, with what `parts_of` has for it and a progress bar."""
    from .ranks import ALONE
    from .train import train as run

    ranks = ranks or ALONE
    model = built(config, train_set, settings.ways, settings.seed).to(ranks.device or device_of(device))
    more = {**more, **parts_of(model)}
    with bar("training", ranks, left=False) as progress:
        return run(model, train_set, val_set, out=out, settings=settings, progress=progress, ranks=ranks, **more)


def built(config: Mapping[str, Any], images: ImageSet, ways: int, seed: int) -> nn.Module:
    """The network of a config for a set's images, with weights drawn by the seed."""
    import torch

    from . import models

    channels, height, side = images.image_shape
    torch.manual_seed(seed)
    shape = {"ways": ways, "in_channels": channels, "image_size": side if height == side else [height, side]}
    return models.build({**config, **shape})


def config_of(network: str, args: tuple[str, ...], width: int | None) -> dict[str, Any]:
    """What `models.build` takes, less what the images say."""
    given: dict[str, Any] = {}
    for arg in args:
        key, is_one, value = arg.partition("=")
        if not is_one or not key.isidentifier():
            raise ValueError(f"--network-args {arg}: expected KEY=VALUE, such as depth=12")
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
    if network == "conv4":
        if given:
            raise ValueError(f"--network-args {args[0]}: conv4 has --width alone")
        return {"network": network, "width": 32 if width is None else width}
    if width is not None:
        named = "widths=[64,128,256,512]" if network == "resnet12" else f"width={width}"
        raise ValueError(f"--width {width} is of conv4: give --network-args {named} to {network}")
    return {"network": network, **({"args": given} if ":" in network else given)}
