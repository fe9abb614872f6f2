"""Values that hold others: tuples, lists, dicts, named tuples, data classes, and classes made of them.

They are taken apart and put together again as what they were: same class, same attributes. No code of a class runs.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

__all__ = ["Frame", "attributes", "flatten", "opened", "slots_of"]


def attributes(value: Any) -> dict[str, Any]:
    """What an object holds by name, in its `__dict__` and in its slots."""
    held = dict(getattr(value, "__dict__", ()))
    cls: Any = type(value)
    held.update((name, getattr(value, name)) for name in slots_of(cls) if hasattr(value, name))
    return held


@lru_cache(maxsize=1024)
def slots_of(cls: Any) -> tuple[str, ...]:
    """The names of the attributes that the objects of a class hold in slots."""
    found = []
    for base in cls.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


class Frame:
    """A container or data class without what it holds; called with that, it makes another of its class."""

    __name__ = "frame"  # torch.fx names a graph's node by it

    def __init__(self, value: Any, base: Any, parts: list[Any]) -> None:
        """Notes how `value` holds its parts, and appends them to `parts`."""
        self.cls, self.base = type(value), base
        self.keys: tuple[Any, ...] = tuple(base.keys(value)) if issubclass(base, dict) else ()
        if issubclass(base, dict):
            parts += base.values(value)
        elif base is not object:
            parts += base.__iter__(value)
        self.items = len(parts)
        self.factory = value.default_factory if isinstance(value, defaultdict) else None
        places = {id(part): place for place, part in enumerate(parts)}
        self.held: list[tuple[str, int]] = []  # attributes, and where they are among the parts
        for name, attribute in attributes(value).items() if self.cls is not base else ():
            if id(attribute) not in places:
                places[id(attribute)] = len(parts)
                parts.append(attribute)
            self.held.append((name, places[id(attribute)]))

    def __call__(self, *parts: Any) -> Any:
        base, items = self.base, parts[: self.items]
        made: Any
        if base is tuple:
            # torch.return_types are tuples made in C, which have a constructor of their own.
            made = self.cls(items) if hasattr(self.cls, "n_sequence_fields") else tuple.__new__(self.cls, items)
        else:
            made = base.__new__(self.cls)
        if base is list:
            list.extend(made, items)
        for key, item in zip(self.keys, items):
            base.__setitem__(made, key, item)
        if self.factory is not None:
            made.default_factory = self.factory
        for name, place in self.held:
            object.__setattr__(made, name, parts[place])
        return made

    def __repr__(self) -> str:
        return f"{self.cls.__module__}.{self.cls.__qualname__}({self.items}, {self.keys}, {self.held})"


def opened(value: Any) -> tuple[Frame, list[Any]] | None:
    """A container's or data class's frame and its parts, such that `frame(*parts)` equals it; None for all else."""
    base = _base(type(value))
    if base is None:
        return None
    parts: list[Any] = []
    return Frame(value, base, parts), parts


def flatten(value: Any) -> tuple[list[Tensor], Callable[[Sequence[Any]], Any]]:
    """The tensors in a result of any structure, and a function that puts others in their places.

        tensors, rebuild = flatten({"logits": z, "hidden": [h, None]})
        rebuild([t.detach() for t in tensors])          # {"logits": ..., "hidden": [..., None]}

    What is no tensor stays as it is. Raises ValueError where `rebuild` gets another number of values.
    """
    tensors: list[Tensor] = []
    make = _taken_apart(value, tensors)

    def rebuild(values: Sequence[Any]) -> Any:
        if len(values) != len(tensors):
            raise ValueError(f"a result of {len(tensors)} tensors cannot be made of {len(values)} values")
        return make(values)

    return tensors, rebuild


def _taken_apart(value: Any, tensors: list[Tensor]) -> Callable[[Sequence[Any]], Any]:
    if isinstance(value, Tensor):
        place = len(tensors)
        tensors.append(value)
        return lambda values: values[place]
    before, found = len(tensors), opened(value)
    makers = [_taken_apart(part, tensors) for part in found[1]] if found is not None else []
    if found is None or len(tensors) == before:
        return lambda values: value
    frame = found[0]
    return lambda values: frame(*(make(values) for make in makers))


def _base(cls: type) -> type | None:
    """The built-in class that a container is made of; `object` for a data class, None for all else."""
    if issubclass(cls, (Tensor, nn.Module)):
        return None
    found = next((base for base in (OrderedDict, defaultdict, dict, list, tuple) if issubclass(cls, base)), None)
    return object if found is None and dataclasses.is_dataclass(cls) else found
