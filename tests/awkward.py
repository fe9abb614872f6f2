"""Networks that are hard to follow: they write in place, share tensors, count calls, or ask for values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from networks import Case, Groups, pair
from torch import Tensor, nn


class WritesPrefix(nn.Module):
    """In-place steps on values of the first layer: on the value, on a view of it, before and after others read it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 2)
        self.shift = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * 1.0
        kind = self.kind
        if kind == "relu":
            h = F.relu_(h)
            h = h + self.second(h)
        elif kind == "value":
            early = h * 2.0
            h.add_(self.second(h * 1.0) * self.shift)
            h = h + early
        elif kind == "view":
            part = h[:, :2]
            part += self.second(h * 1.0)[:, 1:] * self.shift[1:]
            h = h * 1.5
        elif kind == "setitem":
            h[:, 0] = self.second(h * 1.0)[:, 0] + self.shift[0]
        elif kind == "order":
            late = h + self.second(
                x.expand(-1, 3, -1, -1)
            )  # reads h before the in-place step, which no parameter reaches
            h.mul_(0.5)
            h = h * late
        else:
            raise AssertionError(kind)
        return self.head(F.relu(h).mean((2, 3)))


def writes_prefix(kind: str) -> Case:
    network = WritesPrefix(kind).double()
    weights = {"first": pair("first"), "second": pair("second"), "head": pair("head")}
    weights["first"] = ["shift", *weights["first"]]  # what a module holds beside layers belongs to the first of them
    return Case(network, [(names, []) for names in weights.values()], (1, 4, 4))


class Scaled(nn.Module):
    """Raw parameters that are read before, between and behind the layers: all of them are the network's own."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.conv = nn.Conv2d(1, 3, 3)
        self.scale = nn.Parameter(torch.rand(3, 1, 1) + 0.5)
        self.fc = nn.Linear(3, 2)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("offset", torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x * self.gain)) * self.scale + self.offset
        return self.fc(h.mean((2, 3))) / self.temperature


def scaled() -> Case:
    groups: Groups = [(["gain", "scale", "temperature", *pair("conv")], []), (pair("fc"), [])]
    return Case(Scaled().double(), groups, (1, 5, 5))


class Tied(nn.Module):
    """One weight in two linear layers, and one module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.b, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.a(x))))
        return self.head(torch.tanh(self.b(torch.tanh(self.twice(x)))))


def tied() -> Case:
    groups: Groups = [(pair("a"), []), (pair("twice"), []), (["b.bias"], []), (pair("head"), [])]
    network = Tied().double()
    network.head = nn.Linear(4, 2).double()
    return Case(network, groups, (4,))


class Untraceable(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        h = F.relu(h) if h.sum() > -1e9 else h
        return self.fc(h.mean((2, 3)))


def untraceable() -> Case:
    return Case(Untraceable().double(), [(pair("conv"), pair("norm")), (pair("fc"), [])], (1, 5, 5))


class Configured(nn.Module):
    """Its forward depends on an object that it holds."""

    class Settings:
        def __init__(self) -> None:
            self.square = False

    def __init__(self) -> None:
        super().__init__()
        self.settings = self.Settings()
        self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.fc((h * h if self.settings.square else h).mean((2, 3)))


class NoGrad(nn.Module):
    """A backbone that its own forward runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x).mean((2, 3))
        return self.fc(torch.tanh(self.mid(x)))


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.5 * g


class StraightThrough(NoGrad):
    """A custom autograd.Function inside of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(_Sign.apply(self.mid(self.conv(x).mean((2, 3)))))


class AsksType(NoGrad):
    """A forward that looks at the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x] if isinstance(x, Tensor) else [2.0 * x]
        return self.fc(self.mid(self.conv(features[0]).mean((2, 3))))


class WritesInput(NoGrad):
    """A forward that writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.9)
        return self.fc(self.mid(self.conv(x).mean((2, 3))))


class Counts(NoGrad):
    """A buffer that counts the calls and shifts a value."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(torch.sin(self.mid(self.conv(x).mean((2, 3))) + self.calls))


def three(kind: type[nn.Module]) -> Case:
    return Case(kind().double(), [(pair(n), []) for n in ("conv", "mid", "fc")], (1, 5, 5))
