"""Convolutions of 3x3 pixels by Winograd's algorithm, and the frozen block made of them: exactness, every instruction
set, and where the native backend takes them."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT, IMAGES, STEPS, assert_as_exact, layouts
from loops import conv4_groups, plain_loop, torch_conv4
from machine import PATIENCE
from tape import Tape
from torch import Tensor

from lambda_kernels.agreement import within
from lambda_kernels.backends import native
from lambda_kernels.backends.native import Native
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec
from lambda_maml import adapt, models

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize("name", CASES)
def test_as_torch(name: str) -> None:
    check_convolution(CASES[name])


@pytest.mark.parametrize("name", ["1x16to64-7x7-padding1x1", "2x32to5-6x9-padding1x1-tasks333"])
def test_memory_layouts_change_nothing(name: str) -> None:
    case = CASES[name]
    x, weight, gy = (t.float() for t in operands(case))
    want = winograd(case, (x, weight, gy))
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    for label, other in {**layouts(weight), "transposed": turned, "mirrored": weight.mT.contiguous().mT}.items():
        assert torch.equal(other, weight)
        for key, value in winograd(case, (x, other, gy)).items():
            assert torch.equal(value, want[key]), (label, key)
    for (label, images), gradient in zip(layouts(x).items(), layouts(gy).values()):
        for key, value in winograd(case, (images, weight, gradient)).items():
            assert torch.equal(value, want[key]), (label, key)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    for name in ("1x48to48-33x47-padding1x1", "1x8to8-33x47-padding0x2", "75x16to64-7x7-padding1x1",
                 "1x32to5-21x21-padding2x2", "2x16to64-7x7-padding1x1-tasks313"):  # fmt: skip
        case, found = CASES[name], []
        given = [t.to(dtype) for t in operands(case)]
        for threads in (1, 2):
            with on_threads(threads):
                found.append(winograd(case, given))
        for key in found[0]:
            assert torch.equal(found[0][key], found[1][key]), (name, key)


def test_results_are_channels_last_and_whole_after_a_run_of_nan() -> None:
    """Scratch memory comes from an arena that earlier calls have written to."""
    for case in CASES.values():
        if max(case.size) > 21 or max(case.inputs, case.outputs) > 64:
            continue
        given = [t.float() for t in operands(case)]
        want = winograd(case, given)
        assert all(want[key].permute(0, 1, 3, 4, 2).is_contiguous() for key in ("y", "gx"))
        winograd(case, [torch.full_like(t, torch.nan) for t in given])
        for key, value in winograd(case, given).items():
            assert torch.equal(value, want[key]), (case.name, key)


def test_tracing_sees_the_shapes_and_the_memory_layout() -> None:
    tests = ("test_schema", "test_faketensor")
    case = CASES["2x32to5-6x9-padding1x1-tasks333"]
    for tasks in SHARING:
        x, weight, gy = operands(case._replace(tasks=tasks))
        torch.library.opcheck(OPS.winograd.default, (x, weight, case.padding), test_utils=tests)
        sized = (gy, weight, list(x.shape), case.padding)
        torch.library.opcheck(OPS.winograd_input_grad.default, sized, test_utils=tests)
        sized = (gy, x, list(weight.shape), case.padding)
        torch.library.opcheck(OPS.winograd_weight_grad.default, sized, test_utils=tests)
    for frozen in (FROZEN["33x47"], FROZEN["rgb-48"], FROZEN["stride"], FROZEN["dilation-pair"]):
        geometry = native._geometry(BlockSpec(frozen.spec, EPS, frozen.pool))
        given = frozen_operands(frozen, torch.float32, 2, shared=True)
        torch.library.opcheck(OPS.frozen_block.default, (*given, geometry, EPS), test_utils=tests)


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


@pytest.mark.parametrize(("tasks", "shared"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_block_is_the_references(name: str, tasks: int, shared: bool) -> None:
    check_frozen(FROZEN[name], tasks, shared)


@pytest.mark.parametrize("name", ["7x7", "rgb-48"])
def test_operands_of_a_frozen_block_are_shared_one_by_one(name: str) -> None:
    case = FROZEN[name]
    given = frozen_operands(case, torch.float64, 3)
    for own in product((True, False), repeat=4):
        some = tuple(t if wanted else t[:1] for t, wanted in zip(given, own))
        truth = block(Reference(), case, some)
        got = OPS.frozen_block(*some, native._geometry(BlockSpec(case.spec, EPS, case.pool)), EPS)
        for value, want in zip(got, truth.values()):
            torch.testing.assert_close(value, want, **EXACT)
        assert got[0].shape[0] == (3 if any(own) else 1)


@pytest.mark.parametrize("name", ["7x7", "width-600", "rgb-48"])
def test_memory_layouts_of_a_frozen_block(name: str) -> None:
    case = FROZEN[name]
    x, weight, gamma, beta = frozen_operands(case, torch.float32, 2)
    geometry = native._geometry(BlockSpec(case.spec, EPS, case.pool))
    want = OPS.frozen_block(x, weight, gamma, beta, geometry, EPS)
    weights = {**layouts(weight), "transposed": weight.transpose(1, 2).contiguous().transpose(1, 2)}
    for images, other in product(layouts(x).values(), weights.values()):
        other_gamma, other_beta = (torch.stack([t, t], -1)[..., 0] for t in (gamma, beta))
        got = OPS.frozen_block(images, other, other_gamma, other_beta, geometry, EPS)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", ["7x7", "2x2", "21x21", "no-padding", "rgb-48", "no-pool", "stride"])
@pytest.mark.parametrize("shift", [10.0, 1000.0])
def test_images_far_from_zero_lose_no_more_than_in_torch(name: str, shift: float) -> None:
    case = FROZEN[name]
    case = case._replace(spec=case.spec._replace(padding=(0, 0))) if min(case.x[2:]) > 3 else case
    single = frozen_operands(case, torch.float32, 1, shift=shift)
    truth = block(Reference(), case, [t.double() for t in single])
    got, theirs = (block(backend, case, single) for backend in (Native(), Reference()))
    for key in got:
        assert_as_exact(f"{name} {key}", got[key], theirs[key], truth[key])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FROZEN)
def test_nan_in_one_image_comes_out_of_every_image_of_its_task(name: str, dtype: torch.dtype) -> None:
    case = FROZEN[name]
    given = frozen_operands(case, dtype, 2)
    clean = block(Native(), case, given)
    given[0][1, -1, -1, case.x[2] // 2, case.x[3] // 2] = torch.nan
    truth, got = (block(backend, case, given) for backend in (Reference(), Native()))
    for key in got:
        assert torch.equal(got[key][0], clean[key][0])
        assert torch.equal(got[key].isnan(), truth[key].isnan())
    assert got["y"][1].isnan().all()


def test_zero_gamma_gives_beta() -> None:
    for name in ("7x7", "rgb-48"):
        case = FROZEN[name]
        x, weight, gamma, beta = frozen_operands(case, torch.float32, 1)
        y = block(Native(), case, (x, weight, torch.zeros_like(gamma), beta))["y"]
        assert torch.equal(y, beta.relu()[:, None, :, None, None].expand_as(y))


def test_constant_images_have_no_variance() -> None:
    """Neither a square root of less than zero nor a mean that is off."""
    case = FROZEN["7x7"]._replace(spec=ConvSpec((1, 1), (0, 0), (1, 1), 1))
    _, weight, gamma, beta = frozen_operands(case, torch.float32, 1)
    x = torch.full((1, *case.x), 3.0)
    y, mean, rstd = block(Native(), case, (x, weight, gamma, beta)).values()
    torch.testing.assert_close(mean, 3.0 * weight.sum((2, 3, 4)), **within(torch.float32))
    # a variance of next to nothing beside eps
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5), rtol=1e-4, atol=0.0)
    assert y.isfinite().all()


def test_a_frozen_block_after_a_run_of_nan() -> None:
    for case in FROZEN.values():
        given = frozen_operands(case, torch.float32, 1)
        want = block(Native(), case, given)
        block(Native(), case, [torch.full_like(t, torch.nan) for t in given])
        again = block(Native(), case, given)
        assert all(torch.equal(again[key], want[key]) for key in want), case.name


def test_threads_change_a_frozen_block_by_rounding_alone() -> None:
    for case in FROZEN.values():
        for tasks in (1, 3):
            given, found = frozen_operands(case, torch.float64, tasks), []
            for threads in (1, 2):
                with on_threads(threads):
                    found.append(block(Native(), case, given))
            for key in found[0]:
                torch.testing.assert_close(found[0][key], found[1][key], **EXACT)


def takes(x: Tensor, weight: Tensor, spec: ConvSpec, pool: int) -> bool:
    """Whether the frozen block has a kernel: an error says that it has none, any other error is one."""
    ones = x.new_ones(1, weight.shape[1])
    try:
        OPS.frozen_block(x, weight, ones, ones, native._geometry(BlockSpec(spec, EPS, pool)), EPS)
    except RuntimeError as error:
        assert "no kernel for a weight" in str(error), error
        return False
    return True


def test_the_rule_is_the_same_in_python_and_in_the_kernels() -> None:
    agreed = set()
    channels = ((1, 8), (3, 16), (4, 4), (7, 64), (8, 8), (8, 64), (8, 128), (15, 80), (16, 16), (16, 63), (16, 64),
                (31, 33), (32, 32), (33, 31), (64, 15), (100, 8))  # fmt: skip
    kernels = ((3, 3), (1, 1), (5, 5), (3, 2))
    constants = [ConvSpec((1, 1), padding, (1, 1), 1) for padding in (*PADDINGS, (3, 1))]
    constants += [ConvSpec((2, 1), (1, 1), (1, 1), 1), ConvSpec((1, 1), (1, 1), (1, 2), 1)]
    sizes = ((1, 2, 2), (1, 3, 3), (1, 7, 7), (1, 1, 9), (1, 32, 32), (1, 33, 33), (4, 16, 16), (5, 16, 16))
    for (inputs, outputs), kernel, spec, (images, *size), pool in product(channels, kernels, constants, sizes, (1, 2)):
        reach = [spec.dilation[a] * (kernel[a] - 1) + 1 for a in (0, 1)]
        if (kernel != (3, 3) and spec != constants[1]) or outputs * inputs * images * size[0] * size[1] > 2**18:
            continue
        if any((size[a] + 2 * spec.padding[a] - reach[a]) // spec.stride[a] + 1 < pool for a in (0, 1)):
            continue
        x, weight = torch.zeros(1, images, inputs, *size), torch.zeros(1, outputs, inputs, *kernel)
        filters = pool == 2 and native._filters(x.shape, weight.shape, spec, x.dtype)
        expected = filters or not Native().image_refusals(x, weight, BlockSpec(spec, 1e-5, pool))
        assert takes(x, weight, spec, pool) == expected, (inputs, outputs, kernel, spec, images, size, pool)
        agreed.add((filters, expected))
    assert agreed == {(True, True), (False, True), (False, False)}


REFUSED = {
    "few-channels": ((2, 8, 33, 33), (16, 8, 3, 3), ConvSpec((1, 1), (1, 1), (1, 1), 1)),
    "stride": ((2, 32, 9, 9), (32, 32, 3, 3), ConvSpec((2, 2), (1, 1), (1, 1), 1)),
    "dilation": ((2, 32, 9, 9), (32, 32, 3, 3), ConvSpec((1, 1), (2, 2), (2, 2), 1)),
    "groups": ((2, 64, 9, 9), (64, 32, 3, 3), ConvSpec((1, 1), (1, 1), (1, 1), 2)),
    "kernel": ((2, 32, 9, 9), (32, 32, 5, 5), ConvSpec((1, 1), (2, 2), (1, 1), 1)),
    "padding": ((2, 32, 9, 9), (32, 32, 3, 3), ConvSpec((1, 1), (3, 3), (1, 1), 1)),
    "one-row": ((2, 32, 1, 5), (32, 32, 3, 3), ConvSpec((1, 1), (1, 1), (1, 1), 1)),
    "no-images": ((0, 32, 9, 9), (32, 32, 3, 3), ConvSpec((1, 1), (1, 1), (1, 1), 1)),
}
FILTERS = ("winograd", "winograd_input_grad", "winograd_weight_grad", "frozen_block")


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_is_atens(name: str) -> None:
    sizes, kernel, spec = REFUSED[name]
    x, weight = torch.randn(1, *sizes, dtype=torch.float64), torch.randn(1, *kernel, dtype=torch.float64)
    x = last(x)
    bias, gamma, beta = (torch.randn(1, kernel[0], dtype=torch.float64) for _ in range(3))
    y = Reference().conv2d(x, weight, bias, spec)
    gy = last(torch.randn_like(y))
    pooled = bool(x.numel()) and min(y.shape[-2:]) >= 2
    with no_operator(*FILTERS):
        have = Native().conv2d(x, weight, bias, spec)
        gx = Native().conv2d_input_grad(gy, weight, x.shape, spec)
        gw = Native().conv2d_weight_grad(gy, x, weight.shape, spec)
        blocks = Native().block(x, weight, gamma, beta, BlockSpec(spec, EPS, 2)) if pooled else ()
    torch.testing.assert_close(have, y, **EXACT)
    torch.testing.assert_close(gx, Reference().conv2d_input_grad(gy, weight, x.shape, spec), **EXACT)
    torch.testing.assert_close(gw, Reference().conv2d_weight_grad(gy, x, weight.shape, spec), **EXACT)
    if pooled:
        for value, want in zip(blocks, Reference().block(x, weight, gamma, beta, BlockSpec(spec, EPS, 2))):
            torch.testing.assert_close(value, want, **EXACT)


def test_half_precision_and_images_that_are_not_channels_last_are_atens() -> None:
    case = CASES["1x48to48-21x21-padding1x1"]
    x, weight, gy = operands(case)
    with no_operator(*FILTERS):
        Native().conv2d(x, weight, None, case.spec)
        Native().conv2d_input_grad(gy, weight, x.shape, case.spec)
        Native().conv2d_weight_grad(gy, x, weight.shape, case.spec)
        Native().conv2d(last(x).bfloat16(), weight.bfloat16(), None, case.spec)


@pytest.mark.parametrize("tasks", SHARING)
def test_the_backend_takes_them_for_channels_last_images(tasks: tuple[int, int, int]) -> None:
    case = Case(32, 48, (6, 9), (1, 1), images=2, tasks=tasks)
    x, weight, gy = operands(case)
    bias = torch.randn(tasks[1], 48, dtype=torch.float64)
    want = (
        Reference().conv2d(x, weight, bias, case.spec),
        Reference().conv2d_input_grad(gy, weight, x.shape, case.spec),
        Reference().conv2d_weight_grad(gy, x, weight.shape, case.spec),
    )
    with no_operator("convolution", "convolution_backward"):
        have = (
            Native().conv2d(last(x), weight, bias, case.spec),
            Native().conv2d_input_grad(last(gy), weight, x.shape, case.spec),
            Native().conv2d_weight_grad(last(gy), last(x), weight.shape, case.spec),
        )
    for value, truth in zip(have, want):
        torch.testing.assert_close(value, truth, **EXACT)


# Each is run in a process of its own by its place: some have killed the process.
IMAGE, KERNEL, RESULT, VECTOR = (1, 2, 16, 7, 7), (1, 64, 16, 3, 3), (1, 2, 64, 7, 7), (1, 64)
SIX, TWO, THREE, FIFTEEN = (1, 2, 64, 6, 7), (2, *IMAGE[1:]), (3, *KERNEL[1:]), (1, 64, 15, 3, 3)
ONE, NONE = [1, 1, 1, 1, 1, 1, 2], [1, 1, 0, 0, 1, 1, 2]
WRONG: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "channels": ("winograd", (IMAGE, FIFTEEN, [1, 1]), r"\[1, 64, 15, 3, 3\].*\[1, 2, 16, 7, 7\]"),
    "kernel": ("winograd", (IMAGE, (1, 64, 16, 5, 5), [1, 1]), r"\[1, 64, 16, 5, 5\].*\[1, 2, 16, 7, 7\]"),
    "dimensions": ("winograd", (IMAGE, KERNEL[1:], [1, 1]), r"\[64, 16, 3, 3\].*\[1, 2, 16, 7, 7\]"),
    "one padding": ("winograd", (IMAGE, KERNEL, [1]), r"\[1, 2, 16, 7, 7\]"),
    "no row": ("winograd", ((1, 2, 16, 2, 2), KERNEL, [0, 0]), r"\[1, 2, 16, 2, 2\]"),
    "no image": ("winograd", ((1, 0, 16, 7, 7), KERNEL, [1, 1]), r"\[1, 0, 16, 7, 7\]"),
    "tasks": ("winograd", (TWO, THREE, [1, 1]), r"\[3, 64, 16, 3, 3\].*\[2, 2, 16, 7, 7\]"),
    "input: rows": ("winograd_input_grad", (SIX, KERNEL, IMAGE, [1, 1]), r"\[1, 2, 64, 6, 7\]"),
    "input: outputs": ("winograd_input_grad", ((1, 2, 63, 7, 7), KERNEL, IMAGE, [1, 1]), r"\[1, 2, 63, 7, 7\]"),
    "input: images": ("winograd_input_grad", ((1, 1, 64, 7, 7), KERNEL, IMAGE, [1, 1]), r"\[1, 1, 64, 7, 7\]"),
    "input: channels": ("winograd_input_grad", (RESULT, KERNEL, (1, 2, 15, 7, 7), [1, 1]), r"\[1, 2, 15, 7, 7\]"),
    "weight: rows": ("winograd_weight_grad", (SIX, IMAGE, KERNEL, [1, 1]), r"\[1, 2, 64, 6, 7\]"),
    "weight: outputs": ("winograd_weight_grad", ((1, 2, 63, 7, 7), IMAGE, KERNEL, [1, 1]), r"\[1, 2, 63, 7, 7\]"),
    "weight: images": ("winograd_weight_grad", ((1, 1, 64, 7, 7), IMAGE, KERNEL, [1, 1]), r"\[1, 1, 64, 7, 7\]"),
    "weight: tasks": ("winograd_weight_grad", ((3, *RESULT[1:]), TWO, KERNEL, [1, 1]), r"\[(3, 2, 64|2, 2, 16), 7,"),
    "block: channels": ("frozen_block", (IMAGE, FIFTEEN, VECTOR, VECTOR, ONE), r"\[1, 64, 15, 3, 3\].*\[1, 2, 16"),
    "block: numbers": ("frozen_block", (IMAGE, KERNEL, VECTOR, VECTOR, ONE[:6]), r"numbers \[1, 1, 1, 1, 1, 1\]"),
    "block: no image": ("frozen_block", ((1, 0, 16, 7, 7), KERNEL, VECTOR, VECTOR, ONE), r"\[1, 0, 16, 7, 7\]"),
    "block: gamma": ("frozen_block", (IMAGE, KERNEL, (1, 63), VECTOR, ONE), r"\[1, 63\]"),
    "block: beta": ("frozen_block", (IMAGE, KERNEL, VECTOR, (1, 65), ONE), r"\[1, 65\]"),
    "block: beta without a task axis": ("frozen_block", (IMAGE, KERNEL, VECTOR, (64,), ONE), r"\[64\]"),
    "block: tasks": ("frozen_block", (TWO, THREE, VECTOR, VECTOR, ONE), r"\[3, 64, 16, 3, 3\]"),
    "block: tasks of gamma": ("frozen_block", ((3, *IMAGE[1:]), KERNEL, (2, 64), VECTOR, ONE), r"\[2, 64\]"),
    "block: no row": ("frozen_block", ((1, 2, 1, 2, 2), (1, 8, 1, 3, 3), (1, 8), (1, 8), NONE), r"\[1, 2, 1, 2, 2\]"),
    "block: no kernel": ("frozen_block", (IMAGE, KERNEL, VECTOR, VECTOR, [*ONE[:6], 3]), r"\[1, 64, 16, 3, 3\].* 3"),
}  # fmt: skip


def attempt(name: str) -> None:
    """Prints the error that a call with these sizes gives."""
    operator, shapes, _ = WRONG[name]
    arguments = [torch.zeros(s) if isinstance(s, tuple) else s for s in shapes]
    if operator in ("winograd_input_grad", "winograd_weight_grad"):
        arguments[2] = list(shapes[2])
    if operator == "frozen_block":
        arguments.append(EPS)
    try:
        getattr(OPS, operator)(*arguments)
    except (RuntimeError, IndexError) as error:
        print(str(error).replace("\n", " "))


ATTEMPTS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import test_winograd as t
for name in t.WRONG:
    if not (child := os.fork()):
        print(name, end="\\t", flush=True)
        t.attempt(name)
        sys.stdout.flush()
        os._exit(0)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print("ended by signal", -code, flush=True)
    else:
        print(flush=True)
"""


HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with more of them must not be forked
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, HERE], env=environment, capture_output=True, text=True, timeout=PATIENCE,
        check=True,
    )  # fmt: skip
    lines = (line.split("\t") for line in done.stdout.splitlines() if "\t" in line)
    return {name: text for name, text in lines}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sizes_are_errors_that_name_them(name: str, errors: dict[str, str]) -> None:
    assert re.search(WRONG[name][2], errors[name]), errors[name] or "no error"


def check_adaptation() -> None:
    """A network whose blocks go through the first block's kernel, Winograd's, and the few pixels' path."""
    network = torch_conv4(3, 2, 32, 21)
    model = models.conv4(3, 2, 32, 21).double()
    model.load_state_dict(network.state_dict())
    generator = torch.Generator().manual_seed(1)
    xs, xq = (torch.randn(n, 2, 21, 21, generator=generator, dtype=torch.float64) for n in (6, 4))
    ys, yq = torch.arange(6) % 3, torch.arange(4) % 3
    for pattern in ("11111", "00011"):
        want = plain_loop(network, conv4_groups(), pattern, xs, ys, xq, yq, steps=3, lr=0.1)
        adapted = adapt(model, xs, ys, pattern=pattern, steps=3, lr=0.1)
        with torch.no_grad():
            torch.testing.assert_close(adapted(xq), want.logits, **STEPS)
        for name, value in adapted.parameters_dict().items():
            torch.testing.assert_close(value.detach(), want.parameters[name], **STEPS)


def check_instruction_set() -> None:
    torch.set_num_threads(1)
    names = ("1x8to8-7x7-padding0x0", "1x16to64-33x47-padding1x1", "1x32to5-1x9-padding2x2", "1x48to48-2x2-padding1x1",
             "1x100to100-7x7-padding1x1", "75x32to5-2x2-padding1x1", "2x16to64-7x7-padding1x1-tasks133")  # fmt: skip
    for name in names:
        check_convolution(CASES[name])
    for name in FROZEN:
        check_frozen(FROZEN[name], 2, shared=False)
    check_adaptation()
    print(importlib.import_module("lambda_kernels._C").isa())


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_is_exact(isa: str) -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_winograd as t; t.check_instruction_set()"
    environment = {**os.environ, "LAMBDA_KERNELS_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, HERE], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    if done.returncode != 0 and "this machine runs" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
