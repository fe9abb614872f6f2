"""What an operation does beside its result: random numbers, writes, shared memory; read from schemas and tags.

An operation is run on fake tensors (shapes, strides and storages without values) under a mode that sees every operator
of ATen's that it comes to. No list of names: a new operator is known by its schema as soon as torch has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Deeds", "Watch", "is_random", "storages", "written"]


@dataclass
class Deeds:
    """What one operation does."""

    random: str | None = None  # the operator that draws
    writes: set[int] = field(default_factory=set)  # storages
    memory: frozenset[int] = frozenset()  # storages of its result
    statistics: bool = False  # writes running statistics, of which the schema says nothing
    otherwise: frozenset[int] = frozenset()  # storages that its result would share, were its inputs laid out otherwise


def storages(value: Any) -> frozenset[int]:
    """The storages of the tensors in a value, by a number each."""
    return frozenset(_number(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _number(t: Tensor) -> int:
    if t.layout is not torch.strided:
        return id(t)
    return int(t.untyped_storage()._cdata)


def is_random(op: Any, given: dict[str, Any]) -> bool:
    """Whether an operator, called with these arguments by name, draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    # Attention and dropout have one operator for both: what they are told says whether they draw.
    if given.get("dropout_p", given.get("dropout", 1.0)) == 0.0:
        return False
    return given.get("train", given.get("training", True)) is not False


def written(op: Any, given: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operator writes to."""
    for argument in op._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield given.get(argument.name)


def _tracked(given: dict[str, Any]) -> list[Any]:
    """Running statistics that a batch or instance norm moves; ATen's schemas of them name no write."""
    moving = next((given[name] for name in ("training", "train", "use_input_stats") if name in given), False)
    return [given[name] for name in ("running_mean", "running_var") if moving and given.get(name) is not None]


def by_name(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by the names that its schema gives them, defaults included."""
    arguments = op._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given.update((a.name, value) for a, value in zip(arguments, args))
    given.update(kwargs)
    return given


class Watch(TorchDispatchMode):
    """Notes what the operators do that are called under it.

    with fake_mode, Watch() as watch:
        y, deeds = watch.run(torch.nn.functional.dropout, x)
    deeds.random                                # "aten.native_dropout"
    """

    def __init__(self) -> None:
        super().__init__()
        self._deeds = Deeds()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = by_name(op, args, kwargs or {})
        if is_random(op, given):
            self._deeds.random = str(op.overloadpacket)
        for value in written(op, given):
            self._deeds.writes |= storages(value)
        if moved := _tracked(given):
            self._deeds.writes |= storages(moved)
            self._deeds.statistics = True
        return op(*args, **(kwargs or {}))

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Deeds]:
        """The function's result, and what it did."""
        self._deeds = deeds = Deeds()
        result = function(*args, **kwargs)
        deeds.memory = storages(result)
        deeds.otherwise = self._otherwise(function, args, kwargs) - deeds.memory
        return result, deeds

    def _otherwise(self, function: Callable[..., Any], args: Any, kwargs: Any) -> frozenset[int]:
        """The storages of arguments that the result shares where all of them are contiguous, or channels-last.

        `flatten` and `contiguous` give a view or a copy, as the memory lies.
        """
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found: set[int] = set()
        for layout in (torch.contiguous_format, torch.channels_last):
            laid = {id(t): torch.empty_like(t, memory_format=layout) for t in given if _may_lie(t, layout)}
            memory = self._memory_of(function, args, kwargs, laid)
            found.update(*(storages(t) for t in given if id(t) in laid and storages(laid[id(t)]) & memory))
        return frozenset(found)

    def _memory_of(
        self, function: Callable[..., Any], args: Any, kwargs: Any, tensors: dict[int, Tensor]
    ) -> frozenset[int]:
        """The storages of the function's result, with others in the places of its tensors; what it does is left out."""
        self._deeds = Deeds()
        args, kwargs = tree_map_only(Tensor, lambda t: tensors.get(id(t), t), (args, kwargs))
        try:
            return storages(function(*args, **kwargs))
        except Exception:  # `view`, say, refuses some memory
            return frozenset()


def _may_lie(t: Tensor, layout: torch.memory_format) -> bool:
    return t.layout is torch.strided and (layout is torch.contiguous_format or t.dim() == 4)
