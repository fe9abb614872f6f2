"""A captured forward: whatever its Python code reads is seen to be the same, or the network runs as it is written."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import gc
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.agreement import within
from lambda_kernels.program import lookup, program_for
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


def sets(path: str, value: Any) -> Callable[[Any], Any]:
    """Gives an attribute of the network, or of what it holds, a value."""
    *parents, name = path.split(".")

    def change(network: Any) -> None:
        for parent in parents:
            network = getattr(network, parent)
        setattr(network, name, value)

    return change


def gives(owner: Any, name: str, value: Any) -> Callable[[Any], Any]:
    """Gives an attribute of another object a value."""
    return lambda network: setattr(owner, name, value)


def teaches(name: str, value: Any) -> Callable[[Any], Any]:
    """Gives an attribute of the network's class a value."""
    return lambda network: setattr(kind(network), name, value)


def three(*_: Any) -> float:
    return 3.0


def other_features(self: Any, x: Tensor) -> Tensor:
    return x.mean((2, 3))[:, :1] * self.head.weight[0]


def absent_global() -> float:
    return float(SPACE.absent) if hasattr(SPACE, "absent") else 1.0


# What is read, how it is changed, and whether it can be captured at all.
READS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any], bool]] = {
    "global": (lambda n, x: GLOBAL, lambda n: set_global(n, "GLOBAL", 3.0), True),
    "attribute of a global": (lambda n, x: SPACE.scale, gives(SPACE, "scale", 3.0), True),
    "enumeration": (lambda n, x: SPACE.mode.value, gives(SPACE, "mode", Mode.HIGH), True),
    "global function": (lambda n, x: function(), lambda n: set_global(n, "function", three), True),
    "code of a function": (lambda n, x: with_default(), gives(with_default, "__code__", three.__code__), True),
    "default of a function": (lambda n, x: with_default(), gives(with_default, "__defaults__", (3.0,)), True),
    "closure": (lambda n, x: n.reader(), lambda n: n.change_cell(), True),
    "tensor of the module": (lambda n, x: n.plain, lambda n: n.plain.fill_(3.0), False),
    "global tensor": (lambda n, x: TENSOR, lambda n: TENSOR.fill_(3.0), False),
    "value of a buffer": (lambda n, x: n.number.item(), lambda n: n.number.fill_(3.0), False),
    "branch on a buffer": (lambda n, x: 3.0 if n.number > 2 else 1.0, lambda n: n.number.fill_(3.0), False),
    "buffer": (lambda n, x: n.number, lambda n: n.number.fill_(3.0), True),
    "buffer, replaced": (lambda n, x: n.number, sets("number", torch.tensor(3.0)), True),
    "array": (lambda n, x: float(n.array[0]), lambda n: n.array.fill(3.0), False),
    "deep attribute": (lambda n, x: n.config.model.head.scale, sets("config.model.head.scale", 3.0), True),
    "deque": (lambda n, x: n.deque[0], lambda n: n.deque.__setitem__(0, 3.0), True),
    "nested list": (lambda n, x: n.numbers[1][0], lambda n: n.numbers[1].__setitem__(0, 3.0), True),
    "nested dict": (lambda n, x: n.words["a"]["b"], lambda n: n.words["a"].__setitem__("b", 3.0), True),
    "set": (lambda n, x: 3.0 if 3 in n.kinds else 1.0, lambda n: n.kinds.add(3), True),
    "length": (lambda n, x: float(len(n.kinds)), lambda n: n.kinds.add(3), True),
    "slot": (lambda n, x: n.slots.value, sets("slots.value", 3.0), True),
    "data class": (lambda n, x: n.settings.value, sets("settings.value", 3.0), True),
    "property": (lambda n, x: n.helper.value, sets("helper.shared", 3.0), True),
    "__getattr__": (lambda n, x: n.lazy.value, lambda n: n.lazy.held.update(value=3.0), True),
    "class attribute": (lambda n, x: getattr(n, "extra", 1.0), gives(Net, "extra", 3.0), True),
    "class of the network": (lambda n, x: getattr(n, "own", 1.0), teaches("own", 3.0), True),
    "method, replaced": (lambda n, x: n.method(), teaches("method", three), True),
    "method of a helper": (lambda n, x: n.helper.method(), gives(Helper, "method", three), True),
    "features, replaced": (lambda n, x: 1.0, teaches("features", other_features), True),
    "missing name": (lambda n, x: n.__dict__.get("absent", 1.0), sets("absent", 3.0), True),
    "hasattr": (lambda n, x: n.absent if hasattr(n, "absent") else 1.0, sets("absent", 3.0), True),
    "hasattr of a global": (lambda n, x: absent_global(), gives(SPACE, "absent", 3.0), True),
    "caught exception": (lambda n, x: tried(n), sets("absent", 3.0), False),
    "suppressed exception": (lambda n, x: suppressed(n), sets("absent", 3.0), False),
    "mode": (lambda n, x: 1.0 if n.training else 3.0, lambda n: n.eval(), True),
    "mode of a child": (lambda n, x: 1.0 if n.head.training else 3.0, lambda n: n.head.eval(), True),
    "hook": (lambda n, x: 1.0, lambda n: n.head.register_forward_hook(lambda m, i, o: 3 * o), True),
    "hook of the network": (lambda n, x: 1.0, lambda n: n.register_forward_pre_hook(lambda m, i: (3 * i[0],)), True),
    "layer, replaced": (lambda n, x: 1.0, lambda n: setattr(n, "head", other_head()), True),
    "forward of an instance": (lambda n, x: 1.0, sets("head.forward", lambda x: 3 * x[:, :3]), True),
    "attribute of a layer": (lambda n, x: 1.0, sets("norm.eps", 3.0), True),
    "gradient": (
        lambda n, x: 1.0 if n.head.weight.grad is None else 3.0,
        sets("head.weight.grad", torch.ones(3, 4, dtype=torch.float64)),
        True,
    ),
    "parameter in its place": (
        lambda n, x: 1.0 if n.head.weight.requires_grad else 3.0,
        sets("head.weight.requires_grad", False),
        True,
    ),
    "number of parameters": (
        lambda n, x: float(len(list(n.parameters()))),
        lambda n: n.register_parameter("more", nn.Parameter(torch.ones(1))),
        True,
    ),
    "function of torch": (lambda n, x: 1.0, gives(F, "relu", lambda x: 3 * x), True),
}


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
    if hasattr(Net, "extra"):
        del Net.extra
    setattr(Helper, "method", method)  # noqa: B010
    with_default.__code__, with_default.__defaults__ = code, defaults
    F.relu = relu


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


class Effects(Net):
    """Forwards that no graph holds, by the name of what they do."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls, self.log = what, 0, [0]
        self.number: Tensor

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.features(x))
        if self.what == "counts":
            self.calls += 1
        elif self.what == "appends":
            self.log.append(1)
        elif self.what == "keeps":
            self.kept = y
        elif self.what == "counts in a buffer":
            self.number.add_(1)
        elif self.what == "replaces a buffer":
            self.number = self.number + 1
        elif self.what == "writes to its input":
            x.mul_(2)
        elif self.what == "prints":
            print(end="")
        elif self.what == "hooks a tensor":
            y.register_hook(lambda g: 2 * g)
        elif self.what == "switches gradients":
            with torch.no_grad():
                y = y + self.head(self.features(x))
        elif self.what == "switches autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = y + self.head(self.features(x))
        elif self.what == "seeds":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                y = y + torch.randn_like(y)
        elif self.what == "branches":
            y = y if y.sum() > -1e9 else -y
        return y


EFFECTS = {
    "counts": "writes to self.calls",
    "appends": "writes to self.log",
    "keeps": "writes to self.kept",
    "counts in a buffer": "writes into a parameter or buffer in place",
    "replaces a buffer": "writes to self",
    "writes to its input": "writes into its input in place",
    "prints": "print",
    "hooks a tensor": "",
    "switches gradients": "_set_grad_enabled",
    "switches autocast": "_enter_autocast",
    "seeds": "",
    "branches": "(?i)data-dependent",
}


@pytest.mark.parametrize("what", EFFECTS)
def test_what_no_graph_holds_runs_as_it_is_written(what: str, x: Tensor) -> None:
    stock = Effects(what).double()
    ours: Any = lk.convert(copy.deepcopy(stock))
    for _ in range(3):
        torch.testing.assert_close(ours(x.clone()), stock(x.clone()), **within(torch.float32))
    why = program_for(ours, (x,), {}).untraceable
    assert why is not None and re.search(EFFECTS[what], why), why
    assert (ours.calls, ours.log) == (stock.calls, stock.log) and torch.equal(ours.number, stock.number)


def test_what_one_network_does_is_not_laid_at_anothers_door(x: Tensor) -> None:
    assert program_for(Effects("prints").double(), (x,), {}).untraceable is not None
    assert program_for(Effects("nothing").double(), (x,), {}).untraceable is None


def test_two_networks_of_a_class_share_a_capture_and_keep_what_is_theirs(x: Tensor) -> None:
    one, two = made(lambda n, x: n.settings.value), None
    two = copy.deepcopy(one)
    assert program_for(one, (x,), {}) is program_for(two, (x,), {})
    two.settings.value = 2.0
    assert program_for(one, (x,), {}) is not program_for(two, (x,), {})
    torch.testing.assert_close(adapt(two, x, torch.arange(3).repeat(2), pattern="01", steps=0)(x), one(x) / 2, **EXACT)
    two.head.bias = nn.Parameter(two.norm.bias[:3].detach().clone())
    two.conv.bias = two.norm.bias  # tied: another structure
    assert program_for(two, (x,), {}).aliases == {"norm.bias": "conv.bias"}


def test_a_function_where_another_lay_is_another_function(x: Tensor) -> None:
    network = made(lambda n, x: n.reader())
    for value in range(1, 20):  # each takes the place of the last one, in memory too
        network.reader = eval(f"lambda: {value}.0")
        torch.testing.assert_close(
            adapt(network, x, torch.arange(3).repeat(2), pattern="01", steps=0)(x), network(x), **EXACT
        )


def test_captures_are_freed_with_their_classes_and_networks(x: Tensor) -> None:
    network = made(lambda n, x: n.settings.value)
    program_for(network, (x,), {})
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_a_forward_that_never_reads_the_same_is_given_up(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_MOST", 3)
    network = made(lambda n, x: n.settings.value)
    for value in range(1, 7):
        network.settings.value = float(value)
        torch.testing.assert_close(program_for(network, (x,), {})(network, x), network(x), **EXACT)
    assert "another in each of 3 calls" in str(program_for(network, (x,), {}).untraceable)


def test_networks_seen_for_the_first_time_in_many_threads(x: Tensor) -> None:
    """As in one thread, and no other thread draws a number twice."""
    wrong: list[str] = []
    drawn: list[float] = []
    stop = threading.Event()

    networks = [[made(lambda n, x: n.settings.value * 2) for _ in range(2)] for _ in range(6)]  # each seeds torch

    def work(networks: list[Any]) -> None:
        for network in networks:
            try:
                got = adapt(network, x, torch.arange(3).repeat(2), pattern="01", steps=0)(x)
                torch.testing.assert_close(got, network(x), **EXACT)
                assert program_for(network, (x,), {}).untraceable is None
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")

    def draw() -> None:
        while not stop.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    drawing = threading.Thread(target=draw)
    drawing.start()
    threads = [threading.Thread(target=work, args=(own,)) for own in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    drawing.join()
    assert not wrong, wrong
    assert len(set(drawn)) == len(drawn)


def test_under_a_transform_a_network_is_captured_as_outside(x: Tensor) -> None:
    stock = made(lambda n, x: n.settings.value)
    ours = lk.convert(copy.deepcopy(stock))
    both = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(ours)(both), torch.stack([stock(x), stock(2 * x)]), **EXACT)
    weights = {name: p.detach() for name, p in stock.named_parameters()}

    def loss(network: nn.Module, weights: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(network, weights, (x,)).square().sum()
        return result

    got, want = (torch.func.grad(functools.partial(loss, network))(weights) for network in (ours, stock))
    for name in weights:
        torch.testing.assert_close(got[name], want[name], **within(torch.float64, "gradient"))
    assert program_for(ours, (x,), {}, called=False).untraceable is None
