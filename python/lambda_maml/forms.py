"""What is read from a file, checked once against the form that it is declared to have."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec

__all__ = ["Count", "Finite", "From1", "NotBelow0", "Positive", "Share", "checked"]

Form = TypeVar("Form")
_MOST = 10**9
Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
From1 = Annotated[int, msgspec.Meta(ge=1, le=_MOST)]
Finite = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
NotBelow0 = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


def checked(value: Any, form: type[Form] | Any, source: object, remedy: str, at: str = "") -> Form:
    """`value`, of objects as JSON has them, in a form of msgspec: types, ranges, and fields that must be there.

    >>> checked({"steps": 5}, dict[str, Count], "a.json", "write it anew")
    {'steps': 5}

    source: the file, `at`: where in it the value stands, remedy: what helps, for the message.

    Raises:
        ValueError: it has another form; names the file, the field with what it holds, and the remedy.
    """
    try:
        found: Form = msgspec.convert(value, form)
        return found
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        what, _, path = str(error).partition(" - at `")
        path = path.rstrip("`")
        missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
        expected = re.match(r"Expected (`.*?`|.*?)(, got .*)?$", what)
        place = f"{at}{path.removeprefix('$')}" + (f".{missing[1]}" if missing else "")
        if missing:
            told = " is missing"
        elif what.startswith("Invalid enum value"):
            told = f" is {_at(value, path)}, which is none of its values"
        elif expected:
            told = f" is {_at(value, path)}, expected {expected[1].replace('`', '')}"
        else:  # what a data class says of its fields
            told = f": {what}"
        raise ValueError(f"{source}: {place.lstrip('.') or 'the whole'}{told}; {remedy}") from None


def _at(value: Any, path: str) -> str:
    """The value at a path of msgspec such as $.a[0].b, in few characters."""
    try:
        for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
            value = value[name] if name else value[int(index)]
    except (KeyError, IndexError, TypeError):
        return "not so"
    told = repr(value)
    return told if len(told) <= 60 else f"{told[:60]}..."
