"""MAML's network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

import lambda_kernels as lk

from .shapes import check_counts, sides_of

__all__ = ["Conv4", "conv4"]

BLOCKS = 4


class Conv4(nn.Sequential):
    """MAML's conv4: four blocks of convolution, batch norm, ReLU and max-pool, then a linear layer; see `conv4`."""

    def __init__(self, ways: int, in_channels: int, width: int, image_size: int | Sequence[int]) -> None:
        check_counts("conv4", ways=ways, in_channels=in_channels, width=width)
        features = width
        for side in sides_of("conv4", image_size, BLOCKS):
            features *= side // 2**BLOCKS
        blocks = [(f"block{i + 1}", lk.ConvBlock(in_channels if i == 0 else width, width)) for i in range(BLOCKS)]
        super().__init__(OrderedDict([*blocks, ("flatten", nn.Flatten()), ("head", lk.Linear(features, ways))]))
        self.ways, self.in_channels, self.width, self.image_size = ways, in_channels, width, image_size


def conv4(ways: int, in_channels: int, width: int, image_size: int | Sequence[int]) -> Conv4:
    """MAML's network (Finn et al. 2017): 4 x (3x3 convolution with bias, batch norm with the batch's statistics, ReLU,
    2x2 max-pool), then a linear layer; 5 layers in a pattern.

    Args:
        ways: number of classes. in_channels: 1 grey, 3 RGB. width: channels of every block. image_size: pixels per
        side, at least 16, or height and width; the linear layer sees width x (image_size // 16)^2 features.

    >>> conv4(ways=5, in_channels=3, width=64, image_size=84)(torch.randn(25, 3, 84, 84)).shape
    torch.Size([25, 5])

    Raises:
        ValueError: a number is below 1, or image_size below 16.
    """
    return Conv4(ways, in_channels, width, image_size)
