"""The residual network of few-shot learning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

import lambda_kernels as lk

from .shapes import check_counts, sides_of

__all__ = ["ResNet12", "resnet12"]

WIDTHS = (64, 160, 320, 640)
SLOPE = 0.1  # of the leaky ReLUs below zero


class Stage(nn.Module):
    """Three 3x3 convolutions beside a 1x1 one, each with its norm, and a 2x2 max-pool of their sum."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(in_channels, width, 3), _norm(width)
        self.conv2, self.norm2 = _conv(width, width, 3), _norm(width)
        self.conv3, self.norm3 = _conv(width, width, 3), _norm(width)
        self.shortcut = nn.Sequential(OrderedDict(conv=_conv(in_channels, width, 1), norm=_norm(width)))
        self.act = nn.LeakyReLU(SLOPE)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, width, H // 2, W // 2]."""
        y = self.act(self.norm1(self.conv1(x)))
        y = self.act(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y)) + self.shortcut(x)
        pooled: Tensor = self.pool(self.act(y))
        return pooled


def _conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    conv = lk.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu")
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)


class ResNet12(nn.Sequential):
    """Four residual stages, the mean over the pixels, and a linear layer; see `resnet12`."""

    def __init__(
        self, ways: int, in_channels: int, image_size: int | Sequence[int], widths: Sequence[int] = WIDTHS
    ) -> None:
        if not isinstance(widths, (list, tuple)) or len(widths) != len(WIDTHS):
            raise ValueError(f"resnet12: widths must be {len(WIDTHS)} numbers, one per stage, got {widths!r}")
        check_counts(
            "resnet12", ways=ways, in_channels=in_channels, **{f"widths[{i}]": w for i, w in enumerate(widths)}
        )
        sides_of("resnet12", image_size, len(widths))
        stages = [(f"stage{i + 1}", Stage(n, w)) for i, (n, w) in enumerate(zip((in_channels, *widths), widths))]
        mean = ("mean", nn.AdaptiveAvgPool2d(1))
        super().__init__(OrderedDict([*stages, mean, ("flatten", nn.Flatten()), ("head", lk.Linear(widths[-1], ways))]))
        self.ways, self.in_channels, self.image_size, self.widths = ways, in_channels, image_size, widths


def resnet12(ways: int, in_channels: int, image_size: int | Sequence[int], widths: Sequence[int] = WIDTHS) -> ResNet12:
    """The ResNet-12 of few-shot learning (Lee et al. 2019, section 4.1; Tian et al. 2020, section 4): 4 stages of three
    3x3 convolutions with batch norm and leaky ReLU (slope 0.1) beside a 1x1 convolution, 2x2 max-pool, then the mean
    over the pixels and a linear layer. Norms use the batch's statistics. Without those papers' DropBlock.

    17 layers in a pattern: conv1, conv2, conv3 and shortcut.conv of each stage, and the head. A bit per stage, and one
    for the head: "stages:00011". The leaky ReLUs keep its layers from being fused; a frozen prefix is run once, as in
    any network.

    Args:
        ways: number of classes. in_channels: 1 grey, 3 RGB. image_size: pixels per side, at least 16, or height and
        width; other images work too. widths: channels of the stages; (64, 128, 256, 512) is the other usual choice.

    >>> resnet12(ways=5, in_channels=3, image_size=32, widths=(8, 16, 16, 24))(torch.randn(25, 3, 32, 32)).shape
    torch.Size([25, 5])

    Raises:
        ValueError: a number is below 1, image_size below 16, or there are not four widths.
    """
    return lk.convert(ResNet12(ways, in_channels, image_size, widths))
