"""How far long work has come, and the time left, for the person who waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Progress", "shown", "spoken", "time_left"]

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what): whole numbers of the same unit, and a few words on the last step."""

EVERY = 10.0
"""Seconds between lines where there is no terminal."""


@contextmanager
def shown(
    progress: Progress | bool | None, title: str, *, here: bool = True, left: bool = True
) -> Iterator[Progress | None]:
    """What to call as work goes on: the function that is given, or, for True, what shows it on stderr.

    On a terminal that is a bar (by rich, if it is installed), else a line every ten seconds and at the end. With `left`
    the time left is said too, by the pace so far. False and None show nothing, nor does a process that is not the one
    to do it (`here`).
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress or not here:
        yield None
        return
    if (console := _terminal()) is None:
        yield _with_time_left(_lines(title)) if left else _lines(title)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, TextColumn("{task.description}"), console=console) as bars:
        task = bars.add_task("", total=None)

        def update(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=total, description=what)

        yield _with_time_left(update) if left else update


def _terminal() -> Any:
    """stderr as rich's console, or None where it is no terminal or rich is not installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    console = Console(stderr=True)
    return console if console.is_terminal else None


def _lines(title: str) -> Progress:
    last = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f"{title}: {done}/{total} {what}", file=sys.stderr, flush=True)

    return line


def _with_time_left(progress: Progress) -> Progress:
    """Adds the time left to the words, from the second call of a stretch on: one that counts on towards one total."""
    begun, first, last, whole = 0.0, 0, 0, -1

    def tell(done: int, total: int, what: str) -> None:
        nonlocal begun, first, last, whole
        now = time.monotonic()
        if total != whole or done < last:
            begun, first, whole = now, done, total
        last = done
        if first < done < total:
            what += f", {time_left((now - begun) / (done - first) * (total - done))}"
        progress(done, total, what)

    return tell


def time_left(seconds: float) -> str:
    """A time in words, rounded.

    >>> time_left(12000)
    '3 h 20 min left'
    """
    return f"{spoken(seconds)} left"


def spoken(seconds: float) -> str:
    """A length of time in words, rounded.

    >>> spoken(12000), spoken(42.3)
    ('3 h 20 min', '42 s')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"
