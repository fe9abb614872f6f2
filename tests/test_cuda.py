"""The CUDA kernels of norm, ReLU, pool and the first block, emulated on the CPU and on a device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import BLOCKS, EXACT, IMAGES, name_of, norm_block
from chains import check_rates, check_sgd
from cuda_checks import (
    DTYPES,
    REFERENCE,
    Runner,
    T,
    channels_last,
    check,
    double,
    like_memory_of_others,
    operands_of_a_norm,
    sure_windows,
)
from machine import fresh
from torch import Tensor

from lambda_kernels.backends import cuda
from lambda_kernels.backends.base import Call
from lambda_kernels.backends.cuda import Cuda
from lambda_kernels.backends.cuda.library import ImageBlock
from lambda_kernels.backends.cuda.operands import patches_inside
from lambda_kernels.spec import BlockSpec, ConvSpec

pytestmark = pytest.mark.usefixtures("poisoned_memory", "float32_has_its_digits")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=[case.name for case in BLOCKS])
def test_norm_relu_pool(runner: Runner, number: int, dtype: torch.dtype) -> None:
    case = BLOCKS[number]
    tasks, per_task = [(1, False), (T, False), (T, True)][(number + DTYPES.index(dtype)) % 3]
    z, gamma, beta = operands_of_a_norm(case, dtype, tasks, per_task, runner.device)
    truth = REFERENCE.norm_relu_pool(*double(z, gamma, beta), norm_block(case.pool))
    stock = REFERENCE.norm_relu_pool(z, gamma, beta, norm_block(case.pool))
    how = (len(case.name) + tasks) % 3
    got = runner.backend.norm_relu_pool(like_memory_of_others(z, how), gamma, beta, norm_block(case.pool))
    y, index, mean, rstd = got
    assert y.dtype == dtype and index.dtype == torch.uint8 and mean.dtype == rstd.dtype == stock[2].dtype
    assert y.permute(0, 1, 3, 4, 2).is_contiguous() and index.permute(0, 1, 3, 4, 2).is_contiguous()
    check("y mean rstd", (y, mean, rstd), (stock[0], *stock[2:]), (truth[0], *truth[2:]))
    zd, gd, bd = double(z, gamma, beta)
    a = (zd - truth[2][:, None, :, None, None]) * (gd * truth[3])[:, None, :, None, None] + bd[:, None, :, None, None]
    sure = sure_windows(a, case.pool, 1e-12 if dtype == torch.float64 else 1e-5)
    assert sure.double().mean() > 0.9 and torch.equal(index.cpu()[sure], truth[1][sure])
    assert bool((index <= case.pool**2).all())

    gy = torch.randn(y.shape, device=runner.device).to(dtype)
    saved = (truth[1].to(runner.device), stock[2], stock[3])
    exact = REFERENCE.norm_relu_pool_grad(*double(gy, z, gamma), *truth[1:], norm_block(case.pool), True)
    beside = REFERENCE.norm_relu_pool_grad(gy, z, gamma, *saved, norm_block(case.pool), True)
    for need_z in (True, False):
        gradients = runner.backend.norm_relu_pool_grad(
            like_memory_of_others(gy, (how + 1) % 3), like_memory_of_others(z, how), gamma, *saved,
            norm_block(case.pool), need_z,
        )  # fmt: skip
        assert gradients[1].dtype == gradients[2].dtype == gamma.dtype
        names = "dz dgamma dbeta" if need_z else "dgamma dbeta"
        first = 0 if need_z else 1
        assert need_z or gradients[0] is None
        check(names, gradients[first:], beside[first:], exact[first:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_half_precision_beside_wide_parameters(runner: Runner, dtype: torch.dtype) -> None:
    z, gamma, beta = operands_of_a_norm(BLOCKS[0], torch.float32, T, True, runner.device)
    z, beta = z.to(dtype), beta.to(dtype)
    y, index, mean, rstd = runner.backend.norm_relu_pool(z, gamma, beta, norm_block(2))
    want = REFERENCE.norm_relu_pool(z, gamma, beta, norm_block(2))
    check("y mean rstd", (y, mean, rstd), (want[0], *want[2:]), double(*(want[i] for i in (0, 2, 3))))
    got = runner.backend.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, norm_block(2), True)
    beside = REFERENCE.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, norm_block(2), True)
    assert [t.dtype for t in got if t is not None] == [dtype, torch.float32, torch.float32]
    check("dz dgamma dbeta", got, beside, double(*beside))


def test_tasks_that_share_their_convolution(runner: Runner) -> None:
    z, gamma, beta = operands_of_a_norm(BLOCKS[0], torch.float64, T, True, runner.device)
    one = channels_last(z[:1])
    got = runner.backend.norm_relu_pool(one.expand(z.shape), gamma, beta, norm_block(2))
    want = REFERENCE.norm_relu_pool(one.expand(z.shape), gamma, beta, norm_block(2))
    torch.testing.assert_close(got, want, **EXACT)
    gy = torch.randn_like(want[0])
    operands = (gy, one.expand(z.shape), gamma, *want[1:], norm_block(2), True)
    got, want = (b.norm_relu_pool_grad(*operands) for b in (runner.backend, REFERENCE))
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("width", [1, 64])
def test_statistics_far_from_zero(runner: Runner, width: int) -> None:
    z = 1000 + torch.randn(1, 25, width, 21, 21, device=runner.device)
    vectors = (torch.ones(1, width, device=runner.device), torch.zeros(1, width, device=runner.device))
    got, stock = (b.norm_relu_pool(z, *vectors, norm_block(2)) for b in (runner.backend, REFERENCE))
    truth = REFERENCE.norm_relu_pool(*double(z, *vectors), norm_block(2))
    check("y mean rstd", *(tuple(r[i] for i in (0, 2, 3)) for r in (got, stock, truth)))
    flat = torch.full_like(z, 1100.1)
    y = runner.backend.norm_relu_pool(flat, vectors[0], vectors[0], norm_block(2))[0]
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-6)  # roundings of 1


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("width", [3, 4])
def test_what_is_not_finite_and_ties(runner: Runner, pool: int, width: int) -> None:
    z = torch.randint(-1, 2, (2, 2, width, 4, 5), device=runner.device).float()
    # Where beta is 0, a value that is the mean lies on the edge of the ReLU, and rounding decides.
    gamma, beta = torch.randn(2, width, device=runner.device), torch.full((2, width), 0.3, device=runner.device)
    gamma[0, 0] = beta[0, 0] = 0
    z[1, 1, 2, 1, 3] = float("nan")
    got, want = (b.norm_relu_pool(z, gamma, beta, norm_block(pool)) for b in (runner.backend, REFERENCE))
    assert torch.equal(got[1], want[1]) and bool(got[0][1, :, 2].isnan().all()) and not got[0][0].isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True)


OWN = ("", "x", "weight gamma beta", "x weight beta")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("number", range(len(IMAGES)), ids=[case.name for case in IMAGES])
def test_image_block(runner: Runner, number: int, dtype: torch.dtype) -> None:
    case, own = IMAGES[number], OWN[(number + DTYPES.index(dtype)) % len(OWN)]

    def made(name: str, *shape: int) -> Tensor:
        return torch.randn(T if name in own else 1, *shape).to(device=runner.device, dtype=dtype)

    x = made("x", case.images, case.inputs, *case.size) + 0.5
    weight = made("weight", case.width, case.inputs, *case.kernel) * 0.3
    gamma, beta = made("gamma", case.width), made("beta", case.width)
    backend, spec, pool = runner.backend, case.spec, case.pool
    block = BlockSpec(spec, 1e-5, pool)
    assert backend.image_refusals(x, weight, block) == []
    xd, wd, gd, bd = double(x, weight, gamma, beta)
    moments = backend.image_moments(x if own else like_memory_of_others(x, 2), case.kernel, spec)
    exact_moments = REFERENCE.image_moments(xd, case.kernel, spec)
    # in float64 whatever the images are: sums of squares beside products that cancel
    torch.testing.assert_close(moments.cpu(), exact_moments, rtol=1e-12, atol=1e-9)
    assert torch.equal(moments, moments.mT)

    got = backend.image_block(x, weight, gamma, beta, moments, block)
    stock = REFERENCE.image_block(x, weight, gamma, beta, moments, block)
    truth = REFERENCE.image_block(xd, wd, gd, bd, exact_moments, block)
    taps = weight[0, 0].numel()
    assert [t.dtype for t in got] == [t.dtype for t in stock] and [t.shape for t in got] == [t.shape for t in truth]
    check("y mean rstd", *(tuple(r[i] for i in (0, 2, 3)) for r in (got, stock, truth)), terms=taps)
    z = REFERENCE.conv2d(xd, wd, None, spec)
    tasks = truth[0].shape[0]
    a = (z - truth[2][:, None, :, None, None]) * (gd * truth[3])[:, None, :, None, None] + bd[:, None, :, None, None]
    sure = sure_windows(a.expand(tasks, *a.shape[1:]), pool, 1e-10 if dtype == torch.float64 else 1e-4)
    assert sure.double().mean() > 0.9 and torch.equal(got[1].cpu()[sure], truth[1][sure])
    assert bool((got[1] <= pool**2).all())

    gy = torch.randn(truth[0].shape).to(device=runner.device, dtype=dtype)
    saved = (truth[1].to(runner.device), stock[2], stock[3])
    gradients = backend.image_block_grad(gy, x, weight, gamma, *saved, moments, block)
    exact = REFERENCE.image_block_grad(gy.cpu().double(), xd, wd, gd, *truth[1:], exact_moments, block)
    z = REFERENCE.conv2d(x, weight, None, spec).expand(tasks, case.images, case.width, *a.shape[-2:])
    dz, dgamma, dbeta = REFERENCE.norm_relu_pool_grad(gy, z, gamma, *saved, norm_block(pool), True)
    assert dz is not None
    dw = REFERENCE.conv2d_weight_grad(dz, x, torch.Size((tasks, *weight.shape[1:])), spec)
    check("dw dgamma dbeta", gradients, (dw, dgamma, dbeta), exact, terms=dz[0, :, 0].numel())


@pytest.mark.parametrize(
    ("images", "inputs", "size", "kernel", "padding", "inside"),
    [
        (2, 3, (20, 37), (3, 3), (1, 1), 16 * 33),
        (3, 1, (33, 35), (3, 3), (1, 1), 29 * 31),  # a row and a column beyond the tiles
        (2, 3, (18, 40), (3, 3), (0, 0), 12 * 34),
        (1, 3, (17, 17), (3, 3), (2, 2), 15 * 15),  # the core is the whole image
        (2, 1, (19, 23), (3, 3), (4, 3), 17 * 21),  # and there are patches of zeros alone
        (2, 1, (21, 33), (5, 3), (1, 0), 11 * 27),
        (3, 3, (16, 20), (1, 3), (0, 1), 0),
        (2, 3, (15, 14), (2, 3), (1, 1), 14 * 10),
        (1, 1, (40, 66), (10, 3), (9, 2), 31 * 64),
        (2, 3, (8, 8), (3, 3), (1, 1), 0),  # too few
        (2, 2, (20, 30), (3, 3), (1, 1), 0),
        (2, 1, (20, 30), (3, 5), (1, 1), 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_moments_by_distance(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, images: int, inputs: int, size: tuple[int, int],
    kernel: tuple[int, int], padding: tuple[int, int], inside: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Inside of the images taps are multiplied once for each distance; in as many parts as there are, or one."""
    seen: list[int] = []
    spec = ConvSpec((1, 1), padding, (1, 1), 1)
    x = (torch.randn(2, images, inputs, *size) + 0.5).to(device=runner.device, dtype=dtype)

    def found(p: ImageBlock) -> int:
        seen.append(patches_inside(p))
        return seen[-1]

    monkeypatch.setattr(cuda, "patches_inside", found)
    truth = REFERENCE.image_moments(*double(x), kernel, spec)
    for parts in (64, 10**6):
        monkeypatch.setattr(cuda, "PART_PATCHES", parts)
        monkeypatch.setattr(cuda, "DISTANCE_PATCHES", parts)
        moments = runner.backend.image_moments(x, kernel, spec)
        # in float64 whatever the images are, as above
        torch.testing.assert_close(moments.cpu(), truth, rtol=1e-12, atol=1e-9)
        assert torch.equal(moments, moments.mT)
    assert seen == [inside] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("number", range(len(IMAGES)), ids=[case.name for case in IMAGES])
def test_image_block_on_tensor_cores(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, number: int, dtype: torch.dtype
) -> None:
    """Products of numbers rounded to TF32: float32 keeps these digits, half precision loses nothing."""
    monkeypatch.setattr(cuda, "allows_tf32", lambda _: True)
    case = IMAGES[number]
    x = torch.randn(T, case.images, case.inputs, *case.size) + 0.5
    weight = torch.randn(1, case.width, case.inputs, *case.kernel) * 0.3
    gamma, beta = torch.randn(T, case.width), torch.randn(1, case.width)
    x, weight, gamma, beta = (t.to(device=runner.device, dtype=dtype) for t in (x, weight, gamma, beta))
    block = BlockSpec(case.spec, 1e-5, case.pool)
    moments = runner.backend.image_moments(x, case.kernel, case.spec)
    y, index, *_ = runner.backend.image_block(x, weight, gamma, beta, moments, block)
    xd, wd, gd, bd, md = double(x, weight, gamma, beta, moments)
    truth = REFERENCE.image_block(xd, wd, gd, bd, md, block)
    if dtype == torch.float32:
        off = (y.cpu() - truth[0]).norm() / truth[0].norm()
        assert 1e-6 < off < 1e-3  # it is TF32 that was tried
    else:
        stock = REFERENCE.image_block(x, weight, gamma, beta, moments, block)
        check("y", (y,), (stock[0],), (truth[0],), terms=weight[0, 0].numel())
    z = REFERENCE.conv2d(xd, wd, None, case.spec)
    a = (z - truth[2][:, None, :, None, None]) * (gd * truth[3])[:, None, :, None, None] + bd[:, None, :, None, None]
    sure = sure_windows(a, case.pool, 2e-3)
    assert sure.double().mean() > 0.5 and torch.equal(index.cpu()[sure], truth[1][sure])
    assert bool((index <= case.pool**2).all())
    frozen = runner.backend.block(x, weight, gamma, beta, block)[0]
    assert torch.equal(frozen, y)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("width", [3, 8])
def test_ties_and_what_is_not_finite_on_tensor_cores(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, pool: int, width: int
) -> None:
    """Small whole numbers are exact in TF32: the first of equal values is the maximum, a NaN comes before all."""
    x = torch.randint(-1, 2, (2, 3, 2, 9, 8), device=runner.device).float()
    weight = torch.randint(-1, 2, (1, width, 2, 1, 1), device=runner.device).float()
    gamma, beta = torch.ones(2, width, device=runner.device), torch.zeros(1, width, device=runner.device)
    block = BlockSpec(ConvSpec((1, 1), (0, 0), (1, 1), 1), 1e-5, pool)
    moments = runner.backend.image_moments(x, (1, 1), block.conv)
    moments[:, :-1, -1] = 0  # means of 0, so that nothing is rounded
    x[1, 1, 0, 2, 3], x[1, 1, 0, 3, 3], x[1, 2, 1, 4, 4] = float("nan"), float("nan"), float("inf")
    found = []
    for allowed in (False, True):
        monkeypatch.setattr(cuda, "allows_tf32", lambda _, allowed=allowed: allowed)
        found.append(runner.backend.image_block(x, weight, gamma, beta, moments, block))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)
    assert bool(found[0][0].isnan().any())


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.parametrize("pool", [1, 2])
def test_a_frozen_first_block_stores_no_convolution(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, pool: int, width: int
) -> None:
    """It goes by the patches' moments; a block whose patches are too large goes through the convolution."""
    block = BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, pool)

    def operands(inputs: int) -> list[Tensor]:
        shapes = (T, 3, inputs, 9, 7), (1, width, inputs, 3, 3), (T, width), (1, width)
        return [torch.randn(s, dtype=torch.float64, device=runner.device) for s in shapes]

    images, features = operands(3), operands(4)
    want = REFERENCE.block(*double(*images), block)
    torch.testing.assert_close([t.cpu() for t in runner.backend.block(*features, block)],
                               list(REFERENCE.block(*double(*features), block)), **EXACT)  # fmt: skip
    monkeypatch.setattr(Cuda, "conv2d", None)
    monkeypatch.setattr(Cuda, "norm_relu_pool", None)
    got = runner.backend.block(*images, block)
    torch.testing.assert_close([t.cpu() for t in got], list(want), **EXACT)
    assert got[0].permute(0, 1, 3, 4, 2).is_contiguous()


def test_images_far_from_zero(runner: Runner) -> None:
    spec = ConvSpec((1, 1), (0, 0), (1, 1), 1)
    x, weight = 1000 + torch.randn(1, 9, 1, 20, 21), torch.rand(1, 5, 1, 3, 3)
    ones = torch.ones(1, 5)
    operands = [t.to(runner.device) for t in (x, weight, ones, ones)]
    block = BlockSpec(spec, 1e-5, 2)
    got = runner.backend.image_block(*operands, runner.backend.image_moments(operands[0], (3, 3), spec), block)
    truth = REFERENCE.image_block(*double(*operands), REFERENCE.image_moments(x.double(), (3, 3), spec), block)
    torch.testing.assert_close(got[0].cpu().double(), truth[0], rtol=0, atol=2e-6)  # roundings of values of a few units


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sgd_takes_a_rate_per_parameter(runner: Runner, dtype: torch.dtype) -> None:
    check_sgd(runner.backend, runner.device, dtype)


def test_rates_are_those_of_a_plain_loop(runner: Runner) -> None:
    check_rates(runner.backend, runner.device)


@pytest.mark.parametrize(
    ("spec", "kernel", "inputs", "pool", "dtype", "words"),
    [
        (ConvSpec((1, 1), (1, 1), (1, 1), 2), (3, 3), 1, 2, torch.float32, "no image block of 2 groups"),
        (ConvSpec((1, 1), (1, 1), (1, 1), 1), (3, 3), 4, 2, torch.float32, "up to 32 numbers, not 36"),
        (ConvSpec((1, 1), (1, 1), (1, 1), 1), (3, 3), 3, 3, torch.float32, "pools by 1 or 2, not 3"),
        (ConvSpec((1, 1), (0, 0), (1, 1), 1), (1, 5), 3, 2, torch.float32, r"nothing is left of images \[2, 3, 5, 5\]"),
        (ConvSpec((1, 1), (1, 1), (1, 1), 1), (3, 3), 3, 2, torch.complex64, "float16.*, not torch.complex64"),
    ],
    ids=["groups", "taps", "pool", "size", "dtype"],
)
def test_what_the_image_block_refuses(
    runner: Runner, spec: ConvSpec, kernel: tuple[int, int], inputs: int, pool: int, dtype: torch.dtype, words: str
) -> None:
    x = torch.zeros(1, 2, inputs * spec.groups, 5, 5, device=runner.device, dtype=dtype)
    weight = torch.zeros(1, 4, inputs, *kernel, device=runner.device, dtype=dtype)
    (why,) = runner.backend.image_refusals(x, weight, BlockSpec(spec, 1e-5, pool))
    assert re.search(words, why)


def test_the_operators_are_the_kernels() -> None:
    """A call in a graph of torch.compile goes through the operators, which have an implementation for CUDA."""
    for name in ("norm_relu_pool", "norm_relu_pool_grad"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lambda_kernels::{name}", "CUDA")


def test_refusals() -> None:
    backend = Cuda()
    assert backend.refusals(Call("linear", torch.device("cpu"), torch.float32)) == [
        "it runs on CUDA devices, the tensors are on cpu"
    ]
    why = backend.refusals(Call("conv_block", torch.device("cpu"), torch.int64, pool=3))
    assert len(why) == 3 and "not torch.int64" in why[1] and "pools by 1 or 2, not 3" in why[2]


def test_nothing_is_loaded_by_an_import() -> None:
    program = (
        "import ctypes, torch; ctypes.CDLL = None; import lambda_kernels.backends.cuda as c; "
        "assert '_library' not in vars(c._OPERATORS)"
    )
    fresh(program)
