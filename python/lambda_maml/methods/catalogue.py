"""The methods by name: their table, and how a part is written down as JSON and made again.

A part remembers what it was made with, where that is numbers, texts, other parts, or the network itself. A file that
names a part can make nothing else than the parts of this catalogue.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..fingerprint import fingerprint
from ..inner.rules import sgd
from ..patterns import Pattern

__all__ = ["METHODS", "Method", "described", "made", "method", "named"]

_NETWORK = {"network": True}
Make = TypeVar("Make", bound=Callable[..., Any])


class Method(NamedTuple):
    """A part by its name."""

    name: str
    place: str
    """"rule", "solver", "estimator", "selector", "objective", "weights", "source" or "chooser"; see `places`."""
    make: Callable[..., Any]
    needs: str
    """What it asks of network, pattern and run, in words; "" where it takes all."""
    chain: str
    """Whether an adaptation with it may run on the fast chain, in words."""
    fill: Mapping[str, str]
    """Parameters that a run knows, by what it calls them: the command line fills them in."""

    @property
    def paper(self) -> str:
        """Whose it is, from its file: first author, title, and year or arXiv number."""
        text = " ".join((sys.modules[self.make.__module__].__doc__ or "").split())
        own = text[max(0, text.find(f"`{self.name}`")) :]
        found = re.search(r"([A-Z][\w-]+)((?:, [A-Z][\w-]+)*(?: et al\.)?), \*(.+?)\*(.{0,100})", own)
        if found is None:
            return ""
        first, others, title, rest = found.groups()
        number = re.search(r"arXiv (?:\d{4}\.\d{5})|\b(?:19|20)\d\d\b", rest)
        return f"{first}{' et al.' if others else ''}, {title}, {number[0] if number else ''}"

    @property
    def does(self) -> str:
        """The first sentence of its docstring."""
        return (inspect.getdoc(self.make) or "").partition("\n\n")[0].replace("\n", " ")


METHODS: dict[str, Method] = {}


def method(
    place: str, *, chain: str, needs: str = "", fill: Mapping[str, str] | None = None
) -> Callable[[Make], Make]:  # fmt: skip
    """Put a class, or a function that makes a part, into the catalogue; see `Method`."""

    def register(make: Make) -> Make:
        known = Method(make.__name__, place, make, needs, chain, fill or {})
        if not isinstance(make, type):

            @functools.wraps(make)
            def function(*args: Any, **given: Any) -> Any:
                part = make(*args, **given)
                _remember(part, known, args, given)
                return part

            METHODS[known.name] = known._replace(make=function)
            return function  # type: ignore[return-value]
        init: Callable[..., None] = make.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **given: Any) -> None:
            init(self, *args, **given)
            if type(self) is make:  # a class made of this one has settings of its own
                _remember(self, known, args, given)

        make.__init__ = __init__  # type: ignore[misc]
        METHODS[known.name] = known
        return make

    return register


def named(text: str) -> Method:
    """The method of a name, or of what only one name begins with.

    >>> named("ridge").name
    'ridge_head'

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [METHODS[text]] if text in METHODS else [m for name, m in METHODS.items() if name.startswith(text)]
    if len(found) != 1:
        told = f"several: {', '.join(m.name for m in found)}" if found and text else f"one of {', '.join(METHODS)}"
        raise ValueError(f"there is no one method {text!r}: expected {told}")
    return found[0]


def described(part: Any) -> Any:
    """What makes a part again, as JSON has it.

    >>> described(ridge_head(0.5))
    {'part': 'ridge_head', 'with': {'lam': 0.5}}

    Raises:
        ValueError: it, or one of its settings, is of a kind that JSON does not have.
    """
    if part is None or isinstance(part, (bool, int, str)):
        return part
    if isinstance(part, float):
        return part if abs(part) < float("inf") else {"number": str(part)}
    if isinstance(part, (list, tuple)):
        return [described(value) for value in part]
    if isinstance(part, Mapping) and all(isinstance(key, str) for key in part):
        return {"table": {key: described(value) for key, value in part.items()}}
    if isinstance(part, Pattern):
        return str(part)
    if type(part) is sgd and part.fixed is not None:
        return {"part": "sgd", "with": {"lr": part.lr}}
    form = getattr(part, "made_with", None)
    if form is None:
        raise ValueError(f"{part!r} is none of the package's own parts with settings that a file can hold")
    return form


def made(form: Any, network: nn.Module) -> Any:
    """The part that `described` wrote down, for a network.

    Raises:
        ValueError: the form is none that `described` gives, or its settings are out of range.
    """
    if isinstance(form, list):
        return tuple(made(value, network) for value in form)
    if not isinstance(form, dict):
        return form
    if form == _NETWORK:
        return network
    if form.keys() == {"number"} and form["number"] in ("inf", "-inf"):
        return float(form["number"])
    if form.keys() == {"table"} and isinstance(form["table"], dict):
        return {key: made(value, network) for key, value in form["table"].items()}
    name, settings = form.get("part"), form.get("with")
    if form.keys() != {"part", "with"} or not isinstance(settings, dict) or name not in {"sgd", *METHODS}:
        raise ValueError(f"a part is {str(form)[:100]}, expected one of {', '.join(METHODS)} with its settings")
    try:
        if name == "sgd":
            return sgd(settings["lr"])
        return METHODS[name].make(**{key: made(value, network) for key, value in settings.items()})
    except (TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error


def _remember(part: Any, method: Method, args: Any, given: Any) -> None:
    """What a part was made with: `made_with`, from which it can be made again, None where a setting is of a kind that a
    file does not have; `made_from`, by which two can be told apart."""
    bare = inspect.signature(method.make, follow_wrapped=True).bind(*args, **given).arguments
    settings = {**{k: v for k, v in bare.items() if k != "more"}, **bare.get("more", {})}
    network = {k for k in settings if method.fill.get(k) == "model"}
    part.__dict__["made_from"] = {k: _NETWORK if k in network else fingerprint(v) for k, v in settings.items()}
    try:
        own = {k: _NETWORK if k in network else described(v) for k, v in settings.items()}
    except ValueError:
        own = None
    part.__dict__["made_with"] = None if own is None else {"part": method.name, "with": own}
