"""conv2d, linear and conv_block: every derivative by every subset of the operands; what is computed and kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    EXACT,
    explicit_block,
    subsets,
)
from operations import BLOCK, TINY, call, check_gradients, randn, tiny
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels.backends.native import Native
from lambda_kernels.backends.reference import Reference

# Called with operands out of lists and tables.
conv2d: Any = lk.functional.conv2d
linear: Any = lk.functional.linear
conv_block: Any = lk.functional.conv_block


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with lk.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("per_task", [False, True], ids=["shared", "per-task"])
@pytest.mark.parametrize("mask", subsets(("x", "weight", "bias")), ids="-".join)
@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_first_and_second_derivatives(op: str, mask: tuple[str, ...], per_task: bool) -> None:
    check_gradients(op, tiny(op, per_task), mask)


@pytest.mark.parametrize("name", ["native-shared", "native-per-task", "reference-shared"])
@pytest.mark.parametrize("mask", subsets(BLOCK), ids="-".join)
def test_first_and_second_derivatives_of_the_block(mask: tuple[str, ...], name: str) -> None:
    with lk.use_backend(name.partition("-")[0]):
        check_gradients("conv_block", tiny("conv_block", "per-task" in name), mask)


def test_every_entry_of_the_blocks_second_derivative(backend: str) -> None:
    operands = tiny("conv_block", False)
    operands["x"] = operands["x"][..., :3, :4].contiguous()
    check_gradients("conv_block", operands, BLOCK, fast=False)


@pytest.mark.parametrize(
    "own", [("x",), ("x", "weight"), ("x", "gamma"), ("x", "weight", "bias", "gamma", "beta")], ids="-".join
)
def test_second_derivatives_with_some_parameters_shared(own: tuple[str, ...], backend: str) -> None:
    shared, per_task = tiny("conv_block", False), tiny("conv_block", True)
    check_gradients("conv_block", {k: (per_task if k in own else shared)[k] for k in shared}, BLOCK)


@pytest.mark.parametrize("mask", [("x",), ("weight", "gamma"), ("x", "weight", "gamma", "beta")], ids="-".join)
def test_third_derivatives_of_the_block(mask: tuple[str, ...], backend: str) -> None:
    operands = tiny("conv_block", False)
    inputs = [operands[name].requires_grad_() for name in mask]
    y = {"got": conv_block(**operands), "want": explicit_block(*operands.values(), 1e-5, TINY)}
    directions = [[torch.randn_like(t) for t in inputs] for _ in range(3)]
    results = []
    for value in y.values():
        scalar, orders = value.pow(3).sum(), []
        for direction in directions:
            grads = torch.autograd.grad(scalar, inputs, create_graph=True)
            orders.append(grads)
            scalar = sum((g * d).sum() for g, d in zip(grads, direction))
        results.append(orders)
    for order, (got, want) in enumerate(zip(*results), 1):
        scale = max(float(w.detach().abs().max()) for w in want)
        for g, w in zip(got, want):
            # relative to the largest value of the order
            assert torch.allclose(g, w, rtol=1e-8, atol=1e-9 * scale), f"order {order}: {(g - w).abs().max()}"


# What is computed and what is kept.


def counting(name: str, function: Any, counts: dict[str, int]) -> Any:
    def counted(*args: Any) -> Tensor:
        counts[name] += 1
        return function(*args)

    return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the convolution's two gradients were computed, and a block's of images that need none."""
    counts = {"conv2d_input_grad": 0, "conv2d_weight_grad": 0, "image_block_grad": 0}
    for name in counts:
        owner = Native if name == "image_block_grad" else Reference
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name), counts))
    return counts


@pytest.mark.parametrize("op", ["conv2d", "conv_block"])
@pytest.mark.parametrize("mask", subsets(("x", "weight", "bias")), ids="-".join)
def test_only_what_is_asked_is_computed(op: str, mask: tuple[str, ...], calls: dict[str, int]) -> None:
    operands = {k: v.requires_grad_(k in mask) for k, v in tiny(op, False).items()}
    call(op, operands).sum().backward()
    by_patches = op == "conv_block" and mask[0] == "weight"
    over_z = "weight" in mask and not by_patches
    assert calls == {"conv2d_input_grad": "x" in mask, "conv2d_weight_grad": over_z, "image_block_grad": by_patches}
    assert {k for k, v in operands.items() if v.grad is not None} == set(mask)


@pytest.mark.parametrize("of", subsets(("x", "weight", "bias")), ids="-".join)
def test_a_gradient_of_some_inputs_computes_only_theirs(of: tuple[str, ...], calls: dict[str, int]) -> None:
    # All operands require a gradient, autograd.grad is asked for some: leaves and results of other operations.
    for leaf in (True, False):
        operands = {k: v.requires_grad_() for k, v in tiny("conv2d", False).items()}
        operands = operands if leaf else {k: v * 1.0 for k, v in operands.items()}
        calls.update(dict.fromkeys(calls, 0))
        grads = torch.autograd.grad(call("conv2d", operands).sum(), [operands[k] for k in of])
        assert all(g is not None for g in grads)
        assert calls == {"conv2d_input_grad": "x" in of, "conv2d_weight_grad": "weight" in of, "image_block_grad": 0}


def saved(function: Any) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("mask", subsets(("x", "weight", "bias")), ids="-".join)
@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_only_what_a_gradient_needs_is_kept(op: str, mask: tuple[str, ...]) -> None:
    operands = {k: v.requires_grad_(k in mask) for k, v in tiny(op, False).items()}
    pointers = {t.untyped_storage().data_ptr() for t in saved(lambda: call(op, operands))}
    needed = {other for one, other in (("weight", "x"), ("x", "weight")) if one in mask}
    assert pointers == {operands[k].untyped_storage().data_ptr() for k in needed}


def shapes_kept(operands: dict[str, Tensor], mask: tuple[str, ...]) -> set[tuple[int, ...]]:
    given = {k: v.detach().requires_grad_(k in mask) for k, v in operands.items()}
    return {tuple(t.shape[-4:]) for t in saved(lambda: conv_block(**given))}


def test_what_a_block_keeps(backend: str) -> None:
    """The convolution's output alone where its weight is frozen; of images that need no gradient these in its place,
    where there are kernels for that."""
    operands, output = tiny("conv_block", False), (2, 2, 4, 5)
    images = tuple(operands["x"].shape)
    by_patches = backend == "native"
    frozen = shapes_kept(operands, ("gamma", "beta"))
    assert ((images in frozen), (output in frozen)) == ((True, False) if by_patches else (False, True))
    moving = shapes_kept(operands, ("weight", "gamma"))
    assert images in moving and (output in moving) != by_patches
    assert images in (both := shapes_kept(operands, ("x", "weight"))) and output in both
    assert not shapes_kept(operands, ("bias",))


def test_a_block_of_images_makes_their_convolution_for_second_derivatives_alone(
    monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]
) -> None:
    convolved = {"conv2d": 0}
    monkeypatch.setattr(Reference, "conv2d", counting("conv2d", Reference.conv2d, convolved))
    operands = {k: v.requires_grad_(k != "x") for k, v in tiny("conv_block", False).items()}
    inputs = [operands[k] for k in ("weight", "gamma", "beta")]
    y = conv_block(**operands)
    direction = torch.randn_like(y)
    first = torch.autograd.grad(y, inputs, direction, retain_graph=True)
    assert (convolved, calls["image_block_grad"]) == ({"conv2d": 0}, 1)
    again = torch.autograd.grad(y, inputs, direction, create_graph=True)
    assert (convolved, calls["image_block_grad"]) == ({"conv2d": 1}, 1)
    torch.testing.assert_close(again, first, **EXACT)
    assert all(g.requires_grad for g in again)


def test_a_block_of_images_is_nearer_to_float64_than_its_layers() -> None:
    """Their moments are in float64: the statistics keep digits that a sum over all pixels in float32 loses."""
    torch.manual_seed(0)
    x, weight = torch.randn(25, 3, 40, 40) + 3.0, torch.randn(32, 3, 3, 3) / 5
    given = {"x": x, "weight": weight, "bias": None, "gamma": torch.rand(32) + 0.5, "beta": torch.randn(32)}
    errors = []
    truth = None
    for dtype, way in ((torch.float64, explicit_block), (torch.float32, conv_block), (torch.float32, explicit_block)):
        own = {k: None if v is None else v.detach().to(dtype).requires_grad_(k != "x") for k, v in given.items()}
        y = conv_block(**own) if way is conv_block else explicit_block(*own.values(), 1e-5, TINY)
        inputs = [own[k] for k in ("weight", "gamma", "beta")]
        found = torch.autograd.grad(y.tanh().sum(), inputs)  # type: ignore[arg-type]
        truth = found if truth is None else truth
        errors.append(max(float((g - t).norm() / t.norm()) for g, t in zip(found, truth)))
    _, ours, stock = errors
    assert ours <= stock and ours < 1e-4  # a window whose maximum rounding turns moves them by about 1e-5


@pytest.mark.parametrize("op", ["conv2d", "conv_block"])
def test_second_order_skips_the_frozen_weight_inside_and_reaches_it_outside(op: str, calls: dict[str, int]) -> None:
    frozen, head = randn(2, 2 if op == "conv2d" else 1, 3, 3).requires_grad_(), randn(3, 2, 3, 3).requires_grad_()
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    x = randn(2, frozen.shape[1], 8, 8)

    def loss(use: Any, first: Tensor, second: Tensor) -> Tensor:
        if op == "conv2d":
            return use.conv2d(use.conv2d(x, first, padding=1).tanh(), second, padding=1).square().mean()
        if use is F:
            hidden = explicit_block(x, first, None, ones, zeros, 1e-5, TINY)
        else:
            hidden = conv_block(x, first, None, ones, zeros)
        return use.conv2d(hidden, second, padding=1).square().mean()

    results = []
    for use in (F, lk.functional):
        calls.update(dict.fromkeys(calls, 0))
        (inner,) = torch.autograd.grad(loss(use, frozen, head), head, create_graph=True)
        if use is not F:
            assert calls == {"conv2d_input_grad": 0, "conv2d_weight_grad": 1, "image_block_grad": 0}
        results.append(torch.autograd.grad(loss(use, frozen, head - 0.1 * inner), (frozen, head)))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert results[1][0].abs().sum() > 0
