"""The CUDA kernels of an inner step: loss, updates, K steps; what they refuse; graphs and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BLOCKS, STEPS, assert_as_exact, name_of, norm_block
from cuda_checks import DTYPES, REFERENCE, Runner, T, check, double, operands_of_a_norm
from torch import Tensor

from lambda_kernels import cuda_graph
from lambda_kernels.backends.cuda import Cuda
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec

pytestmark = pytest.mark.usefixtures("poisoned_memory", "float32_has_its_digits")


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


def test_dependent_launches(runner: Runner) -> None:
    """Every kernel waits for the one before it, where the emulator says that it has to; the results are the same."""
    x = torch.randn(2, 4, 3, 10, 9, device=runner.device)
    shapes = [(8, 3, 3, 3), (8,), (8,), (6, 8, 3, 3), (6,), (6,), (5, 24), (5,)]
    first = [0.3 * torch.randn(shape, device=runner.device) for shape in shapes]
    labels = torch.randint(5, (2, 4), device=runner.device)

    def results() -> list[Tensor]:
        found = [runner.backend.inner_loop(x, labels, first, [i >= at for i in range(8)], [norm_block(2)] * 2, 2, [0.1])
                 for at in (0, 3, 6)]  # fmt: skip
        return [t for f in found for t in (f.rows, *f.updated)]

    want, usual = results(), cuda_graph.conditions()
    with runner.backend.dependent_launches():
        got = results()
        assert cuda_graph.conditions() != usual  # a recording without them is not replayed
    assert all(map(torch.equal, got, want)) and cuda_graph.conditions() == usual


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
