"""The CUDA kernels: on the CPU through the emulator of tests/cuda_emulator, and the same comparisons on a real device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import BLOCKS, BlockCase, assert_as_exact
from cuda_emulator import build
from torch import Tensor

from lambda_kernels.backends import cuda
from lambda_kernels.backends.cuda import Cuda
from lambda_kernels.backends.reference import Reference, windows
from lambda_kernels.spec import BlockSpec, ConvSpec, output_size

REFERENCE = Reference()
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RUNNERS = ("emulated", pytest.param("device", marks=pytest.mark.gpu))
T = 3


class Runner(NamedTuple):
    """A backend under test, and the device on which its tensors lie."""

    backend: Cuda
    device: str


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.library(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Runner:
    if request.param == "device":
        return Runner(Cuda(), "cuda")
    return Runner(Cuda(request.getfixturevalue("emulated_library"), "cpu"), "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch.empty gives is NaN, bytes are 255: an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "name", str(value))


def double(*tensors: Tensor) -> list[Tensor]:
    """Copies in float64 on the CPU, where the truth is computed."""
    return [t.cpu().double() if t.is_floating_point() else t.cpu() for t in tensors]


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def like_memory_of_others(x: Tensor, how: int) -> Tensor:
    """The same values: channels-last, contiguous, or cut out of a larger tensor at an odd address."""
    if how == 0:
        return channels_last(x)
    if how == 1:
        return x.contiguous()
    larger = x.new_full([n + 1 for n in x.shape], float("nan"))
    larger[tuple(slice(1, None) for _ in x.shape)] = x
    return larger[tuple(slice(1, None) for _ in x.shape)]


def sure_windows(a: Tensor, pool: int, margin: float) -> Tensor:
    """Windows of a [T, N, C, H, W] in which no rounding of relative size `margin` turns the maximum or the ReLU.

    Equal values stay equal: the first one is the maximum for all.
    """
    tiles = windows(a, pool)
    best, margin = tiles.amax(-1), margin * max(1.0, a.abs().max().item())
    gap = best.unsqueeze(-1) - tiles
    return (best.abs() > margin) & ((gap == 0) | (gap > margin)).all(-1)


def check(names: str, got: Any, stock: Any, truth: Any, terms: int = 1) -> None:
    for name, mine, theirs, exact in zip(names.split(), got, stock, truth, strict=True):
        if mine.dtype == torch.float64:  # the truth has roundings too
            scale = max(1.0, exact.abs().max().item())
            torch.testing.assert_close(mine.cpu(), exact, rtol=0, atol=1e-13 * max(terms, 100) ** 0.5 * scale)
        else:
            assert_as_exact(name, mine.cpu(), theirs.cpu(), exact, terms)


def operands_of_a_norm(case: BlockCase, dtype: torch.dtype, tasks: int, per_task: bool, device: str) -> list[Tensor]:
    z = torch.randn(tasks, case.images, case.width, *case.size) * 2 + 3
    gamma, beta = (torch.randn(tasks if per_task else 1, case.width) for _ in range(2))
    return [t.to(device=device, dtype=dtype) for t in (z, gamma, beta)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=[case.name for case in BLOCKS])
def test_norm_relu_pool(runner: Runner, number: int, dtype: torch.dtype) -> None:
    case = BLOCKS[number]
    tasks, per_task = [(1, False), (T, False), (T, True)][(number + DTYPES.index(dtype)) % 3]
    z, gamma, beta = operands_of_a_norm(case, dtype, tasks, per_task, runner.device)
    truth = REFERENCE.norm_relu_pool(*double(z, gamma, beta), 1e-5, case.pool)
    stock = REFERENCE.norm_relu_pool(z, gamma, beta, 1e-5, case.pool)
    how = (len(case.name) + tasks) % 3
    got = runner.backend.norm_relu_pool(like_memory_of_others(z, how), gamma, beta, 1e-5, case.pool)
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
    exact = REFERENCE.norm_relu_pool_grad(*double(gy, z, gamma), *truth[1:], case.pool, True)
    beside = REFERENCE.norm_relu_pool_grad(gy, z, gamma, *saved, case.pool, True)
    for need_z in (True, False):
        gradients = runner.backend.norm_relu_pool_grad(
            like_memory_of_others(gy, (how + 1) % 3), like_memory_of_others(z, how), gamma, *saved, case.pool, need_z
        )
        assert gradients[1].dtype == gradients[2].dtype == gamma.dtype
        names = "dz dgamma dbeta" if need_z else "dgamma dbeta"
        first = 0 if need_z else 1
        assert need_z or gradients[0] is None
        check(names, gradients[first:], beside[first:], exact[first:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_half_precision_beside_wide_parameters(runner: Runner, dtype: torch.dtype) -> None:
    z, gamma, beta = operands_of_a_norm(BLOCKS[0], torch.float32, T, True, runner.device)
    z, beta = z.to(dtype), beta.to(dtype)
    y, index, mean, rstd = runner.backend.norm_relu_pool(z, gamma, beta, 1e-5, 2)
    want = REFERENCE.norm_relu_pool(z, gamma, beta, 1e-5, 2)
    check("y mean rstd", (y, mean, rstd), (want[0], *want[2:]), double(*(want[i] for i in (0, 2, 3))))
    got = runner.backend.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, 2, True)
    beside = REFERENCE.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, 2, True)
    assert [t.dtype for t in got if t is not None] == [dtype, torch.float32, torch.float32]
    check("dz dgamma dbeta", got, beside, double(*beside))


def test_tasks_that_share_their_convolution(runner: Runner) -> None:
    z, gamma, beta = operands_of_a_norm(BLOCKS[0], torch.float64, T, True, runner.device)
    one = channels_last(z[:1])
    got = runner.backend.norm_relu_pool(one.expand(z.shape), gamma, beta, 1e-5, 2)
    want = REFERENCE.norm_relu_pool(one.expand(z.shape), gamma, beta, 1e-5, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gy = torch.randn_like(want[0])
    got, want = (b.norm_relu_pool_grad(gy, one.expand(z.shape), gamma, *want[1:], 2, True) for b in (runner[0], REFERENCE))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 64])
def test_statistics_far_from_zero(runner: Runner, width: int) -> None:
    z = 1000 + torch.randn(1, 25, width, 21, 21, device=runner.device)
    vectors = (torch.ones(1, width, device=runner.device), torch.zeros(1, width, device=runner.device))
    got, stock = (b.norm_relu_pool(z, *vectors, 1e-5, 2) for b in (runner.backend, REFERENCE))
    truth = REFERENCE.norm_relu_pool(*double(z, *vectors), 1e-5, 2)
    check("y mean rstd", *(tuple(r[i] for i in (0, 2, 3)) for r in (got, stock, truth)))
    flat = torch.full_like(z, 1100.1)
    y = runner.backend.norm_relu_pool(flat, vectors[0], vectors[0], 1e-5, 2)[0]
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("width", [3, 4])
def test_what_is_not_finite_and_ties(runner: Runner, pool: int, width: int) -> None:
    z = torch.randint(-1, 2, (2, 2, width, 4, 5), device=runner.device).float()
    gamma, beta = torch.randn(2, width, device=runner.device), torch.zeros(1, width, device=runner.device)
    gamma[0, 0] = 0
    z[1, 1, 2, 1, 3] = float("nan")
    got, want = (b.norm_relu_pool(z, gamma, beta, 1e-5, pool) for b in (runner.backend, REFERENCE))
    assert torch.equal(got[1], want[1]) and bool(got[0][1, :, 2].isnan().all()) and not got[0][0].isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True)


class ImageCase(NamedTuple):
    name: str
    images: int
    inputs: int
    width: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pool: int = 2

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec(self.stride, self.padding, self.dilation, 1)


IMAGES = (
    ImageCase("rgb-48", 3, 3, 48, (13, 15)),
    ImageCase("rgb-100", 2, 3, 100, (9, 12)),
    ImageCase("gray-5", 5, 1, 5, (14, 11)),
    ImageCase("width-1", 4, 3, 1, (7, 7), padding=(0, 0)),
    ImageCase("5x5", 3, 1, 48, (11, 12), kernel=(5, 5), padding=(2, 1)),
    ImageCase("dilation", 2, 3, 5, (13, 12), dilation=(2, 2)),
    ImageCase("stride", 3, 1, 8, (15, 16), stride=(2, 1)),
    ImageCase("no-pool", 2, 3, 48, (6, 7), pool=1),
    ImageCase("no-pool-stride", 3, 3, 5, (9, 9), stride=(2, 2), padding=(0, 0), pool=1),
    ImageCase("one-pixel", 7, 3, 6, (1, 1), kernel=(1, 1), padding=(0, 0), pool=1),
    ImageCase("32-taps", 2, 2, 12, (9, 8), kernel=(4, 4)),
)


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
    assert backend.image_refusals(x, weight, spec, pool) == []
    xd, wd, gd, bd = double(x, weight, gamma, beta)
    moments = backend.image_moments(x if own else like_memory_of_others(x, 2), case.kernel, spec)
    exact_moments = REFERENCE.image_moments(xd, case.kernel, spec)
    torch.testing.assert_close(moments.cpu(), exact_moments, rtol=1e-12, atol=1e-9)
    assert torch.equal(moments, moments.mT)

    got = backend.image_block(x, weight, gamma, beta, moments, spec, 1e-5, pool)
    stock = REFERENCE.image_block(x, weight, gamma, beta, moments, spec, 1e-5, pool)
    truth = REFERENCE.image_block(xd, wd, gd, bd, exact_moments, spec, 1e-5, pool)
    taps = weight[0, 0].numel()
    assert [t.dtype for t in got] == [t.dtype for t in stock] and [t.shape for t in got] == [t.shape for t in truth]
    check("y mean rstd", *(tuple(r[i] for i in (0, 2, 3)) for r in (got, stock, truth)), taps)
    z = REFERENCE.conv2d(xd, wd, None, spec)
    tasks = truth[0].shape[0]
    a = (z - truth[2][:, None, :, None, None]) * (gd * truth[3])[:, None, :, None, None] + bd[:, None, :, None, None]
    sure = sure_windows(a.expand(tasks, *a.shape[1:]), pool, 1e-10 if dtype == torch.float64 else 1e-4)
    assert sure.double().mean() > 0.9 and torch.equal(got[1].cpu()[sure], truth[1][sure])
    assert bool((got[1] <= pool**2).all())

    gy = torch.randn(truth[0].shape).to(device=runner.device, dtype=dtype)
    saved = (truth[1].to(runner.device), stock[2], stock[3])
    gradients = backend.image_block_grad(gy, x, weight, gamma, *saved, moments, spec, pool)
    exact = REFERENCE.image_block_grad(gy.cpu().double(), xd, wd, gd, *truth[1:], exact_moments, spec, pool)
    z = REFERENCE.conv2d(x, weight, None, spec).expand(tasks, case.images, case.width, *a.shape[-2:])
    dz, dgamma, dbeta = REFERENCE.norm_relu_pool_grad(gy, z, gamma, *saved, pool, True)
    assert dz is not None
    dw = REFERENCE.conv2d_weight_grad(dz, x, torch.Size((tasks, *weight.shape[1:])), spec)
    check("dw dgamma dbeta", gradients, (dw, dgamma, dbeta), exact, dz[0, :, 0].numel())


def test_images_far_from_zero(runner: Runner) -> None:
    spec = ConvSpec((1, 1), (0, 0), (1, 1), 1)
    x, weight = 1000 + torch.randn(1, 9, 1, 20, 21), torch.rand(1, 5, 1, 3, 3)
    ones = torch.ones(1, 5)
    operands = [t.to(runner.device) for t in (x, weight, ones, ones)]
    got = runner.backend.image_block(*operands, runner.backend.image_moments(operands[0], (3, 3), spec), spec, 1e-5, 2)
    truth = REFERENCE.image_block(*double(*operands), REFERENCE.image_moments(x.double(), (3, 3), spec), spec, 1e-5, 2)
    torch.testing.assert_close(got[0].cpu().double(), truth[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1, 2), (T, 5, 5), (2, 30, 33), (1, 3, 100)], ids=str)
def test_cross_entropy_grad(runner: Runner, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(shape)).to(device=runner.device, dtype=dtype)
    labels = torch.randint(shape[2], shape[:2], device=runner.device)
    results = [b.cross_entropy_grad(logits, labels) for b in (runner.backend, REFERENCE)]
    check("loss gradient", *results, REFERENCE.cross_entropy_grad(*double(logits, labels)))
    shared = logits[:1].expand(shape)
    for operands in ((shared, labels), (logits, labels[:1])):
        got = runner.backend.cross_entropy_grad(*operands)
        torch.testing.assert_close(got, REFERENCE.cross_entropy_grad(*operands))


def test_cross_entropy_of_what_is_no_label_or_not_finite(runner: Runner) -> None:
    logits, labels = torch.randn(4, 3, 5, device=runner.device), torch.zeros(4, 3, dtype=torch.int64, device=runner.device)
    labels[0, 1], labels[1, 2], logits[2, 0, 3], logits[3, 0, 3] = 5, -1, float("nan"), -float("inf")
    got, want = (b.cross_entropy_grad(logits, labels) for b in (runner.backend, REFERENCE))
    assert got[0].isnan().tolist() == [True, True, True, False]
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sgd(runner: Runner, dtype: torch.dtype) -> None:
    shapes = [(T, 5), (1,), (4096,), (4097,), (3, 64, 3, 3, 8), (7, 1000)] + [(i,) for i in range(1, 110)]
    parameters = [torch.randn(s, device=runner.device).to(dtype) for s in shapes]
    gradients = [torch.randn(s, device=runner.device).to(dtype) for s in shapes]
    larger = torch.randn(70, device=runner.device).to(dtype)
    parameters += [larger[1:67], torch.randn(8, 6, device=runner.device).to(dtype).t(), larger[::2][34:]]
    gradients += [torch.randn(p.shape, device=runner.device).to(dtype) for p in parameters[-3:]]
    outside = larger[[0, 67, 69]].clone()
    before, slopes = double(*parameters), double(*gradients)
    truth = [p - 0.37 * g for p, g in zip(before, slopes)]
    stock = [p.to(dtype) for p in before]
    torch._foreach_add_(stock, [g.to(dtype) for g in slopes], alpha=-0.37)
    runner.backend.sgd_(parameters, gradients, 0.37)
    for i, (got, beside, exact) in enumerate(zip(parameters, stock, truth)):
        assert_as_exact(str(i), got.cpu(), beside, exact)
    assert torch.equal(larger[[0, 67, 69]], outside)
    runner.backend.sgd_([], [], 1.0)


@pytest.mark.parametrize("updated", [[True] * 8, [False] * 3 + [True] * 5, [True] * 3 + [False] * 5], ids=["all", "top", "first"])
@pytest.mark.parametrize("inputs", [3, 4])
def test_an_inner_loop_is_the_references(runner: Runner, updated: list[bool], inputs: int) -> None:
    def descended(backend: Reference, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)

        def made(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x, labels = made(T, 5, inputs, 9, 10), torch.randint(5, (T, 5), generator=generator)
        shapes = [(8, inputs, 3, 3), (8,), (8,), (6, 8, 3, 3), (6,), (6,), (5, 24), (5,)]
        first = [made(1, *s) * 0.3 + (len(s) == 1) for s in shapes]
        own = [p.expand(T, *p.shape[1:]).clone() if u else p for p, u in zip(first, updated)]
        x, labels, *own = (t.to(device) for t in (x, labels, *own))
        blocks = [BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, 2)] * 2
        losses = backend.inner_loop(x, labels, own, updated, blocks, 3, 0.01)
        return [t.cpu() for t in (losses, *own)]

    got, want = descended(runner.backend, runner.device), descended(REFERENCE, "cpu")
    assert (want[0][-1] < want[0][0]).all()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
