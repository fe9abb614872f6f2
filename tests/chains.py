"""Chains made by hand for the inner loops: every kind of layer, in any memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from cases import STEPS, layouts
from torch import Tensor

from lambda_kernels.backends.base import InnerLoop
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec

LR = 0.1


class Layer(NamedTuple):
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pool: int = 2

    @property
    def spec(self) -> BlockSpec:
        return BlockSpec(ConvSpec(self.stride, self.padding, self.dilation, self.groups), 1e-5, self.pool)


class Network(NamedTuple):
    size: tuple[int, ...]  # of an image [C, H, W], or of its features
    layers: tuple[Layer, ...]
    images: int = 6
    ways: int = 3

    @property
    def specs(self) -> list[BlockSpec]:
        return [layer.spec for layer in self.layers]

    def from_layer(self, first: int) -> list[bool]:
        """The flags where everything from that layer on is updated; the linear layer is the last."""
        return [i >= 3 * first for i in range(3 * len(self.layers) + 2)]


class Given(NamedTuple):
    x: Tensor
    labels: Tensor
    query: Tensor
    parameters: list[Tensor]


def given(network: Network, dtype: torch.dtype = torch.float64, tasks: int = 1, own: bool = False) -> Given:
    """Images, labels and parameters, drawn in float64; parameters with a task axis where they are the tasks' own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    axis = (tasks,) if own else ()
    parameters, size = [], list(network.size)
    for outputs, kernel, stride, padding, dilation, groups, pool in network.layers:
        taps = size[0] // groups * kernel[0] * kernel[1]
        parameters.append(draw(*axis, outputs, size[0] // groups, *kernel) / taps**0.5)
        parameters += [1.0 + 0.2 * draw(*axis, outputs), 0.2 * draw(*axis, outputs)]
        size[0] = outputs
        for a in (0, 1):
            span = size[1 + a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1
            size[1 + a] = (span // stride[a] + 1) // pool
    features = torch.Size(size).numel()
    parameters += [draw(*axis, network.ways, features) / features**0.5, 0.2 * draw(*axis, network.ways)]
    x, query = draw(tasks, network.images, *network.size), draw(tasks, 4, *network.size)
    labels = torch.arange(network.images).remainder(network.ways).expand(tasks, network.images)
    return Given(x.to(dtype), labels, query.to(dtype), [p.to(dtype) for p in parameters])


def run(
    backend: Reference, network: Network, task: Given, updated: list[bool], steps: int,
    rates: Sequence[float] = (LR,), query: bool = False,
) -> InnerLoop:  # fmt: skip
    """A backend's inner loop, with the logits of the query images where `query` says so."""
    x, labels, images, parameters = task
    return backend.inner_loop(
        x, labels, parameters, updated, network.specs, steps, list(rates), images if query else None
    )


def near(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **STEPS, msg=lambda text: f"{name}: {text}")


# The first updated layer has few pixels: all steps run on those where that takes fewer multiply-adds, which it never
# does for one step. Sizes are such that it does for two and more.
FEW: dict[str, tuple[Network, int]] = {
    "winograd": (Network((2, 9, 9), (Layer(32), Layer(64, pool=1)), images=2), 1),
    "winograd-then-more": (Network((2, 9, 9), (Layer(16), Layer(32), Layer(24, padding=(1, 2))), images=1), 1),
    "first": (Network((8, 4, 4), (Layer(32), Layer(8)), images=1), 0),
    "stride": (Network((16, 9, 8), (Layer(48, stride=(2, 2), pool=1), Layer(16, pool=1)), images=2), 0),
    "stride-pair": (Network((3, 16, 18), (Layer(16), Layer(32, stride=(3, 2), padding=(0, 1))), images=2), 1),
    "5x5": (Network((8, 4, 4), (Layer(32, (5, 5), padding=(2, 2)),), images=2), 0),
    "5x5-frozen-below": (Network((1, 8, 9), (Layer(16), Layer(32, (5, 5), padding=(2, 2))), images=2), 1),
    "1x3-dilation": (
        Network((32, 4, 5), (Layer(64, (1, 3), padding=(0, 2), dilation=(1, 2)), Layer(8, pool=1)), images=2), 0
    ),
    "2x2": (Network((32, 4, 4), (Layer(48, (2, 2), padding=(0, 0), pool=1),), images=3), 0),
    "1x1": (Network((100, 3, 3), (Layer(112, (1, 1), padding=(0, 0), pool=1),), images=2), 0),
}  # fmt: skip

MIXED = {
    "images-winograd-library": Network(
        (3, 18, 19), (Layer(16), Layer(64), Layer(16, (3, 2), padding=(1, 0)), Layer(8, pool=1))
    ),
    "library-groups": Network((40, 7, 7), (Layer(12, groups=4, stride=(2, 1), pool=1), Layer(10, groups=2))),
    "winograd-first": Network((16, 9, 7), (Layer(64, pool=1), Layer(32), Layer(16, pool=1)), images=4),
    "few-pixels": FEW["winograd-then-more"][0],
    "linear": Network((33,), ()),
}  # fmt: skip


def in_other_memory(task: Given) -> Given:
    """The same values: weights of convolutions channels-last, the linear layer's transposed, images cut out."""

    def moved(p: Tensor) -> Tensor:
        kernels, matrix = p.dim() >= 4, p.dim() == 2
        return layouts(p)["channels-last"] if kernels else p.mT.contiguous().mT if matrix else p

    x = task.x if task.x.dim() == 3 else layouts(task.x)["sliced"]
    query = layouts(task.query)["strided"] if task.x.dim() == 3 else layouts(task.query)["channels-last"]
    return Given(x, task.labels, query, [moved(p) for p in task.parameters])
