"""Which networks are read off their tree, and which have to be captured: no code but torch's and ours is passed by."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from programs import program_of
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, prune

import lambda_kernels as lk
from lambda_kernels.program import lookup
from lambda_kernels.program.walk import is_walkable, look, walk
from lambda_maml import models


class OwnLinear(nn.Linear):
    """A class of a user's that changes nothing."""


class Named(nn.Sequential):
    """A class of a user's that says which layers there are, and what else may be asked of them."""

    def __init__(self) -> None:
        super().__init__(*plain())
        self.ways = 2

    def features(self, x: Tensor) -> Tensor:
        return self[:-1](x)


class Heir(Named):
    ways = 3


class Doubled(Named):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shorter(Named):
    def __iter__(self) -> Any:
        return iter(list(self._modules.values())[:-1])


class Always(Named):
    training = property(lambda self: True, lambda self, value: None)


class Metered(type(nn.Module)):  # type: ignore[misc]
    def __getattribute__(cls, name: str) -> Any:
        return super().__getattribute__(name)


class Mixed(Named, nn.Module):
    pass


class Measured(Named, metaclass=Metered):
    pass


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def square(x: Tensor) -> Tensor:
    return x * x


def plain() -> nn.Sequential:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()


def changed(change: Callable[[Any], Any]) -> nn.Module:
    network = plain()
    change(network)
    return network


def around(*between: nn.Module) -> nn.Module:
    return nn.Sequential(*between, nn.Flatten(), nn.Linear(32, 2)).double()


def attention(activation: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 8, 0.0, activation, batch_first=True)
    return nn.Sequential(nn.Flatten(2), layer, nn.Flatten()).double()


def forward_of_the_instance(network: Any) -> None:
    network[4].forward = lambda x: F.linear(x, network[4].weight)


def attribute(network: Any) -> None:
    network[2].made_by = Swish()


# name -> the network, and whether it is walked
NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "torch's layers": (plain, True),
    "converted": (lambda: lk.convert(plain()), True),
    "nested": (lambda: nn.Sequential(OrderedDict(stem=plain()[:3], head=plain()[3:])), True),
    "blocks of ours": (lambda: around(lk.ConvBlock(2, 2, pool=1)), True),
    "a layer alone": (lambda: nn.Conv2d(2, 3, 3).double(), True),
    "an attention layer": (lambda: attention("relu"), True),
    "an attention layer with a function of torch's": (lambda: attention(F.silu), True),
    "an attention layer with a user's activation": (lambda: attention(square), False),
    "an attention layer with a user's module": (lambda: attention(Swish()), False),
    "a user's layer": (lambda: around(Swish()), False),
    "a user's class of a layer": (lambda: changed(lambda n: n.append(OwnLinear(2, 2).double())), False),
    "conv4": (lambda: models.conv4(2, 2, 3, 16).double(), True),
    "a user's Sequential": (Named, True),
    "what inherits from it": (Heir, True),
    "a user's Sequential, converted": (lambda: lk.convert(Named()), True),
    "a user's Sequential inside": (lambda: nn.Sequential(OrderedDict(net=Named())), True),
    "a Sequential with a forward of its own": (Doubled, False),
    "a Sequential that iterates otherwise": (Shorter, False),
    "a Sequential with a mode of its own": (Always, False),
    "a Sequential that inherits twice": (Mixed, False),
    "a Sequential of another kind of class": (Measured, False),
    "a forward hook": (lambda: changed(lambda n: n[4].register_forward_hook(lambda *_: None)), False),
    "a hook before": (lambda: changed(lambda n: n[0].register_forward_pre_hook(lambda *_: None)), False),
    "a backward hook": (lambda: changed(lambda n: n[4].register_full_backward_hook(lambda *_: None)), False),
    "a hook of the root": (lambda: changed(lambda n: n.register_forward_hook(lambda *_: None)), False),
    "a parametrised layer": (lambda: changed(lambda n: parametrizations.weight_norm(n[4])), False),
    "a pruned layer": (lambda: changed(lambda n: prune.l1_unstructured(n[4], "weight", 0.5)), False),
    "a forward of the instance": (lambda: changed(forward_of_the_instance), False),
    "an attribute of a user's class": (lambda: changed(attribute), False),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_which_networks_are_walked(name: str) -> None:
    make, walked = NETWORKS[name]
    network = make()
    size = 16 if name == "conv4" else 4
    x = torch.randn(2, 2, size, size, dtype=torch.float64)
    assert is_walkable(network) is walked
    program = program_of(network, x)
    assert lookup._KNOWN[network].family.walkable is walked if network in lookup._KNOWN else not walked
    torch.testing.assert_close(program(network, x), network(x), **EXACT)


def test_a_method_given_to_a_walked_class_later_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Heir(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    program_of(network, x)
    assert is_walkable(network)
    original = nn.Sequential.forward
    monkeypatch.setattr(Named, "forward", lambda self, x: 2 * original(self, x), raising=False)
    assert not is_walkable(network)
    torch.testing.assert_close(program_of(network, x)(network, x), network(x), **EXACT)


def test_a_replaced_forward_of_torchs_own_class_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = plain(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    assert is_walkable(network)
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * original(self, x) + 1)
    other = plain()
    assert not is_walkable(other)
    torch.testing.assert_close(program_of(other, x)(other, x), other(x), **EXACT)


def test_a_replaced_forward_of_torchs_own_class_is_noticed_in_a_network_that_was_walked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, x = plain(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    program_of(network, x)
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * original(self, x) + 1)
    torch.testing.assert_close(program_of(network, x)(network, x), network(x), **EXACT)


def spelled(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_the_graph_is_the_layers_in_a_row_by_their_first_names() -> None:
    inner = plain()
    assert spelled(walk(nn.Sequential(OrderedDict(a=inner, b=nn.Sequential(nn.Tanh(), nn.Tanh()))))) == [
        *(f"a.{i}" for i in range(5)), "b.0", "b.1",
    ]  # fmt: skip
    twice = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    twice.append(twice[0])
    assert spelled(walk(twice)) == ["0", "1", "0"]
    assert spelled(walk(nn.Linear(2, 2))) == [""] and spelled(walk(nn.Sequential())) == []
    assert spelled(walk(attention("relu"))) == ["0", "1", "2"]  # a layer of layers is one


def test_nothing_of_nothing() -> None:
    x = torch.randn(3, 2)
    assert program_of(nn.Sequential(), x)(nn.Sequential(), x) is x


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_looking_sees_what_layers_do_and_leaves_them_alone(layout: torch.memory_format) -> None:
    network = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5))
    before = {name: b.clone() for name, b in network.named_buffers()}
    graph, x = walk(network), torch.randn(2, 2, 3, 3).contiguous(memory_format=layout)
    state = torch.random.get_rng_state()
    assert look(network, graph, x) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
    given, norm, relu, flat, drop = (n.meta["deeds"] for n in graph.nodes if n.op != "output")
    assert norm.statistics and norm.memory != given.memory
    assert relu.writes == norm.memory == relu.memory == flat.memory and not flat.writes
    assert drop.random is not None and drop.memory != flat.memory


def test_an_input_that_layers_refuse_is_no_reason_against_the_next_one() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    wrong = program_of(network, torch.randn(4, 5))
    assert str(wrong.untraceable).startswith("it cannot be seen what its layers do (RuntimeError: ")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wrong(network, torch.randn(4, 5))
    assert program_of(network, torch.randn(4, 5)) is wrong
    assert program_of(network, torch.randn(4, 3)).untraceable is None


def test_layers_that_write_into_the_input_are_one_step() -> None:
    network, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), torch.randn(4, 3)
    program = program_of(network, x)
    assert program.untraceable == "its forward writes into its input in place (_0)"
    want = network(x.clone())
    assert torch.equal(program(network, x), want) and (x >= 0).all()
