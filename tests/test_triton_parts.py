"""Products of float32 in parts that a tensor core takes are as exact as float32, in a model of the core on the CPU.

The model is a pessimist's: products are exact, but all that one instruction adds, its accumulator too, is cut off below
the 24th bit of the largest addend, and so is the sum. The parts, the order of the products and the sum outside of the
core are triton's own: tests/test_triton_aot.py looks for that sum.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lambda_kernels.agreement import Errors, element_errors

DEPTH = {"tf32": 8, "bf16": 16}  # terms of one instruction
SIZE = 8  # rows and columns


def cut(x: Tensor, bits: int) -> Tensor:
    """x without what lies below its `bits` leading bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).trunc() / 2**bits, exponent)


def rounded(x: Tensor, bits: int) -> Tensor:
    """x rounded to `bits` leading bits, halves away from zero as cvt.rna does."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa.abs() * 2**bits + 0.5).floor() * mantissa.sign() / 2**bits, exponent)


def parts(x: Tensor, kind: str, count: int) -> list[Tensor]:
    """x in `count` parts of TF32 (11 leading bits) or bfloat16 (8), the largest first; the core cuts TF32's."""
    found = []
    for i in range(count):
        if kind == "bf16":
            part = x.bfloat16().double()
        else:
            part = rounded(x, 11) if count == 1 or i < count - 1 else cut(x, 11)
        found.append(part)
        x = x - part
    return found


def instruction(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total [M, N] + a [M, D] b [D, N] by one instruction."""
    addends = torch.cat([total[:, None], a[:, :, None] * b[None]], 1)
    unit = torch.exp2(torch.frexp(addends.abs().amax(1, keepdim=True)).exponent.double() - 24)
    return cut(((addends / unit).trunc() * unit).sum(1), 24)


def product(a: Tensor, b: Tensor, kind: str, count: int, block: int, outside: bool) -> Tensor:
    """a [M, K] b [K, N] in float32, of `count` parts each; `outside`: blocks of the sum are added in float32.

    The pairs of parts that triton takes, the smallest first: three of two parts, six of three.
    """
    a_parts, b_parts = parts(a.double(), kind, count), parts(b.double(), kind, count)
    pairs = sorted(((i, j) for i in range(count) for j in range(count) if i + j < count), key=lambda pair: -sum(pair))
    total = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    for first in range(0, a.shape[1], block):
        own = torch.zeros_like(total) if outside else total
        for i, j in pairs:
            for k in range(first, min(first + block, a.shape[1]), DEPTH[kind]):
                some = slice(k, k + DEPTH[kind])
                own = instruction(own, a_parts[i][:, some], b_parts[j][some])
        total = (total.float() + own.float()).double() if outside else own
    return total.float()


def operands(terms: int, mean: float) -> tuple[Tensor, Tensor]:
    return torch.randn(SIZE, terms) + mean, torch.randn(terms, SIZE) + mean


def errors(found: Tensor, a: Tensor, b: Tensor) -> Errors:
    """By the rule for one operation, with torch's float32 product as stock."""
    return element_errors(found, a @ b, a.double() @ b.double(), a.shape[1])


@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["centred", "positive"])
@pytest.mark.parametrize("terms", [27, 576, 4096])
@pytest.mark.parametrize(("kind", "count"), [("tf32", 2), ("bf16", 3)], ids=["tf32x3", "bf16x6"])
def test_parts_are_as_exact_as_float32(kind: str, count: int, terms: int, mean: float) -> None:
    a, b = operands(terms, mean)
    found = errors(product(a, b, kind, count, 32, outside=True), a, b)
    assert found.agree, found


def test_what_the_exactness_rests_on() -> None:
    a, b = operands(4096, 1.0)
    for kind, count in (("tf32", 2), ("bf16", 3)):  # the sum of the core drifts
        assert not errors(product(a, b, kind, count, 32, outside=False), a, b).agree
    a, b = operands(27, 0.0)
    for kind, count in (("tf32", 1), ("bf16", 2)):  # too few parts
        assert not errors(product(a, b, kind, count, 32, outside=True), a, b).agree


@pytest.mark.parametrize("terms", [27, 576, 4096])
def test_three_products_of_bfloat16_are_closer_than_tf32(terms: int) -> None:
    a, b = operands(terms, 0.0)
    ours = errors(product(a, b, "bf16", 2, 64, outside=True), a, b).mine
    assert ours * 4 < errors(product(a, b, "tf32", 1, 64, outside=False), a, b).mine
