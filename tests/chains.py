"""Chains made by hand for the inner loops: every kind of layer, in any memory, beside a plain loop of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import STEPS, layouts
from torch import Tensor

from lambda_kernels.backends.base import Backend, InnerLoop
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
    eps: float = 1e-5

    @property
    def spec(self) -> BlockSpec:
        return BlockSpec(ConvSpec(self.stride, self.padding, self.dilation, self.groups), self.eps, self.pool)


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
    x: Tensor  # [T, N, ...]
    labels: Tensor  # [T, N]
    query: Tensor  # [T, Q, ...]
    parameters: list[Tensor]

    def to(self, target: str | torch.dtype) -> Given:
        """On a device, or in a dtype."""
        labels = self.labels.to(target) if isinstance(target, str) else self.labels
        return Given(self.x.to(target), labels, self.query.to(target), [p.to(target) for p in self.parameters])


def given(
    network: Network, dtype: torch.dtype = torch.float64, tasks: int = 1, own: bool | Sequence[bool] = False
) -> Given:
    """Images, labels and parameters, drawn in float64; parameters that are the tasks' own have a task axis."""
    generator = torch.Generator().manual_seed(0)
    owns = iter([own] * (3 * len(network.layers) + 2) if isinstance(own, bool) else own)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def parameter(*shape: int) -> Tensor:
        return draw(*((tasks,) if next(owns) else ()), *shape)

    parameters, size = [], list(network.size)
    for outputs, kernel, stride, padding, dilation, groups, pool, _ in network.layers:
        taps = size[0] // groups * kernel[0] * kernel[1]
        parameters.append(parameter(outputs, size[0] // groups, *kernel) / taps**0.5)
        parameters += [1.0 + 0.2 * parameter(outputs), 0.2 * parameter(outputs)]
        size[0] = outputs
        for a in (0, 1):
            span = size[1 + a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1
            size[1 + a] = (span // stride[a] + 1) // pool
    features = torch.Size(size).numel()
    parameters += [parameter(network.ways, features) / features**0.5, 0.2 * parameter(network.ways)]
    x, query = draw(tasks, network.images, *network.size), draw(tasks, 4, *network.size)
    labels = torch.arange(network.images).remainder(network.ways).expand(tasks, network.images)
    return Given(x, labels, query, parameters).to(dtype)


def run(
    backend: Backend, network: Network, task: Given, updated: list[bool], steps: int,
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


def forward(network: Network, parameters: list[Tensor], x: Tensor) -> Tensor:
    """Logits of one task's x [N, ...], as anyone writes them."""
    for i, layer in enumerate(network.layers):
        weight, gamma, beta = parameters[3 * i : 3 * i + 3]
        z = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        x = F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.0, layer.eps))
        x = F.max_pool2d(x, layer.pool) if layer.pool > 1 else x
    return F.linear(x.flatten(1), *parameters[-2:])


def plain(network: Network, task: Given, updated: Sequence[bool], rates: Tensor) -> InnerLoop:
    """The loop by autograd, one task after another; rates [steps, updated parameters]. All results have a task axis."""
    ranks = [4, 1, 1] * len(network.layers) + [2, 1]
    moved = [i for i, flag in enumerate(updated) if flag]
    rows, new, logits = [], [], []
    for x, labels, query, own in zip(
        task.x, task.labels, task.query,
        ([p[t] if p.dim() > n else p for p, n in zip(task.parameters, ranks)] for t in range(len(task.x))),
    ):  # fmt: skip
        losses = []
        for row in rates:
            leaves = [own[i].detach().requires_grad_() for i in moved]
            for i, leaf in zip(moved, leaves):
                own[i] = leaf
            loss = F.cross_entropy(forward(network, own, x), labels)
            losses.append(loss.detach())
            for i, gradient, rate in zip(moved, torch.autograd.grad(loss, leaves), row):
                own[i] = own[i].detach() - rate * gradient
        rows.append(torch.stack([*losses, x.new_zeros(())]))
        new.append([own[i].detach() for i in moved])
        logits.append(forward(network, own, query).detach())
    return InnerLoop(torch.stack(rows, 1), [torch.stack(p) for p in zip(*new)], torch.stack(logits))


def drawn_rates(updated: Sequence[bool], steps: int = 3) -> Tensor:
    """Rates [steps, updated parameters]: some are 0, one is negative, no two of the others are equal."""
    generator = torch.Generator().manual_seed(2)
    shape = steps, sum(updated)
    rates = 0.05 + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    rates[torch.rand(shape, generator=generator) < 0.2] = 0.0
    rates.view(-1)[:2] = torch.tensor([0.0, -0.02])
    return rates


def flat(rates: Tensor) -> list[float]:
    return [float(rate) for rate in rates.flatten()]


# What every backend has to do with rates per parameter and step.
TWO_BLOCKS = Network((3, 9, 8), (Layer(8), Layer(6, stride=(1, 2), pool=1, eps=1e-3)), images=5, ways=5)
SOME_OWN = [i % 2 == 1 for i in range(8)]  # of its parameters, those that are the tasks' own


def check_rates(backend: Backend, device: str = "cpu") -> None:
    """Rates as in a plain loop, exact freezing, equal rates as one, parameters left as they are."""
    network, steps, tasks = TWO_BLOCKS, 3, 2
    task = given(network, tasks=tasks, own=SOME_OWN).to(device)
    before = [p.clone() for p in task.parameters]
    for bits in ("11111111", "00000011", "00011100", "10010010", "01000001"):
        updated = [bit == "1" for bit in bits]
        rates = drawn_rates(updated)
        got = run(backend, network, task, updated, steps, flat(rates), query=True)
        want = plain(network, task.to("cpu"), updated, rates)
        assert got.rows.shape == (steps + 1, tasks) and got.logits is not None and want.logits is not None
        torch.testing.assert_close(got.rows.cpu().double(), want.rows, **STEPS)
        torch.testing.assert_close([p.cpu() for p in got.updated], want.updated, **STEPS)
        torch.testing.assert_close(got.logits.cpu(), want.logits, **STEPS)

        one = run(backend, network, task, updated, steps, [0.03], query=True)
        equal = run(backend, network, task, updated, steps, [0.03] * (steps * sum(updated)), query=True)
        assert same(one, equal), bits

        frozen = [0.0 if i % sum(updated) == 0 else 0.03 for i in range(steps * sum(updated))]
        found = run(backend, network, task, updated, steps, frozen)
        first = task.parameters[updated.index(True)]
        assert torch.equal(found.updated[0], first.expand_as(found.updated[0])) and found.logits is None, bits
        assert all(torch.equal(p, old) for p, old in zip(task.parameters, before)), bits


def same(one: InnerLoop, other: InnerLoop) -> bool:
    """Bit for bit."""
    pairs = zip([one.rows, *one.updated], [other.rows, *other.updated], strict=True)
    logits = one.logits is other.logits is None or (
        one.logits is not None and other.logits is not None and torch.equal(one.logits, other.logits)
    )
    return logits and all(torch.equal(a, b) for a, b in pairs)


def check_sgd(backend: Backend, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """One rate per parameter; a rate of 0 leaves a parameter as it is, whatever the gradient holds."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(7,), (1025,), (3, 4, 5), (1,), (2048,), *[(n,) for n in range(9, 120)]]
    first, slopes = (
        [torch.randn(s, generator=generator).to(device=device, dtype=dtype) for s in shapes] for _ in range(2)
    )
    slopes[2] = torch.full_like(slopes[2], torch.nan)
    rates = [0.01 * i for i in range(len(shapes))]
    rates[2] = 0.0
    got, want = ([p.clone() for p in first] for _ in range(2))
    backend.sgd_(got, slopes, rates)
    for parameter, slope, rate in zip(want, slopes, rates):
        if rate != 0.0:
            backend.sgd_([parameter], [slope], [rate])
    assert all(map(torch.equal, got, want))
    assert torch.equal(got[0], first[0]) and torch.equal(got[2], first[2])
    equal, one = ([p.clone() for p in first] for _ in range(2))
    backend.sgd_(equal, slopes, [0.1] * len(shapes))
    backend.sgd_(one, slopes, [0.1])
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(equal, one)) if i != 2)
