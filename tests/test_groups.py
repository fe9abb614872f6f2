"""Patterns by name: what stands for which bits, wherever a pattern is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import torch_conv4
from torch import Tensor, nn

from lambda_maml import LambdaMAML, Pattern, adapt, adapt_tasks, explain, measure_time, models
from lambda_maml.models import layer_names
from lambda_maml.timing import measure_times, timing_info


class Net(nn.Module):
    """A stem, two stages of two blocks of two layers, a head."""

    def __init__(self, stages: str = "layer") -> None:
        super().__init__()

        def stage() -> nn.Module:
            return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)))

        self.conv1, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        if stages == "layer":
            self.layer1, self.layer2 = stage(), stage()
        else:
            self.stages = nn.Sequential(stage(), stage())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        body = self.stages if hasattr(self, "stages") else nn.Sequential(self.layer1, self.layer2)
        return self.fc(body(self.norm(self.conv1(x))))


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


NAMED: list[tuple[nn.Module, Any, str]] = [
    (Net(), "MAML", "1111111111"),
    (Net(), "ANIL", "0000000001"),
    (Net(), "head", "0000000001"),
    (Net(), "boil", "1111111110"),
    (Net(), "MAML,ANIL", "1111111111,0000000001"),
    (Net(), "BOIL,0000000001,Head", "1111111110,0000000001"),
    (Net(), "stages:0100", "0111100000"),
    (Net(), "stages:0011,ANIL", "0000011111,0000000001"),
    (Net(), "layer2:01", "0000000110"),
    (Net(), "layer2.1:10", "0000000100"),
    (Net("stages"), "stages:01", "0000011110"),  # the module of that name
    (Wrapped(Net()), "stages:0001", "0000000001"),  # the parts of what is wrapped
    (Wrapped(Wrapped(Net())), "module.module.layer1:10", "0110000000"),
    (torch_conv4(), "stages:00011", "00011"),
    (models.conv4(2, 1, 2, 16), "stages:10001", "10001"),
    (nn.Linear(4, 2), "ANIL", "1"),
    (nn.Linear(4, 2), "stages:1", "1"),
    (Net(), {"layer2": 1, "fc": 1}, "0000011111"),
    (Net(), {"layer2": True, "layer2.0": 0}, "0000000110"),  # the longest path decides
    (Net(), {"": 1, "conv1": 0, "layer1.0.2": 0}, "0101111111"),
    (nn.Linear(4, 2), {"": 1}, "1"),
    (Net(), Pattern("0000000001"), "0000000001"),
]


@pytest.mark.parametrize(("model", "pattern", "bits"), NAMED, ids=lambda value: str(value)[:40])
def test_names_and_paths_stand_for_bits(model: nn.Module, pattern: Any, bits: str) -> None:
    assert str(Pattern.of(model, pattern)) == bits
    if isinstance(pattern, str):
        named = Pattern(pattern)
        assert Pattern.parse(str(named)) == named and Pattern.of(model, named) == Pattern(bits)
        assert named.parameters(model) == Pattern(bits).parameters(model)
        assert named.describe(model) == Pattern(bits).describe(model)


WRONG: list[tuple[Any, str]] = [
    ("ANILL", r"pattern 'ANILL': 'ANILL' is neither bits, .* nor a name: did you mean ANIL\?"),
    ("MAML,quux", "'quux' is neither bits, .* nor a name: names are MAML, ANIL, BOIL, head, stages:0011"),
    ("stages:", "pattern 'stages:' is empty"),
    ("stages:0000", "updates no layer: at least one bit of '0000' must be 1"),
    ("stages:02", "'stages:02' is neither bits"),
    ("stages:01", r"pattern 'stages:01' has 2 bits, Net has 4 parts with layers \(conv1, layer1, layer2, fc\)"),
    ("layer2:001", r"has 3 bits, layer2 has 2 parts with layers \(layer2.0, layer2.1\)"),
    ("layer3:01", "pattern 'layer3:01': Net has no layer at or below it: there are layer2, layer1"),
    ("ANIL,01", "pattern 'ANIL,01' has 2 bits, Net has 10 layers"),
    ({"layer": 1}, "pattern of 'layer': Net has no layer at or below it: there are layer2, layer1"),
    ({"norm": 1}, "pattern of 'norm': Net has no layer at or below it: there are"),
    ({"zzz": 1}, "there are conv1, layer1, layer2, fc"),
    ({"fc.weight": 1}, "pattern of 'fc.weight': it is a part of the layer 'fc'"),
    ({"fc": 2}, r"pattern of 'fc' is 2: a bit is 0 \(frozen\) or 1 \(updated\)"),
    ({"fc": "1"}, "pattern of 'fc' is '1'"),
    ({"fc": 0}, "updates no layer of Net: at least one bit must be 1"),
    ({}, "updates no layer of Net"),
    ("011", "pattern '011' has 3 bits, Net has 10 layers"),
]


@pytest.mark.parametrize(("pattern", "says"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_names_and_paths_are_told_with_close_ones(pattern: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Pattern.of(Net(), pattern)


def test_a_name_has_no_bits_without_a_network() -> None:
    named = Pattern("MAML,ANIL")
    assert str(named) == "MAML,ANIL" and repr(named) == "Pattern('MAML,ANIL')" and named == Pattern("maml,anil")
    calls: list[Callable[[], object]] = [lambda: named.layers, lambda: named.at(0), lambda: named.segments(2)]
    for call in calls:
        with pytest.raises(ValueError, match=r"'MAML' stands for bits of a network: Pattern.of\(model, 'MAML,ANIL'\)"):
            call()
    with pytest.raises(ValueError, match="BOIL' updates all layers but the last, Linear has one layer"):
        Pattern.of(nn.Linear(2, 2), "BOIL")
    with pytest.raises(ValueError, match=r"got {'fc': 1}: Pattern.of\(model, ...\) takes bits by path"):
        Pattern.parse({"fc": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "bits"), [("ANIL", "00001"), ("MAML,ANIL", "11111,00001"), ("stages:00011", "00011")])
def test_names_are_taken_wherever_a_pattern_is(name: str, bits: str) -> None:
    model = torch_conv4()
    x, y = torch.randn(4, 1, 16, 16, dtype=torch.float64), torch.arange(2).repeat(2)
    given: dict[str, Any] = {"steps": 2, "lr": 0.1}
    many = (x.expand(2, *x.shape), y.expand(2, -1), x.expand(2, *x.shape))
    for _ in range(2):  # the second call may be a prepared one
        assert torch.equal(adapt(model, x, y, pattern=name, **given)(x), adapt(model, x, y, pattern=bits, **given)(x))
    got, want = (adapt_tasks(model, *many, pattern=p, **given) for p in (name, bits))
    assert torch.equal(got, want)
    assert explain(model, x, pattern=name, **given) == explain(model, x, pattern=bits, **given)
    maml = LambdaMAML(model, lr=0.1, pattern=name)
    assert str(maml.pattern) == bits
    assert list(measure_times(model, x, y, patterns=[name], steps=1, stock=False, repeats=1)) == [bits]
    assert measure_time(model, x, y, pattern=name, steps=1, repeats=1) > 0


def test_a_benchmark_states_bits() -> None:
    model = models.conv4(2, 1, 2, 16)
    stated = timing_info(model, torch.zeros(1), pattern="ANIL", shots=1, steps=1, norm="follow")
    assert json.loads(json.dumps(stated["pattern"])) == "00001"


def test_a_legend_has_a_row_for_each_layer_and_a_share_of_parameters_or_cost() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    assert Pattern("ANIL,11").describe(model) == "\n".join(
        [
            "bit  layer  kind                 parameters  share of parameters",
            "0,1  0      Conv2d, BatchNorm2d          24                47.1%",
            "1,1  3      Linear                       27                52.9%",
            "norm='follow': gamma and beta of norms follow their layer's bit",
        ]
    )
    assert Pattern("01").describe(model, (5, 1, 4, 4), norm="never") == "\n".join(
        [
            "bit  layer  kind                 parameters  share of cost",
            "0    0      Conv2d, BatchNorm2d          24          75.0%",  # 4 * 18 of 4 * 18 + 24
            "1    3      Linear                       27          25.0%",
            "norm='never': gamma and beta of norms are never updated",
        ]
    )


def test_every_network_has_a_legend() -> None:
    for model in (Net(), nn.Linear(2, 3), nn.LSTM(2, 3), nn.BatchNorm1d(2), nn.TransformerEncoderLayer(4, 2, 8)):
        lines = Pattern("MAML").describe(model).splitlines()
        assert len(lines) == len(layer_names(model)) + 2 and len({len(line) for line in lines[:-1]}) == 1
