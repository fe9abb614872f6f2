"""The kinds of values that options take: paths, and numbers that are finite."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import click

__all__ = ["COUNT", "PLACE", "RATE", "SEED", "SELECT_SEED", "TEST_SEED", "Number", "Place", "expanded"]


def expanded(text: str) -> str:
    """A path with ~ and variables such as $HOME replaced.

    >>> expanded("runs/demo")
    'runs/demo'

    Raises:
        ValueError: it is empty, or names a variable that is not set.
    """
    if not text:
        raise ValueError("a path is empty: is a variable of the shell not set?")
    found = os.path.expandvars(os.path.expanduser(text))
    unset = re.search(r"\$(\w+|\{\w+\})", found)
    if unset and not os.path.exists(found):
        raise ValueError(f"{text}: the variable {unset[0]} is not set")
    return found


class Place(click.Path):
    """A path, as `expanded` gives it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(expanded(os.fspath(value)), param, ctx)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Number(click.FloatRange):
    """A number in a range, neither infinite nor NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no finite number", param, ctx)
        return found


PLACE, RATE = Place(), Number(0, 1e6)
COUNT, SEED = click.IntRange(1, 10**9), click.IntRange(0, 2**32 - 1)

SELECT_SEED, TEST_SEED = 1000, 2000
"""Seeds of the tasks to choose on and to report on, apart from those of training and of its validation."""
