"""Reference networks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

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
    """The settings from which `build` makes the same network anew."""
    if not isinstance(model, Conv4):
        raise ValueError(
            f"the settings of {type(model).__name__} are not known: only networks of lambda_maml.models have them"
        )
    names = ("ways", "in_channels", "width", "image_size")
    return {"network": "conv4", **{name: getattr(model, name) for name in names}}


def build(config: dict[str, Any]) -> nn.Module:
    """The network of settings as `config_of` gives them.

    E.g. {"network": "conv4", "ways": 5, "in_channels": 1, "width": 32, "image_size": 28}.
    """
    settings = dict(config)
    name = settings.pop("network", None)
    if name != "conv4":
        raise ValueError(f"there is no network {name!r}: choose conv4")
    try:
        return conv4(**settings)
    except TypeError as error:
        raise ValueError(f"settings of conv4: {error}") from None


def layer_names(model: nn.Module) -> list[str]:
    """The names of the layers that a pattern's bits stand for, input first."""
    return [layer.name for layer in layers_of(model)]
