"""convert() of networks whose forward is awkward: random, counting, data-dependent, with any arguments."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from cases import EXACT
from converted import Residual, run
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.agreement import within


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64)


# Forwards that a graph does not hold: they must run as they are written.


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = run()


class PythonRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if random.random() < 0.9 else self.net(x) * 3


class NumpyRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if np.random.rand() < 0.9 else self.net(x) * 3


class TorchRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if torch.rand(()) < 0.9 else self.net(x) * 3


class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn_like(x))


class Counter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(len(x))
        return self.net(x) * self.calls


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.net(x)
        return y + x.mean()


class Mixed(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x.float())


class AsksForGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (2.0 if torch.is_grad_enabled() else 5.0)


class AsksForTensor(Base):
    def forward(self, x: Any) -> Tensor:
        return self.net(x) if isinstance(x, Tensor) else self.net(x[0]) * 7


class Constant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)


class HeldTensor(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((4,), 2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


class Optional(Base):
    def forward(self, x: Tensor, scale: float = 2.0, shift: Tensor | None = None) -> Tensor:
        y = self.net(x) * scale
        return y if shift is None else y + shift


class Star(Base):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(inputs[0])


class DoubleStar(Base):
    def forward(self, x: Tensor, **named: Tensor) -> Tensor:
        return self.net(x) + sum(named.values())


class ByShape(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.shape[0] > 3 else self.net(x) * 2


class ByValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > -1e9 else self.net(x) * 2


class Loops(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x[i : i + 2]).sum() for i in range(len(x) - 1)])


AWKWARD = [
    PythonRandom,
    NumpyRandom,
    TorchRandom,
    Noise,
    Counter,
    NoGrad,
    Mixed,
    AsksForGradients,
    AsksForTensor,
    Constant,
    HeldTensor,
    Optional,
    Star,
    DoubleStar,
    ByShape,
    ByValue,
    Loops,
]


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("kind", AWKWARD, ids=lambda k: k.__name__)
def test_awkward_forwards_do_the_same(kind: type[Base], x: Tensor) -> None:
    plain = kind().double() if kind is not Mixed else kind()
    model = copy.deepcopy(plain)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    lk.convert(model)
    assert (random.random(), np.random.rand(), torch.rand(())) == state  # looking at the forward draws nothing
    results = []
    for network in (plain, model):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        ys = [network(x) for _ in range(30)]
        ys += [network(x[:3])]
        with torch.no_grad():
            ys.append(network(x))
        results.append(ys)
        assert (getattr(network, "calls", 32), getattr(network, "log", [6])[-1]) == (32, 6)
    for got, want in zip(results[1], results[0]):
        assert got.requires_grad == want.requires_grad and got.dtype == want.dtype
        torch.testing.assert_close(got, want, **within(got.dtype))


def test_keyword_and_optional_arguments(x: Tensor) -> None:
    plain = Optional().double()
    model = lk.convert(copy.deepcopy(plain))
    for arguments in ({"x": x}, {"x": x, "scale": 3.0}, {"x": x, "shift": x.mean()}):
        torch.testing.assert_close(model(**arguments), plain(**arguments), **EXACT)
    star = lk.convert(DoubleStar().double())
    torch.testing.assert_close(star(x, shift=x.mean()), star(x=x) + x.mean(), **EXACT)
    torch.testing.assert_close(lk.convert(Residual().double())(x=x).shape, torch.Size([6, 5]))
