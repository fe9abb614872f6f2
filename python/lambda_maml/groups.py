"""Bits by name: what the names of patterns, and bits by the paths of modules, stand for in a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

__all__ = ["bits_by_path", "bits_of", "checked", "is_bits", "parts_of"]

_NAMES = {name.lower(): name for name in ("MAML", "ANIL", "BOIL", "head")}


def is_bits(stage: str) -> bool:
    """Whether a stage of a pattern is bits, not a name."""
    return set(stage) <= {"0", "1"}


def checked(part: str, text: str) -> str:
    """One stage of a pattern's text, bits or a name in its usual spelling."""
    path, colon, bits = part.rpartition(":")
    if not part or (colon and not (path and bits)):
        raise ValueError(f"pattern {text!r} is empty: give one bit per layer, as in '00011'")
    if not colon and part.lower() in _NAMES:
        return _NAMES[part.lower()]
    wrong = sorted(set(bits) - {"0", "1"})
    if wrong and any(c.isalpha() for c in part):
        close = get_close_matches(part.lower(), _NAMES, 1)
        known = f"did you mean {_NAMES[close[0]]}?" if close else f"names are {', '.join(_NAMES.values())}, stages:0011"
        raise ValueError(f"pattern {text!r}: {part!r} is neither bits, 0 (frozen) and 1 (updated), nor a name: {known}")
    if wrong:
        raise ValueError(f"pattern {text!r} has {', '.join(map(repr, wrong))}: a bit is 0 (frozen) or 1 (updated)")
    if "1" not in bits:
        raise ValueError(f"pattern {text!r} updates no layer: at least one bit of {bits!r} must be 1")
    return part


def bits_of(stage: str, names: Sequence[str], network: str) -> str:
    """The bits that a stage's name stands for in a network with layers of these names."""
    last = len(names) - 1
    if stage == "MAML":
        return "1" * len(names)
    if stage == "BOIL":
        if last == 0:
            raise ValueError(f"pattern 'BOIL' updates all layers but the last, {network} has one layer")
        return "1" * last + "0"
    if stage in ("ANIL", "head"):
        return "0" * last + "1"
    path, _, bits = stage.rpartition(":")
    parent = path
    if path == "stages" and not any(_below(name, path) for name in names):
        parent, _ = parts_of(names)
    groups = list(dict.fromkeys(_child(name, parent) for name in names if _below(name, parent)))
    if not groups:
        raise ValueError(f"pattern {stage!r}: {_no_layer(path, names, network)}")
    if len(groups) != len(bits):
        raise ValueError(
            f"pattern {stage!r} has {len(bits)} bits, {parent or network} has {len(groups)} parts with layers "
            f"({', '.join(groups)}): give one bit for each"
        )
    by_group = dict(zip(groups, bits))
    return "".join(by_group.get(_child(name, parent), "0") if _below(name, parent) else "0" for name in names)


def parts_of(names: Sequence[str]) -> tuple[str, list[str]]:
    """The path of the innermost module that holds all layers of these names, and those of its children with layers."""
    parent = ""
    while len(parts := dict.fromkeys(_child(name, parent) for name in names)) == 1 and parent not in names:
        parent = next(iter(parts))
    return parent, list(parts)


def bits_by_path(given: Mapping[str, int], names: Sequence[str], network: str) -> str:
    """The bits of layers of these names, each that of the longest given path at or above it."""
    for path, bit in given.items():
        if bit not in (0, 1):
            raise ValueError(f"pattern of {path!r} is {bit!r}: a bit is 0 (frozen) or 1 (updated)")
        if not any(_below(name, path) for name in names):
            raise ValueError(f"pattern of {path!r}: {_no_layer(path, names, network)}")
    chosen = [max((path for path in given if _below(name, path)), key=len, default=None) for name in names]
    if not any(given[path] for path in chosen if path is not None):
        raise ValueError(f"pattern {dict(given)} updates no layer of {network}: at least one bit must be 1")
    return "".join("0" if path is None else str(int(given[path])) for path in chosen)


def _below(name: str, path: str) -> bool:
    """Whether a layer is the module at a path or below it."""
    return not path or name == path or name.startswith(f"{path}.")


def _child(name: str, parent: str) -> str:
    """The path of that child of `parent` which is, or holds, a layer."""
    start = len(parent) + 1 if parent else 0
    end = name.find(".", start)
    return name if end < 0 else name[:end]


def _no_layer(path: str, names: Sequence[str], network: str) -> str:
    parents = dict.fromkeys(name[: m.start()] for name in names for m in re.finditer(r"\.|$", name))
    inside = next((name for name in names if path.startswith(f"{name}.")), None)
    if inside is not None:
        return f"it is a part of the layer {inside!r}"
    close = get_close_matches(path, parents, 3) or list(dict.fromkeys(_child(name, "") for name in names))
    return f"{network} has no layer at or below it: there are {', '.join(close)}"
