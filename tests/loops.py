"""The inner loop in plain PyTorch, and the networks it is run on: what the adapter's results are compared with."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Groups = list[tuple[list[str], list[str]]]  # a layer: its weights, its norm's gamma and beta


class Adapted(NamedTuple):
    parameters: dict[str, Tensor]
    logits: Tensor
    gradients: dict[str, Tensor]  # of the query loss, by the network's own parameters
    buffers: dict[str, Tensor]


def updated_names(groups: Groups, bits: str, norm: str) -> list[str]:
    assert len(groups) == len(bits)
    return [
        n
        for bit, (weights, gamma_beta) in zip(bits, groups)
        if bit == "1"
        for n in (weights + gamma_beta if norm == "follow" else weights)
    ]


def stage(pattern: str, step: int) -> str:
    stages = pattern.split(",")
    return stages[min(step, len(stages) - 1)]


def plain_loop(
    network: nn.Module,
    groups: Groups,
    pattern: str,
    xs: Tensor,
    ys: Tensor,
    xq: Tensor,
    yq: Tensor,
    *,
    steps: int,
    lr: float,
    norm: str = "follow",
    second_order: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Adapted:
    """MAML's inner loop as anyone would write it, on a copy of the network."""
    network = copy.deepcopy(network)
    meta = dict(network.named_parameters())
    for parameter in meta.values():
        parameter.requires_grad_()
    fast: dict[str, Tensor] = dict(meta)
    for step in range(steps):
        names = updated_names(groups, stage(pattern, step), norm)
        fast.update({n: fast[n].view_as(fast[n]) for n in names})  # gradient by these values, not by their past
        value = loss(functional_call(network, fast, (xs,)), ys)
        gradients = torch.autograd.grad(value, [fast[n] for n in names], create_graph=second_order, allow_unused=True)
        for name, gradient in zip(names, gradients):
            if gradient is not None:
                fast[name] = fast[name] - lr * gradient
    logits = functional_call(network, fast, (xq,))
    outer = torch.autograd.grad(loss(logits, yq), list(meta.values()), allow_unused=True)
    return Adapted(
        {n: t.detach() for n, t in fast.items()},
        logits.detach(),
        {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(meta.items(), outer)},
        dict(network.named_buffers()),
    )


def close(got: Tensor, want: Tensor, what: str, rtol: float = 1e-9, scale: float = 1e-12) -> None:
    """Equal to rounding: relative, or small beside the tensor's greatest value (or 1)."""
    atol = scale * max(1.0, float(want.detach().abs().max()) if want.numel() else 1.0)
    torch.testing.assert_close(got.detach(), want.detach(), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def all_close(got: dict[str, Tensor], want: dict[str, Tensor], what: str, **tolerance: float) -> None:
    assert list(got) == list(want)
    for name in want:
        close(got[name], want[name], f"{what} {name}", **tolerance)


# Networks of stock layers, each with its layers as a pattern counts them.


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


class WritesPrefix(nn.Module):
    """In-place steps on values of the first layer: on the value, on a view of it, before and after others read it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 2)
        self.shift = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * 1.0
        kind = self.kind
        if kind == "relu":
            h = F.relu_(h)
            h = h + self.second(h)
        elif kind == "value":
            early = h * 2.0
            h.add_(self.second(h * 1.0) * self.shift)
            h = h + early
        elif kind == "view":
            part = h[:, :2]
            part += self.second(h * 1.0)[:, 1:] * self.shift[1:]
            h = h * 1.5
        elif kind == "setitem":
            h[:, 0] = self.second(h * 1.0)[:, 0] + self.shift[0]
        elif kind == "order":
            late = h + self.second(
                x.expand(-1, 3, -1, -1)
            )  # reads h before the in-place step, which no parameter reaches
            h.mul_(0.5)
            h = h * late
        else:
            raise AssertionError(kind)
        return self.head(F.relu(h).mean((2, 3)))


def writes_prefix(kind: str) -> Case:
    network = WritesPrefix(kind).double()
    weights = {"first": pair("first"), "second": pair("second"), "head": pair("head")}
    reader = {"relu": "head", "value": "second", "view": "second", "setitem": "second", "order": "head"}[kind]
    weights[reader] = [*weights[reader], "shift"]  # a parameter outside of layers belongs to the layer in front of it
    return Case(network, [(names, []) for names in weights.values()], (1, 4, 4))


class Scaled(nn.Module):
    """Raw parameters before, between and behind the layers."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.conv = nn.Conv2d(1, 3, 3)
        self.scale = nn.Parameter(torch.rand(3, 1, 1) + 0.5)
        self.fc = nn.Linear(3, 2)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("offset", torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x * self.gain)) * self.scale + self.offset
        return self.fc(h.mean((2, 3))) / self.temperature


def scaled() -> Case:
    groups: Groups = [(["gain", *pair("conv"), "scale"], []), ([*pair("fc"), "temperature"], [])]
    return Case(Scaled().double(), groups, (1, 5, 5))


class Tied(nn.Module):
    """One weight in two linear layers, and one module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.b, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.a(x))))
        return self.head(torch.tanh(self.b(torch.tanh(self.twice(x)))))


def tied() -> Case:
    groups: Groups = [(pair("a"), []), (pair("twice"), []), (["b.bias"], []), (pair("head"), [])]
    network = Tied().double()
    network.head = nn.Linear(4, 2).double()
    return Case(network, groups, (4,))


class Untraceable(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        h = F.relu(h) if h.sum() > -1e9 else h
        return self.fc(h.mean((2, 3)))


def untraceable() -> Case:
    return Case(Untraceable().double(), [(pair("conv"), pair("norm")), (pair("fc"), [])], (1, 5, 5))


class Configured(nn.Module):
    """Its forward depends on an object that it holds."""

    class Settings:
        def __init__(self) -> None:
            self.square = False

    def __init__(self) -> None:
        super().__init__()
        self.settings = self.Settings()
        self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.fc((h * h if self.settings.square else h).mean((2, 3)))


class NoGrad(nn.Module):
    """A backbone that its own forward runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mid, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x).mean((2, 3))
        return self.fc(torch.tanh(self.mid(x)))


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.5 * g


class StraightThrough(NoGrad):
    """A custom autograd.Function inside of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(_Sign.apply(self.mid(self.conv(x).mean((2, 3)))))


class AsksType(NoGrad):
    """A forward that looks at the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x] if isinstance(x, Tensor) else [2.0 * x]
        return self.fc(self.mid(self.conv(features[0]).mean((2, 3))))


class WritesInput(NoGrad):
    """A forward that writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.9)
        return self.fc(self.mid(self.conv(x).mean((2, 3))))


class Counts(NoGrad):
    """A buffer that counts the calls and shifts a value."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(torch.sin(self.mid(self.conv(x).mean((2, 3))) + self.calls))


def three(kind: type[nn.Module]) -> Case:
    return Case(kind().double(), [(pair(n), []) for n in ("conv", "mid", "fc")], (1, 5, 5))


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


NETWORKS: dict[str, Callable[[], Case]] = {
    "residual": residual,
    "branches": branches,
    "in-place-relu": lambda: writes_prefix("relu"),
    "in-place-value": lambda: writes_prefix("value"),
    "in-place-view": lambda: writes_prefix("view"),
    "in-place-setitem": lambda: writes_prefix("setitem"),
    "in-place-order": lambda: writes_prefix("order"),
    "scaled": scaled,
    "tied": tied,
    "untraceable": untraceable,
    "no-grad-inside": lambda: three(NoGrad),
    "straight-through": lambda: three(StraightThrough),
    "asks-type": lambda: three(AsksType),
    "layer-norm": layer_norm,
    "group-norm": group_norm,
    "batch-norm-mlp": batch_norm_mlp,
    "linear-only": linear_only,
    "conv1d": conv1d,
    "odd-conv": odd_conv,
}
