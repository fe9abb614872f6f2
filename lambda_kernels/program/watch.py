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


_LAYOUTS = (torch.contiguous_format, torch.channels_last)


@dataclass
class Deeds:
    """What one operation does."""

    random: str | None = None  # the operator that draws
    writes: set[int] = field(default_factory=set)  # storages
    memory: frozenset[int] = frozenset()  # storages of its result
    statistics: bool = False  # writes running statistics, of which the schema says nothing
    otherwise: frozenset[int] = frozenset()  # storages that its result would share, were its inputs laid out otherwise
    uncertain: bool = False  # whether its result shares a storage at all depends on how its inputs lie


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
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        views = [self._views(function, args, kwargs, given, layout) for layout in _LAYOUTS]
        deeds.otherwise = frozenset().union(*filter(None, views)) - deeds.memory
        now = deeds.memory & storages(given)
        if now or deeds.otherwise:
            views += [self._views_mapped(function, args, kwargs, given, behind) for behind in (False, True)]
        deeds.uncertain = any(found is not None and found != now for found in views)
        return result, deeds

    def _views(
        self, function: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor], layout: torch.memory_format
    ) -> frozenset[int] | None:
        """The storages of arguments that the result shares where all of them lie in this layout; None where it cannot
        be had.

        `flatten` and `contiguous` give a view or a copy, as the memory lies.
        """
        laid = {id(t): torch.empty_like(t, memory_format=layout) for t in given if _may_lie(t, layout)}
        return self._shared(given, laid, lambda: _instead(function, args, kwargs, laid))

    def _views_mapped(
        self, function: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor], behind: bool
    ) -> frozenset[int] | None:
        """The same for tensors of two tasks, mapped by torch.func.vmap, whose axis lies in front or behind."""
        many = [t.new_empty((*t.shape, 2) if behind else (2, *t.shape)) for t in given]

        def one(*tensors: Tensor) -> Any:
            result = _instead(function, args, kwargs, {id(t): own for t, own in zip(given, tensors)})
            return tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))

        axes = tuple(t.dim() if behind else 0 for t in given)
        own = {id(t): whole for t, whole in zip(given, many)}
        return self._shared(given, own, lambda: torch.func.vmap(one, in_dims=axes)(*many))

    def _shared(self, given: list[Tensor], own: dict[int, Tensor], result: Callable[[], Any]) -> frozenset[int] | None:
        """The storages of given tensors whose stand-ins a result shares; what is done to get it is left out."""
        self._deeds = Deeds()
        try:
            memory = storages(result())
        except Exception:  # `view`, say, refuses some memory, and vmap has no rule for some operators
            return None
        return frozenset().union(*(storages(t) for t in given if id(t) in own and storages(own[id(t)]) & memory))


def _instead(function: Callable[..., Any], args: Any, kwargs: Any, tensors: dict[int, Tensor]) -> Any:
    """function(*args, **kwargs) with other tensors in the places of some."""
    args, kwargs = tree_map_only(Tensor, lambda t: tensors.get(id(t), t), (args, kwargs))
    return function(*args, **kwargs)


def _may_lie(t: Tensor, layout: torch.memory_format) -> bool:
    return t.layout is torch.strided and (layout is torch.contiguous_format or t.dim() == 4)
