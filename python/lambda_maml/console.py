"""What the commands share: options, messages, progress bars."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .progress import Progress, shown

if TYPE_CHECKING:
    import torch

    from .ranks import Ranks

__all__ = ["bar", "device_of", "device_option", "json_option", "options", "print_json", "say"]

Command = TypeVar("Command", bound=Callable[..., Any])


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else."
)
device_option = click.option("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:N.")


def device_of(text: str) -> torch.device:
    import torch

    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(f"--device {text}: expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text}: this torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def say(text: str) -> None:
    """A line for the person who waits."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def bar(title: str, ranks: Ranks | None = None, *, left: bool = True) -> AbstractContextManager[Progress | None]:
    """A progress that `progress.shown` shows; None for every rank but the first."""
    return shown(True, title, here=ranks is None or ranks.rank == 0, left=left)
