"""Shapes of Winograd's convolutions and of frozen blocks, and their checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from cases import EXACT, IMAGES, assert_as_exact, layouts
from tape import Tape
from torch import Tensor

from lambda_kernels.backends.native import Native
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec

EPS = 1e-5
OPS = torch.ops.lambda_kernels
SIZES = ((7, 7), (21, 21), (33, 47), (1, 9), (2, 2))
CHANNELS = ((8, 8), (16, 64), (48, 48), (100, 100), (32, 5))
PADDINGS = ((0, 0), (1, 1), (2, 2), (0, 2))
# Tasks of x, of the weight and of the gradient of y.
SHARING = ((1, 1, 1), (3, 1, 3), (1, 3, 3), (3, 3, 3), (3, 3, 1), (3, 1, 1), (1, 3, 1))


class Case(NamedTuple):
    inputs: int
    outputs: int
    size: tuple[int, int]
    padding: tuple[int, int]
    images: int = 1
    tasks: tuple[int, int, int] = (1, 1, 1)

    @property
    def name(self) -> str:
        tasks = "" if self.tasks == (1, 1, 1) else "-tasks" + "".join(map(str, self.tasks))
        padding, size = (f"{a}x{b}" for a, b in (self.padding, self.size))
        return f"{self.images}x{self.inputs}to{self.outputs}-{size}-padding{padding}{tasks}"

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec((1, 1), self.padding, (1, 1), 1)

    @property
    def result(self) -> tuple[int, int]:
        rows, columns = (n + 2 * p - 2 for n, p in zip(self.size, self.padding))
        return rows, columns


EVERY = [
    case
    for (inputs, outputs), size, padding in product(CHANNELS, SIZES, PADDINGS)
    if min((case := Case(inputs, outputs, size, padding)).result) > 0
]
MANY = [
    Case(inputs, outputs, size, (1, 1), images=75)
    for inputs, outputs in ((8, 8), (16, 64), (32, 5))
    for size in ((7, 7), (1, 9), (2, 2))
]
TASKS = [
    Case(inputs, outputs, size, (1, 1), images=2, tasks=tasks)
    for (inputs, outputs), size in (((16, 64), (7, 7)), ((32, 5), (6, 9)))
    for tasks in SHARING
]
FAR = [Case(16, 32, (5, 6), padding, images=2) for padding in ((3, 3), (4, 0))]  # tiles that lie in the padding alone
CASES = {case.name: case for case in (*EVERY, *MANY, *TASKS, *FAR)}


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight and the gradient of y, in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(case.tasks[0], case.images, case.inputs, *case.size)
    weight = draw(case.tasks[1], case.outputs, case.inputs, 3, 3) / (9 * case.inputs) ** 0.5
    return x, weight, draw(case.tasks[2], case.images, case.outputs, *case.result)


def stock(case: Case, given: Sequence[Tensor]) -> dict[str, Tensor]:
    """What ATen gives: y, the gradient of every task's own images, and the weight's, summed where tasks share it."""
    x, weight, gy = given
    tasks = max(case.tasks)
    images = x.expand(tasks, *x.shape[1:]).clone().requires_grad_()
    own = weight.expand(tasks, *weight.shape[1:]) if weight.shape[0] == 1 else weight
    own = own.clone().requires_grad_()
    y = torch.stack([F.conv2d(a, w, padding=case.padding) for a, w in zip(images, own)])
    gx, gw = torch.autograd.grad(y, (images, own), gy.expand_as(y))
    single = weight.shape[0] == 1
    # An operator counts the tasks that its own operands have.
    have = {"y": max(case.tasks[:2]), "gx": max(case.tasks[1:]), "gw": max(case.tasks[::2])}
    found = {"y": y[: have["y"]], "gx": gx[: have["gx"]]}
    return {**found, "gw": gw[: have["gw"]].sum(0, keepdim=True) if single else gw[: have["gw"]]}


def winograd(case: Case, given: Sequence[Tensor]) -> dict[str, Tensor]:
    x, weight, gy = given
    return {
        "y": OPS.winograd(x, weight, case.padding),
        "gx": OPS.winograd_input_grad(gy, weight, x.shape, case.padding),
        "gw": OPS.winograd_weight_grad(gy, x, weight.shape, case.padding),
    }


def last(x: Tensor) -> Tensor:
    """The same values with the channels side by side in memory."""
    return layouts(x)["channels-last"]


def assert_exact(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **EXACT, msg=lambda text: f"{name}: {text}")


def check_convolution(case: Case) -> None:
    given = operands(case)
    truth = stock(case, given)
    terms = {"y": 9 * case.inputs, "gx": 9 * case.outputs, "gw": truth["y"][:, :, 0].numel()}
    for key, value in winograd(case, given).items():
        assert_exact(f"{case.name} {key}", value, truth[key])
    single = [t.float() for t in given]
    theirs = stock(case, single)
    for key, value in winograd(case, [last(t) for t in single]).items():
        assert_as_exact(f"{case.name} {key}", value, theirs[key], truth[key], terms[key])


class Frozen(NamedTuple):
    """A block without a gradient: sizes of x [N, C, H, W] and of the weight [O, C, kh, kw]."""

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    spec: ConvSpec
    pool: int = 2


def filtered(name: str, images: int, inputs: int, outputs: int, size: tuple[int, int], padding: int = 1) -> Frozen:
    spec = ConvSpec((1, 1), (padding, padding), (1, 1), 1)
    return Frozen(name, (images, inputs, *size), (outputs, inputs, 3, 3), spec)


FROZEN = {
    case.name: case
    for case in (
        filtered("7x7", 3, 8, 8, (7, 7)),
        filtered("2x2", 5, 16, 16, (2, 2)),
        filtered("21x21", 2, 32, 48, (21, 21)),
        filtered("33x47", 1, 16, 64, (33, 47)),
        filtered("no-padding", 2, 32, 100, (9, 12), padding=0),
        filtered("wide-padding", 2, 100, 20, (5, 6), padding=2),
        filtered("75-images", 75, 32, 32, (4, 5)),
        filtered("width-600", 2, 10, 600, (5, 7)),  # more outputs than the kernel takes at a time
        *(
            Frozen(c.name, (c.images, c.inputs, *c.size), (c.width, c.inputs, *c.kernel), c.spec, c.pool)
            for c in IMAGES
        ),
    )
}


def frozen_operands(
    case: Frozen, dtype: torch.dtype, tasks: int, shared: bool = False, shift: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, gamma, beta, drawn in float64. Gamma is below zero, zero and above it in turn."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own, outputs = 1 if shared else tasks, case.weight[0]
    x = draw(tasks, *case.x) + shift
    weight = draw(own, *case.weight) / (case.weight[1] * case.weight[2] * case.weight[3]) ** 0.5
    gamma = draw(own, outputs).abs() * (torch.arange(outputs) + own).remainder(3).sub(1)
    return x.to(dtype), weight.to(dtype), gamma.to(dtype), draw(own, outputs).to(dtype)


def block(backend: Reference, case: Frozen, given: Sequence[Tensor]) -> dict[str, Tensor]:
    x, weight, gamma, beta = given
    y, mean, rstd = backend.block(x, weight, gamma, beta, BlockSpec(case.spec, EPS, case.pool))
    tasks = max(t.shape[0] for t in given)  # the reference has one result where tasks share it
    return {key: t.expand(tasks, *t.shape[1:]) for key, t in (("y", y), ("mean", mean), ("rstd", rstd))}


def check_single(case: Frozen, got: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """A float32 block beside torch's. A mean is there to be taken from z, so its roundings are those of values as far
    from zero as z is."""
    terms = case.weight[1] * case.weight[2] * case.weight[3]
    deviation = 1.0 / truth["rstd"].min().item()
    for key in got:
        values = [found[key] for found in (got, stock, truth)]
        if key == "mean":
            values = [torch.cat([t, torch.full_like(t[:1], deviation)]) for t in values]
        mine, theirs, want = values
        assert_as_exact(f"{case.name} {key}", mine, theirs, want, terms)


def check_frozen(case: Frozen, tasks: int, shared: bool) -> None:
    wide = frozen_operands(case, torch.float64, tasks, shared)
    single = frozen_operands(case, torch.float32, tasks, shared)
    truth = block(Reference(), case, wide)
    with no_operator("norm_relu_pool"):
        got = block(Native(), case, wide)
        rough = block(Native(), case, single)
    for key in got:
        assert_exact(f"{case.name} {key}", got[key], truth[key])
    check_single(case, rough, block(Reference(), case, single), truth)


@contextmanager
def no_operator(*names: str) -> Iterator[None]:
    """No operator of these names is called: what would do the same in another way."""
    with Tape() as tape:
        yield
    called = {str(entry[0]).split(".")[1] for entry in tape.entries}
    assert not called & set(names), called
