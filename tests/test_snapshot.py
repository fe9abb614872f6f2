"""A program is looked up by what the module was when last seen: everything that can change it is noticed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import program_of
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.program import lookup, snapshot, tensors_of
from lambda_maml import models

X = torch.randn(3, 1, 4, 4)


class Held:
    """Something that can change without being replaced."""


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False)
        self.inner = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(12, 2)
        self.scale, self.sizes, self.act, self.names = 2.0, [1, 2], F.relu, {"a": 1}
        self.register_buffer("offset", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.norm(self.conv(x))).flatten(1)) * self.scale + self.offset


def replace(path: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda network: setattr(network.get_submodule(path), name, value)


def rename(network: Any) -> None:
    """The same object as the last attribute, by another name."""
    network.flag_a = True
    program_of(network, X)
    del network.flag_a
    network.flag_b = True


def rebuilt(network: Any) -> None:
    """Another float where the first one lay, or not: the first one has to be kept alive."""
    for step in range(50):
        network.scale = 3.0 + step * 0.5


CHANGES: dict[str, Callable[[Any], Any]] = {
    "mode": lambda n: n.eval(),
    "mode of a child": lambda n: n.get_submodule("norm").eval(),
    "plain attribute": replace("", "scale", 3.0),
    "attribute of a layer": replace("norm", "eps", 0.1),
    "new attribute": replace("", "new", 1),
    "renamed attribute": rename,
    "many floats": rebuilt,
    "list in place": lambda n: n.sizes.append(3),
    "dict in place": lambda n: n.names.update(b=2),
    "another function": replace("", "act", torch.sigmoid),
    "parameter": lambda n: setattr(n.get_submodule("head"), "bias", None),
    "tied parameter": lambda n: setattr(n.get_submodule("norm"), "bias", n.get_submodule("norm").weight),
    "child": replace("inner", "0", nn.Tanh()),
    "class": lambda n: lk.convert(n),
    "hook": lambda n: n.get_submodule("conv").register_forward_hook(lambda *_: None),
    "forward on the instance": lambda n: setattr(n, "forward", lambda x: x),
    "buffer": lambda n: n.register_buffer("second", torch.ones(1)),
}


UNREAD = ("list in place", "dict in place", "another function")  # what the forward does not read


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_noticed(name: str) -> None:
    network = Network()
    program = program_of(network, X)
    assert program_of(network, X) is program
    noted = snapshot.Snapshot(network)
    assert noted.holds(network)
    CHANGES[name](network)
    assert not noted.holds(network)
    assert (program_of(network, X) is program) is (name in UNREAD)


def test_values_that_change_in_place_are_not_taken_for_fixed() -> None:
    held = Held()
    for value in (held, [held], {"a": [1]}, {1, 2}, (1, [2]), lambda: held):
        network: Any = Network()
        network.held = value
        assert not snapshot.Snapshot(network).holds(network), value


def test_a_trained_network_is_still_the_same() -> None:
    network = Network()
    noted, program = snapshot.Snapshot(network), program_of(network, X)
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.randn(2, 1, 4, 4)).sum().backward()
    optimiser.step()
    optimiser.zero_grad()
    network.zero_grad(set_to_none=True)
    assert noted.holds(network) and program_of(network, X) is program


def test_the_network_of_the_demo_is_seen_as_a_whole() -> None:
    for network in (models.conv4(5, 1, 4, 28), lk.convert(Network()), Network()):
        program_of(network, X)
        assert lookup._KNOWN[network].snapshot.holds(network)


def test_what_may_lead_back_to_the_network_is_not_kept() -> None:
    network: Any = Network()
    network.act = network.forward
    program_of(network, X)
    assert network not in lookup._KNOWN
    network.act = F.relu
    program_of(network, X)
    assert network in lookup._KNOWN


def test_a_network_is_freed_with_its_last_reference() -> None:
    network = Network()
    program_of(network, X)
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_tensors_by_all_their_names() -> None:
    network = Network()
    network.norm.bias = network.norm.weight
    for _ in range(2):
        parameters, buffers = tensors_of(network)
        want = dict(network.named_parameters(remove_duplicate=False))
        assert list(parameters) == list(want) and all(parameters[n] is want[n] for n in want)
        assert list(buffers) == ["offset"] and buffers["offset"] is network.offset
        network.head.weight = nn.Parameter(torch.zeros(2, 12))
        program_of(network, X)


def test_without_the_extension_nothing_is_taken_for_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_ADDRESSES", None)
    network = Network()
    assert not snapshot.Snapshot(network).holds(network)
    program = program_of(network, X)
    assert program_of(network, X) is program
    network.scale = 3.0
    assert program_of(network, X) is not program
