"""The Triton backend: on a GPU where torch sees one, else the same kernels in Triton's interpreter on small shapes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BLOCKS,
    CONVS,
    EXACT,
    GRADIENT,
    LINEARS,
    STEPS,
    THIRDS,
    BlockCase,
    ConvCase,
    assert_as_exact,
    by_task,
    layouts,
    name_of,
    norm_block,
    stock_block,
    subsets,
)
from chains import check_rates, check_sgd
from machine import fresh
from operations import (
    BLOCK,
    as_called,
    block_operands,
    check_block_far_from_zero,
    check_block_rounding,
    check_gradients,
    check_one_graph,
    geometry,
    tiny,
)
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels import functional
from lambda_kernels.backends.base import Call
from lambda_kernels.backends.reference import Reference
from lambda_kernels.backends.triton import Triton
from lambda_kernels.spec import BlockSpec, ConvSpec, output_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON, REFERENCE = Triton(), Reference()
if TRITON.reasons():
    pytest.skip(f"triton: {'; '.join(TRITON.reasons())}", allow_module_level=True)

# numpy's, of triton 3.6's interpreter
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.usefixtures("float32_has_its_digits"),
]
conv2d: Any = lk.functional.conv2d
linear: Any = lk.functional.linear
conv_block: Any = lk.functional.conv_block
T = 3
SINGLE, DOUBLE, HALVES = torch.float32, torch.float64, (torch.float16, torch.bfloat16)
DTYPES = (SINGLE, DOUBLE, *HALVES)
PLAIN = ConvSpec((1, 1), (1, 1), (1, 1), 1)


def device() -> Any:
    """Tensors are made on DEVICE."""
    return nullcontext() if DEVICE == "cpu" else torch.device(DEVICE)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every call goes to the Triton backend."""
    monkeypatch.setattr(functional, "choose", lambda *call: TRITON)
    with device():
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were started."""
    from lambda_kernels.backends.triton import loss, norm, products, update

    names: list[str] = []
    for module in (loss, norm, products, update):

        def launch(kernel: Any, *arguments: Any, to: Any = module.launch, **options: Any) -> None:
            names.append(kernel.__name__)
            to(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", launch)
    return names


def randn(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE).to(dtype)


def small(op: str, per_task: bool) -> dict[str, Tensor]:
    with torch.device("cpu"):
        return {name: tensor.to(DEVICE) for name, tensor in tiny(op, per_task).items()}


# Convolution and linear layer.


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for i, case in enumerate(CONVS) for dtype in (DTYPES[:2] if i % 4 else DTYPES)],
    ids=name_of,
)
def test_conv2d_rounds_no_worse_than_torch(case: ConvCase, dtype: torch.dtype) -> None:
    exact = [randn(*s, dtype=dtype).double().requires_grad_() for s in (case.x, case.weight, case.weight[:1])]
    mine, plain = ([t.detach().to(dtype).requires_grad_() for t in exact] for _ in range(2))
    stock: Any = F.conv2d
    results = [conv2d(*mine, *case.geometry), *(stock(*t, *case.geometry) for t in (plain, exact))]
    assert_as_exact("y", *results)
    gy = torch.randn_like(results[0])
    grads = [torch.autograd.grad(y, t, gy.to(y.dtype)) for y, t in zip(results, (mine, plain, exact))]
    pixels = results[0].numel() // case.weight[0]
    for name, own, theirs, want in zip(("x", "weight", "bias"), *grads):
        assert_as_exact(name, own, theirs, want, 1 if name == "x" else pixels)


@pytest.mark.parametrize("layout", ["channels-last", "sliced", "strided"])
@pytest.mark.parametrize("name", ["padding", "everything", "depthwise"])
def test_conv2d_in_any_memory_layout(name: str, layout: str) -> None:
    case = next(c for c in CONVS if c.name == name)
    operands = [randn(*s) for s in (case.x, case.weight, case.weight[:1])]
    mine = [layouts(t)[layout].detach().requires_grad_() for t in operands[:2]] + [operands[2].requires_grad_()]
    plain = [t.detach().clone().requires_grad_() for t in operands]
    stock: Any = F.conv2d
    got, want = conv2d(*mine, *case.geometry), stock(*plain, *case.geometry)
    torch.testing.assert_close(got, want, **EXACT)
    channels_last = got.is_contiguous(memory_format=torch.channels_last)
    assert channels_last if layout == "channels-last" else got.is_contiguous()
    gy = layouts(torch.randn_like(want))[layout]
    grads = torch.autograd.grad(got, mine, gy)
    torch.testing.assert_close(grads, torch.autograd.grad(want, plain, gy), **EXACT)
    channels_last = grads[0].is_contiguous(memory_format=torch.channels_last)
    assert channels_last if layout == "channels-last" else grads[0].is_contiguous()


@pytest.mark.parametrize("own", subsets(("x", "weight", "bias")), ids="-".join)
@pytest.mark.parametrize("name", ["everything", "stride-pair", "batch-0"])
def test_conv2d_with_tasks_is_torchs_task_by_task(name: str, own: tuple[str, ...]) -> None:
    case = next(c for c in CONVS if c.name == name)
    shapes = {"x": case.x, "weight": case.weight, "bias": case.weight[:1]}
    operands = [randn(*((T,) if name in own else ()), *shape).requires_grad_() for name, shape in shapes.items()]
    got = conv2d(*operands, *case.geometry)
    want = by_task(lambda *t: F.conv2d(*t, *case.geometry), T, *zip(operands, (4, 4, 1)))
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, operands, gy), torch.autograd.grad(want, operands, gy), **EXACT)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tasks", [(1, 1), (T, 1), (1, T), (T, T)], ids=str)
def test_a_wide_convolution_reads_one_tap_at_a_time(tasks: tuple[int, int], dtype: torch.dtype) -> None:
    # 64 channels, a multiple of the tile; stride 2 spreads the input gradient.
    x, weight = randn(tasks[0], 2, 64, 9, 5, dtype=dtype), randn(tasks[1], 64, 64, 3, 2, dtype=dtype)
    spec, x = (ConvSpec((2, 2), (2, 1), (1, 2), 1), x) if tasks == (T, 1) else (PLAIN, TRITON.layout(x))
    gy = randn(max(tasks), 2, 64, *output_size(x.shape, weight.shape, spec), dtype=dtype)

    def all_three(backend: Reference, x: Tensor, weight: Tensor, gy: Tensor) -> list[Tensor]:
        y = backend.conv2d(x, weight, None, spec)
        gx = backend.conv2d_input_grad(gy, weight, x.shape, spec)
        return [y, gx, backend.conv2d_weight_grad(gy, x, weight.shape, spec)]

    mine, stock = all_three(TRITON, x, weight, gy), all_three(REFERENCE, x, weight, gy)
    truth = all_three(REFERENCE, x.double(), weight.double(), gy.double())
    for name, terms, own, theirs, want in zip(("y", "x", "weight"), (384, 384, 270), mine, stock, truth):
        assert_as_exact(name, own, theirs, want, terms)


def device_tiles() -> list[Any]:
    """The tiles that a device chooses from, each size once: warps and stages mean nothing to the interpreter."""
    from lambda_kernels.backends.triton import products

    tables = [table for name, table in vars(products).items() if name.endswith("_TILES") and "INTERPRETED" not in name]
    return list({(*tile[:3], products._swapped(tile)): tile for table in tables for tile in table}.values())


def check_products(channels: int, dtype: torch.dtype) -> None:
    """Both directions of a convolution, its weight gradient and a linear layer beside torch's."""
    x, weight = randn(1, 2, channels, 7, 5, dtype=dtype), randn(1, 40, channels, 3, 3, dtype=dtype)
    gy, vector = randn(1, 2, 40, 7, 5, dtype=dtype), randn(1, 40, dtype=dtype)

    def every(backend: Reference, x: Tensor, weight: Tensor, gy: Tensor, vector: Tensor) -> list[Tensor]:
        z, _, _, _, rstd = backend.conv_block(x, weight, vector, vector, BlockSpec(PLAIN, 1e-5, 2))
        y = backend.block(x, weight, vector, vector, BlockSpec(PLAIN, 1e-5, 2))[0]
        gx = backend.conv2d_input_grad(gy, weight, x.shape, PLAIN)
        gw = backend.conv2d_weight_grad(gy, x, weight.shape, PLAIN)
        return [z, rstd, y, gx, gw, backend.linear(gy.flatten(3)[:, 0], x.flatten(3)[:, 0], None)]

    operands = (TRITON.layout(x), weight, TRITON.layout(gy), vector)
    results = [every(TRITON, *operands), every(REFERENCE, *operands)]
    truth = every(REFERENCE, *(t.double() for t in operands))
    for name, terms, mine, stock, exact in zip(
        ("z", "rstd", "y", "x", "weight", "product"), (576, 70, 576, 360, 70, 35), *results, truth
    ):
        assert_as_exact(name, mine, stock, exact, terms)


@pytest.mark.parametrize("channels", [64, 6])  # one tap of the kernel at a time, and several
@pytest.mark.parametrize("tile", device_tiles(), ids=lambda tile: "x".join(map(str, tile[:4])))
def test_products_in_the_tiles_of_a_device(monkeypatch: pytest.MonkeyPatch, tile: Any, channels: int) -> None:
    from lambda_kernels.backends.triton import products

    monkeypatch.setattr(products, "_ways", lambda operand, precision, *sizes: {tile.within(*sizes[:3]): precision})
    check_products(channels, SINGLE if DEVICE == "cpu" else torch.float16)  # float32 has tiles of its own there


@pytest.mark.parametrize("tile", device_tiles()[:4], ids=lambda tile: "x".join(map(str, tile[:4])))
def test_sums_are_split_into_whole_blocks_of_a_tile(monkeypatch: pytest.MonkeyPatch, tile: Any) -> None:
    from lambda_kernels.backends.triton import products

    for count, most, fewest in product((0, 1, 255, 256, 1600, 44100), (0, 1, 7, 512), (256,)):
        chunk, splits = products._split(count, most, fewest, tile)
        assert chunk % tile.terms == 0 and (splits - 1) * chunk < max(count, 1) <= splits * chunk
        assert splits <= max(1, most) and (splits == 1 or chunk >= fewest - tile.terms)
    programs: list[int] = []
    monkeypatch.setattr(products, "_ways", lambda operand, precision, *sizes: {tile: precision})
    monkeypatch.setattr(products, "launch", lambda kernel, count, *arguments, **options: programs.append(count))
    x = torch.empty(1, 25, 64, 42, 42)
    products.conv2d_weight_grad(x, x, torch.Size((1, 64, 64, 3, 3)), PLAIN)
    assert products.SPLIT_PROGRAMS * 0.9 < programs[0] <= products.SPLIT_PROGRAMS  # whatever the tile


@pytest.mark.gpu  # the interpreter has no tensor cores; tests/test_triton_parts.py has a model of them
@pytest.mark.parametrize("way", ["tf32x3", "bf16x6"])
def test_products_of_parts_are_as_exact_as_float32(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    from lambda_kernels.backends.triton import products

    tile = products.EXACT_TILES[0] if way == "tf32x3" else products.PARTED_WEIGHT_TILES[0]
    monkeypatch.setattr(products, "_ways", lambda operand, precision, *sizes: {tile.within(*sizes[:3]): way})
    backends: Any = torch.backends
    for switch in (backends.cudnn.conv, backends.cuda.matmul):
        monkeypatch.setattr(switch, "fp32_precision", "ieee")
    check_products(64, SINGLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shapes", LINEARS.values(), ids=LINEARS)
def test_linear_rounds_no_worse_than_torch(shapes: Any, with_bias: bool, dtype: torch.dtype) -> None:
    exact = [randn(*s, dtype=dtype).double() for s in (*shapes, shapes[1][:1])[: 2 + with_bias]]
    every = [[t.to(kind).requires_grad_() for t in exact] for kind in (dtype, dtype, DOUBLE)]
    results = [f(*t) for f, t in zip((linear, F.linear, F.linear), every)]
    assert_as_exact("y", *results)
    gy = torch.randn_like(results[0])
    for three in zip(*(torch.autograd.grad(y, t, gy.to(y.dtype)) for y, t in zip(results, every))):
        assert_as_exact("gradient", *three)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_linear_layer_of_many_terms_is_split(launched: list[str], dtype: torch.dtype) -> None:
    operands = randn(T, 4, 1100, dtype=dtype), randn(T, 5, 1100, dtype=dtype), randn(T, 5, dtype=dtype)
    mine, stock = (backend.linear(*operands) for backend in (TRITON, REFERENCE))
    assert launched == ["matrix_product", "sum_splits"]
    assert_as_exact("y", mine, stock, REFERENCE.linear(*(t.double() for t in operands)), 1100)


@pytest.mark.parametrize("rows", [(4,), (2, 0), (2, 90)], ids=["4", "2x0", "2x90"])
@pytest.mark.parametrize("own", subsets(("weight", "bias")), ids="-".join)
def test_linear_with_tasks_is_torchs_task_by_task(own: tuple[str, ...], rows: tuple[int, ...]) -> None:
    x = layouts(randn(T, *rows, 70))["strided"].requires_grad_()
    weight, bias = (randn(*((T,) if n in own else ()), *s) for n, s in (("weight", (5, 70)), ("bias", (5,))))
    operands = (x, weight.requires_grad_(), bias.requires_grad_())
    got, want = linear(*operands), by_task(F.linear, T, *zip(operands, (0, 2, 1)))
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, operands, gy), torch.autograd.grad(want, operands, gy), **EXACT)


def test_tensor_float_32_follows_torchs_switches() -> None:
    from lambda_kernels.backends.triton import products

    x = torch.empty(1)
    backends: Any = torch.backends
    before = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    try:
        for conv, matmul in (("ieee", "tf32"), ("tf32", "ieee")):
            backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision = conv, matmul
            kinds = [products._arithmetic(x, kind)[0] for kind in ("conv", "matmul")]
            assert kinds == ([conv, matmul] if DEVICE == "cuda" else ["ieee", "ieee"])
            assert products._arithmetic(x.double(), "conv")[0] == "ieee"
    finally:
        backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision = before


# The fused block.


# The interpreter needs seconds a thousand pixels.
FEW = tuple(
    case for case in (*BLOCKS, THIRDS) if DEVICE == "cuda" or case.name not in ("33x47", "75-images", "width-600")
)


@pytest.mark.parametrize("case", FEW, ids=name_of)
def test_block_in_float64(case: BlockCase) -> None:
    plain = {k: v.requires_grad_() for k, v in block_operands(case).items()}
    mine = {k: v.detach().clone().requires_grad_() for k, v in plain.items()}
    got, want = conv_block(**mine, **geometry(case)), stock_block(*plain.values(), 1e-5, as_called(case))
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want)
    grads = [torch.autograd.grad(y, list(t.values()), gy) for y, t in ((got, mine), (want, plain))]
    torch.testing.assert_close(*grads, **GRADIENT)


@pytest.mark.parametrize(
    "case", [case for case in (*BLOCKS, THIRDS) if case.name not in ("2x2", "groups-stride")][::2], ids=name_of
)
def test_block_rounds_no_worse_than_torch(case: BlockCase) -> None:
    check_block_rounding(block_operands(case), case)


@pytest.mark.parametrize("width", [1, 5])
def test_block_on_images_far_from_zero(width: int) -> None:
    check_block_far_from_zero(BlockCase("raw", 9, 1, width, (21, 33), padding=0))


@pytest.mark.parametrize("fused", [True, False])
def test_block_on_constant_images(fused: bool) -> None:
    # The variance is exactly zero, so the result is relu(beta).
    x, beta, gamma = TRITON.layout(torch.full((1, 9, 1, 21, 21), 1000.0)), torch.randn(1, 5), torch.ones(1, 5)
    spec = ConvSpec((1, 1), (0, 0), (1, 1), 1)
    weight = torch.full((1, 5, 1, 1, 1), 1.1)
    if fused:
        y = TRITON.conv_block(x, weight, gamma, beta, BlockSpec(spec, 1e-5, 2))[1]
    else:
        y = TRITON.norm_relu_pool(REFERENCE.conv2d(x, weight, None, spec), gamma, beta, norm_block(2))[0]
    torch.testing.assert_close(y, F.relu(beta)[:, None, :, None, None].expand_as(y), rtol=0, atol=1e-6)  # roundings


@pytest.mark.parametrize("rounds", [1, 3, 99], ids=["groups-of-groups", "groups", "one-after-the-other"])
def test_moments_of_many_tiles_are_merged(monkeypatch: pytest.MonkeyPatch, launched: list[str], rounds: int) -> None:
    from lambda_kernels.backends.triton import norm

    monkeypatch.setattr(norm, "MERGE_TILES", 2)
    monkeypatch.setattr(norm, "MERGE_ROUNDS", rounds)
    monkeypatch.setattr(norm, "MOMENT_PIXELS", 16)
    z = randn(2, 3, 5, 11, 12) + torch.linspace(-9, 30, 132, dtype=DOUBLE).reshape(11, 12)
    z[0, :, 3] = 1000.0  # all equal: the variance is exactly zero
    gamma, beta = affine((1, 1), 5, DOUBLE)
    got, want = (b.norm_relu_pool(z, gamma, beta, norm_block(2)) for b in (TRITON, REFERENCE))
    torch.testing.assert_close(got, want, **EXACT)
    assert got[3][0, 3] == torch.tensor(1e-5, dtype=DOUBLE).rsqrt()
    # 25 tiles become 13, 7, 4 and 2 groups of two; three rounds take 6 of them
    assert launched.count("merge_groups") == {1: 4, 3: 3, 99: 0}[rounds] and launched.count("merge") == 1


def affine(tasks: tuple[int, int], channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gamma, beta = (randn(t, channels, dtype=dtype) for t in tasks)
    beta[:, -1] = -20.0  # a channel that the ReLU shuts
    return gamma, beta


def assert_moments(z: Tensor, mean: Tensor, rstd: Tensor, stock: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """A mean near zero is as exact as the values it is taken of; stock and truth are `norm_relu_pool`'s results."""
    rounding = torch.finfo(mean.dtype).eps * z.abs().max().item()
    torch.testing.assert_close(mean.double(), truth[2], rtol=0, atol=4 * rounding)
    assert_as_exact("rstd", rstd, stock[3], truth[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("shape", "pool"),
    [((1, 3, 5, 11, 12), 1), ((2, 3, 5, 11, 12), 3), ((T, 2, 40, 7, 9), 2), ((2, 1, 130, 5, 6), 5)],
    ids=str,
)
def test_norm_relu_pool_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype, pool: int) -> None:
    z = randn(*shape, dtype=dtype)
    wide = torch.promote_types(dtype, SINGLE)
    gamma, beta = affine((1, shape[0]), shape[2], wide if pool > 1 else dtype)
    stock = REFERENCE.norm_relu_pool(z, gamma, beta, norm_block(pool))
    want = REFERENCE.norm_relu_pool(z.double(), gamma.double(), beta.double(), norm_block(pool))
    for layout in ("channels-last", "contiguous", "sliced"):
        operand = layouts(z)[layout]
        y, index, mean, rstd = TRITON.norm_relu_pool(operand, gamma, beta, norm_block(pool))
        assert mean.dtype == rstd.dtype == wide and index.dtype == torch.uint8
        assert_as_exact("y", y, stock[0], want[0])
        assert_moments(z, mean, rstd, stock, want)
        turned = index != want[1]
        assert not turned.any() if dtype == DOUBLE else turned.float().mean() < 0.02
        gy = layouts(randn(*y.shape, dtype=dtype))[layout]
        saved = index, mean, rstd, norm_block(pool)
        for need_z in (True, False):
            mine = TRITON.norm_relu_pool_grad(gy, operand, gamma, *saved, need_z)
            plain = REFERENCE.norm_relu_pool_grad(gy, z, gamma, *saved, need_z)
            exact = index, want[2], want[3], norm_block(pool)
            truth = REFERENCE.norm_relu_pool_grad(gy.double(), z.double(), gamma.double(), *exact, need_z)
            for name, ours, theirs, true in zip(("z", "gamma", "beta"), mine, plain, truth):
                assert_as_exact(name, ours, theirs, true)


@pytest.mark.parametrize("own", [("x",), ("weight",), ("gamma",), ("x", "beta"), ("x", "weight", "gamma", "beta")])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_conv_block_is_its_convolution_and_norm(dtype: torch.dtype, own: tuple[str, ...]) -> None:
    shapes = {"x": (4, 3, 9, 8), "weight": (10, 3, 3, 3), "gamma": (10,), "beta": (10,)}
    x, weight, gamma, beta = (randn(T if n in own else 1, *shape, dtype=dtype) for n, shape in shapes.items())
    z, y, index, mean, rstd = TRITON.conv_block(x, weight, gamma, beta, BlockSpec(PLAIN, 1e-5, 2))
    plain, exact = (REFERENCE.conv2d(a, b, None, PLAIN) for a, b in ((x, weight), (x.double(), weight.double())))
    assert_as_exact("z", z, plain.expand(z.shape), exact.expand(z.shape))
    stock = REFERENCE.norm_relu_pool(z, gamma, beta, norm_block(2))
    truth = REFERENCE.norm_relu_pool(z.double(), gamma.double(), beta.double(), norm_block(2))
    assert_as_exact("y", y, stock[0], truth[0])
    assert_moments(z, mean, rstd, stock, truth)
    assert dtype != DOUBLE or torch.equal(index, truth[1])


@pytest.mark.parametrize("own", [(), ("x",), ("weight",), ("gamma",), ("x", "weight", "gamma", "beta")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("size", "spec", "pool"),
    [
        ((9, 8), PLAIN, 1),
        ((8, 12), PLAIN, 2),
        ((9, 7), PLAIN, 2),  # a row and a column that no window holds
        ((8, 7), ConvSpec((2, 1), (1, 1), (1, 2), 2), 2),  # a column
        ((11, 10), PLAIN, 4),  # three rows and two columns
    ],
    ids=["no-pool", "even", "odd", "strided-groups", "pool-4"],
)
def test_a_frozen_block_keeps_one_value_of_a_window(
    size: tuple[int, int], spec: ConvSpec, pool: int, dtype: torch.dtype, own: tuple[str, ...]
) -> None:
    shapes = {"x": (4, 6, *size), "weight": (10, 6 // spec.groups, 3, 3), "gamma": (10,), "beta": (10,)}
    x, weight, gamma, beta = (randn(T if n in own else 1, *shape, dtype=dtype) for n, shape in shapes.items())
    gamma[:, :3] = torch.tensor([0.0, -1.0, 1.0])  # the least value counts where the scale is negative
    beta[:, 9] = -20.0  # a channel that the ReLU shuts
    block = BlockSpec(spec, 1e-5, pool)
    assert TRITON.block_refusals(x, weight, block) == []
    z = TRITON.conv_block(x, weight, gamma, beta, block)[0]
    stock = REFERENCE.norm_relu_pool(z, gamma, beta, block)
    truth = REFERENCE.norm_relu_pool(z.double(), gamma.double(), beta.double(), block)
    for name, layout in layouts(x).items():
        y, mean, rstd = TRITON.block(layout, weight, gamma, beta, block)
        assert y.dtype == dtype and mean.dtype == rstd.dtype == torch.promote_types(dtype, SINGLE)
        assert_as_exact(name, y, stock[0], truth[0])
        assert_moments(z, mean, rstd, stock, truth)
        assert y.movedim(2, -1).is_contiguous() and not y[:, :, 9].any()


def test_a_frozen_block_is_to_the_bit_what_keeps_z_where_the_statistics_are() -> None:
    x, weight, gamma, beta = (randn(*s, dtype=SINGLE) for s in ((2, 4, 3, 9, 8), (1, 10, 3, 3, 3), (2, 10), (1, 10)))
    block = BlockSpec(PLAIN, 1e-5, 2)
    y, mean, rstd = TRITON.block(x, weight, gamma, beta, block)
    z = TRITON.conv_block(x, weight, gamma, beta, block)[0]
    at = (Ellipsis, None, None)
    a = (z - mean[:, None][at]) * (gamma * rstd)[:, None][at] + beta[:, None][at]
    want = F.max_pool2d(F.relu(a).flatten(0, 1), 2).unflatten(0, y.shape[:2])
    if DEVICE == "cpu":
        assert torch.equal(y, want)
    torch.testing.assert_close(y, want)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice):RuntimeWarning")  # numpy's, below the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_reaches_a_frozen_blocks_result(value: float) -> None:
    x, weight, gamma, beta = randn(1, 3, 2, 6, 7), randn(1, 4, 2, 3, 3), randn(1, 4), randn(1, 4)
    x[0, 1, 1, 2, 3] = value
    weight[0, 0, 1] = 0.0  # of which 0 times infinity comes
    gamma[0, 1] = 0.0
    block = BlockSpec(PLAIN, 1e-5, 2)
    got, want = TRITON.block(x, weight, gamma, beta, block), REFERENCE.block(x, weight, gamma, beta, block)
    assert want[0].isnan().all()
    assert got[0].isnan().all() and got[2].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, below the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("pool", [1, 2])
def test_what_is_not_finite_reaches_the_result_as_in_torch(value: float, pool: int) -> None:
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


def test_block_breaks_ties_as_torch() -> None:
    case = BlockCase("ties", 4, 2, 3, (8, 9))
    x = torch.randint(-1, 2, (4, 2, 8, 9)).double().requires_grad_()
    weight = torch.randint(-1, 2, (3, 2, 3, 3)).double()
    beta, gamma = torch.zeros(3, dtype=DOUBLE), torch.tensor([1.0, -1.0, 0.0], dtype=DOUBLE)
    got, want = conv_block(x, weight, None, gamma, beta), stock_block(x, weight, None, gamma, beta, 1e-5, case)
    gy = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, x, gy), torch.autograd.grad(want, x, gy), **EXACT)


# The loss and the inner loop.


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 5, 5), (T, 75, 5), (2, 3, 1), (2, 9, 2000)], ids=str)
def test_cross_entropy_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = layouts(randn(*shape, dtype=dtype) * 5)["strided"]
    for tasks in {1, shape[0]}:
        labels = torch.randint(0, shape[2], (tasks, shape[1]))
        mine, stock = (b.cross_entropy_grad(logits, labels) for b in (TRITON, REFERENCE))
        truth = REFERENCE.cross_entropy_grad(logits.double(), labels)
        for name, own, theirs, want in zip(("loss", "gradient"), mine, stock, truth):
            assert_as_exact(name, own, theirs, want)
    labels[0, 1] = shape[2]
    loss = TRITON.cross_entropy_grad(logits, labels)[0]
    assert bool(loss[0].isnan()) and (labels.shape[0] == 1 or not loss[1:].isnan().any())
    labels[0, 1] = -1
    assert bool(TRITON.cross_entropy_grad(logits, labels)[0][0].isnan())


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, torch.float16, torch.bfloat16], ids=name_of)
def test_sgd_in_place_is_torchs(dtype: torch.dtype) -> None:
    shapes = [(7,), (1025,), (3, 4, 5), (1,), (0,), (2048,), *[(n,) for n in range(9, 40)]]  # for two launches
    exact = [randn(2, *shape) for shape in shapes]
    truth = [p - 0.03 * g for p, g in exact]
    stock, got, gradients = ([t[i].to(dtype).clone() for t in exact] for i in (0, 0, 1))
    TRITON.sgd_(got, gradients, [0.03])
    torch._foreach_add_(stock, gradients, alpha=-0.03)
    for mine, theirs, want in zip(got, stock, truth):
        assert_as_exact("parameter", mine, theirs, want)
    strided, every_other = torch.zeros(4, 4, dtype=dtype, device=DEVICE), torch.ones(4, 8, dtype=dtype, device=DEVICE)
    TRITON.sgd_([strided.T[:, :2]], [every_other[:, ::4]], [1.0])  # not dense: torch's
    TRITON.sgd_([strided[2:]], [every_other[2:, ::2]], [1.0])
    assert strided.sum() == -8 - 8 and strided[2].eq(-1).all()
    TRITON.sgd_([], [], [0.1])


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE], ids=name_of)
def test_sgd_takes_a_rate_per_parameter(dtype: torch.dtype) -> None:
    check_sgd(TRITON, DEVICE, dtype)


def test_rates_are_numbers_of_the_host_whatever_the_default_device() -> None:
    own, gradient = torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)
    with torch.device("meta"):
        TRITON.sgd_([own], [gradient], [0.5])
    assert own.eq(0.5).all()


def test_rates_are_those_of_a_plain_loop() -> None:
    check_rates(TRITON, DEVICE)


def chain(dtype: torch.dtype, updated: list[bool], tasks: int = 2) -> tuple[Any, ...]:
    """Arguments of inner_loop: two blocks of 6 channels and a head of 3 ways."""
    specs = [BlockSpec(PLAIN, 1e-5, 2), BlockSpec(PLAIN, 1e-5, 2)]
    shapes = [(6, 2, 3, 3), (6,), (6,), (6, 6, 3, 3), (6,), (6,), (3, 24), (3,)]
    parameters = [randn(tasks if u else 1, *shape, dtype=dtype) * 0.5 for u, shape in zip(updated, shapes)]
    x, labels = randn(tasks, 6, 2, 8, 9, dtype=dtype), torch.randint(0, 3, (tasks, 6))
    return x, labels, parameters, updated, specs


@pytest.mark.parametrize("bits", ["111", "001", "010", "100", "011"])
def test_inner_loop_is_the_references(bits: str) -> None:
    updated = [b == "1" for b, n in zip(bits, (3, 3, 2)) for _ in range(n)]
    x, labels, parameters, updated, specs = chain(DOUBLE, updated)
    results = []
    for backend in (TRITON, REFERENCE):
        found = backend.inner_loop(x, labels, parameters, updated, specs, 3, [0.1])
        results.append([found.rows, *found.updated])
    torch.testing.assert_close(results[0], results[1], **STEPS)
    assert len(results[0]) == 1 + sum(updated)


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_inner_loop() -> None:
    x, labels, parameters, updated, specs = chain(SINGLE, [True] * 8)
    want = TRITON.inner_loop(x, labels, parameters, updated, specs, 3, [0.1]).updated
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own = TRITON.inner_loop(x, labels, parameters, updated, specs, 3, [0.1]).updated
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(own, want))


# Derivatives, transforms, compilation.


@pytest.mark.parametrize("mask", subsets(("x", "weight", "bias")), ids="-".join)
@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_first_and_second_derivatives(op: str, mask: tuple[str, ...]) -> None:
    check_gradients(op, small(op, len(mask) == 2), mask)


@pytest.mark.parametrize("mask", [*subsets(BLOCK[:-1]), ("bias",), BLOCK], ids="-".join)
def test_first_and_second_derivatives_of_the_block(mask: tuple[str, ...]) -> None:
    check_gradients("conv_block", small("conv_block", len(mask) == 2), mask)


def test_vmap_over_tasks() -> None:
    case = BlockCase("", 3, 2, 4, (6, 7))
    base = block_operands(case)
    own = ("x", "gamma")
    operands = [base[k] + 0.3 * randn(T, *base[k].shape) if k in own else base[k] for k in base]
    dims = tuple(0 if k in own else None for k in base)
    places = (0, 1, 3, 4)

    def energy(*t: Tensor) -> Tensor:
        return linear(conv_block(*t).flatten(1), t[1].flatten()[:36].reshape(1, 36)).pow(3).sum()

    def stock(*t: Tensor) -> Tensor:
        return F.linear(stock_block(*t, 1e-5, case).flatten(1), t[1].flatten()[:36].reshape(1, 36)).pow(3).sum()

    got = torch.func.vmap(torch.func.grad(energy, places), dims)(*operands)
    alone = [torch.func.grad(stock, places)(*(t[i] if d == 0 else t for t, d in zip(operands, dims))) for i in range(T)]
    torch.testing.assert_close(got, tuple(torch.stack(g) for g in zip(*alone)), **GRADIENT)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, of every Function
def test_compiles_as_one_graph() -> None:
    check_one_graph()


def operator_calls() -> list[tuple[str, tuple[Any, ...]]]:
    """Arguments of every operator, in two layouts and with shared and per-task operands."""
    flat = [2, 1, 1, 1, 1, 1, 1]
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for layout in ("contiguous", "channels-last"):
        x, weight = layouts(randn(2, 3, 2, 7, 6))[layout], randn(1, 4, 2, 3, 3)
        bias, gy, z = randn(2, 4), layouts(randn(2, 3, 4, 4, 6))[layout], layouts(randn(2, 3, 4, 7, 6))[layout]
        gamma, beta = affine((1, 2), 4, DOUBLE)
        y, index, mean, rstd = TRITON.norm_relu_pool(z, gamma, beta, norm_block(2))
        calls += [
            ("conv2d", (x, weight, bias, flat)),
            ("conv2d_input_grad", (gy, weight, list(x.shape), flat)),
            ("conv2d_input_grad", (gy, weight.expand(2, -1, -1, -1, -1), [1, *x.shape[1:]], flat)),
            ("conv2d_weight_grad", (gy, x, list(weight.shape), flat)),
            ("conv_block", (x[:1], weight, gamma, beta, flat, 1e-5, 2)),
            ("block", (x[:1], weight, gamma, beta, flat, 1e-5, 2)),
            ("norm_relu_pool", (z, gamma, beta, 1e-5, 2)),
            ("norm_relu_pool_grad", (y, z, gamma, index, mean, rstd, 2, True)),
            ("norm_relu_pool_grad", (y, z, gamma, index, mean, rstd, 2, False)),
        ]
    logits = randn(2, 5, 3)
    calls += [
        ("linear", (logits, randn(1, 4, 3), randn(2, 4))),
        ("cross_entropy_grad", (logits, torch.randint(0, 3, (1, 5)))),
    ]
    return calls


def test_operators_keep_torchs_rules() -> None:
    from lambda_kernels.backends.triton.operators import OPERATORS

    known = set()
    for name, arguments in operator_calls():
        operator = getattr(torch.ops.lambda_kernels_triton, name).default
        some = (
            () if name in known else ("test_autograd_registration", "test_aot_dispatch_dynamic")
        )  # which takes seconds
        known.add(name)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor", *some))
    assert known == OPERATORS.keys()


# What the kernels promise beside their values.


def results() -> list[Tensor]:
    """What every operator returns, for the same values in every call."""
    torch.manual_seed(1)
    found: list[Tensor] = []
    for name, arguments in operator_calls():
        before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        result = getattr(torch.ops.lambda_kernels_triton, name)(*arguments)
        found += [result] if isinstance(result, Tensor) else result
        for a, b in zip(arguments, before):
            assert not isinstance(a, Tensor) or torch.equal(a, b), f"{name} changed an input"
    torch.manual_seed(2)
    gy, x = randn(2, 30, 5, 9, 7, dtype=SINGLE), randn(2, 30, 3, 9, 7, dtype=SINGLE)  # enough pixels to be split
    found.append(TRITON.conv2d_weight_grad(gy, x, torch.Size((1, 5, 3, 3, 3)), PLAIN))
    return found


def test_results_repeat_to_the_bit_and_inputs_stay() -> None:
    assert all(torch.equal(a, b) for a, b in zip(results(), results()))


def test_every_element_is_written() -> None:
    clean = results()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN, bytes with 255
    try:
        assert torch.empty(9).isnan().all()
        poisoned = results()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned):
        assert torch.equal(a, b) and not (a.is_floating_point() and a.isnan().any())


def test_how_many_launches_a_method_takes(launched: list[str]) -> None:
    x, weight, bias = randn(T, 4, 2, 7, 6), randn(T, 4, 2, 3, 3), randn(1, 4)
    z, y, index, mean, rstd = TRITON.conv_block(x, weight, bias, bias, BlockSpec(PLAIN, 1e-5, 2))
    assert launched == ["convolve", "merge", "normalise"]
    wanted: list[tuple[Any, list[str]]] = [
        (lambda: TRITON.sgd_([weight.clone() for _ in range(10)], [weight] * 10, [0.1]), ["sgd"]),
        (lambda: TRITON.conv2d(x, weight, bias, PLAIN), ["convolve"]),
        (lambda: TRITON.conv2d(x, weight[:1], bias, PLAIN), ["convolve"]),
        (lambda: TRITON.conv2d_input_grad(z, weight, x.shape, PLAIN), ["convolve"]),
        (lambda: TRITON.conv2d_weight_grad(z, x, weight.shape, PLAIN), ["weight_gradient"]),
        (lambda: TRITON.norm_relu_pool(z, bias, bias, norm_block(2)), ["moments", "merge", "normalise"]),
        (lambda: TRITON.block(x, weight, bias, bias, BlockSpec(PLAIN, 1e-5, 2)), ["convolve", "merge", "normalise"]),
        (
            lambda: TRITON.norm_relu_pool_grad(y, z, bias, index, mean, rstd, norm_block(2), True),
            ["gradient_sums", "finish_sums", "dense_gradient"],
        ),
        (
            lambda: TRITON.norm_relu_pool_grad(y, z, bias, index, mean, rstd, norm_block(2), False),
            ["gradient_sums", "finish_sums"],
        ),
        (lambda: TRITON.linear(x.flatten(2), z.flatten(2)[:, :, :84], None), ["matrix_product"]),
        (lambda: TRITON.cross_entropy_grad(x.flatten(2), torch.zeros(1, 4, dtype=torch.int64)), ["cross_entropy"]),
    ]
    for function, names in wanted:
        launched.clear()
        function()
        assert launched == names
    many = randn(1, 40, 2, 7, 6), randn(1, 40, 4, 7, 6)
    launched.clear()
    TRITON.conv2d_weight_grad(many[1], many[0], weight[:1].shape, PLAIN)
    TRITON.linear(many[0][:, :, 0, 0], many[1][:, :, 0, 0], None)
    TRITON.linear(randn(1, 4, 600), randn(1, 5, 600), None)
    assert launched == ["weight_gradient", "sum_splits", "matrix_product", "matrix_product", "sum_splits"]


def test_tiles_are_measured_once_and_remembered_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from lambda_kernels.backends.triton import launch

    class Kernel:
        __name__, cache_key = "kernel", "source"

    tiles = [launch.Tile(16, 16, 16, 4, 2), launch.Tile(32, 16, 16, 4, 2), launch.Tile(64, 16, 16, 4, 2)]
    times = dict(zip(tiles, (3.0, 1.0, 2.0)))
    measured: list[launch.Tile] = []
    capturing = [True]

    def milliseconds(run: Any, tile: launch.Tile) -> float:
        measured.append(tile)
        return times[tile]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    x = torch.empty(1)
    tuner = launch.Tuner(Kernel)
    assert tuner.tile((1,), tiles, x, print) == tiles[0] and not measured
    capturing[0] = False
    for again in (tuner, tuner, launch.Tuner(Kernel)):
        assert again.tile((1,), tiles, x, print) == tiles[1]
    assert measured == tiles
    assert tuner.tile((2,), tiles, x, print) == tiles[1] and len(measured) == 6
    assert tuner.tile((3,), tiles[:1], x, print) == tiles[0] and len(measured) == 6


# Where it runs.


def test_what_it_refuses() -> None:
    device, other = torch.device(DEVICE), torch.device("cuda" if DEVICE == "cpu" else "cpu")
    assert TRITON.reasons() == []
    for op in ("conv2d", "linear", "conv_block"):
        for dtype in DTYPES:
            assert TRITON.refusals(Call(op, device, dtype, pool=2)) == []
        assert f"the tensors are on {other}" in TRITON.refusals(Call(op, other, SINGLE, pool=2))[0]
        assert "not torch.complex64" in TRITON.refusals(Call(op, device, torch.complex64, pool=2))[0]
    x, weight = torch.empty(1, 2, 3, 9, 9), torch.empty(1, 4, 3, 3, 3)
    for pool, why in ((3, "pools by 1, 2 or 4, not 3"), (16, "pools by at most 8, not 16")):
        assert why in TRITON.block_refusals(x, weight, BlockSpec(PLAIN, 1e-5, pool))[0]
    assert (
        "nothing is left of images [2, 3, 3, 9]"
        in TRITON.block_refusals(x[..., :3, :], weight, BlockSpec(PLAIN, 1e-5, 4))[0]
    )
    want = REFERENCE.block(x.zero_(), weight.zero_(), torch.ones(1, 4), torch.ones(1, 4), BlockSpec(PLAIN, 1e-5, 3))
    got = TRITON.block(x, weight, torch.ones(1, 4), torch.ones(1, 4), BlockSpec(PLAIN, 1e-5, 3))
    torch.testing.assert_close(got, want)
    assert "pools by at most 8, not 9" in TRITON.refusals(Call("conv_block", device, SINGLE, pool=9))[0]


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from lambda_kernels.backends import triton as backend

    def why(interpreting: bool = False) -> str:
        return " ".join(backend._reasons.__wrapped__(interpreting))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in why() and why(interpreting=True) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0 or newer, this one has 7.5" in why()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert why() == ""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert "needs triton 3.6 or newer, this is 3.5.1" in why()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed: `pip install triton`" in why()


def test_importing_it_imports_no_triton() -> None:
    code = """
import sys
from lambda_kernels.backends.triton import Triton
import torch
from lambda_kernels.backends.base import Call
Triton().refusals(Call("conv2d", torch.device("cpu"), torch.float32))
assert not any(name.partition(".")[0] == "triton" for name in sys.modules), "triton was imported"
"""
    fresh(code)
