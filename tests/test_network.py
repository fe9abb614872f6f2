"""What a bit stands for: layers of any class, written in any way, each parameter in one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import program_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lambda_kernels as lk
from lambda_kernels.agreement import within
from lambda_maml import adapt, models
from lambda_maml.network import Layer, layers_of


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class LowRank(nn.Linear):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(cin, cout)
        self.down, self.up = nn.Linear(cin, 1, bias=False), nn.Parameter(torch.zeros(cout, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.down(x) @ self.up.t()


class ByHand(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(cout, cin, 3, 3)), nn.GroupNorm(1, cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight))


class InList(nn.Module):
    """MAML's networks of old: all parameters in a list."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.vars = nn.ParameterList([torch.randn(cout, cin), torch.zeros(cout)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.vars)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Block(nn.Module):
    """Its own gain belongs to its first layer, wherever the one before it ends."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.norm, self.a, self.act, self.b = nn.LayerNorm(4), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.b(self.act(self.a(self.norm(x))))


class TiedHead(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.word, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=bias)
        self.head.weight = self.word.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.word(x)))


def parametrised(module: nn.Module, name: str = "weight") -> nn.Module:
    return parametrize.register_parametrization(module, name, Doubled())


MODULES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "weight standardisation": (lambda: nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)), ["0", "2"]),
    "low rank": (lambda: nn.Sequential(LowRank(3, 4), nn.Linear(4, 2)), ["0", "1"]),
    "by hand": (lambda: nn.Sequential(ByHand(3, 4), ByHand(4, 2)), ["0", "1"]),
    "in a list": (lambda: nn.Sequential(InList(3, 4), InList(4, 2)), ["0", "1"]),
    "parametrised": (
        lambda: nn.Sequential(parametrised(nn.Linear(3, 4)), parametrised(Scale(), "gain"), Scale()),
        ["0", "1", "2"],
    ),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(3, 4, 3)), nn.PReLU()), ["0"]),
    "pruned": (lambda: nn.Sequential(prune.random_unstructured(nn.Linear(3, 4), "weight", 0.5), Scale()), ["0", "1"]),
    "other dimensions": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 2, 3), nn.Conv3d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3)
        ),
        ["0", "1", "2", "3"],
    ),
    "words": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.EmbeddingBag(5, 3), nn.Bilinear(3, 3, 2)), ["0", "1", "2"]),
    "recurrent": (
        lambda: nn.Sequential(nn.RNN(2, 3), nn.LSTM(3, 3, 2), nn.GRU(3, 3), nn.RNNCell(3, 3), nn.LSTMCell(3, 3)),
        ["0", "1", "2", "3", "4"],
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16), ["self_attn", "linear1", "linear2"]),
    "blocks": (lambda: nn.Sequential(Block(), Block()), ["0.a", "0.b", "1.a", "1.b"]),
    "conv4": (lambda: models.conv4(3, 3, 4, 16), [*(f"block{i}.conv" for i in (1, 2, 3, 4)), "head"]),
    "a layer": (lambda: nn.Linear(4, 3), ["Linear"]),
    "a layer by hand": (lambda: ByHand(4, 3), ["ByHand"]),
    "a norm": (lambda: nn.BatchNorm2d(3), ["BatchNorm2d"]),
    "norms": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.PReLU()), ["Sequential"]),
    "one module twice": (lambda: nn.Sequential(*[nn.Linear(3, 3)] * 2, nn.Linear(3, 2)), ["0", "2"]),
    "lazy": (lambda: called(nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d(), nn.Linear(3, 2))), ["0", "2"]),
    "tied": (lambda: TiedHead(bias=True), ["word", "body", "head"]),
    "tied, and nothing of its own": (lambda: TiedHead(bias=False), ["word", "body"]),
}


def called(model: nn.Module) -> nn.Module:
    model(torch.randn(2, 1, 5, 5))
    return model


@pytest.mark.parametrize("name", MODULES)
def test_layers_are_the_same_however_the_network_is_written_and_every_parameter_is_in_one(name: str) -> None:
    make, names = MODULES[name]
    model = make()
    layers = layers_of(model)
    assert [layer.name for layer in layers] == names
    assert all(layer.weights + layer.norm for layer in layers)
    held = [n for layer in layers for n in layer.weights + layer.norm]
    assert sorted(held) == sorted(n for n, _ in model.named_parameters())
    converted = lk.convert(make())
    assert layers_of(converted) == layers_of(lk.to_torch(converted)) == layers_of(lk.to_torch(model)) == layers


def test_norms_and_loose_parameters_belong_to_the_layer_in_front_and_a_blocks_own_to_its_first() -> None:
    assert layers_of(nn.Sequential(Block(), Block())) == (
        Layer("0.a", ("0.gain", "0.a.weight", "0.a.bias", "0.act.weight"), ("0.norm.weight", "0.norm.bias")),
        Layer("0.b", ("0.b.weight", "0.b.bias"), ("1.norm.weight", "1.norm.bias")),
        Layer("1.a", ("1.gain", "1.a.weight", "1.a.bias", "1.act.weight"), ()),
        Layer("1.b", ("1.b.weight", "1.b.bias"), ()),
    )
    own, parametrised_norm = ByHand(3, 4), parametrised(nn.LayerNorm(4))
    (layer,) = layers_of(nn.Sequential(own, parametrised_norm))
    assert layer.weights == ("0.weight",)
    assert layer.norm == ("0.norm.weight", "0.norm.bias", "1.bias", "1.parametrizations.weight.original")


def test_the_network_is_not_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("it is run")

    assert models.layer_names(Backwards()) == ["last", "first"]


def test_whole_numbers_belong_to_no_layer() -> None:
    class Counted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 3)
            self.calls = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)

    assert layers_of(nn.Sequential(Counted()))[0].weights == ("0.weight", "0.bias")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.ReLU()), "Sequential has no parameters, so there is nothing to adapt"),
        (nn.Sequential(nn.LazyLinear(3)), "0.weight, 0.bias of Sequential have no shape yet: call the network on an"),
    ],
)
def test_networks_without_layers(model: nn.Module, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        layers_of(model)


def test_a_converted_network_that_went_to_torch_and_back_is_fused_again() -> None:
    model = models.conv4(2, 1, 3, 16)
    stock = lk.to_torch(model)
    assert all(type(m).__module__.startswith("torch.") for m in stock.modules() if m is not stock)
    back = lk.convert(copy.deepcopy(stock))
    x, y = torch.randn(4, 1, 16, 16), torch.arange(2).repeat(2)
    assert len(program_of(back, x).fusions) == len(program_of(model, x).fusions) == 4
    given: dict[str, Any] = {"pattern": "00011", "steps": 2, "lr": 0.1}
    want = adapt(model, x, y, **given)(x)
    for other in (stock, back):
        torch.testing.assert_close(adapt(other, x, y, **given)(x), want, **within(torch.float32, "steps"))


def test_a_block_with_other_parts_than_its_own_stays_a_block() -> None:
    block = lk.ConvBlock(1, 2)
    block.extra = nn.Linear(2, 2)
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(lk.to_torch(block)(x), block(x))
