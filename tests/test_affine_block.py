"""A block without a norm of its own, and a chain of them, in one pass: what torch's layers give, in any memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT, layouts
from machine import needs_native, on_threads
from torch import Tensor
from winograd_cases import FROZEN, OPS

from lambda_kernels import use_backend
from lambda_kernels.agreement import within
from lambda_kernels.backends import native
from lambda_kernels.functional import affine_block
from lambda_kernels.spec import BlockSpec, ConvSpec

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_native]


def operands(name: str, dtype: torch.dtype = torch.float64, tasks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, N, C, H, W], weight [T, O, C, kh, kw], bias [T, O]."""
    case, generator = FROZEN[name], torch.Generator().manual_seed(0)
    shapes = (case.x, case.weight, case.weight[:1])
    return tuple(torch.randn(tasks, *s, generator=generator).to(dtype) for s in shapes)  # type: ignore[return-value]


def geometry(name: str) -> list[int]:
    return native._geometry(BlockSpec(FROZEN[name].spec, 1e-5, FROZEN[name].pool))


def layers(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    spec = FROZEN[name].spec
    y = F.relu(F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation))
    return F.max_pool2d(y, FROZEN[name].pool)


@pytest.mark.parametrize("name", FROZEN)
def test_a_block_is_torchs_layers(name: str) -> None:
    for tasks, dtype in ((1, torch.float32), (2, torch.float64)):
        x, weight, bias = operands(name, dtype, tasks)
        want = torch.stack([layers(name, *own) for own in zip(x, weight, bias)])
        exact = EXACT if dtype == torch.float64 else within(dtype, "gradient")  # sums in another order
        torch.testing.assert_close(OPS.affine_block(x, weight, bias, geometry(name)), want, **exact)
    shared = OPS.affine_block(x, weight[:1], bias, geometry(name))
    want = torch.stack([layers(name, images, weight[0], own) for images, own in zip(x, bias)])
    torch.testing.assert_close(shared, want, **EXACT)


@pytest.mark.parametrize("name", ["7x7", "rgb-48"])
def test_memory_layouts_and_threads_change_no_bit(name: str) -> None:
    x, weight, bias = operands(name, torch.float32, 2)
    want = OPS.affine_block(x, weight, bias, geometry(name))
    for images, other in product(layouts(x).values(), layouts(weight).values()):
        assert torch.equal(OPS.affine_block(images, other, bias, geometry(name)), want)
    for threads in (2, 3):
        with on_threads(threads):
            assert torch.equal(OPS.affine_block(x, weight, bias, geometry(name)), want)


def test_nan_stays() -> None:
    x, weight, bias = operands("7x7", torch.float32)
    x[0, 0] = float("nan")
    y = OPS.affine_block(x, weight, bias, geometry("7x7"))
    assert y[0, 0].isnan().all() and not y[0, 1:].isnan().any()


@pytest.mark.parametrize("name", ["7x7", "rgb-48"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_function_is_the_layers_with_their_derivatives(name: str, backend: str) -> None:
    case, (x, weight, bias) = FROZEN[name], (t[0] for t in operands(name))
    given: Any = dict(padding=case.spec.padding, pool=case.pool, stride=case.spec.stride, dilation=case.spec.dilation)
    with use_backend(backend):
        torch.testing.assert_close(affine_block(x, weight, bias, **given), layers(name, x, weight, bias), **EXACT)
        none = layers(name, x, weight, torch.zeros_like(bias))
        torch.testing.assert_close(affine_block(x, weight, None, **given), none, **EXACT)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        got = torch.autograd.grad(affine_block(*leaves, **given).square().sum(), leaves)
        want = torch.autograd.grad(layers(name, *leaves).square().sum(), leaves)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, **EXACT)
        own = affine_block(x, torch.stack([weight, -weight]), bias, **given)
        twins = torch.stack([layers(name, x, weight, bias), layers(name, x, -weight, bias)])
        torch.testing.assert_close(own, twins, **EXACT)
    assert affine_block(x[:0], weight, bias, **given).shape[0] == 0
    assert affine_block(x[:1, :, :3, :3], weight, bias, padding=0, pool=1).shape[-2:] == (1, 1)
    with pytest.raises(ValueError, match=r"affine_block: .*weight"):
        affine_block(x[:, :1], weight[:, :1].expand(-1, 5, -1, -1), bias, **given)


def test_a_chain_is_its_blocks_and_a_linear_layer() -> None:
    generator = torch.Generator().manual_seed(1)
    x, *parameters = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 3, 21, 19), (8, 3, 3, 3), (8,), (16, 8, 3, 3), (16,), (3, 16 * 5 * 4), (3,))
    )
    numbers = [1, 1, 1, 1, 1, 1, 2] * 2
    y = x
    for weight, bias in zip(parameters[:4:2], parameters[1:4:2]):
        y = F.max_pool2d(F.relu(F.conv2d(y, weight, bias, padding=1)), 2)
    want = F.linear(y.flatten(1), *parameters[-2:])
    for images in layouts(x.unsqueeze(0)).values():
        torch.testing.assert_close(OPS.affine_chain(images[0], parameters, numbers, []), want, **EXACT)


def test_what_was_made_of_a_chains_weights_gives_the_same_bits() -> None:
    x, *parameters = (torch.randn(*shape) for shape in ((3, 2, 12, 13), (32, 2, 3, 3), (32,), (32, 32, 3, 3), (32,)))
    parameters += [torch.randn(5, 32 * 3 * 3), torch.randn(5)]
    numbers = [1, 1, 1, 1, 1, 1, 2] * 2
    want = OPS.affine_chain(x, parameters, numbers, [])
    ready = OPS.affine_chain_prepare(parameters, numbers, [2, 12, 13])
    assert [t.numel() for t in ready] == [(2 * 9 + 3) * 32, 16 * 32 * 32, 32 * 9 * 16]
    for each in (parameters, [t.transpose(0, -1).contiguous().transpose(0, -1) for t in parameters]):
        assert torch.equal(OPS.affine_chain(x, each, numbers, ready), want)
        assert all(map(torch.equal, OPS.affine_chain_prepare(each, numbers, [2, 12, 13]), ready))
    with pytest.raises(RuntimeError, match=r"ready must be 3 numbers, got 2"):
        OPS.affine_chain(x, parameters, numbers, ready[1:])
    with pytest.raises(RuntimeError, match=r"ready must be \[672\] .* got \[16384\]"):
        OPS.affine_chain(x, parameters, numbers, [ready[1], *ready[1:]])


@pytest.mark.parametrize("at", [(0, 0), (3, 3), (7, 4)])
def test_a_window_that_has_a_nan_is_one(at: tuple[int, int]) -> None:
    x, weight, bias = torch.randn(1, 1, 32, 8, 8), torch.randn(1, 32, 32, 3, 3), torch.zeros(1, 32)
    x[0, 0, :, at[0], at[1]] = float("nan")
    want = F.max_pool2d(F.relu(F.conv2d(x[0], weight[0], padding=1)), 2)
    assert OPS.affine_block(x, weight, bias, ONE)[0].isnan().logical_or(want.isnan().logical_not()).all()


IMAGE, FILTER, BIAS = (1, 2, 3, 9, 9), (1, 8, 3, 3, 3), (1, 8)
ONE = [1, 1, 1, 1, 1, 1, 2]
CHAIN: list[Any] = [(8, 3, 3, 3), (8,), (5, 128), (5,)]
WRONG: dict[str, tuple[str, Sequence[Any], str]] = {
    "channels": ("affine_block", (IMAGE, (1, 8, 4, 3, 3), BIAS, ONE), r"\[8, 4, 3, 3\].*\[2, 3, 9, 9\]"),
    "numbers": ("affine_block", (IMAGE, FILTER, BIAS, ONE[:6]), "geometry must be 7 numbers, got 6"),
    "no stride": ("affine_block", (IMAGE, FILTER, BIAS, [0, *ONE[1:]]), r"numbers \[0, 1"),
    "no image": ("affine_block", ((1, 0, 3, 9, 9), FILTER, BIAS, ONE), r"\[1, 0, 3, 9, 9\]"),
    "bias": ("affine_block", (IMAGE, FILTER, (1, 7), ONE), r"bias must be \[1, 8\] .* got \[1, 7\]"),
    "tasks": ("affine_block", ((2, *IMAGE[1:]), (3, *FILTER[1:]), BIAS, ONE), r"x must be \[1 or 3, .* got \[2"),
    "no kernel": ("affine_block", (IMAGE, FILTER, BIAS, [*ONE[:6], 3]), "no kernel for a weight .* pool 3"),
    "chain: axes": (
        "affine_chain", (IMAGE, CHAIN, ONE, []), r"x must be \[at least 1, at least 1, at .* got \[1, 2, 3",
    ),
    "chain: parameters": ("affine_chain", (IMAGE[1:], CHAIN[:2], ONE, []), "2 parameters and 7 numbers"),
    "chain: channels": (
        "affine_chain", ((2, 4, 9, 9), CHAIN, ONE, []), r"the weight of layer 0 must be \[at least 1, 4, ",
    ),
    "chain: head": ("affine_chain", (IMAGE[1:], [*CHAIN[:2], (5, 127), (5,)], ONE, []), r"must be \[at least 1, 128\]"),
    "chain: pool": ("affine_chain", (IMAGE[1:], CHAIN, [*ONE[:6], 3], []), "no kernel for block 0"),
    "chain: no block": ("affine_chain", (IMAGE[1:], CHAIN[2:], [], []), "2 parameters and 0 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    operator, shapes, message = WRONG[name]

    def made(shape: Any) -> Any:
        if isinstance(shape, tuple):
            return torch.zeros(shape)
        return [made(s) for s in shape] if shape and isinstance(shape[0], tuple) else shape

    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, operator)(*map(made, shapes))
    with pytest.raises(RuntimeError, match="dtype|torch.float64|Double"):
        OPS.affine_block(torch.zeros(IMAGE), torch.zeros(FILTER).double(), torch.zeros(BIAS), ONE)


def test_the_rule_is_the_same_in_python_and_in_the_kernels() -> None:
    agreed = set()
    backend = native.Native()
    for inputs, outputs, size, kernel, pool in product((1, 3, 8, 16), (8, 64), (3, 9), (1, 3), (1, 2)):
        block = BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, pool)
        x, weight = torch.zeros(1, 40, inputs, size, size), torch.zeros(1, outputs, inputs, kernel, kernel)
        said = backend.takes_affine(x.shape, weight.shape, x.dtype, block)
        try:
            OPS.affine_block(x, weight, torch.zeros(1, outputs), native._geometry(block))
            taken = True
        except RuntimeError as error:
            assert "no kernel for a weight" in str(error), error
            taken = False
        assert said == taken, (inputs, outputs, size, kernel, pool)
        agreed.add(said)
    assert agreed == {True, False}
