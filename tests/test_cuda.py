"""The CUDA kernels: on the CPU through the emulator of tests/cuda_emulator, on a real device, and their build."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rates
import setuptools
import torch
from cases import BLOCKS, EXACT, IMAGES, STEPS, BlockCase, assert_as_exact, norm_block
from cuda_emulator import build
from torch import Tensor

from lambda_kernels.backends import cuda
from lambda_kernels.backends.base import Call
from lambda_kernels.backends.cuda import Cuda, Library
from lambda_kernels.backends.reference import Reference, windows
from lambda_kernels.spec import BlockSpec, ConvSpec

ROOT = Path(__file__).resolve().parents[1]

REFERENCE: Any = Reference()
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RUNNERS = ("emulated", pytest.param("device", marks=pytest.mark.gpu))
T = 3


class Runner(NamedTuple):
    """A backend under test, and the device on which its tensors lie."""

    backend: Any  # Cuda
    device: str


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


def double(*tensors: Tensor) -> Any:
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


def check(names: str, got: Any, stock: Any, truth: Any, *, terms: int = 1) -> None:
    for name, mine, theirs, exact in zip(names.split(), got, stock, truth, strict=True):
        if mine.dtype == torch.float64:  # the truth has roundings too
            scale = max(1.0, exact.abs().max().item())
            # sums in another order: roundings grow with the root of their number
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
    gamma, beta = torch.randn(2, width, device=runner.device), torch.zeros(1, width, device=runner.device)
    gamma[0, 0] = 0
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
@pytest.mark.parametrize("shape", [(1, 1, 2), (T, 5, 5), (2, 30, 33), (1, 3, 100)], ids=str)
def test_cross_entropy_grad(runner: Runner, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(shape)).to(device=runner.device, dtype=dtype)
    labels = torch.randint(shape[2], shape[:2], device=runner.device)
    got, stock = (b.cross_entropy_grad(logits, labels) for b in (runner.backend, REFERENCE))
    check("loss gradient", got, stock, REFERENCE.cross_entropy_grad(*double(logits, labels)))
    shared = logits[:1].expand(shape)
    for operands in ((shared, labels), (logits, labels[:1])):
        got = runner.backend.cross_entropy_grad(*operands)
        torch.testing.assert_close(got, REFERENCE.cross_entropy_grad(*operands))


def test_cross_entropy_of_what_is_no_label_or_not_finite(runner: Runner) -> None:
    logits, labels = torch.randn(4, 3, 5, device=runner.device), torch.zeros(4, 3, device=runner.device).long()
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
    runner.backend.sgd_(parameters, gradients, [0.37])
    for i, (got, beside, exact) in enumerate(zip(parameters, stock, truth)):
        assert_as_exact(str(i), got.cpu(), beside, exact)
    assert torch.equal(larger[[0, 67, 69]], outside)
    runner.backend.sgd_([], [], [1.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sgd_takes_a_rate_per_parameter(runner: Runner, dtype: torch.dtype) -> None:
    rates.check_sgd(runner.backend, runner.device, dtype)


def test_rates_are_those_of_a_plain_loop(runner: Runner) -> None:
    rates.check(runner.backend, runner.device)


@pytest.mark.parametrize("bits", ["11111111", "00011111", "11100000"])
@pytest.mark.parametrize("inputs", [3, 4])
def test_an_inner_loop_is_the_references(runner: Runner, bits: str, inputs: int) -> None:
    updated = [bit == "1" for bit in bits]

    def descended(backend: Reference, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)

        def made(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x, labels = made(T, 5, inputs, 9, 10), torch.randint(5, (T, 5), generator=generator)
        shapes = [(8, inputs, 3, 3), (8,), (8,), (6, 8, 3, 3), (6,), (6,), (5, 24), (5,)]
        first = [made(1, *s) * 0.3 + (len(s) == 1) for s in shapes]
        own = [p.expand(T, *p.shape[1:]).clone() if u else p for p, u in zip(first, updated)]
        x, labels, *own = (t.to(device) for t in (x, labels, *own))
        found = backend.inner_loop(x, labels, own, updated, [norm_block(2)] * 2, 3, [0.01])
        return [t.cpu() for t in (found.rows, *found.updated)]

    got, want = descended(runner.backend, runner.device), descended(REFERENCE, "cpu")
    assert (want[0][-1] < want[0][0]).all()
    torch.testing.assert_close(got, want, **STEPS)


def test_every_task_sums_alike(runner: Runner) -> None:
    x = torch.randn(1, 4, 3, 20, 20, device=runner.device)
    weight, gamma = torch.randn(1, 16, 3, 3, 3, device=runner.device), torch.randn(1, 16, device=runner.device)
    spec = ConvSpec((1, 1), (1, 1), (1, 1), 1)
    backend = runner.backend

    def results() -> list[Tensor]:
        moments = backend.image_moments(x, (3, 3), spec)
        block = backend.image_block(x, weight, gamma, gamma, moments, BlockSpec(spec, 1e-5, 2))
        z = backend.conv2d(x, weight, None, spec)
        norm = backend.norm_relu_pool(z, gamma, gamma, norm_block(2))
        gradients = backend.norm_relu_pool_grad(norm[0], z, gamma, *norm[1:], norm_block(2), True)
        more = backend.image_block_grad(block[0], x, weight, gamma, *block[1:], moments, BlockSpec(spec, 1e-5, 2))
        return [moments, *block, *norm, *(g for g in gradients if g is not None), *more]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


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


@pytest.mark.gpu
def test_compiled_on_a_device() -> None:
    backend: Any = Cuda()
    z, gamma, beta = operands_of_a_norm(BLOCKS[0], torch.float32, 1, False, "cuda")

    def both(z: Tensor, gamma: Tensor, beta: Tensor) -> Any:
        y, *saved = backend.norm_relu_pool(z, gamma, beta, norm_block(2))
        return y, backend.norm_relu_pool_grad(y, z, gamma, *saved, norm_block(2), True)

    torch.testing.assert_close(torch.compile(both, fullgraph=True)(z, gamma, beta), both(z, gamma, beta))


@pytest.mark.gpu
def test_a_graph_holds_an_inner_step() -> None:
    backend = Cuda()
    x, labels = torch.randn(T, 5, 3, 12, 12, device="cuda"), torch.randint(5, (T, 5), device="cuda")
    shapes = [(8, 3, 3, 3), (8,), (8,), (5, 8 * 36), (5,)]
    first = [0.3 * torch.randn(T, *s, device="cuda") for s in shapes]
    blocks = [BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, 2)]
    want = backend.inner_loop(x, labels, first, [True] * 5, blocks, 2, [0.1])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backend.inner_loop(x, labels, first, [True] * 5, blocks, 2, [0.1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backend.inner_loop(x, labels, first, [True] * 5, blocks, 2, [0.1])
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close((got.rows, *got.updated), (want.rows, *want.updated))


# The emulator itself: what it must not let pass.

BROKEN = """
#include "common.cuh"
namespace {
__global__ void barrier(int*) { if (threadIdx.x < 40) __syncthreads(); else __shfl_sync(0xffffffffu, 1, 0); }
__global__ void exchange(int*) { if (threadIdx.x != 3) __shfl_xor_sync(0xffffffffu, 1, 1); }
__global__ void shared(float* out) {
  __shared__ float values[2];
  if (threadIdx.x == 0) values[0] = 1;
  __syncthreads();
  if (threadIdx.x < 2) out[threadIdx.x] = values[threadIdx.x];
}
}
LK_EXPORT int run(int which, float* out) {
  int* none = nullptr;
  if (which == 0) return lk::launch(barrier, 3, dim3(64), nullptr, none);
  if (which == 1) return lk::launch(exchange, 1, dim3(32), nullptr, none);
  return lk::launch(shared, 1, dim3(8, 8), nullptr, out);
}
LK_EXPORT const char* words() { return cudaGetErrorString(cudaErrorLaunchFailure); }
"""


def test_the_emulator_finds_deadlocks_and_unwritten_shared_memory(tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text(BROKEN)
    made = tmp_path / "broken.so"
    command = ["g++", *build.FLAGS, f"-I{build.HERE}", f"-I{build.SOURCES}", "-shared", "-x", "c++"]
    subprocess.run([*command, str(tmp_path / "broken.cu"), "-o", str(made)], check=True)
    code = ctypes.CDLL(str(made))
    code.words.restype = ctypes.c_char_p
    out = (ctypes.c_float * 2)()
    assert code.run(0, out) == 719
    assert code.words().startswith(b"deadlock in block 0 of 3: 40 threads wait at a barrier, 24 at a warp exchange")
    assert code.run(1, out) == 719 and b"31 at a warp exchange, 1 have ended" in code.words()
    assert code.run(2, out) == 0 and out[0] == 1 and out[1] != out[1]


@pytest.mark.slow
def test_no_kernel_leaves_its_buffers(tmp_path: Path) -> None:
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")
    objects = build.compile_all(tmp_path, *checks)
    driver = tmp_path / "driver"
    flags = [*build.FLAGS, *checks, f"-I{build.HERE}"]
    subprocess.run(["g++", *flags, *map(str, [build.HERE / "driver.cpp", *objects]), "-o", str(driver)], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run([driver], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr


# The build by nvcc.


@pytest.fixture(scope="module")
def setup_py() -> Iterator[dict[str, Any]]:
    """The names of setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.chdir(ROOT)
        yield runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("wish", "names"),
    [
        ("", ["8.0", "9.0", "10.0+PTX"]),
        ("8.0;9.0a;10.0+PTX", ["8.0", "9.0a", "10.0+PTX"]),
        (" 7.5 8.6+PTX  8.6+PTX;", ["7.5", "8.6+PTX"]),
    ],
)
def test_architectures(setup_py: Any, monkeypatch: pytest.MonkeyPatch, wish: str, names: list[str]) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup_py["architectures"]() == names


def test_flags_of_architectures(setup_py: Any) -> None:
    assert setup_py["generated_code"](["9.0a", "10.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_wrong_wishes(setup_py: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(SystemExit, match="names 'Hopper': write compute capabilities, such as TORCH_CUDA_ARCH_LIST="):
        setup_py["architectures"]()
    monkeypatch.setenv("LAMBDA_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        setup_py["wanted_nvcc"](torch)
    monkeypatch.setenv("LAMBDA_KERNELS_CUDA", "1")
    monkeypatch.setitem(setup_py["wanted_nvcc"].__globals__, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="no nvcc was found: install the CUDA toolkit and set CUDA_HOME"):
        setup_py["wanted_nvcc"](torch)
    monkeypatch.setitem(setup_py["wanted_nvcc"].__globals__, "find_nvcc", lambda: "nvcc")
    assert setup_py["wanted_nvcc"](torch) == "nvcc"
    monkeypatch.setenv("LAMBDA_KERNELS_CUDA", "0")
    assert setup_py["wanted_nvcc"](torch) is None
    monkeypatch.delenv("LAMBDA_KERNELS_CUDA")
    assert setup_py["wanted_nvcc"](torch) == ("nvcc" if torch.version.cuda else None)


def test_nvcc_is_found_by_cuda_home(setup_py: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.1, V99.1.2'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py["find_nvcc"]() == str(nvcc) and setup_py["nvcc_version"](str(nvcc)) == "99.1, V99.1.2"


class Built(NamedTuple):
    library: Path
    report: str  # of ptxas, with demangled names
    runs: Path  # a file for each run of nvcc
    again: Any  # builds once more


@pytest.fixture(scope="module")
def built(setup_py: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The library for an A100, an H200 and a B200, with ptxas's report."""
    nvcc = setup_py["find_nvcc"]()
    if nvcc is None or shutil.which("c++filt") is None:
        pytest.skip("needs nvcc of the CUDA toolkit, and c++filt: not found")
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "runs").mkdir()
    reporting = folder / "nvcc"
    log = f'"{folder}/runs/$$"'
    reporting.write_text(f'#!/bin/sh\n"{nvcc}" -Xptxas=-v "$@" 2>{log} || {{ cat {log} >&2; exit 1; }}\n')
    reporting.chmod(0o755)

    def again() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MAX_JOBS", "2")
            names = ["8.0", "9.0a", "10.0"]
            setup_py["build_cuda"](str(reporting), names, "g++", folder / "objects", folder / "lib" / "_cuda.so")

    again()
    text = "".join(p.read_text() for p in sorted((folder / "runs").iterdir()))
    report = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    return Built(folder / "lib" / "_cuda.so", report, folder / "runs", again)


# The most that any instance of a kernel may take, on any of the three architectures: registers per thread, bytes of
# shared memory a block. 128 registers are two blocks of 256 threads on a multiprocessor.
BOUNDS = {
    "moments": (128, 36864),
    "merge_moments": (96, 8192),
    "apply": (128, 0),
    "reduce": (128, 36864),
    "merge_reduce": (64, 4096),
    "dense": (128, 0),
    "image_moments": (64, 28672),
    "merge_image_moments": (48, 0),
    "image_statistics": (64, 0),
    "image_apply": (144, 36864),
    "image_reduce": (192, 24576),
    "merge_image_reduce": (64, 4096),
    "cross_entropy": (96, 1024),
    "sgd": (64, 0),
}
ENTRY = re.compile(
    r"Compiling entry function '(?:void )?(?:lk::)?\(anonymous namespace\)::(?P<kernel>\w+)(?P<types><.*?>)?\(.*' "
    r"for '(?P<sm>\w+)'\n.*\n"
    r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?"
)


@pytest.mark.slow
def test_resources(built: Built) -> None:
    seen: dict[str, set[str]] = {}
    for found in ENTRY.finditer(built.report):
        what = f"{found['kernel']}{found['types'] or ''} for {found['sm']}"
        assert found["stack"] == found["stores"] == found["loads"] == "0", f"{what} uses local memory"
        registers, shared = BOUNDS[found["kernel"]]
        assert int(found["registers"]) <= registers, f"{what} uses {found['registers']} registers"
        assert int(found["shared"] or 0) <= shared, f"{what} uses {found['shared']} bytes of shared memory"
        seen.setdefault(found["kernel"], set()).add(found["sm"])
    assert seen == {kernel: {"sm_80", "sm_90a", "sm_100"} for kernel in BOUNDS}
    assert built.report.count("Compiling entry function") == len(ENTRY.findall(built.report))


@pytest.mark.slow
def test_what_did_not_change_is_not_compiled_again(built: Built) -> None:
    def compiled() -> int:
        return sum("Compiling" in path.read_text() for path in built.runs.iterdir())

    before = compiled()
    built.library.unlink()
    built.again()
    assert built.library.exists() and compiled() == before == len(list((ROOT / "csrc" / "cuda").glob("*.cu"))) - 1


@pytest.mark.slow
def test_the_built_library_loads_and_names_cudas_errors(built: Built) -> None:
    library = Library(built.library)
    assert library.architectures == "8.0 9.0a 10.0"
    needed = subprocess.run(["ldd", built.library], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed and "torch" not in needed and "python" not in needed
    if torch.cuda.is_available():
        return
    backend = Cuda(built.library, "cpu")
    words = r"lk_norm_relu_pool failed with CUDA error \d+ \(.+\) for z \[1, 2, 3, 4, 5\]"
    with pytest.raises(RuntimeError, match=words):
        backend.norm_relu_pool(torch.randn(1, 2, 3, 4, 5), torch.ones(1, 3), torch.ones(1, 3), norm_block(2))
    (why,) = Cuda(built.library).reasons()
    assert "torch.cuda.is_available() is False" in why


def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulated_library: Path) -> None:
    (why,) = Cuda(tmp_path / "_cuda.so").reasons()
    assert why.startswith("the CUDA kernels are not built (there is no _cuda.so)") and "LAMBDA_KERNELS_CUDA=1" in why
    (tmp_path / "_cuda.so").write_text("no library")
    (why,) = Cuda(tmp_path / "_cuda.so").reasons()
    assert "_cuda.so is of no use" in why and "build lambda-kernels again" in why
    assert Cuda(emulated_library, "cpu").reasons() == []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    monkeypatch.setattr(Library, "architectures", property(lambda _: "8.0 9.0", lambda *_: None), raising=False)
    (why,) = Cuda(emulated_library).reasons()
    assert why == (
        "emulated.so is built for 8.0 9.0: cuda:0 (T4) has compute capability 7.5, build lambda-kernels again with "
        "TORCH_CUDA_ARCH_LIST=7.5"
    )
    (why,) = Cuda(emulated_library).refusals(Call("conv_block", torch.device("cuda:0"), torch.float32, pool=2))
    assert "capability 7.5" in why

    class Other(ctypes.Structure):
        _fields_ = [("one", ctypes.c_int64)]

    monkeypatch.setitem(cuda.STRUCTURES, "sgd", Other)
    (why,) = Cuda(emulated_library, "cpu").reasons()
    assert re.search(r"Other has \d+ bytes there, 8 here\): build lambda-kernels again", why)


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("8.0 9.0", (9, 0), True),
        ("8.0 9.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0 9.0", (10, 0), False),
        ("8.0 9.0+PTX", (10, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("", (9, 0), False),
    ],
)
def test_what_code_covers_which_device(architectures: str, capability: tuple[int, int], covered: bool) -> None:
    assert cuda.covers(architectures, capability) is covered


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
    subprocess.run([sys.executable, "-c", program], check=True)
