"""`lambda-maml pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_data import FOLDER_KEYS, image_sets
from .cli_train import augment_options, built, config_of, exit_if_stopped, network_options, set_options
from .cli_types import COUNT, RATE, SEED
from .console import bar, device_of, device_option, json_option, options, print_json, say

__all__ = ["pretrain"]

EPISODE = {"ways": 2, "shots": 1, "query": 0}
"""What classes must have, at least."""

run_options = options(
    click.option("--epochs", type=COUNT, default=30, help="Passes over the images."),
    click.option("--batch", type=click.IntRange(2, 10**9), default=128, help="Images of an update."),
    click.option("--lr", type=RATE, default=0.1, help="The first rate of SGD with momentum; it falls to 0."),
    click.option("--weight-decay", type=RATE, default=5e-4, help="Decay of the weights."),
    click.option(
        "--rotations",
        is_flag=True,
        help="Make three more classes of each, turned by 90, 180 and 270 degrees. Omniglot has them anyway.",
    ),
    click.option("--seed", type=SEED, default=0, help="Seed of the network and of the order of the images."),
    click.option(
        "--resume", is_flag=True, help="Continue the run in --out; the result is the same as without the break."
    ),
)


@click.command()
@set_options
@augment_options
@network_options
@run_options
@device_option
@json_option
def pretrain(
    dataset: str, root: Path | None, out: Path, network: str, network_args: tuple[str, ...], width: int | None,
    resume: bool, device: str, as_json: bool, **settings: Any,
) -> None:  # fmt: skip
    """Teach a network to tell all training classes apart, for train to begin with.

    All layers but the last one learn as in plain supervised training (Baseline of Chen et al. 2019); the last one
    becomes zero. Meta-training then needs a fraction of the iterations:

    \b
    lambda-maml pretrain --dataset cifar_fs --root DATA --width 64 --flip --crop 4 --out runs/pre
    lambda-maml train --start-from runs/pre/pretrained.safetensors ...

    In the folder: pretrained.safetensors with pretrained.json; before, pretraining.safetensors, the state after the
    last epoch. Ctrl-C ends the run, and SIGTERM, SIGHUP and SIGUSR1 do; --resume goes on from the last whole epoch.
    """
    from .pretrain import PRETRAINED, Pretraining
    from .pretrain import pretrain as run
    from .ranks import ALONE

    pictures = {key: settings.pop(key) for key in FOLDER_KEYS}
    chosen = Pretraining(**settings)
    (images,) = image_sets(dataset, root, ("train",), EPISODE, pictures, ALONE)
    model = built(config_of(network, network_args, width), images, 5, chosen.seed).to(device_of(device))
    with bar("pretraining", left=False) as progress:
        result = run(model, images, out=out, settings=chosen, resume=resume, progress=progress)
    last = result.history[-1] if result.history else None
    if as_json:
        print_json(
            {
                "checkpoint": str(out / PRETRAINED) if result.stopped == "epochs" else None,
                "stopped": result.stopped,
                "last": None if last is None else last._asdict(),
            }
        )
    elif result.stopped == "epochs" and last is not None:
        click.echo(
            f"{out / PRETRAINED}: {100 * last.accuracy:.1f} % of the images of {result.classes} training classes told "
            f"rightly in epoch {last.epoch}"
        )
    if result.stopped != "epochs":
        say(f"stopped by {result.stopped} after epoch {len(result.history)}; continue with --resume")
    exit_if_stopped(result.stopped)
