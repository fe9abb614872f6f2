"""conv2d, linear and conv_block beside stock PyTorch: values and first gradients, tasks, rounding."""

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
    GRADIENT,
    LINEARS,
    THIRDS,
    BlockCase,
    ConvCase,
    assert_as_exact,
    by_task,
    layouts,
    stock_block,
    subsets,
)
from operations import as_called, block_operands, check_block_far_from_zero, check_block_rounding, geometry, randn

import lambda_kernels as lk
from lambda_kernels.agreement import within

# Called with operands out of lists and tables.
conv2d: Any = lk.functional.conv2d
linear: Any = lk.functional.linear
conv_block: Any = lk.functional.conv_block
stock_conv2d: Any = F.conv2d
T = 3


def ids(cases: Any) -> list[str]:
    return [case.name for case in cases]


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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
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
    tolerance = within(dtype)
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
    torch.testing.assert_close(mine_grads, plain_grads, **GRADIENT)
    assert not mine_grads[2].any()  # the convolution's bias cancels in the norm


@pytest.mark.parametrize("case", BLOCKS, ids=ids(BLOCKS))
def test_block_rounds_no_worse_than_torch(case: BlockCase, backend: str) -> None:
    check_block_rounding(block_operands(case), case)


@pytest.mark.parametrize("width", [1, 5, 64])
def test_block_on_images_far_from_zero(width: int, backend: str) -> None:
    check_block_far_from_zero(BlockCase("raw", 25, 1, width, (33, 47), padding=0))


@pytest.mark.parametrize("width", [1, 5, 64])
def test_block_on_constant_images(width: int, backend: str) -> None:
    # The variance is exactly zero, so the result is relu(beta); stock PyTorch is off by 0.01, in channels-last by 1.
    x, beta = torch.full((25, 1, 84, 84), 1000.0), torch.randn(width)
    y = conv_block(x, torch.full((width, 1, 1, 1), 1.1), None, torch.ones(width), beta, padding=0)
    torch.testing.assert_close(y, F.relu(beta)[:, None, None].expand_as(y), rtol=0, atol=1e-6)  # roundings of beta


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
    with torch.no_grad():
        torch.testing.assert_close(conv_block(**operands), want, **EXACT)
    gy = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, tensors, gy), torch.autograd.grad(want, tensors, gy), **GRADIENT
    )


@pytest.mark.parametrize("own", ["weight", "bias", "gamma"])
def test_block_of_no_images_has_the_task_axis(own: str, backend: str) -> None:
    operands = block_operands(BLOCKS[0])
    operands[own] = operands[own].expand(T, *operands[own].shape)
    expected = (T, 0, *conv_block(**operands).shape[2:])
    assert conv_block(**{**operands, "x": operands["x"][:0]}).shape == expected


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
    torch.testing.assert_close(y.float(), want, **within(y.dtype, "gradient"))  # two operations


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
            torch.testing.assert_close(mine, stock, equal_nan=True, **GRADIENT)
    x = torch.full((1, 1, 2, 2), value)
    torch.testing.assert_close(conv2d(x, torch.ones(1, 1, 1, 1)), x, equal_nan=True)
    torch.testing.assert_close(linear(x[0, 0], torch.ones(1, 2)), x[0, 0].sum(1, keepdim=True), equal_nan=True)


X, W = torch.zeros(2, 8, 16, 16), torch.zeros(4, 8, 3, 3)
