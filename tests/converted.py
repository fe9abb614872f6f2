"""Networks that the tests of `convert` share, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT
from torch import Tensor, nn

import lambda_kernels as lk


def run(inputs: int = 3, width: int = 4, *, inplace: bool = False, tracks: bool = False) -> Any:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1),
        nn.BatchNorm2d(width, track_running_stats=tracks),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.skip, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        y = F.max_pool2d(torch.relu(self.norm2(self.conv(x))), 2)
        y = y + F.max_pool2d(self.skip(x), 2)
        return self.head(y.view(y.size(0), -1))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), run(4, 4)
        self.again = self.block[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x))) + self.again(self.stem(x)).mean()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = run(3, 3), run(3, 3)
        self.two[0].weight = self.one[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Writes(nn.Module):
    """In-place operations around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = run(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 1.0
        y = self.block(x)
        y += 1
        y.mul_(2)
        return y[..., ::2].transpose(1, 2).contiguous().view(-1)


class TwoUsers(nn.Module):
    """What lies between the layers of a run is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.norm(self.conv(x))
        return self.pool(F.relu(z)), {"before": z}


def overlapping() -> nn.Sequential:
    return nn.Sequential(*run()[:3], nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.LeakyReLU())


# name -> (model, number of fused blocks)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "sequential": (lambda: nn.Sequential(*run(), *run(4), nn.Flatten(), nn.Linear(16, 5)), 2),
    "nested": (
        lambda: nn.Sequential(run(inplace=True), nn.Sequential(run(4, tracks=True), nn.Flatten()), nn.Linear(16, 5)),
        2,
    ),
    "residual": (Residual, 2),
    "shared-module": (Shared, 2),
    "tied-weights": (Tied, 2),
    "in-place": (Writes, 1),
    "two-users": (TwoUsers, 0),
    "overlapping-pool": (overlapping, 1),
    "pool-3": (lambda: nn.Sequential(*run()[:3], nn.MaxPool2d(3)), 1),
    "strided-same": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, 2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        ),
        1,
    ),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), *run()[1:]), 0),
    "dropout": (lambda: nn.Sequential(*run(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5)), 1),
    "group-norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)), 0),
    "block": (lambda: nn.Sequential(lk.ConvBlock(3, 4), lk.ConvBlock(4, 4, pool=1), nn.Flatten(), nn.Linear(64, 5)), 2),
    "conv-alone": (lambda: nn.Conv2d(3, 4, 3), 0),
}


def outcome(model: nn.Module, x: Tensor) -> list[Any]:
    """Result, gradients and buffers after one training step, with the random numbers of a fixed seed."""
    torch.manual_seed(3)
    model.zero_grad()
    y = model(x)
    first = y[0] if isinstance(y, tuple) else y
    first.pow(2).sum().backward()
    return [y, {k: p.grad for k, p in model.named_parameters()}, dict(model.named_buffers())]


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = tuple(value.values())
    return [value] if isinstance(value, Tensor) else [] if value is None else [t for v in value for t in leaves(v)]


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(leaves(got), leaves(want), **GRADIENT)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64)
