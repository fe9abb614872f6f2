"""conv2d, linear and conv_block: forward, backward and double backward of each backend and of stock PyTorch.

Operands are those of conv4's layers on 5 or 25 support images; images themselves (1 or 3 channels) need no gradient.
Nothing is timed before its result was compared with stock PyTorch's in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels import backends, info
from lambda_kernels.agreement import distance

Op = Callable[..., Tensor]


class Case(NamedTuple):
    """x [N, C, H, W] or [N, in]; with tasks, every operand has a leading axis of that many."""

    x: tuple[int, ...]
    out: int
    tasks: int = 0

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.x))}-{self.out}{f'-{self.tasks}tasks' if self.tasks else ''}"


def stock_block(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    z = F.conv2d(x, weight, bias, padding=1)
    return F.max_pool2d(F.relu(F.batch_norm(z, None, None, gamma, beta, training=True)), 2)


# The gate's own failure, not that nothing was timed after it, is what is to be reported.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")

OURS: dict[str, Op] = {
    "conv2d": lambda x, weight, bias: lk.functional.conv2d(x, weight, bias, padding=1),
    "linear": lk.functional.linear,
    "conv_block": lk.functional.conv_block,
}
STOCK: dict[str, Op] = {
    "conv2d": lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1),
    "linear": F.linear,
    "conv_block": stock_block,
}
CASES = {
    "conv2d": [Case((5, 1, 28, 28), 64), Case((25, 32, 16, 16), 32), Case((5, 1, 28, 28), 64, tasks=4)],
    "linear": [Case((25, 800), 5), Case((25, 128), 5, tasks=4)],
    "conv_block": [
        Case((5, 1, 28, 28), 64),
        Case((5, 64, 14, 14), 64),
        Case((25, 3, 32, 32), 32),
        Case((5, 3, 84, 84), 32),
        Case((5, 1, 28, 28), 64, tasks=4),
    ],
}


def operands(op: str, case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, weight, bias and for a block gamma, beta; drawn in float64, so that dtypes differ by rounding alone."""
    generator = torch.Generator().manual_seed(0)
    lead = (case.tasks,) if case.tasks else ()
    kernel = () if op == "linear" else (3, 3)
    affine = [(case.out,)] * (3 if op == "conv_block" else 1)
    shapes = [case.x, (case.out, case.x[1], *kernel), *affine]
    drawn = [torch.randn(*lead, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    wants_x = op == "linear" or case.x[1] > 3
    drawn[1] /= math.prod(shapes[1][1:]) ** 0.5  # outputs of variance 1
    return [t.to(device, dtype).requires_grad_(i > 0 or wants_x) for i, t in enumerate(drawn)]


def like(tensors: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """Random tensors of these shapes, the same for every backend."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]


def forward(op: Op, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (op(*inputs),)

    return run


def backward(op: Op, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """All first gradients; the forward pass is not in it."""
    y = op(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    gy = like((y,), 1)
    return lambda: torch.autograd.grad(y, wanted, gy, retain_graph=True)


def double_backward(op: Op, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients of the first gradients, with respect to the operands and to the gradient that came in."""
    y = op(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    gy = [t.requires_grad_() for t in like((y,), 1)]
    first = torch.autograd.grad(y, wanted, gy, create_graph=True)
    reached = [(g, v) for g, v in zip(first, like(first, 2)) if g.requires_grad]  # a block's bias: a constant zero
    grads, v = [g for g, _ in reached], [v for _, v in reached]
    return lambda: torch.autograd.grad(grads, [*wanted, *gy], v, retain_graph=True, materialize_grads=True)


PASSES = {"forward": forward, "backward": backward, "double_backward": double_backward}


def within(backend: str) -> AbstractContextManager[None]:
    return nullcontext() if backend == "torch" else lk.use_backend(backend)


@pytest.mark.benchmark(disable_gc=True, max_time=0.5)  # seconds; there are ninety of them
@pytest.mark.parametrize("backend", ["torch", *backends.names()])
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(("op", "case"), [(op, c) for op, cases in CASES.items() for c in cases], ids=str)
def test_op(
    benchmark: BenchmarkFixture, op: str, case: Case, direction: str, backend: str, where: torch.device,
    synchronize: Callable[[], None],
) -> None:  # fmt: skip
    """float32."""
    stock = torch.func.vmap(STOCK[op]) if case.tasks else STOCK[op]
    ours = stock if backend == "torch" else OURS[op]
    make = PASSES[direction]
    try:
        with within(backend):
            runs = {dtype: make(ours, operands(op, case, dtype, where)) for dtype in (torch.float64, torch.float32)}
    except lk.BackendError as error:
        pytest.skip(str(error))
    truth = make(stock, operands(op, case, torch.float64, where))()
    length = distance(truth, [torch.zeros_like(t) for t in truth])
    with within(backend):
        for dtype, run in runs.items():
            plain = truth if dtype == torch.float64 else make(stock, operands(op, case, dtype, where))()
            compare(f"{op} {direction} on {backend} in {dtype}", run(), plain, truth, length)
        benchmark.group = f"{op} {direction} {case}"
        benchmark.extra_info.update({
            "kind": "op", "op": op, "pass": direction, "backend": backend, "x": list(case.x), "out": case.out,
            "tasks": case.tasks, "dtype": "float32", "device": str(where), "environment": info.environment(where),
        })  # fmt: skip

        def timed() -> None:
            runs[torch.float32]()
            synchronize()

        benchmark(timed)
