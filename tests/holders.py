"""Networks that hold their layers and tensors in every way: attributes, lists, closures, weak references, hooks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm


def body() -> nn.Sequential:
    norm = nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))


class Around(nn.Module):
    """A network whose attributes are what a test puts there."""

    way: Any

    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Tied(Around):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 8)
        self.other.weight = self.body[0].weight  # type: ignore[assignment]
        self.again = self.body[4]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.again(self.other(x))


class ListOfModules(Around):
    def __init__(self) -> None:
        super().__init__()
        self.layers = list(self.body)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ListOfTensors(Around):
    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, Any] = {"first": [self.body[0].weight], "last": (self.body[4].weight,)}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weights["first"][0]), self.weights["last"][0])


class BoundMethod(Around):
    def __init__(self) -> None:
        super().__init__()
        self.way = self.through

    def through(self, x: Tensor) -> Tensor:
        return self.body(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x)


class Closure(Around):
    def __init__(self) -> None:
        super().__init__()
        layers = self.body

        def way(x: Tensor, depth: int = 0) -> Tensor:
            return layers(x) if depth else way(x, 1)

        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x)


class Partial(Around):
    def __init__(self) -> None:
        super().__init__()
        self.way = functools.partial(BoundMethod.through, self)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x)


class Holder:
    def __init__(self, held: Any) -> None:
        self.held, self.words = held, ["a"] * 1000


class InAnObject(Around):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder({"all": [self.body]})

    def forward(self, x: Tensor) -> Tensor:
        return self.holder.held["all"][0](x)


class Weak(Around):
    def __init__(self) -> None:
        super().__init__()
        part: Any = self.body[3]
        part.owner = weakref.ref(self)

    def forward(self, x: Tensor) -> Tensor:
        part: Any = self.body[3]
        owner = part.owner()
        assert owner is self
        return owner.body(x)


def replaced() -> nn.Module:
    network = Around()
    network.forward = lambda x: network.body(x) * 3  # type: ignore[method-assign]
    return network


def recurrent() -> nn.Module:
    class Recurrent(Around):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTM(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x[None])[0][0])

    return Recurrent()


def hooked(install: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        network = Around()
        install(network.body[0])
        return network

    return make


# nn.Module.__setattr__ and hooks put what they compute into the module itself: see the weights of the last ones.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Around,
    "tied": Tied,
    "list of modules": ListOfModules,
    "list of tensors": ListOfTensors,
    "bound method": BoundMethod,
    "closure": Closure,
    "partial": Partial,
    "in an object": InAnObject,
    "weak reference": Weak,
    "forward on the instance": replaced,
    "recurrent": recurrent,
    "spectral_norm by hooks": hooked(spectral_norm),
    "pruned": hooked(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "spectral_norm": hooked(parametrizations.spectral_norm),
    "weight_norm": hooked(parametrizations.weight_norm),
}
if hasattr(torch.nn.utils, "weight_norm"):
    NETWORKS["weight_norm by hooks"] = hooked(lambda m: silently(weight_norm, m))


def silently(function: Callable[..., Any], *args: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(*args)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double()
