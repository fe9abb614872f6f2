"""Operands of the operations, and the checks that several backends share."""

from __future__ import annotations

from typing import Any

import torch
from cases import EXACT, BlockCase, assert_as_exact, decided, stock_block
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels.agreement import DRAWS

# Called with operands out of lists and tables.
conv2d: Any = lk.functional.conv2d
linear: Any = lk.functional.linear
conv_block: Any = lk.functional.conv_block


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


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


def check_block_rounding(exact: dict[str, Tensor], case: BlockCase, margin: float = 1e-4) -> None:
    """`margin`: no gradient flows through windows and signs that so little of a normalised value decides."""
    mine, plain = ({k: v.float().requires_grad_() for k, v in exact.items()} for _ in range(2))
    exact = {k: v.detach().float().double().requires_grad_() for k, v in exact.items()}
    called = as_called(case)
    results = [conv_block(**mine, **geometry(case)), *(stock_block(*t.values(), 1e-5, called) for t in (plain, exact))]
    assert_as_exact("y", *results)
    with torch.no_grad():
        sure = decided(exact["x"], exact["weight"], exact["gamma"], exact["beta"], called, margin)
        # In one order, whatever the memory layout of the result.
        gy = torch.randn_like(results[0], memory_format=torch.channels_last) * sure
    grads = [torch.autograd.grad(y, list(t.values()), gy.to(y.dtype)) for y, t in zip(results, (mine, plain, exact))]
    for name, *three in zip(exact, *grads):
        got, stock, truth = three
        assert_as_exact(name, got, stock, truth, terms=9 * case.width if name == "x" else 1)


def check_block_far_from_zero(case: BlockCase) -> None:
    """Raw pixels, of mean 1000: the mean is many times the deviation, where one-pass sums cancel.

    Sums of 7,000 are rounded to a thousandth, which is 5e-4 of their deviation. Of one channel, luck makes stock's
    error a tenth: a wrong kernel is wrong in all draws.
    """
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        operands = block_operands(case)
        operands["x"] = operands["x"] + 1000.0
        operands["weight"] = operands["weight"].abs()
        try:
            return check_block_rounding(operands, case, margin=1e-2)
        except AssertionError:
            if draw == DRAWS - 1:
                raise


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


def check_one_graph() -> None:
    """torch.compile of all three operations gives one graph, with their results and gradients."""
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
