"""From a module to its torch.fx graph, where a trace of it holds what a call does."""

from __future__ import annotations

import copy
import operator
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from .. import layers
from ..layers import has_hooks
from .snapshot import fingerprint
from .steps import LAYERS
from .structure import opened

__all__ = ["trace"]

_TORCHS = (tuple, list, dict, torch.Size, immutable_list, immutable_dict)  # containers that torch.fx takes as they are
_TRACING = threading.RLock()  # torch.fx changes nn.Module itself for as long as it traces


class _Value(fx.Proxy):
    """A symbolic value on which `x += y` and `x[i] = y` are in-place steps, as they are on a tensor."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Input(_Value):
    """A symbolic input that passes for a tensor: `isinstance(x, Tensor)` in a forward takes a real call's branch."""

    @property
    def __class__(self) -> type:
        return Tensor

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("the class of an input is fixed")


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m).__module__ == layers.__name__ or super().is_leaf_module(m, module_qualified_name):
            return True
        if has_hooks(m) and any(isinstance(child, LAYERS) for child in m.modules()):
            raise fx.proxy.TraceError(f"{module_qualified_name} holds layers and has hooks")
        return has_hooks(m)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise fx.proxy.TraceError("its forward switches gradients or autocast for a part of it")
        return super().create_node(kind, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return (_Input if node.op == "placeholder" else _Value)(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Input:
            return a.node
        if type(a) not in _TORCHS and (found := opened(a)) is not None:  # torch.fx keeps no class but its own
            frame, parts = found
            return self.create_node("call_function", frame, tuple(self.create_arg(part) for part in parts), {})
        if isinstance(a, Tensor) and not any(a is t for t in (*self.root.parameters(), *self.root.buffers())):
            raise fx.proxy.TraceError(f"its forward uses a tensor {list(a.shape)} that is no parameter or buffer")
        return super().create_arg(a)


def _modes() -> tuple[Any, ...]:
    """What a `with` in a forward can change and a graph does not hold."""
    devices = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _graph(root: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    if "forward" in root.__dict__:
        raise fx.proxy.TraceError("its forward was replaced on the instance")
    if hasattr(type(root), "unfused_forward"):
        tracer.traced_func_name = "unfused_forward"
    return tracer.trace(root)


def _stand_in(root: nn.Module) -> nn.Module:
    """Copies of modules and buffers around the same parameters: a trace runs the forward, which may write to `self`."""
    memo: dict[int, Any] = {}
    for module in root.modules():
        for group in (module._parameters, module.__dict__):
            memo.update({id(value): value for value in group.values() if isinstance(value, Tensor)})
    return copy.deepcopy(root, memo)


def _versions(root: nn.Module) -> list[int]:
    return [t._version for t in (*root.parameters(), *root.buffers())]


def _outside() -> tuple[Any, ...]:
    """The states of the global random number generators."""
    return torch.random.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())


def _spelled(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(n.op, str(n.target), repr(n.args), repr(n.kwargs)) for n in graph.nodes]


def trace(root: nn.Module) -> fx.Graph:
    """The graph of a module's forward in its present mode. The module and all random numbers are left as they are.

    Raises:
        Exception: whatever the forward raises on a symbolic input, and fx.proxy.TraceError where a graph would not do
            what the forward does.
    """
    with _TRACING:
        torch_state, python_state, numpy_state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
        try:
            twin = _stand_in(root)
            before = fingerprint(twin), _versions(twin), _outside()
            graph = _graph(twin)
            with torch.set_grad_enabled(not torch.is_grad_enabled()):
                again = _graph(twin)
            if (fingerprint(twin), _versions(twin), _outside()) != before:
                raise fx.proxy.TraceError(
                    "its forward draws random numbers in Python or writes to attributes or buffers"
                )
            if _spelled(graph) != _spelled(again):
                raise fx.proxy.TraceError("its forward does not do the same twice, with gradients and without")
            return graph
        finally:
            torch.random.set_rng_state(torch_state)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
