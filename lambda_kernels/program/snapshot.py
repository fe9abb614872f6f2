"""What a module was when it was last looked at, and whether anything in it has been replaced since.

A fingerprint says which modules are of one structure; a snapshot, whether one module still is what it was. Looking
through all attributes of a network in Python takes longer than many a small network's layers. So a snapshot compares
the addresses of everything that its modules hold, in one pass; what was there is kept alive, so that an address means
the same thing as before.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _build
from ..layers import has_hooks

__all__ = ["BASE", "SCALARS", "Snapshot", "Stamp", "fingerprint", "outline", "same_values"]

SCALARS = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device))
BASE = frozenset(nn.Module().__dict__)
_HOOKS = tuple(name for name in BASE if name.endswith("_hooks"))
_NOT_BUILT = ("training", "_compiled_call_impl")  # attributes that are no part of a network's structure
_RUN = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # when a module is called


def _native(name: str) -> Any:
    """A function of the extension; None where it cannot be had."""
    try:
        if _build.mismatch():
            return None
        return getattr(importlib.import_module("lambda_kernels._C"), name)
    except (ImportError, ValueError, AttributeError):
        return None


_ADDRESSES: Callable[[list[Any], list[Any], bool], bytes] | None = _native("addresses")
_FORMS: Callable[[list[Tensor]], bytes] | None = _native("forms")
_SAME: Callable[[list[Tensor], list[Tensor]], bool] | None = _native("same")
_VERSIONS: Callable[[list[type], list[Any]], bytes] | None = _native("versions")


def same_values(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors hold what others of their shapes do, of which torch's counts of writes do not tell all: a fused
    optimiser's, a batch norm's, and those through `.data` or `.numpy()` are not among them."""
    if _SAME is not None:
        return _SAME(list(tensors), list(others))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


class Snapshot:
    """The modules, parameters, buffers, modes and plain attributes of a network at one time.

    Without `attributes`, plain attributes count by their names alone: guards of a capture see their values. Where it is
    `complete`, it holds no reference to the network itself, only to what it consists of.
    """

    def __init__(self, root: nn.Module, attributes: bool = True) -> None:
        self._parts = [m for m in root.modules() if m is not root]
        self._containers: list[Any] = []
        self._names = not attributes
        for module in root.modules():
            versioned(type(module))
        take = self._take if attributes else self._take_contents
        self.complete = _ADDRESSES is not None and all([take(m) for m in root.modules()])
        self._kept = [list(c.items()) if isinstance(c, dict) else list(c) for c in self._containers]
        self._kept.append([name for module in root.modules() if self._names for name in module.__dict__])
        self._known = self._now(root)
        self.memo: dict[Any, Any] = {}  # see `lookup.memo_of`
        self.parameters, self.buffers = (
            [
                (f"{path}.{name}" if path else name, group, name)
                for path, module in root.named_modules(remove_duplicate=False)
                for group in (module.__dict__.get(kind, {}),)
                for name, tensor in group.items()
                if tensor is not None
            ]
            for kind in ("_parameters", "_buffers")
        )
        self._groups = [*self.parameters, *self.buffers]

    def forms(self) -> Any:
        """What the parameters and buffers are at present, without their values."""
        tensors = [group[name] for _, group, name in self._groups]
        if _FORMS is not None:
            return _FORMS(tensors)
        return [(t.dtype, t.device, t.requires_grad, t.layout, t.shape) for t in tensors]

    def holds(self, root: nn.Module) -> bool:
        """Whether the network is as it was; False where that cannot be told cheaply."""
        return self.complete and self._now(root) == self._known

    def rebuilt(self, root: nn.Module) -> str | None:
        """What of the network's structure is another, in words; None where only modes, hooks and tensors may be.

        Attributes count for networks of torch's layers alone: a forward of somebody's own may write some.
        """
        modules = list(root.modules())
        if len(modules) != len(self._parts) + 1 or any(a is not b for a, b in zip(modules[1:], self._parts)):
            return "its layers are others"
        tensors = {id(m.__dict__[name]): m for m in modules for name in ("_parameters", "_buffers")}
        hooks = {id(m.__dict__[name]) for m in modules for name in _HOOKS if name in m.__dict__}
        own = {id(m.__dict__): m for m in modules}
        for container, kept in zip(self._containers, self._kept):
            if id(container) in hooks:
                continue
            now = list(container.items()) if isinstance(container, dict) else [(None, v) for v in container]
            then = kept if isinstance(container, dict) else [(None, v) for v in kept]
            if id(container) in tensors:
                present, before = ([(name, t is None) for name, t in items] for items in (now, then))
                if present != before:
                    return f"parameters or buffers of {type(tensors[id(container)]).__name__} are others"
            elif id(container) in own:
                held = [{name: v for name, v in items if name not in _NOT_BUILT} for items in (now, then)]
                names = {**held[0], **held[1]}
                if changed := [n for n in names if not _alike(held[0].get(n, held), held[1].get(n, held))]:
                    return f"{changed[0]} of {type(own[id(container)]).__name__} is another"
            elif len(now) != len(then) or not all(_alike(a, b) for x, y in zip(now, then) for a, b in zip(x, y)):
                return "its layers are others"
        return None

    def _now(self, root: nn.Module) -> bytes:
        if not self.complete or _ADDRESSES is None:
            return b""
        return _ADDRESSES([root, *self._parts], self._containers, self._names)

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

    def _take_contents(self, module: nn.Module) -> bool:
        """Note what a module holds beside attributes; False where something may lead back to the network."""
        if isinstance(module, torch.jit.ScriptModule):  # its tensors are held elsewhere
            return False
        self._containers += [module.__dict__[name] for name in ("_parameters", "_buffers", "_modules", *_RUN)]
        hooked = any(module.__dict__[name] for name in _RUN)
        return not hooked and all(_is_closed(v, 4) for name, v in module.__dict__.items() if name not in BASE)


def versioned(cls: type) -> type:
    """The class, which has a version number from its first look-up of a name on."""
    hasattr(cls, "forward")
    return cls


class Stamp:
    """What classes and functions were at one time: methods may be replaced in a class, code in a function."""

    def __init__(self, classes: Sequence[type], functions: Sequence[types.FunctionType]) -> None:
        self._classes, self._functions = [versioned(cls) for cls in classes], list(functions)
        self._kept = [function.__code__ for function in functions]
        self._known = self._now()

    def holds(self) -> bool:
        """Whether all are as they were."""
        return self._now() == self._known

    def _now(self) -> Any:
        if _VERSIONS is not None:
            return _VERSIONS(self._classes, self._functions)
        codes = [function.__code__ for function in self._functions]
        return [list(map(id, vars(cls).values())) for cls in self._classes], list(map(id, codes))


def _alike(a: Any, b: Any) -> bool:
    """Whether two attributes are the same object, or numbers and texts that are equal."""
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(_alike, a, b))
    return a is b or (type(a) in SCALARS and type(a) is type(b) and bool(a == b))


def _is_fixed(value: Any) -> bool:
    """Whether a value stays what it is as long as it stays in its place."""
    if type(value) in SCALARS or isinstance(value, (Tensor, types.BuiltinFunctionType)):
        return True
    if type(value) is tuple:
        return all(_is_fixed(v) for v in value)
    return isinstance(value, types.FunctionType) and value.__closure__ is None and not value.__dict__


def _is_closed(value: Any, depth: int) -> bool:
    """Whether a value is known to hold no module."""
    kind = type(value)
    if kind in SCALARS or isinstance(value, (Tensor, type, types.BuiltinFunctionType, types.ModuleType)):
        return True
    if isinstance(value, (nn.Module, types.MethodType)) or depth == 0:
        return False
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None and not value.__dict__
    held: Any = ()
    if isinstance(value, dict):
        held = value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        held = value
    own = getattr(value, "__dict__", {})
    return all(_is_closed(v, depth - 1) for v in (*held, *own.values())) and not (
        kind.__module__ == "functools" and kind.__name__ == "partial"
    )


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


def outline(root: nn.Module) -> tuple[Any, ...]:
    """What the modules of one captured program have in common, beside what its guards see.

    Classes, modes, the names of attributes, how many hooks, which parameters and buffers there are and which of them
    are shared.
    """
    parts: list[Any] = []
    seen: dict[int, str] = {}
    numbers: dict[int, int] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        state = module.__dict__
        parts += (path, type(module), module.training, numbers.setdefault(id(module), len(numbers)), *state)
        parts += [len(state.get(name, ())) for name in _RUN]
        for group in (state.get("_parameters", {}), state.get("_buffers", {})):
            for name, tensor in group.items():
                parts += (name, tensor is None or seen.setdefault(id(tensor), f"{path}.{name}"))
    return tuple(parts)
