"""What a module was when it was last looked at, and whether anything in it has been replaced since.

A fingerprint says which modules are of one structure; a snapshot, whether one module still is what it was. Looking
through all attributes of a network in Python takes longer than many a small network's layers. So a snapshot compares
the addresses of everything that its modules hold, in one pass; what was there is kept alive, so that an address means
the same thing as before.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _build
from ..layers import has_hooks

__all__ = ["BASE", "SCALARS", "Snapshot", "fingerprint"]

SCALARS = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device))
BASE = frozenset(nn.Module().__dict__)
_HOOKS = tuple(name for name in BASE if name.endswith("_hooks"))


def _addresses() -> Callable[[list[Any], list[Any]], bytes] | None:
    """The extension's pass over all containers; None where it cannot be had."""
    try:
        if _build.mismatch():
            return None
        return importlib.import_module("lambda_kernels._C").addresses
    except (ImportError, ValueError, AttributeError):
        return None


_ADDRESSES = _addresses()


class Snapshot:
    """The modules, parameters, buffers, modes and plain attributes of a network at one time.

    Where it is `complete`, it holds no reference to the network itself, only to what it consists of.
    """

    def __init__(self, root: nn.Module) -> None:
        self._parts = [m for m in root.modules() if m is not root]
        self._containers: list[Any] = []
        self.complete = _ADDRESSES is not None and all(self._take(m) for m in root.modules())
        self._kept = [list(c.items()) if isinstance(c, dict) else list(c) for c in self._containers]
        self._known = self._now(root)
        self.memo: dict[Any, Any] = {}  # see `lookup.memo_of`
        self.parameters, self.buffers = (
            [
                (f"{path}.{name}" if path else name, group, name)
                for path, module in root.named_modules(remove_duplicate=False)
                for group in (module.__dict__[kind],)
                for name, tensor in group.items()
                if tensor is not None
            ]
            for kind in ("_parameters", "_buffers")
        )

    def holds(self, root: nn.Module) -> bool:
        """Whether the network is as it was; False where that cannot be told cheaply."""
        return self.complete and self._now(root) == self._known

    def _now(self, root: nn.Module) -> bytes:
        return _ADDRESSES([root, *self._parts], self._containers) if self.complete and _ADDRESSES else b""

    def _take(self, module: nn.Module) -> bool:
        """Note a module's dicts and lists; False where it holds something that can change in its place."""
        state = module.__dict__
        if any(state[name] for name in _HOOKS):
            return False
        self._containers.append(state)
        for name, value in state.items():
            if type(value) in (list, dict) or isinstance(value, dict):
                values = value.values() if isinstance(value, dict) else value
                if name not in BASE and not all(_is_fixed(v) for v in values):
                    return False
                self._containers.append(value)
            elif name not in BASE and not _is_fixed(value):
                return False
        return True


def _is_fixed(value: Any) -> bool:
    """Whether a value stays what it is as long as it stays in its place."""
    if type(value) in SCALARS or isinstance(value, (Tensor, types.BuiltinFunctionType)):
        return True
    if type(value) is tuple:
        return all(_is_fixed(v) for v in value)
    return isinstance(value, types.FunctionType) and value.__closure__ is None and not value.__dict__


class _Same:
    """Compares by identity, and keeps the object so that its identity is not given to another."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _freeze(value: Any, depth: int = 4) -> Any:
    """What the value is now, hashable: containers and plain objects by what they hold, `depth` levels deep."""
    if type(value) in SCALARS:
        return value
    if depth == 0 or isinstance(value, (Tensor, nn.Module, type)):
        return _Same(value)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_freeze(v, depth - 1) for v in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_freeze(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return dict, tuple((_freeze(k, depth - 1), _freeze(v, depth - 1)) for k, v in value.items())
    held = getattr(value, "__dict__", None)
    return (_Same(value), _freeze(held, depth - 1)) if isinstance(held, dict) and held else _Same(value)


def fingerprint(root: nn.Module) -> tuple[Any, ...]:
    """All that a module's trace can depend on: classes, modes, hooks, plain attributes, which tensors there are."""
    parts: list[Any] = []
    seen: dict[int, str] = {}
    numbers: dict[int, int] = {}
    for path, module in root.named_modules():
        state = module.__dict__
        parts += (path, type(module), module.training, has_hooks(module))
        for name, child in state["_modules"].items():
            parts += (name, child is None or numbers.setdefault(id(child), len(numbers)))
        for group in (state["_parameters"], state["_buffers"]):
            for name, tensor in group.items():
                parts += (name, tensor is None or seen.setdefault(id(tensor), f"{path}.{name}"))
        for name, value in state.items():
            if name not in BASE:
                parts += (name, value if type(value) in SCALARS else _freeze(value))
    return tuple(parts)
