"""Reference networks."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

import lambda_kernels as lk

from .network import layers_of

__all__ = ["Conv4", "build", "config_of", "conv4", "layer_names"]

BLOCKS = 4


class Conv4(nn.Sequential):
    """MAML's conv4: four blocks of convolution, batch norm, ReLU and max-pool, then a linear layer; see `conv4`."""

    def __init__(self, ways: int, in_channels: int, width: int, image_size: int) -> None:
        for name, value in (("ways", ways), ("in_channels", in_channels), ("width", width), ("image_size", image_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"conv4: {name} must be a whole number of at least 1, got {value!r}")
        side = image_size // 2**BLOCKS
        if side < 1:
            raise ValueError(
                f"conv4: {BLOCKS} poolings need images of {2**BLOCKS} pixels per side or more, got {image_size}"
            )
        blocks = [(f"block{i + 1}", lk.ConvBlock(in_channels if i == 0 else width, width)) for i in range(BLOCKS)]
        super().__init__(
            OrderedDict([*blocks, ("flatten", nn.Flatten()), ("head", lk.Linear(width * side * side, ways))])
        )
        self.ways, self.in_channels, self.width, self.image_size = ways, in_channels, width, image_size


def conv4(ways: int, in_channels: int, width: int, image_size: int) -> Conv4:
    """MAML's network (Finn et al. 2017): 4 x (3x3 convolution with bias, batch norm with the batch's statistics, ReLU,
    2x2 max-pool), then a linear layer; 5 layers in a pattern.

    Args:
        ways: number of classes. in_channels: 1 grey, 3 RGB. width: channels of every block. image_size: pixels per
        side, at least 16; the linear layer sees width x (image_size // 16)^2 features.

    >>> conv4(ways=5, in_channels=3, width=64, image_size=84)(torch.randn(25, 3, 84, 84)).shape
    torch.Size([25, 5])

    Raises:
        ValueError: a number is below 1, or image_size below 16.
    """
    return Conv4(ways, in_channels, width, image_size)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The settings from which `build` makes the same network anew.

    Raises:
        ValueError: neither `conv4` nor `build` made the network.
    """
    if isinstance(model, Conv4):
        names = ("ways", "in_channels", "width", "image_size")
        return {"network": "conv4", **{name: getattr(model, name) for name in names}}
    if model not in _BUILT:
        raise ValueError(
            f"the settings of {type(model).__name__} are not known, so that a checkpoint could not build it anew: make "
            "it with models.build({'network': 'MODULE:FUNCTION', 'ways': ..., 'in_channels': ..., 'image_size': ...})"
        )
    return copy.deepcopy(_BUILT[model])


def build(config: Mapping[str, Any]) -> nn.Module:
    """The network of settings as `config_of` gives them.

    >>> build({"network": "conv4", "ways": 5, "in_channels": 1, "width": 32, "image_size": 28})(xs).shape
    torch.Size([5, 5])

    A network of your own is named by the function that makes it: {"network": "my_networks:resnet", "ways": 5,
    "in_channels": 3, "image_size": 84, "args": {"depth": 12}} imports `my_networks` and gives the result of
    `resnet(ways=5, in_channels=3, image_size=84, depth=12)`, converted by `lambda_kernels.convert`.

    Raises:
        ValueError: there is no such network or function, it takes other arguments, or gives no module.
    """
    settings = dict(config)
    name = settings.pop("network", None)
    if isinstance(name, str) and ":" in name:
        return _of_function(name, settings)
    if name != "conv4":
        raise ValueError(f"there is no network {name!r}: choose conv4, or name your function as MODULE:FUNCTION")
    try:
        return conv4(**settings)
    except TypeError as error:
        raise ValueError(f"settings of conv4: {error}") from None


_BUILT: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()  # the settings of networks of functions


def _of_function(name: str, settings: dict[str, Any]) -> nn.Module:
    """The module that MODULE:FUNCTION makes."""
    where, _, attribute = name.partition(":")
    try:
        made_by: Any = importlib.import_module(where)
        for part in attribute.split("."):
            made_by = getattr(made_by, part)
    except ImportError as error:
        raise ValueError(
            f"network {name}: {where} cannot be imported ({error}): its folder must be the current one or in PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ValueError(f"network {name}: {error}") from error
    given = {**settings, **settings.get("args", {})}
    given.pop("args", None)
    try:
        inspect.signature(made_by).bind(**given)
    except (TypeError, ValueError) as error:
        told = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"network {name}: it cannot be called with {told} ({error})") from error
    model = made_by(**given)
    if not isinstance(model, nn.Module):
        raise ValueError(f"network {name}: it gave a {type(model).__name__}, expected a torch.nn.Module")
    model = lk.convert(model)
    _BUILT[model] = {"network": name, **copy.deepcopy(settings)}
    return model


def layer_names(model: nn.Module) -> list[str]:
    """The names of the layers that a pattern's bits stand for, input first."""
    return [layer.name for layer in layers_of(model)]
