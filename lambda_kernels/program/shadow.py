"""A module's shadow: other module objects around other tensors, so that a forward runs and the module stays as it is.

torch.func.functional_call puts the tensors into the module itself for as long as it runs: another thread computes with
them meanwhile, and what hooks write (the weight of weight_norm, spectral_norm, prune) stays behind.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .snapshot import BASE, SCALARS
from .structure import attributes, opened, slots_of

__all__ = ["leads_nowhere", "replace", "shadow", "shallow", "stands_for"]

_DEPTH = 4  # of containers and objects that an attribute is looked into
_CLOSED = (*SCALARS, Tensor, type, types.ModuleType, types.BuiltinFunctionType, torch.Generator, bytes, complex)
_TENSORS = ("_parameters", "_buffers", "_modules")
_OWN = tuple(n for n, held in nn.Module().__dict__.items() if isinstance(held, (dict, set)) and n not in _TENSORS)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_ORIGINS: MutableMapping[nn.Module, weakref.ref[nn.Module]] = WeakIdKeyDictionary()  # by shadow


def shadow(
    module: nn.Module, tensors: Mapping[str, Tensor] | None = None, modes: Mapping[str, bool] | None = None
) -> nn.Module:
    """A module of the same classes that computes what the given one does, with tensors and modes of its own.

        twin = shadow(model, {name: p - 0.1 * g for (name, p), g in zip(model.named_parameters(), gradients)})
        twin(x)                                     # the model's result after one step; the model is as it was

    Parameters that are not given are the module's own; buffers that are not given are copies. Hooks are the module's,
    and run on the shadow. Plain attributes are shared, unless they lead to a module or to one of its tensors (lists of
    modules, bound methods, closures): such are copied, and lead to the shadow.

    Args:
        tensors: parameters and buffers by full name, leaves or not. A second name of a shared tensor may be left out.
        modes: training or not, by the path of a module; the others keep theirs.

    Raises:
        TypeError: an attribute that leads to a module cannot be copied, or the module is one of torch.jit.
    """
    twin = _Copies(tensors or {}, modes or {}).tree(module, "")
    _ORIGINS[twin] = weakref.ref(stands_for(module))
    return twin


def stands_for(module: nn.Module) -> nn.Module:
    """The module of which this one is a shadow; the module itself where it is none, or where that one is gone."""
    origin = _ORIGINS.get(module)
    found = None if origin is None else origin()
    return module if found is None else found


def shallow(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The shadow of a childless module whose attributes are known to lead nowhere."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for group in ("_parameters", "_buffers"):
        twin.__dict__[group] = {n: None if t is None else tensors[n] for n, t in module.__dict__[group].items()}
    return twin


def leads_nowhere(module: nn.Module) -> bool:
    """Whether a module's attributes, beside its parameters and buffers, are numbers and words."""
    state = module.__dict__
    return all(type(state[n]) in SCALARS or _is_plain(state[n]) for n in state.keys() - BASE)


def replace(module: nn.Module, tensors: Mapping[int, Tensor]) -> None:
    """Put tensors in the places of a module's own, which are named by identity; also in its plain attributes.

    For a module that is a shadow: everything that leads to such a tensor is changed or made anew.
    """
    parts = list(module.modules())
    copies = _Copies({}, {})
    copies.tensors, copies.follows_modules = dict(tensors), False
    for part in parts:
        for group in (part._parameters, part._buffers):
            group.update({n: tensors[id(t)] for n, t in group.items() if id(t) in tensors})  # type: ignore[misc]
        for name in part.__dict__.keys() - BASE:
            value = part.__dict__[name]
            if type(value) not in SCALARS and not _is_plain(value):
                part.__dict__[name] = copies._copy(value, _DEPTH)


class _Copies:
    """The copies of one shadow, and the objects that they are copies of."""

    def __init__(self, tensors: Mapping[str, Tensor], modes: Mapping[str, bool]) -> None:
        self.given, self.modes = tensors, modes
        self.tensors: dict[int, Tensor] = {}  # by the identity of what they stand for
        self.kept: set[int] = set()  # identities of the module's own that were given
        self.copies: dict[int, Any] = {}
        self.follows_modules = True  # False: modules stay what they are

    def tree(self, root: nn.Module, path: str | None) -> nn.Module:
        """The shadow of a module with all its children; `path` is None outside of the module itself."""
        if id(root) in self.copies:
            return self.copies[id(root)]
        found: list[tuple[str | None, nn.Module]] = []
        self._walk(root, path, found)
        for path, module in found:
            self._tensors(path, module)
        for path, module in found:
            self._attributes(path, module)
        return self.copies[id(root)]

    def _walk(self, module: nn.Module, path: str | None, found: list[tuple[str | None, nn.Module]]) -> None:
        """Make the shadows of all modules, still empty, and note which tensors stand for which."""
        prefix = f"{path}." if path else ""
        if path is not None and self.given:
            for group in (module._parameters, module._buffers):
                for name, tensor in group.items():
                    given = None if tensor is None else self.given.get(prefix + name)
                    if given is tensor and tensor is not None:
                        self.kept.add(id(tensor))
                    elif given is not None:
                        self.tensors.setdefault(id(tensor), given)
        if id(module) not in self.copies:
            self.copies[id(module)] = _empty(module, path)
            found.append((path, module))
        elif path is None:
            return
        for name, child in module._modules.items():
            if child is not None:
                self._walk(child, None if path is None else prefix + name, found)

    def _tensors(self, path: str | None, module: nn.Module) -> None:
        state = self.copies[id(module)].__dict__
        state.update(module.__dict__)
        parameters, buffers, prefix = module._parameters, module._buffers, f"{path}." if path else ""
        for tensor in buffers.values():
            if tensor is not None and id(tensor) not in self.tensors and id(tensor) not in self.kept:
                self.tensors[id(tensor)] = tensor.detach().clone()
        for kind, group in (("_parameters", parameters), ("_buffers", buffers)):
            own: dict[str, Tensor | None] = dict(group)
            for name, tensor in group.items():
                given = None if tensor is None or path is None else self.given.get(prefix + name)
                own[name] = given if given is not None else self.tensors.get(id(tensor), tensor)
            state[kind] = own
        state["_modules"] = {
            name: None if child is None else self.copies[id(child)] for name, child in module._modules.items()
        }
        for name in _OWN:  # so that a hook that is set on the shadow is not set on the module
            state[name] = state[name].copy()
        if path is not None:
            state["training"] = self.modes.get(path, module.training)

    def _attributes(self, path: str | None, module: nn.Module) -> None:
        twin = self.copies[id(module)]
        state = module.__dict__
        for name in (*(state.keys() - BASE), *(name for name in _OWN if state[name])):
            value = state[name]
            if type(value) not in SCALARS and not _is_plain(value) and self._leads(value, _DEPTH):
                twin.__dict__[name] = self._moved(path, module, name, value)
        cls: Any = type(module)
        for name in slots_of(cls):
            if hasattr(module, name):
                object.__setattr__(twin, name, self._moved(path, module, name, getattr(module, name)))

    def _moved(self, path: str | None, module: nn.Module, name: str, value: Any) -> Any:
        try:
            return self._copy(value, _DEPTH)
        except TypeError as error:
            where = f"{path or type(module).__name__}.{name}"
            raise TypeError(f"{where} leads to a module and cannot be copied: {error}") from error

    def _leads(self, value: Any, depth: int) -> bool:
        """Whether a module, or a tensor that another stands for, is in the value."""
        met: dict[int, Any] = {}
        level = [value]
        for _ in range(depth + 1):
            below: list[Any] = []
            for item in level:
                if _is_plain(item) or id(item) in met:
                    continue
                if id(item) in self.tensors or (self.follows_modules and isinstance(item, nn.Module)):
                    return True
                if isinstance(item, nn.Module):
                    continue
                met[id(item)] = item
                below += _held(item)
            level = below
        return False

    def _copy(self, value: Any, depth: int) -> Any:
        """The value with the shadow's modules and tensors in the places of the module's."""
        if id(value) in self.tensors:
            return self.tensors[id(value)]
        if depth < 0 or not self._leads(value, depth):
            return value
        if type(value) in _PROXIES:
            raise TypeError("it is a weak proxy")
        if isinstance(value, nn.Module):
            return self.tree(value, None)
        if id(value) not in self.copies:
            self.copies[id(value)] = self._copied(value, depth)
        return self.copies[id(value)]

    def _copied(self, value: Any, depth: int) -> Any:
        def copy(part: Any) -> Any:
            return self._copy(part, depth - 1)

        found = opened(value)
        if found is not None:
            frame, parts = found
            frame.keys = tuple(copy(key) for key in frame.keys)
            return frame(*map(copy, parts))
        if isinstance(value, (set, frozenset)):
            return type(value)(map(copy, value))
        if isinstance(value, types.MethodType):
            return types.MethodType(copy(value.__func__), copy(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {name: copy(v) for name, v in value.keywords.items()}
            return type(value)(copy(value.func), *map(copy, value.args), **keywords)
        if isinstance(value, weakref.ref):
            return type(value)(copy(value()))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        made = self.copies[id(value)] = object.__new__(type(value))
        for name, attribute in attributes(value).items():
            object.__setattr__(made, name, copy(attribute))
        return made

    def _function(self, function: types.FunctionType, depth: int) -> types.FunctionType:
        cells = function.__closure__ or ()
        own = tuple(types.CellType() for _ in cells)
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, closure=own if cells else None
        )
        self.copies[id(function)] = made  # a function may hold itself
        for cell, new in zip(cells, own):
            if not _is_empty(cell):
                new.cell_contents = self._copy(cell.cell_contents, depth - 1)
        made.__defaults__ = self._copy(function.__defaults__, depth - 1)
        made.__kwdefaults__ = self._copy(function.__kwdefaults__, depth - 1)
        made.__dict__.update({name: self._copy(v, depth - 1) for name, v in function.__dict__.items()})
        return made


def _empty(module: nn.Module, path: str | None) -> Any:
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{path or type(module).__name__} is a module of torch.jit: its tensors cannot be replaced")
    try:
        return object.__new__(type(module))
    except TypeError as error:
        raise TypeError(f"{path or 'a module'}, a {type(module).__name__}, cannot be copied: {error}") from None


def _held(value: Any) -> Any:
    """What a value holds; nothing where it is known to hold no module."""
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        items = (*dict.keys(value), *dict.values(value)) if isinstance(value, dict) else tuple(value)
        known = type(value) in (dict, list, tuple, set, frozenset, OrderedDict)
        return items if known else (*items, *attributes(value).values())
    if isinstance(value, _CLOSED) or type(value).__module__.partition(".")[0] == "torch":
        return ()
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, weakref.ref):
        return (target,) if isinstance(target := value(), nn.Module) else ()
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        return (*cells, value.__defaults__, value.__kwdefaults__, *value.__dict__.values())
    return attributes(value).values()


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word or a list of such: a vocabulary is long, so it is looked at as a whole."""
    kind = type(value)
    return kind in SCALARS or (kind in (tuple, list) and SCALARS.issuperset(map(type, value)))


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:  # Python's answer for a name that has no value yet
        return True
