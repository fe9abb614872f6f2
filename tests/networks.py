"""Networks of stock layers, each with its layers as a pattern counts them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Groups = list[tuple[list[str], list[str]]]  # a layer: its weights, its norm's gamma and beta


class Case(NamedTuple):
    network: nn.Module
    groups: Groups
    input_shape: tuple[int, ...]  # without N
    ways: int = 2

    def task(
        self, shots: int = 2, query: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        ys = torch.arange(self.ways).repeat(shots)
        xs = torch.randn(len(ys), *self.input_shape, generator=generator, dtype=torch.float64)
        xq = torch.randn(query, *self.input_shape, generator=generator, dtype=torch.float64)
        yq = torch.randint(self.ways, (query,), generator=generator)
        return xs.to(dtype), ys, xq.to(dtype), yq


def pair(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def conv4_groups() -> Groups:
    return [(pair(f"block{i}.conv"), pair(f"block{i}.norm")) for i in range(1, 5)] + [(pair("head"), [])]


def torch_conv4(ways: int = 2, in_channels: int = 1, width: int = 3, image_size: int = 16) -> nn.Sequential:
    """conv4 out of stock layers, with the state_dict keys of `models.conv4`; the same in every process."""
    torch.manual_seed(0)
    blocks: list[tuple[str, nn.Module]] = []
    for i in range(4):
        norm = nn.BatchNorm2d(width, track_running_stats=False)
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias, 0.0, 0.2)
        block = [
            ("conv", nn.Conv2d(width if i else in_channels, width, 3, padding=1)),
            ("norm", norm),
            ("relu", nn.ReLU()),
            ("pool", nn.MaxPool2d(2)),
        ]
        blocks.append((f"block{i + 1}", nn.Sequential(OrderedDict(block))))
    head = nn.Linear(width * (image_size // 16) ** 2, ways)
    return nn.Sequential(OrderedDict([*blocks, ("flatten", nn.Flatten()), ("head", head)])).double()


class Residual(nn.Module):
    """Two blocks with skip connections, in-place ReLU and a 1x1 downsampling branch."""

    def __init__(self, track: bool = False, momentum: float | None = 0.1) -> None:
        super().__init__()

        def norm() -> nn.BatchNorm2d:
            return nn.BatchNorm2d(3, track_running_stats=track, momentum=momentum)

        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, padding=1, bias=False), norm()
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), norm()
        self.conv3, self.bn3 = nn.Conv2d(3, 3, 3, padding=1, bias=False), norm()
        self.conv4, self.bn4 = nn.Conv2d(3, 3, 3, stride=2, padding=1), norm()
        self.down = nn.Sequential(nn.Conv2d(3, 3, 1, stride=2), norm())
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        skip = x
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += skip
        x = self.relu(x)
        x = self.relu(self.bn4(self.conv4(x)) + self.down(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def residual(**options: Any) -> Case:
    groups: Groups = [([f"conv{i}.weight"], pair(f"bn{i}")) for i in (1, 2, 3)]
    groups += [(pair("conv4"), pair("bn4")), (pair("down.0"), pair("down.1")), (pair("fc"), [])]
    return Case(Residual(**options).double(), groups, (2, 6, 6))


class Branches(nn.Module):
    """Two branches joined by torch.cat; sizes read from the input; torch.sigmoid, a mean and a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 3, 1)
        self.join = nn.Conv2d(5, 3, 3, groups=1, padding=1)
        self.head = nn.Linear(3 * 2 * 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.sigmoid(self.left(x)), F.gelu(self.right(x[:, :, :, :]))
        y = F.max_pool2d(self.join(torch.cat([a, b], dim=1)), 2)
        return self.head(y.view(x.size(0), -1))


def branches() -> Case:
    return Case(Branches().double(), [(pair(n), []) for n in ("left", "right", "join", "head")], (2, 4, 4))


def sequential(groups: list[tuple[int, int | None]], input_shape: tuple[int, ...], *layers: nn.Module) -> Case:
    """A Sequential; each layer by its place and its norm's."""
    network = nn.Sequential(*layers).double()
    own = {i: [f"{i}.{n}" for n, _ in layer.named_parameters()] for i, layer in enumerate(network)}
    return Case(network, [(own[i], [] if norm is None else own[norm]) for i, norm in groups], input_shape)


def layer_norm() -> Case:
    return sequential(
        [(0, 1), (4, 5), (7, None)],
        (1, 4, 4),
        nn.Conv2d(1, 2, 3, padding=1),
        nn.LayerNorm([2, 4, 4]),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
        nn.LayerNorm(5),
        nn.GELU(),
        nn.Linear(5, 2),
    )


def group_norm() -> Case:
    return sequential(
        [(0, 1), (3, 4), (8, None)],
        (1, 5, 5),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
        nn.InstanceNorm2d(3, affine=True),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(5),
        nn.Flatten(),
        nn.Linear(3, 2),
    )


def batch_norm_mlp() -> Case:
    return sequential(
        [(0, 1), (3, 4), (6, None)],
        (5,),
        nn.Linear(5, 6),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.ReLU(),
        nn.Linear(6, 4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Linear(4, 2),
    )


def linear_only() -> Case:
    return sequential([(0, None)], (5,), nn.Linear(5, 2))


def conv1d() -> Case:
    return sequential(
        [(0, 1), (3, None), (6, None)],
        (2, 9),
        nn.Conv1d(2, 3, 3),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Tanh(),
        nn.Conv1d(3, 2, 3, stride=2),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(2, 2),
    )


def odd_conv() -> Case:
    """Strides, dilation, groups, even and "same" kernels, no bias, pooling that drops a row."""
    return sequential(
        [(0, None), (2, None), (4, 5), (9, None)],
        (2, 11, 9),
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), bias=False),
        nn.ELU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.Softplus(),
        nn.Conv2d(4, 3, 3, padding="same"),
        nn.BatchNorm2d(3, affine=True, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 2),
    )
