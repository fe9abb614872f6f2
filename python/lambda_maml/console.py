"""What the commands share: options, messages, progress bars."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch

    from .evaluate import Progress
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


@contextmanager
def bar(title: str, ranks: Ranks | None = None) -> Iterator[Progress | None]:
    """A progress bar on stderr on a terminal, else a line there every ten seconds and at the end; None for every rank
    but the first."""
    if ranks is not None and ranks.rank != 0:
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Bar(*columns, console=console) as shown:
            task = shown.add_task("", total=None)
            yield lambda done, total, what: shown.update(task, completed=done, total=total, description=what)
        return
    last = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"{title}: {done}/{total} {what}")

    yield line
