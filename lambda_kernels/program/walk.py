"""Networks of torch's modules and ours alone: no code of a user's runs, so their graph is read off the tree."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layers import has_hooks
from .shadow import shadow
from .snapshot import BASE, SCALARS
from .watch import Deeds, Watch, storages

__all__ = ["is_walkable", "look", "plain_class", "plain_view", "walk"]

_HOMES = ("torch.nn.modules.", "lambda_kernels.layers")
# What a class holds that runs at no call of its objects.
_SILENT = frozenset((*vars(type("", (), {})), "__init__", "__annotations__", "__annotate_func__"))


def plain_class(module: nn.Module) -> Any:
    """The class that a module had before `convert` made a fused one of it."""
    cls: Any = type(module)
    return getattr(cls, "_lambda_fuses", cls)


def plain_view(module: nn.Module, cls: Any) -> nn.Module:
    """A module as one of another class, around the same attributes."""
    view: nn.Module = object.__new__(cls)
    view.__dict__ = module.__dict__
    return view


def _written(cls: Any) -> Any:
    """Torch's Sequential for a class that adds to it a constructor and names of its own alone; else the class."""
    own = cls
    while own is not nn.Sequential:
        if len(own.__bases__) != 1 or type(own) is not type:
            return cls
        (base,) = own.__bases__
        for name in vars(own).keys() - _SILENT:
            if name.startswith("__") or name in BASE or hasattr(base, name):
                return cls
        own = base
    return own


def is_walkable(root: nn.Module) -> bool:
    """Whether a call of the module runs torch's code and ours only; a class may add a constructor to Sequential."""
    return all(_is_ours(module) for module in root.modules())


def _is_ours(module: nn.Module) -> bool:
    cls = _written(plain_class(module))
    if not f"{cls.__module__}.".startswith(_HOMES) or has_hooks(module):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if not f"{getattr(cls.forward, '__module__', '')}.".startswith(_HOMES):  # replaced on torch's own class
        return False
    # An activation, say, that a user gave to a layer of torch's.
    return not any(_is_users(v) for name, v in module.__dict__.items() if name not in BASE)


def _is_users(value: Any) -> bool:
    if type(value) in SCALARS or isinstance(value, (Tensor, tuple, list, types.BuiltinFunctionType)):
        return isinstance(value, (tuple, list)) and any(map(_is_users, value))
    home = getattr(value, "__module__", None) or type(value).__module__
    return not str(home).startswith(("torch", "builtins", "lambda_kernels", "collections"))


def walk(root: nn.Module) -> fx.Graph:
    """The graph of the module's call with one tensor: its layers in a row, `call_module` by path."""
    graph = fx.Graph()
    paths = {id(module): path for path, module in reversed([*root.named_modules(remove_duplicate=False)])}
    value = graph.placeholder("x")

    def visit(module: nn.Module, value: fx.Node) -> fx.Node:
        if _written(plain_class(module)) is nn.Sequential:
            for child in module._modules.values():
                assert child is not None
                value = visit(child, value)
            return value
        return graph.call_module(paths[id(module)], (value,))

    graph.output(visit(root, value))
    return graph


def look(root: nn.Module, graph: fx.Graph, x: Tensor) -> str | None:
    """Note in a walked graph's nodes (`meta["deeds"]`) what each of its modules does to an input like x.

    Returns why that cannot be seen, or None.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    parts = {n: p.detach() for n, p in root.named_parameters() if not p.is_leaf}  # adapted ones, of a graph
    try:
        # Contiguous, whatever x is: where a view is possible at all, it is one then.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Watch() as watch:
            twin = shadow(root, parts)  # what is written to buffers is written to copies
            value: Any = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            start = Deeds(memory=storages(value))
            for node in graph.nodes:
                if node.op == "placeholder":
                    node.meta["deeds"], node.meta["kept"] = start, value
                elif node.op == "call_module":
                    module = twin.get_submodule(str(node.target))
                    value, node.meta["deeds"] = watch.run(module, value)
                    node.meta["kept"] = value  # so that no storage's number is given to another
    except Exception as error:  # whatever a module raises on such an input, or torch on a fake one
        return f"it cannot be seen what its layers do ({type(error).__name__}: {error})"
    return None
