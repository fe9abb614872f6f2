"""Inner learning rates: one for all, or one per layer, per tensor, per step, in numbers or in tensors that are
learned."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..network import Layer

__all__ = ["DEFAULT_LR", "Rate", "Rates"]

DEFAULT_LR = 0.01

Rate: TypeAlias = (
    "float | Tensor | Sequence[Any] | np.ndarray | Mapping[str, Any] | nn.ParameterList | nn.ParameterDict"
)
"""A number; an array or tensor that broadcasts to [steps, layers] ([layers] is one per layer, [steps, 1] one per step);
or a mapping from layer or parameter names to a number, [steps], or a tensor of the parameter's shape (Meta-SGD). A
vector that may be either, as for a bias of as many numbers as there are steps, is of the parameter's shape, unless a
vector of the same mapping can only be one rate per step."""


class Rates:
    """The rates of a rule. Tensors that require a gradient are learned; `parameters` are those of them that are ours.

        Rates(0.1)                                   # one for all
        Rates([0.1, 0.1, 0.01])                      # one per layer, of a network of three
        Rates(nn.Parameter(torch.full((5, 3), 0.1)))  # one per step and layer, learned (MAML++, Antoniou et al. 2019)

    Raises:
        ValueError: a rate is no finite number, or a number below 0 (a learned one may become negative).
    """

    def __init__(self, value: Rate) -> None:
        self.parameters: list[nn.Parameter] = []
        self.value = self._checked(value)
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the parameters, once they are known
        self.by_step: frozenset[str] = frozenset()  # the parameters of which a vector is one rate per step

    def _checked(self, value: Any, inside: bool = False) -> Any:
        """The value with numbers as floats, arrays as nested lists, and tensors as they are."""
        if isinstance(value, nn.ParameterDict):
            value = dict(value.items())
        if isinstance(value, nn.ParameterList):
            value = list(value)
        if isinstance(value, Mapping):
            if not value:
                raise ValueError("lr is an empty mapping: name the layers or parameters that it has rates for")
            return {str(name): self._checked(v, inside=True) for name, v in value.items()}
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise ValueError(f"lr must be a positive number or a tensor of floating point, got {value.dtype}")
            if isinstance(value, nn.Parameter):
                self.parameters.append(value)
            return value
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if isinstance(value, (list, tuple, np.ndarray)):
            if any(isinstance(v, Tensor) for v in value):
                return [self._checked(v, inside=True) for v in value]
            try:
                rates = np.asarray(value, dtype=np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"lr must hold numbers, in rows of equal length, got {value!r}") from None
            if rates.size == 0 or not np.isfinite(rates).all() or (rates < 0).any():
                raise ValueError(f"lr must hold positive numbers, or 0 for what stays frozen, got {value!r}")
            return rates.tolist()
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not number or not (0.0 < value < math.inf or (inside and value == 0.0)):
            raise ValueError(f"lr must be a positive number, got {value!r}")
        return float(value)

    def bound(self, layers: Sequence[Layer], params: Mapping[str, Tensor]) -> Rates:
        """The same rates by parameter name; `self` where there is one for all.

        Raises:
            ValueError: there are not as many as layers, or a name is unknown.
        """
        if isinstance(self.value, float) or (isinstance(self.value, Tensor) and self.value.dim() == 0):
            return self
        names = {layer.name: layer.weights + layer.norm for layer in layers}
        found: dict[str, Any] = {}
        if isinstance(self.value, dict):
            unknown = [n for n in self.value if n not in names and n not in params]
            if unknown:
                raise ValueError(
                    f"lr names {', '.join(unknown)}: neither a layer ({', '.join(names)}) nor one of the parameters"
                )
            for name, rate in self.value.items():
                found.update({n: rate for n in names.get(name, ())})
            found.update({n: rate for n, rate in self.value.items() if n in params})
        else:
            for at, layer in enumerate(layers):
                rate = _column(self.value, at, len(layers))
                found.update({n: rate for n in layer.weights + layer.norm})
        by_name = copy.copy(self)
        by_name.value = found
        by_name.shapes = {n: tuple(params[n].shape) for n in found if n in params}
        own = self.value if isinstance(self.value, dict) else {}
        vectors = {n: r for n, r in own.items() if isinstance(r, Tensor) and r.dim() == 1 and n in params}
        if any(r.shape != params[n].shape for n, r in vectors.items()):
            own = {}
        by_name.by_step = frozenset(n for n in found if n not in own)
        return by_name

    def replaced(self, new: Mapping[int, Any]) -> Rates:
        """The same with other tensors in the places of some, which are named by their identity."""

        def other(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: other(v) for name, v in value.items()}
            return [other(v) for v in value] if isinstance(value, list) else new.get(id(value), value)

        twin = copy.copy(self)
        twin.value, twin.parameters = other(self.value), other(self.parameters)
        return twin

    def at(self, name: str, step: int) -> float | Tensor:
        """The rate of a parameter in a step, counted from 0: a number, or a tensor of one number or of its shape."""
        rate = self.value
        if isinstance(rate, dict):
            if name not in rate:
                raise ValueError(f"lr has no rate for {name}: give one, or 0 to leave it frozen")
            rate = rate[name]
        if isinstance(rate, float) or (isinstance(rate, Tensor) and rate.dim() == 0):
            return rate
        if isinstance(rate, Tensor) and self._is_elementwise(rate, name):
            return rate
        if isinstance(rate, Tensor) and tuple(rate.shape[1:]) not in ((), self.shapes.get(name, ())):
            raise ValueError(
                f"lr of {name} is {list(rate.shape)}: give one number, one per step, or the parameter's shape "
                f"{list(self.shapes.get(name, ()))}"
            )
        if step >= len(rate):
            raise ValueError(f"lr has rates for {len(rate)} steps, step {step + 1} has none: give one row per step")
        chosen: float | Tensor = rate[step]
        return chosen

    def constants(self, names: Sequence[str], steps: int) -> list[list[float]] | None:
        """[steps, names]: the rates as numbers; None where one is learned, or is of a parameter's shape."""
        if isinstance(self.value, float):
            return [[self.value] * len(names)] * steps
        rows = [[self.at(name, step) for name in names] for step in range(steps)]
        tensors = [rate for row in rows for rate in row if isinstance(rate, Tensor)]
        if any(t.dim() > 0 or (t.requires_grad and torch.is_grad_enabled()) for t in tensors):
            return None
        return [[float(rate) for rate in row] for row in rows]

    @property
    def tensors(self) -> list[Tensor]:
        """The rates that are tensors."""
        return _tensors(self.value)

    @property
    def learned(self) -> bool:
        """Whether a rate requires a gradient, and gradients are on."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.tensors)

    def check_steps(self, steps: int) -> None:
        """ValueError where there are rates per step, and another number of them than of steps."""
        rates = list(self.value.items()) if isinstance(self.value, dict) else [("", self.value)]
        for name, rate in rates:
            elementwise = isinstance(rate, Tensor) and self._is_elementwise(rate, name)
            if _shape(rate) and not elementwise and len(rate) != steps:
                raise ValueError(
                    f"lr has rates for {len(rate)} steps, the adaptation has {steps}: give one row per step"
                )

    def _is_elementwise(self, rate: Tensor, name: str) -> bool:
        same = rate.dim() > 0 and tuple(rate.shape) == self.shapes.get(name)
        return same and not (rate.dim() == 1 and name in self.by_step)

    def __repr__(self) -> str:
        return _told(self.value)


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return (len(value), *_shape(value[0])) if isinstance(value, list) else ()


def _column(value: Any, at: int, layers: int) -> Any:
    """The rates of one layer, a number or [steps], out of what broadcasts to [steps, layers]."""
    shape = _shape(value)
    if len(shape) > 2 or shape[-1] not in (1, layers):
        steps = f"; for one rate per step give shape [{shape[0]}, 1]" if len(shape) == 1 else ""
        raise ValueError(
            f"lr has shape {list(shape)}, the network {layers} layers: give one rate, one per layer [{layers}], one "
            f"per step [steps, 1], or both [steps, {layers}]{steps}"
        )
    at = at if shape[-1] == layers else 0
    if len(shape) == 1:
        return value[at]
    rows = value[:, at] if isinstance(value, Tensor) else [row[at] for row in value]
    return rows if shape[0] > 1 else rows[0]


def _told(value: Any) -> str:
    """The rates in words: numbers, and the shapes of tensors."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {_told(rate)}" for name, rate in value.items()) + "}"
    return f"[{', '.join(map(_told, value))}]" if isinstance(value, list) else repr(value)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, list) else []
