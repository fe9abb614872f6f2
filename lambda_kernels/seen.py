"""What a module was when it was last looked at, and whether anything in it has been replaced since.

Looking through all attributes of a network in Python takes longer than many a small network's layers. Here the
addresses of everything that its modules hold are compared in one pass; what was there is kept alive, so that an address
means the same thing as before.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _build

__all__ = ["BASE", "SCALARS", "Seen"]

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


class Seen:
    """The modules, parameters, buffers, modes and plain attributes of a network at one time.

    Where it is `complete`, it holds no reference to the network itself, only to what it consists of.
    """

    def __init__(self, root: nn.Module) -> None:
        self._parts = [m for m in root.modules() if m is not root]
        self._containers: list[Any] = []
        self.complete = _ADDRESSES is not None and all(self._take(m) for m in root.modules())
        self._kept = [list(c.items()) if isinstance(c, dict) else list(c) for c in self._containers]
        self._known = self._now(root)
        self.memo: dict[Any, Any] = {}  # see `graph.memo_of`
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
