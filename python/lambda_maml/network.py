"""What a pattern speaks of: a network's layers, in the order in which their modules were registered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lambda_kernels.program import NORMS, notes_of

__all__ = ["Layer", "layers_of", "module_of", "zero_last"]

_WITH_ALL_BELOW = (
    _ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
_PARAMETER_LISTS = (nn.ParameterList, nn.ParameterDict)
_FREE = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)  # torch's classes that say nothing of what is computed


class Layer(NamedTuple):
    """One bit of a pattern: a convolution, linear or other layer with weights, and the norm that follows it."""

    name: str  # the module's path
    weights: tuple[str, ...]  # parameter names
    norm: tuple[str, ...]  # names of the norm's gamma and beta

    def adapted(self, norm: str) -> tuple[str, ...]:
        """The parameters that the inner loop updates where the layer's bit is 1, under a norm convention."""
        return self.weights + self.norm if norm == "follow" else self.weights


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """The layers of a network in the order of registration (`named_modules`), input first by convention.

    A layer is a convolution, linear, bilinear, embedding, recurrent or attention module, or of a subclass of these,
    with everything below it; or a module of a class of its own that holds parameters and no layer below it. A norm, a
    PReLU and whatever else holds parameters belongs to the layer in front of it (the first where there is none), and
    parameters that a module holds beside layers below it belong to the first of those. Every parameter belongs to one
    layer, a shared one to the first that has it; a layer without a parameter of its own has no bit, and a network
    without a layer is one.

    >>> [layer.name for layer in layers_of(nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.LSTM(5, 3)))]
    ['0', '2']

    Raises:
        ValueError: the network has no parameter of real or complex numbers, or one that is not made yet (lazy layers).
    """
    notes = notes_of(model)  # for as long as the model's structure stays what it is
    found: tuple[Layer, ...] | None = notes.get("layers")
    if found is None:
        found = notes["layers"] = _find(model)
    return found


def _find(model: nn.Module) -> tuple[Layer, ...]:
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"{', '.join(lazy)} of {type(model).__name__} have no shape yet: call the network on an input once"
        )
    walk = _Walk(model)
    whole = type(model).__name__
    found = walk.layers or ([(whole, walk.ahead)] if walk.ahead else [])
    if not found:
        raise ValueError(f"{whole} has no parameters, so there is nothing to adapt")
    norms = walk.norms
    return tuple(
        Layer(path or whole, tuple(n for n in own if n not in norms), tuple(n for n in own if n in norms))
        for path, own in found
    )


def module_of(model: nn.Module, layer: Layer) -> nn.Module:
    """The module that a layer is, the network itself where it is one layer."""
    return dict(model.named_modules()).get(layer.name, model)


@torch.no_grad()
def zero_last(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the last layer, which become zero in place."""
    parameters = dict(model.named_parameters())
    last = [parameters[name] for name in layers_of(model)[-1].weights]
    for p in last:
        p.zero_()
    return last


class _Walk:
    """What a walk through a network's modules has found so far."""

    def __init__(self, root: nn.Module) -> None:
        self.layers: list[tuple[str, list[str]]] = []  # module path, parameter names
        self.ahead: list[str] = []  # parameters of the next layer
        self.norms = {n for path, m in root.named_modules() if isinstance(m, NORMS) for n, _ in _beside(m, path)}
        self._taken: set[int] = set()
        self._are_layers: set[nn.Module] = set()
        self._hold_layers: set[nn.Module] = set()
        self._sort(root)
        self._visit(root, "")

    def _sort(self, module: nn.Module) -> bool:
        """Whether a module is a layer or holds one."""
        lists = _parameter_lists(module)
        below = [self._sort(child) for child in module.children() if child not in lists]
        if isinstance(module, _WITH_ALL_BELOW) or (not any(below) and _is_of_its_own(module)):
            self._are_layers.add(module)
        elif any(below):
            self._hold_layers.add(module)
        return module in self._are_layers or any(below)

    def _visit(self, module: nn.Module, path: str) -> None:
        if module in self._hold_layers:
            self.ahead += self._take(_beside(module, path))
            for name, child in module.named_children():
                if child not in _parameter_lists(module):
                    self._visit(child, f"{path}.{name}" if path else name)
            return
        own = self._take(module.named_parameters(path))
        if module in self._are_layers and own:
            self.layers.append((path, self.ahead + own))
            self.ahead = []
        else:
            (self.layers[-1][1] if self.layers else self.ahead).extend(own)

    def _take(self, parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
        """The names of those that no layer has yet; whole numbers cannot be adapted."""
        names = []
        for name, p in parameters:
            if id(p) not in self._taken and (p.is_floating_point() or p.is_complex()):
                self._taken.add(id(p))
                names.append(name)
        return names


def _is_of_its_own(module: nn.Module) -> bool:
    """Whether a module holds parameters and is of no class that torch has for a purpose, such as a norm or PReLU."""
    kinds = {cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules.")}
    return kinds <= set(_FREE) and any(True for _ in _beside(module, ""))


def _beside(module: nn.Module, path: str) -> Iterable[tuple[str, Tensor]]:
    """The parameters that a module holds itself, some of them in lists or parametrised, with their names."""
    yield from module.named_parameters(path, recurse=False)
    lists = _parameter_lists(module)
    for name, child in module.named_children():
        if child in lists:
            yield from child.named_parameters(f"{path}.{name}" if path else name)


def _parameter_lists(module: nn.Module) -> list[nn.Module]:
    """The children that hold nothing but a module's own parameters."""
    parametrised = module.parametrizations if is_parametrized(module) else None
    return [child for child in module.children() if isinstance(child, _PARAMETER_LISTS) or child is parametrised]
