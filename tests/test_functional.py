"""conv2d, linear and conv_block: values, gradients of every order, masks, transforms, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    BLOCKS,
    CONVS,
    EXACT,
    LINEARS,
    THIRDS,
    BlockCase,
    ConvCase,
    assert_as_exact,
    by_task,
    decided,
    explicit_block,
    layouts,
    stock_block,
    subsets,
)
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels.backends.reference import Reference

# Called with operands out of lists and tables.
conv2d: Any = lk.functional.conv2d
linear: Any = lk.functional.linear
conv_block: Any = lk.functional.conv_block
stock_conv2d: Any = F.conv2d
T = 3
HALF: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2}


def ids(cases: Any) -> list[str]:
    return [case.name for case in cases]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with lk.use_backend(request.param):
        yield request.param


# conv2d and linear.


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced", "strided"])
@pytest.mark.parametrize("case", CONVS, ids=ids(CONVS))
def test_conv2d_and_its_gradients_are_torchs(case: ConvCase, layout: str) -> None:
    x, weight, bias = (randn(*s) for s in (case.x, case.weight, case.weight[:1]))
    mine = [
        layouts(x)[layout].detach().requires_grad_(),
        layouts(weight)[layout].detach().requires_grad_(),
        bias.clone().requires_grad_(),
    ]
    plain = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    got, want = conv2d(*mine, *case.geometry), stock_conv2d(*plain, *case.geometry)
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, mine, gy), torch.autograd.grad(want, plain, gy), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CONVS, ids=ids(CONVS))
def test_conv2d_rounds_no_worse_than_torch(case: ConvCase, dtype: torch.dtype) -> None:
    exact = [randn(*s).to(dtype).double().requires_grad_() for s in (case.x, case.weight, case.weight[:1])]
    mine, plain = ([t.detach().to(dtype).requires_grad_() for t in exact] for _ in range(2))
    results = [conv2d(*mine, *case.geometry), *(stock_conv2d(*t, *case.geometry) for t in (plain, exact))]
    assert_as_exact("y", *results)
    gy = torch.randn_like(results[0])
    grads = [torch.autograd.grad(y, t, gy.to(y.dtype)) for y, t in zip(results, (mine, plain, exact))]
    for name, *three in zip(("x", "weight", "bias"), *grads):
        assert_as_exact(name, *three)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("own", subsets(("x", "weight", "bias")), ids="-".join)
@pytest.mark.parametrize("case", [c for c in CONVS if len(c.x) == 4], ids=lambda c: c.name)
def test_conv2d_with_tasks_is_torchs_task_by_task(case: ConvCase, own: tuple[str, ...]) -> None:
    shapes = {"x": case.x, "weight": case.weight, "bias": case.weight[:1]}
    operands = [randn(*((T,) if name in own else ()), *shape).requires_grad_() for name, shape in shapes.items()]
    got = conv2d(*operands, *case.geometry)
    want = by_task(lambda *t: F.conv2d(*t, *case.geometry), T, *zip(operands, (4, 4, 1)))
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, operands, gy), torch.autograd.grad(want, operands, gy), **EXACT)


def test_conv2d_unbatched_with_own_weights() -> None:
    x, weight = randn(3, 9, 7), randn(T, 8, 3, 3, 3)
    torch.testing.assert_close(conv2d(x, weight), torch.stack([F.conv2d(x, w) for w in weight]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shapes", LINEARS.values(), ids=LINEARS)
def test_linear_is_torchs(shapes: Any, with_bias: bool, dtype: torch.dtype) -> None:
    operands = [randn(*shape).to(dtype).requires_grad_() for shape in (*shapes, shapes[1][:1])[: 2 + with_bias]]
    got, want = linear(*operands), F.linear(*operands)
    tolerance = EXACT if dtype == torch.float64 else HALF
    torch.testing.assert_close(got, want, **tolerance)
    gy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, operands, gy), torch.autograd.grad(want, operands, gy), **tolerance
    )


@pytest.mark.parametrize("rows", [(), (4,), (2, 0), (2, 3)], ids=["none", "4", "2x0", "2x3"])
@pytest.mark.parametrize("own", subsets(("weight", "bias")), ids="-".join)
def test_linear_with_tasks_is_torchs_task_by_task(own: tuple[str, ...], rows: tuple[int, ...]) -> None:
    x = randn(T, *rows, 7).requires_grad_()
    weight, bias = (
        randn(*((T,) if n in own else ()), *s).requires_grad_() for n, s in (("weight", (5, 7)), ("bias", (5,)))
    )
    got = linear(x, weight, bias)
    want = by_task(F.linear, T, (x, 0), (weight, 2), (bias, 1))
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, weight, bias), gy), torch.autograd.grad(want, (x, weight, bias), gy), **EXACT
    )


# conv_block.


def block_operands(case: BlockCase, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """gamma of both signs; one channel that the ReLU shuts."""
    width = case.width
    kernel = 1 if min(case.size) == 1 else 3
    beta = randn(width)
    if width > 1:
        beta[-1] = -20.0
    x = randn(case.images, case.inputs, *case.size)
    operands = {
        "x": x,
        "weight": randn(width, case.inputs // case.groups, kernel, kernel),
        "bias": randn(width),
        "gamma": randn(width) + 0.2,
        "beta": beta,
    }
    return {name: t.to(dtype) for name, t in operands.items()}


def geometry(case: BlockCase) -> dict[str, Any]:
    return {
        "padding": 0 if min(case.size) == 1 else case.padding,
        "pool": case.pool,
        "stride": case.stride,
        "groups": case.groups,
    }


def as_called(case: BlockCase) -> BlockCase:
    return case._replace(padding=geometry(case)["padding"])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("case", BLOCKS, ids=ids(BLOCKS))
def test_block_in_float64(case: BlockCase, layout: str, backend: str) -> None:
    plain = {k: v.requires_grad_() for k, v in block_operands(case).items()}
    mine = {k: v.detach().clone().requires_grad_() for k, v in plain.items()}
    mine["x"] = layouts(plain["x"].detach())[layout].requires_grad_()
    got, want = conv_block(**mine, **geometry(case)), stock_block(*plain.values(), 1e-5, as_called(case))
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want)
    mine_grads, plain_grads = (torch.autograd.grad(y, list(t.values()), gy) for y, t in ((got, mine), (want, plain)))
    torch.testing.assert_close(mine_grads, plain_grads, rtol=1e-8, atol=1e-8)
    assert not mine_grads[2].any()  # the convolution's bias cancels in the norm


def check_block_rounding(exact: dict[str, Tensor], case: BlockCase) -> None:
    mine, plain = ({k: v.float().requires_grad_() for k, v in exact.items()} for _ in range(2))
    exact = {k: v.detach().float().double().requires_grad_() for k, v in exact.items()}
    called = as_called(case)
    results = [conv_block(**mine, **geometry(case)), *(stock_block(*t.values(), 1e-5, called) for t in (plain, exact))]
    assert_as_exact("y", *results)
    with torch.no_grad():
        sure = decided(exact["x"], exact["weight"], exact["gamma"], exact["beta"], called, 1e-4)
        gy = torch.randn_like(results[0]) * sure
    grads = [torch.autograd.grad(y, list(t.values()), gy.to(y.dtype)) for y, t in zip(results, (mine, plain, exact))]
    for name, *three in zip(exact, *grads):
        got, stock, truth = three
        assert_as_exact(name, got, stock, truth, terms=9 * case.width if name == "x" else 1)


@pytest.mark.parametrize("case", BLOCKS, ids=ids(BLOCKS))
def test_block_rounds_no_worse_than_torch(case: BlockCase, backend: str) -> None:
    check_block_rounding(block_operands(case), case)


@pytest.mark.parametrize("width", [1, 5, 64])
def test_block_on_images_far_from_zero(width: int, backend: str) -> None:
    # Raw pixels: the mean is many times the deviation, where one-pass sums cancel.
    case = BlockCase("raw", 25, 1, width, (33, 47))
    operands = block_operands(case)
    operands["x"] = operands["x"] + 1000.0
    operands["weight"] = operands["weight"].abs()
    check_block_rounding(operands, case._replace(padding=0))


@pytest.mark.parametrize("width", [1, 5, 64])
def test_block_on_constant_images(width: int, backend: str) -> None:
    # The variance is exactly zero, so the result is relu(beta); stock PyTorch is off by 0.01, in channels-last by 1.
    x, beta = torch.full((25, 1, 84, 84), 1000.0), torch.randn(width)
    y = conv_block(x, torch.full((width, 1, 1, 1), 1.1), None, torch.ones(width), beta, padding=0)
    torch.testing.assert_close(y, F.relu(beta)[:, None, None].expand_as(y), rtol=0, atol=1e-6)


def test_block_breaks_ties_as_torch(backend: str) -> None:
    case = BlockCase("ties", 4, 2, 3, (8, 9))
    x, weight = (
        torch.randint(-1, 2, (4, 2, 8, 9)).double().requires_grad_(),
        torch.randint(-1, 2, (3, 2, 3, 3)).double(),
    )
    beta, gamma = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    got, want = conv_block(x, weight, None, gamma, beta), stock_block(x, weight, None, gamma, beta, 1e-5, case)
    gy = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, x, gy), torch.autograd.grad(want, x, gy), **EXACT)


@pytest.mark.parametrize("absent", [("gamma",), ("beta",), ("bias",), ("gamma", "beta", "bias")], ids="-".join)
def test_block_without_some_parameters(absent: tuple[str, ...], backend: str) -> None:
    case = BLOCKS[0]
    operands = {k: None if k in absent else v.requires_grad_() for k, v in block_operands(case).items()}
    got, want = conv_block(**operands, **geometry(case)), stock_block(*operands.values(), 1e-5, case)
    torch.testing.assert_close(got, want, **EXACT)
    present = [t for t in operands.values() if t is not None]
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), present), torch.autograd.grad(want.square().sum(), present), **EXACT
    )


@pytest.mark.parametrize("own", subsets(("x", "weight", "bias", "gamma", "beta")), ids="-".join)
def test_block_with_tasks_is_torchs_task_by_task(own: tuple[str, ...], backend: str) -> None:
    case = BLOCKS[0]
    operands = block_operands(case)
    for name in own:
        operands[name] = operands[name] + 0.3 * randn(T, *operands[name].shape)
    tensors = [t.requires_grad_() for t in operands.values()]
    got = conv_block(**operands)
    want = by_task(lambda *t: stock_block(*t, 1e-5, case), T, *zip(tensors, (4, 4, 1, 1, 1)))
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, tensors, gy), torch.autograd.grad(want, tensors, gy), rtol=1e-8, atol=1e-8
    )


def test_block_pool_3_needs_the_reference() -> None:
    operands = block_operands(THIRDS)
    want = stock_block(*operands.values(), 1e-5, THIRDS)
    for name in ("auto", "reference"):
        with lk.use_backend(name):
            torch.testing.assert_close(conv_block(**operands, pool=3), want, **EXACT)
    with lk.use_backend("native"), pytest.raises(lk.BackendError, match="native.*conv_block.*pools by 1 or 2, not 3"):
        conv_block(**operands, pool=3)


def test_block_in_half_precision_takes_float32_parameters() -> None:
    case = BLOCKS[0]
    operands = block_operands(case, torch.float32)
    want = stock_block(*operands.values(), 1e-5, case)
    for name in ("x", "weight", "bias"):
        operands[name] = operands[name].bfloat16()
    y = conv_block(**operands)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("pool", [1, 2])
def test_what_is_not_finite_reaches_the_result_as_in_torch(value: float, pool: int, backend: str) -> None:
    case = BlockCase("", 3, 2, 4, (6, 7), pool=pool)
    operands = block_operands(case)
    operands["weight"][0] = 0.0
    operands["weight"][1, 0] = 0.0
    operands["x"][1, 1, 2, 3] = value
    tensors = [t.requires_grad_() for t in operands.values()]
    got, want = conv_block(**operands, pool=pool), stock_block(*tensors, 1e-5, case)
    assert want.isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True, **EXACT)
    grads = [torch.autograd.grad(y.sum(), tensors) for y in (got, want)]
    for name, mine, stock in zip(operands, *grads):
        if name != "bias":  # exactly zero here
            torch.testing.assert_close(mine, stock, equal_nan=True, rtol=1e-8, atol=1e-8)
    x = torch.full((1, 1, 2, 2), value)
    torch.testing.assert_close(conv2d(x, torch.ones(1, 1, 1, 1)), x, equal_nan=True)
    torch.testing.assert_close(linear(x[0, 0], torch.ones(1, 2)), x[0, 0].sum(1, keepdim=True), equal_nan=True)


# Derivatives by every subset of the operands.

# The bias comes last: its gradient is a constant, and gradgradcheck takes the outputs behind a constant one for others.
BLOCK = ("x", "weight", "gamma", "beta", "bias")
TINY = BlockCase("tiny", 2, 1, 2, (4, 5))


def tiny(op: str, per_task: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes: dict[str, tuple[int, ...]] = {
        "conv2d": {"x": (2, 2, 4, 3), "weight": (2, 1, 2, 2), "bias": (2,)},
        "linear": {"x": (2, 3), "weight": (2, 3), "bias": (2,)},
        "conv_block": {"x": (2, 1, 4, 5), "weight": (2, 1, 3, 3), "bias": (2,), "gamma": (2,), "beta": (2,)},
    }[op]
    lead = (2,) if per_task else ()
    return {k: torch.randn(*lead, *s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}


def call(op: str, operands: dict[str, Tensor]) -> Tensor:
    if op == "conv2d":
        return conv2d(**operands, stride=(1, 2), padding=1, groups=2)
    return linear(**operands) if op == "linear" else conv_block(**operands)


def check_gradients(op: str, operands: dict[str, Tensor], mask: tuple[str, ...], fast: bool = True) -> None:
    inputs = tuple(operands[name].clone().requires_grad_() for name in mask)

    def function(*chosen: Tensor) -> Tensor:
        return call(op, operands | dict(zip(mask, chosen)))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    if (op, mask) == ("conv_block", ("bias",)):
        (gradient,) = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
        assert not gradient.any()
    else:
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)


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
            assert torch.allclose(g, w, rtol=1e-8, atol=1e-9 * scale), f"order {order}: {(g - w).abs().max()}"


# What is computed and what is kept.


def counting(name: str, function: Any, counts: dict[str, int]) -> Any:
    def counted(*args: Any) -> Tensor:
        counts[name] += 1
        return function(*args)

    return counted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the convolution's two gradients were computed."""
    counts = {"conv2d_input_grad": 0, "conv2d_weight_grad": 0}
    for name in counts:
        monkeypatch.setattr(Reference, name, counting(name, getattr(Reference, name), counts))
    return counts


@pytest.mark.parametrize("op", ["conv2d", "conv_block"])
@pytest.mark.parametrize("mask", subsets(("x", "weight", "bias")), ids="-".join)
def test_only_what_is_asked_is_computed(op: str, mask: tuple[str, ...], calls: dict[str, int]) -> None:
    operands = {k: v.requires_grad_(k in mask) for k, v in tiny(op, False).items()}
    call(op, operands).sum().backward()
    assert calls == {"conv2d_input_grad": "x" in mask, "conv2d_weight_grad": "weight" in mask}
    assert {k for k, v in operands.items() if v.grad is not None} == set(mask)


@pytest.mark.parametrize("of", subsets(("x", "weight", "bias")), ids="-".join)
def test_a_gradient_of_some_inputs_computes_only_theirs(of: tuple[str, ...], calls: dict[str, int]) -> None:
    # All operands want a gradient, autograd.grad is asked for some: leaves and results of other operations.
    for leaf in (True, False):
        operands = {k: v.requires_grad_() for k, v in tiny("conv2d", False).items()}
        operands = operands if leaf else {k: v * 1.0 for k, v in operands.items()}
        calls.update(dict.fromkeys(calls, 0))
        grads = torch.autograd.grad(call("conv2d", operands).sum(), [operands[k] for k in of])
        assert all(g is not None for g in grads)
        assert calls == {"conv2d_input_grad": "x" in of, "conv2d_weight_grad": "weight" in of}


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


def test_the_input_of_a_frozen_block_is_not_kept(backend: str) -> None:
    operands = {k: v.requires_grad_(k in ("gamma", "beta")) for k, v in tiny("conv_block", False).items()}
    kept = {tuple(t.shape[-4:]) for t in saved(lambda: conv_block(**operands))}
    assert tuple(operands["x"].shape) not in kept and (2, 2, 4, 5) in kept
    operands = {k: v.detach().requires_grad_(k == "bias") for k, v in operands.items()}
    assert not saved(lambda: conv_block(**operands))
    operands = {k: v.detach().requires_grad_(k == "weight") for k, v in operands.items()}
    assert tuple(operands["x"].shape) in {tuple(t.shape[-4:]) for t in saved(lambda: conv_block(**operands))}


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
            assert calls == {"conv2d_input_grad": 0, "conv2d_weight_grad": 1}
        results.append(torch.autograd.grad(loss(use, frozen, head - 0.1 * inner), (frozen, head)))
    torch.testing.assert_close(results[1], results[0], **EXACT)
    assert results[1][0].abs().sum() > 0


# torch.func and torch.compile.


def test_vmap_over_either_operand_and_nested() -> None:
    x, weight, bias = randn(T, 2, 3, 6, 5), randn(T, 4, 3, 3, 3), randn(4)
    for mapped in subsets(("x", "weight")):
        dims = tuple(0 if n in mapped else None for n in ("x", "weight"))
        operands = [t if d == 0 else t[0] for t, d in zip((x, weight), dims)]
        got = torch.func.vmap(lambda a, w: conv2d(a, w, bias, padding=1), dims)(*operands)
        want = torch.func.vmap(lambda a, w: F.conv2d(a, w, bias, padding=1), dims)(*operands)
        torch.testing.assert_close(got, want, **EXACT)
    last = torch.func.vmap(lambda a: conv2d(a, weight[0], bias), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(last, torch.stack([F.conv2d(a, weight[0], bias) for a in x.unbind(1)], 1), **EXACT)
    nested = torch.func.vmap(lambda a: torch.func.vmap(lambda w: conv2d(a, w, bias))(weight))(x)
    torch.testing.assert_close(
        nested, torch.stack([torch.stack([F.conv2d(a, w, bias) for w in weight]) for a in x]), **EXACT
    )
    with_tasks = torch.func.vmap(lambda a: conv2d(a, weight, bias))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(with_tasks, torch.stack([conv2d(x, weight, bias), conv2d(2 * x, weight, bias)]), **EXACT)


@pytest.mark.parametrize("mapped", subsets(("x", "weight", "gamma")), ids="-".join)
def test_vmap_over_the_block_and_its_gradient(mapped: tuple[str, ...], backend: str) -> None:
    case = BlockCase("", 3, 2, 4, (6, 7))
    base = block_operands(case)
    operands = [base[k] + 0.3 * randn(T, *base[k].shape) if k in mapped else base[k] for k in base]
    dims = tuple(0 if k in mapped else None for k in base)

    def energy(*t: Tensor) -> Tensor:
        return conv_block(*t).pow(3).sum()

    def stock(*t: Tensor) -> Tensor:
        return stock_block(*t, 1e-5, case).pow(3).sum()

    places = (0, 1, 3, 4)
    got = torch.func.vmap(torch.func.grad(energy, places), dims)(*operands)
    alone = [torch.func.grad(stock, places)(*(t[i] if d == 0 else t for t, d in zip(operands, dims))) for i in range(T)]
    torch.testing.assert_close(got, tuple(torch.stack(g) for g in zip(*alone)), rtol=1e-8, atol=1e-8)


def test_second_order_maml_through_grad_vmap_grad(backend: str) -> None:
    case = BlockCase("", 5, 1, 3, (8, 8))
    x, y = randn(T, 5, 1, 8, 8), torch.randint(0, 3, (T, 5))
    operands = block_operands(case)
    parameters = [operands[k] for k in ("weight", "gamma", "beta")] + [randn(3, 48) * 0.1]

    def fused(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, head: Tensor) -> Tensor:
        return linear(conv_block(x, weight, None, gamma, beta).flatten(1), head)

    def plain(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, head: Tensor) -> Tensor:
        return F.linear(explicit_block(x, weight, None, gamma, beta, 1e-5, case).flatten(1), head)

    def meta(network: Any) -> Any:
        def one(x: Tensor, y: Tensor, *p: Tensor) -> Tensor:
            def loss(*q: Tensor) -> Tensor:
                return F.cross_entropy(network(x, *q), y)

            for _ in range(2):
                p = tuple(a - 0.1 * g for a, g in zip(p, torch.func.grad(loss, (0, 1, 2, 3))(*p)))
            return loss(*p)

        dims = (0, 0, None, None, None, None)
        return torch.func.grad(lambda *p: torch.func.vmap(one, dims)(x, y, *p).mean(), (0, 1, 2, 3))(*parameters)

    torch.testing.assert_close(meta(fused), meta(plain), rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, of every Function
def test_compiles_as_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    case = BlockCase("", 3, 2, 4, (6, 7))
    operands = [t.requires_grad_() for t in (*block_operands(case).values(), randn(5, 36), randn(2, 4, 1, 1))]

    def network(*t: Tensor) -> Tensor:
        hidden = conv_block(*t[:5])
        return linear(hidden.flatten(1), t[5]).sum() + conv2d(hidden, t[6]).pow(2).sum()

    eager = network(*operands)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(*operands)
    torch.testing.assert_close(compiled, eager, **EXACT)
    grads = [torch.autograd.grad(y, operands, allow_unused=True) for y in (compiled, eager)]
    torch.testing.assert_close(grads[0], grads[1], **EXACT)


# Errors.

X, W = torch.zeros(2, 8, 16, 16), torch.zeros(4, 8, 3, 3)
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "channels": (
        lambda: conv2d(X, torch.zeros(4, 3, 3, 3), groups=2),
        ValueError,
        r"conv2d: weight has 3 channels per group, expected 8/2 "
        r"\(x \[2, 8, 16, 16\], weight \[4, 3, 3, 3\], groups=2\)",
    ),
    "groups": (lambda: conv2d(X, W, groups=3), ValueError, "conv2d: 4 output channels cannot be split into groups=3"),
    "no-groups": (lambda: conv2d(X, W, groups=0), ValueError, "groups=0"),
    "x-dims": (lambda: conv2d(X[0, 0], W), ValueError, r"x must be \[N, C, H, W\].*got \[16, 16\]"),
    "weight-dims": (lambda: conv2d(X, W[0]), ValueError, r"weight must be \[O, C/groups, kh, kw\].*got \[8, 3, 3\]"),
    "bias": (lambda: conv2d(X, W, torch.zeros(5)), ValueError, r"bias must be \[4\] or \[tasks, 4\].*got \[5\]"),
    "kernel-too-large": (
        lambda: conv2d(X, W, dilation=8),
        ValueError,
        "kernel reaches over 17 pixels, the padded image has 16",
    ),
    "stride": (
        lambda: conv2d(X, W, stride=0),
        ValueError,
        "stride must be an int of at least 1 or a pair of them, got 0",
    ),
    "padding": (lambda: conv2d(X, W, padding=-1), ValueError, "padding must be an int of at least 0 .* got -1"),
    "padding-float": (lambda: conv2d(X, W, padding=1.5), ValueError, "padding must be an int .* got 1.5"),
    "padding-triple": (lambda: conv2d(X, W, padding=(1, 1, 1)), ValueError, r"padding must be .* got \(1, 1, 1\)"),
    "padding-word": (lambda: conv2d(X, W, padding="full"), ValueError, "'same', 'valid', .* got 'full'"),
    "same-stride": (
        lambda: conv2d(X, W, padding="same", stride=2),
        ValueError,
        r"padding='same' needs stride 1, got \(2, 2\)",
    ),
    "tasks": (lambda: conv2d(X.expand(3, *X.shape), W.expand(2, *W.shape)), ValueError, "weight has 2 tasks, x has 3"),
    "bias-tasks": (
        lambda: conv2d(X, W.expand(2, *W.shape), torch.zeros(3, 4)),
        ValueError,
        "bias has 3 tasks, weight has 2",
    ),
    "integers": (
        lambda: conv2d(X.long(), W),
        TypeError,
        r"x must be a floating-point tensor, got torch.int64; .*x.float\(\)",
    ),
    "no-tensor": (lambda: conv2d([1.0], W), TypeError, "x must be a floating-point tensor, got list"),
    "weight-no-tensor": (lambda: conv2d(X, [1.0]), TypeError, "weight must be a tensor, got list"),
    "dtype": (lambda: conv2d(X, W.double()), TypeError, "weight is torch.float64, x is torch.float32"),
    "device": (lambda: conv2d(X, W.to("meta")), ValueError, "weight is on meta, x is on cpu: move one"),
    "linear-features": (
        lambda: linear(torch.zeros(2, 3), torch.zeros(4, 5)),
        ValueError,
        r"x has 3 features, weight takes 5 \(x \[2, 3\], weight \[4, 5\]\)",
    ),
    "linear-scalar": (lambda: linear(torch.zeros(()), torch.zeros(4, 5)), ValueError, "x has no features"),
    "linear-weight": (lambda: linear(torch.zeros(2, 3), torch.zeros(3)), ValueError, r"weight must be \[out, in\]"),
    "linear-tasks": (
        lambda: linear(torch.zeros(2, 3), torch.zeros(4, 5, 3)),
        ValueError,
        r"4 tasks, x must be \[4, ..., 3\], got \[2, 3\]",
    ),
    "linear-bias-tasks": (
        lambda: linear(torch.zeros(2, 3), torch.zeros(2, 5, 3), torch.zeros(3, 5)),
        ValueError,
        "bias has 3 tasks, weight has 2",
    ),
    "gamma": (lambda: conv_block(X, W, None, torch.zeros(3), None), ValueError, r"conv_block: gamma must be \[4\]"),
    "beta-tasks": (
        lambda: conv_block(X, W, None, torch.zeros(2, 4), torch.zeros(3, 4)),
        ValueError,
        "beta has 3 tasks, gamma has 2",
    ),
    "gamma-dtype": (lambda: conv_block(X, W, None, torch.zeros(4).double(), None), TypeError, "gamma is torch.float64"),
    "pool": (
        lambda: conv_block(X, W, None, None, None, pool=0),
        ValueError,
        "pool must be a whole number of at least 1.* got 0",
    ),
    "pool-float": (
        lambda: conv_block(X, W, None, None, None, pool=2.0),
        ValueError,
        "pool must be a whole number.* got 2.0",
    ),
    "no-images": (
        lambda: conv_block(X[:0], W, None, None, None),
        ValueError,
        "more than one value per channel, got N=0 images of 16x16",
    ),
    "one-value": (
        lambda: conv_block(X[:1, :, :1, :1], W, None, None, None, pool=1),
        ValueError,
        "got N=1 images of 1x1",
    ),
    "window": (
        lambda: conv_block(X[..., :1], W, None, None, None),
        ValueError,
        "output of 16x1 is smaller than the 2x2 pooling window",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_values(name: str) -> None:
    function, kind, words = ERRORS[name]
    conv_block(X, W, None, None, None, pool=2)  # what was checked before must not pass for what is like it
    with pytest.raises(kind, match=words):
        function()


@pytest.mark.parametrize("op", ["conv2d", "linear", "conv_block"])
def test_results_may_be_changed_in_place(op: str) -> None:
    operands = {k: v.requires_grad_() for k, v in tiny(op, False).items()}
    want = torch.autograd.grad((call(op, operands) * 2).exp().sum(), list(operands.values()))
    got = torch.autograd.grad(call(op, operands).mul_(2).exp_().sum(), list(operands.values()))
    torch.testing.assert_close(got, want, **EXACT)
