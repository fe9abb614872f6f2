"""models.conv4: its keys, its sizes, its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import EXACT, STEPS
from torch import nn

import lambda_kernels as lk
from lambda_maml import models


def test_state_dict_keys_and_shapes() -> None:
    model = models.conv4(ways=5, in_channels=3, width=7, image_size=32)
    want: dict[str, tuple[int, ...]] = {}
    for i in range(1, 5):
        want[f"block{i}.conv.weight"] = (7, 3 if i == 1 else 7, 3, 3)
        want |= {f"block{i}.{n}": (7,) for n in ("conv.bias", "norm.weight", "norm.bias")}
    want |= {"head.weight": (5, 28), "head.bias": (5,)}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == want
    assert list(model.state_dict()) == list(want)


@pytest.mark.parametrize(("size", "side"), [(84, 5), (32, 2), (28, 1), (16, 1), (31, 1), (48, 3), (105, 6)])
def test_features_at_the_head(size: int, side: int) -> None:
    model = models.conv4(ways=3, in_channels=1, width=2, image_size=size)
    assert model.get_submodule("head").in_features == 2 * side * side
    assert model(torch.randn(2, 1, size, size)).shape == (2, 3)


def test_images_need_not_be_square() -> None:
    model = models.conv4(ways=3, in_channels=1, width=2, image_size=[32, 50])
    assert model(torch.randn(2, 1, 32, 50)).shape == (2, 3)
    assert models.config_of(models.conv4(3, 1, 2, (32, 50))) == models.config_of(model)
    assert models.image_shape(models.config_of(model)) == (1, 32, 50)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_network_of_the_papers(training: bool) -> None:
    model = models.conv4(ways=4, in_channels=2, width=3, image_size=20).double().train(training)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    layers: list[nn.Module] = []
    for i in range(4):
        norm = nn.BatchNorm2d(3, track_running_stats=False)
        layers += [nn.Conv2d(2 if i == 0 else 3, 3, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    stock = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3, 4)).double().train(training)
    stock.load_state_dict(dict(zip(stock.state_dict(), model.state_dict().values())))
    x = torch.randn(5, 2, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock(x), **STEPS)
    torch.testing.assert_close(lk.to_torch(model)(x), stock(x), **EXACT)


def test_settings_and_back() -> None:
    settings = {"network": "conv4", "ways": 5, "in_channels": 3, "width": 6, "image_size": 84}
    model = models.build(settings)
    assert models.config_of(model) == settings and isinstance(model, models.Conv4)
    assert settings["network"] == "conv4"  # build does not empty what it is given
    twin = models.build(models.config_of(model))
    twin.load_state_dict(model.state_dict())


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="there is no network 'resnet': choose conv4"):
        models.build({"network": "resnet"})
    with pytest.raises(ValueError, match="there is no network None"):
        models.build({})
    with pytest.raises(ValueError, match="settings of conv4: .*depth"):
        models.build({"network": "conv4", "ways": 5, "in_channels": 1, "width": 2, "image_size": 28, "depth": 3})
    with pytest.raises(ValueError, match="settings of conv4: .*image_size"):
        models.build({"network": "conv4", "ways": 5, "in_channels": 1, "width": 2})
    with pytest.raises(ValueError, match="the settings of Sequential are not known"):
        models.config_of(nn.Sequential())


@pytest.mark.parametrize("size", [1, 8, 15])
def test_images_that_are_too_small(size: int) -> None:
    with pytest.raises(ValueError, match=f"4 poolings need images of 16 pixels per side or more, got {size}"):
        models.conv4(ways=5, in_channels=1, width=2, image_size=size)


@pytest.mark.parametrize("name", ["ways", "in_channels", "width", "image_size"])
@pytest.mark.parametrize("value", [0, -3, 2.0, "5", None])
def test_settings_that_are_no_counts(name: str, value: Any) -> None:
    given: dict[str, Any] = {"ways": 5, "in_channels": 1, "width": 2, "image_size": 28, name: value}
    with pytest.raises(ValueError, match=f"conv4: {name} must be a whole number of at least 1, got"):
        models.conv4(**given)
