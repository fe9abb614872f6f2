"""The command line, `lambda-maml`: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from .cli_adapt import adapt
from .cli_checkpoint import inner_loop, inner_options, load, pattern_of
from .cli_config import with_config
from .cli_demo import demo
from .cli_eval import evaluate_command
from .cli_export import export, predict
from .cli_methods import methods
from .cli_pretrain import pretrain
from .cli_report import report
from .cli_select import select
from .cli_train import train
from .cli_types import PLACE
from .console import device_option, json_option, print_json


class Group(click.Group):
    """Commands in the order in which they are defined, each with `--config`."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(with_config(cmd, self), name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(cls=Group, context_settings=HELP, invoke_without_command=True)
@click.version_option(package_name="lambda-kernels", prog_name="lambda-maml")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Adapt few-shot networks fast: find out which layers a MAML-trained network must update.

    A pattern has one bit per layer, input first: 0 frozen, 1 updated while adapting to a new task. 11111 is MAML, 00001
    is ANIL, and these names may stand for them. Begin with `lambda-maml demo`; then `train` a network, `select` a
    pattern, and `adapt` to your own images.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (demo, pretrain, train, methods, select, evaluate_command, adapt, predict, export, report):
    cli.add_command(command)


@cli.command()
@click.argument("checkpoint", type=PLACE, required=False)
@click.option("--pattern", help="Bits, a name, or a pattern.json, to explain.  [default: all layers]")
@inner_options
@device_option
@json_option
def info(
    checkpoint: Path | None, pattern: str | None, steps: int | None, lr: float | None, norm: str | None, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Versions, devices, and which kernels can run here.

    With a CHECKPOINT also which way an adaptation of its network takes, and why it takes no faster one.
    """
    from lambda_kernels import info as kernels

    found = kernels.collect()
    ways = "" if checkpoint is None else _ways(checkpoint, pattern, steps, lr, norm, device)
    if as_json:
        print_json({**found, **({"adaptation": ways.splitlines()} if ways else {})})
    else:
        click.echo(kernels.text(found))
        if ways:
            click.echo(f"\n{ways}")


def _ways(
    checkpoint: Path, pattern: str | None, steps: int | None, lr: float | None, norm: str | None, device: str
) -> str:
    """How the checkpoint's network is adapted to a support set of its own ways and shots."""
    import torch

    from .explain import explain
    from .models import image_shape

    model, meta = load(checkpoint, device)
    bits, report = pattern_of(model, pattern)
    settings = meta["settings"]
    ys = torch.arange(settings["ways"]).repeat_interleave(settings["shots"]).to(device)
    some = next(model.parameters())
    xs = torch.zeros(len(ys), *image_shape(meta["network"]), dtype=some.dtype, device=device)
    return explain(model, xs, ys, pattern=bits, **inner_loop(checkpoint, model, meta, report, steps, lr, norm))


def run(args: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after an error (one line on stderr, whatever the error is),
    130 after Ctrl-C. Of several ranks one says what all have met.

    With LAMBDA_MAML_DEBUG=1 in the environment errors show their traceback.
    """
    debug = os.environ.get("LAMBDA_MAML_DEBUG", "") not in ("", "0")
    try:
        given = sys.argv[1:] if args is None else args
        status = cli.main(given, prog_name="lambda-maml", standalone_mode=False, obj=given)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        message = error.format_message()
    except (click.Abort, KeyboardInterrupt):
        click.echo("lambda-maml: interrupted", err=True)
        return 130
    except Exception as error:
        if debug:
            raise
        if getattr(error, "told", False):  # `ranks.Lost`: another rank says it
            return 2
        message = _told(error)
    click.echo(f"lambda-maml: error: {' '.join(message.split())}", err=True)
    return 2


def _told(error: Exception) -> str:
    """The text of an error; of one that no check foresaw, also its kind."""
    if isinstance(error, MemoryError):
        return f"the memory does not suffice ({error or 'no more could be had'}): take fewer tasks or smaller images"
    if isinstance(error, (ValueError, OSError, ArithmeticError, RuntimeError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (unforeseen: LAMBDA_MAML_DEBUG=1 shows where)"


def main() -> None:
    """Entry point of the console script. Networks of one's own are found in the current folder too, as by python -m."""
    sys.path.append(os.getcwd())
    status = run()
    if status and os.environ.get("RANK"):
        # A collective that another rank left alone would hold this process until its own timeout.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
