"""A captured forward: whatever its Python code reads is seen to be the same, or the network runs as it is written."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import random
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.program import capture, program_for
from lambda_maml import LambdaMAML, adapt


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


@dataclasses.dataclass
class Settings:
    value: float = 1.0


class Mode(enum.Enum):
    LOW = 1.0
    HIGH = 3.0


class Helper:
    shared = 1.0

    @property
    def value(self) -> float:
        return self.shared

    def method(self) -> float:
        return 1.0


class Lazy:
    def __init__(self) -> None:
        self.held = {"value": 1.0}

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("held", {}):
            raise AttributeError(name)
        return self.held[name]


GLOBAL: Any = 1.0
SPACE: Any = types.SimpleNamespace(scale=1.0, mode=Mode.LOW)
TENSOR: Any = torch.ones(3, dtype=torch.float64)


def function() -> float:
    return 1.0


def with_default(value: float = 1.0) -> float:
    return value


def cell() -> tuple[Callable[[], float], Callable[[], None]]:
    held = 1.0

    def change() -> None:
        nonlocal held
        held = 3.0

    return lambda: held, change


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 3)
        self.register_buffer("number", torch.tensor(1.0))
        self.deque, self.words, self.numbers = collections.deque([1.0]), {"a": {"b": 1.0}}, [1.0, [1.0]]
        self.array, self.plain, self.slots, self.kinds = np.ones(3), torch.ones(3), Slots(), {1}
        self.config = types.SimpleNamespace(model=types.SimpleNamespace(head=types.SimpleNamespace(scale=1.0)))
        self.helper, self.lazy, self.settings = Helper(), Lazy(), Settings()
        self.reader, self.change_cell = cell()

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))).mean((2, 3))

    def method(self) -> float:
        return 1.0


def made(read: Callable[[Any, Any], Any]) -> Any:
    """A network of a class of its own whose result is divided by what `read` gives."""

    def forward(self: Any, x: Any) -> Any:
        return self.head(self.features(x)) / read(self, x)

    return type("Network", (Net,), {"forward": forward})().double()


def tried(network: Any) -> float:
    try:
        return float(network.absent)
    except AttributeError:
        return 1.0


def suppressed(network: Any) -> float:
    with contextlib.suppress(AttributeError):
        return float(network.absent)
    return 1.0


def other_head() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()


def set_global(_: Any, name: str, value: Any) -> None:
    globals()[name] = value


# What is read, how it is changed, and whether it can be captured at all.
READS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any], bool]] = {
    "global": (lambda n, x: GLOBAL, lambda n: set_global(n, "GLOBAL", 3.0), True),
    "attribute of a global": (lambda n, x: SPACE.scale, lambda n: setattr(SPACE, "scale", 3.0), True),
    "enumeration": (lambda n, x: SPACE.mode.value, lambda n: setattr(SPACE, "mode", Mode.HIGH), True),
    "global function": (lambda n, x: function(), lambda n: set_global(n, "function", lambda: 3.0), True),
    "code of a function": (
        lambda n, x: with_default(),
        lambda n: setattr(with_default, "__code__", (lambda value: 3.0).__code__),
        True,
    ),
    "default of a function": (lambda n, x: with_default(), lambda n: setattr(with_default, "__defaults__", (3.0,)), True),
    "closure": (lambda n, x: n.reader(), lambda n: n.change_cell(), True),
    "tensor of the module": (lambda n, x: n.plain, lambda n: n.plain.fill_(3.0), False),
    "global tensor": (lambda n, x: TENSOR, lambda n: TENSOR.fill_(3.0), False),
    "value of a buffer": (lambda n, x: n.number.item(), lambda n: n.number.fill_(3.0), False),
    "branch on a buffer": (lambda n, x: 3.0 if n.number > 2 else 1.0, lambda n: n.number.fill_(3.0), False),
    "buffer": (lambda n, x: n.number, lambda n: n.number.fill_(3.0), True),
    "buffer, replaced": (lambda n, x: n.number, lambda n: setattr(n, "number", torch.tensor(3.0)), True),
    "array": (lambda n, x: float(n.array[0]), lambda n: n.array.fill(3.0), False),
    "deep attribute": (lambda n, x: n.config.model.head.scale, lambda n: setattr(n.config.model.head, "scale", 3.0), True),
    "deque": (lambda n, x: n.deque[0], lambda n: n.deque.__setitem__(0, 3.0), True),
    "nested list": (lambda n, x: n.numbers[1][0], lambda n: n.numbers[1].__setitem__(0, 3.0), True),
    "nested dict": (lambda n, x: n.words["a"]["b"], lambda n: n.words["a"].__setitem__("b", 3.0), True),
    "set": (lambda n, x: 3.0 if 3 in n.kinds else 1.0, lambda n: n.kinds.add(3), True),
    "length": (lambda n, x: float(len(n.kinds)), lambda n: n.kinds.add(3), True),
    "slot": (lambda n, x: n.slots.value, lambda n: setattr(n.slots, "value", 3.0), True),
    "data class": (lambda n, x: n.settings.value, lambda n: setattr(n.settings, "value", 3.0), True),
    "property": (lambda n, x: n.helper.value, lambda n: setattr(n.helper, "shared", 3.0), True),
    "__getattr__": (lambda n, x: n.lazy.value, lambda n: n.lazy.held.update(value=3.0), True),
    "class attribute": (lambda n, x: getattr(n, "extra", 1.0), lambda n: setattr(Net, "extra", 3.0), True),
    "class of the network": (lambda n, x: getattr(n, "own", 1.0), lambda n: setattr(kind(n), "own", 3.0), True),
    "method, replaced": (lambda n, x: n.method(), lambda n: setattr(kind(n), "method", lambda self: 3.0), True),
    "method of a helper": (lambda n, x: n.helper.method(), lambda n: setattr(Helper, "method", lambda self: 3.0), True),
    "forward, replaced": (lambda n, x: 1.0, lambda n: setattr(kind(n), "features", lambda s, x: x.mean((2, 3))[:, :1] * s.head.weight[0]), True),
    "missing name": (lambda n, x: n.__dict__.get("absent", 1.0), lambda n: setattr(n, "absent", 3.0), True),
    "hasattr": (lambda n, x: n.absent if hasattr(n, "absent") else 1.0, lambda n: setattr(n, "absent", 3.0), True),
    "hasattr of a global": (lambda n, x: SPACE.absent if hasattr(SPACE, "absent") else 1.0, lambda n: setattr(SPACE, "absent", 3.0), True),
    "caught exception": (lambda n, x: tried(n), lambda n: setattr(n, "absent", 3.0), False),
    "suppressed exception": (lambda n, x: suppressed(n), lambda n: setattr(n, "absent", 3.0), False),
    "mode": (lambda n, x: 1.0 if n.training else 3.0, lambda n: n.eval(), True),
    "mode of a child": (lambda n, x: 1.0 if n.head.training else 3.0, lambda n: n.head.eval(), True),
    "hook": (lambda n, x: 1.0, lambda n: n.head.register_forward_hook(lambda m, i, o: 3 * o), True),
    "hook of the network": (lambda n, x: 1.0, lambda n: n.register_forward_pre_hook(lambda m, i: (3 * i[0],)), True),
    "layer, replaced": (lambda n, x: 1.0, lambda n: setattr(n, "head", other_head()), True),
    "forward of an instance": (lambda n, x: 1.0, lambda n: setattr(n.head, "forward", lambda x: 3 * x[:, :3]), True),
    "attribute of a layer": (lambda n, x: 1.0, lambda n: setattr(n.norm, "eps", 3.0), True),
    "gradient": (lambda n, x: 1.0 if n.head.weight.grad is None else 3.0, lambda n: setattr(n.head.weight, "grad", torch.ones(3, 4).double()), True),
    "number of parameters": (lambda n, x: float(len(list(n.parameters()))), lambda n: n.register_parameter("q", nn.Parameter(torch.ones(1))), True),
    "function of torch": (lambda n, x: 1.0, lambda n: setattr(F, "relu", lambda x: 3 * x), True),
}  # fmt: skip


def kind(network: nn.Module) -> Any:
    """The user's class of a network."""
    return getattr(type(network), "fuses", type(network))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Globals, helpers and torch are after a test what they were."""
    held = {name: globals()[name] for name in ("GLOBAL", "function")}
    method, code, defaults, relu = Helper.method, with_default.__code__, with_default.__defaults__, F.relu
    yield
    globals().update(held)
    SPACE.__dict__.clear()
    SPACE.__dict__.update(scale=1.0, mode=Mode.LOW)
    TENSOR.fill_(1.0)
    for name in ("extra",):
        if hasattr(Net, name):
            delattr(Net, name)
    setattr(Helper, "method", method)
    with_default.__code__, with_default.__defaults__ = code, defaults
    setattr(F, "relu", relu)


@pytest.mark.parametrize("name", READS)
def test_what_a_forward_reads_is_read_again_when_it_changes(name: str, x: Tensor) -> None:
    read, change, captured = READS[name]
    stock = made(read)
    ours = lk.convert(copy.deepcopy(stock))
    ys = torch.arange(3).repeat(2)
    before = program_for(ours, (x,), {})
    assert (before.untraceable is None) is captured, before.untraceable
    torch.testing.assert_close(ours(x), stock(x), **EXACT)
    adapt(ours, x, ys, pattern="01", steps=1)
    change(ours)
    change(stock)
    want = stock(x)
    torch.testing.assert_close(ours(x), want, **EXACT)
    torch.testing.assert_close(ours(x), want, **EXACT)
    task = LambdaMAML(ours, 0.1, pattern="01").clone()
    torch.testing.assert_close(task(x), want, **EXACT)
    learner = adapt(ours, x, ys, pattern="01", steps=0)
    torch.testing.assert_close(learner(x), want, **EXACT)
