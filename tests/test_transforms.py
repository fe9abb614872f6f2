"""conv2d, linear and conv_block under torch.func and torch.compile; their errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    EXACT,
    GRADIENT,
    STEPS,
    BlockCase,
    explicit_block,
    stock_block,
    subsets,
)
from operations import block_operands, call, check_one_graph, randn, tiny
from test_functional import W, X
from torch import Tensor

import lambda_kernels as lk

# Called with operands out of lists and tables.
conv2d: Any = lk.functional.conv2d
linear: Any = lk.functional.linear
conv_block: Any = lk.functional.conv_block
T = 3


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with lk.use_backend(request.param):
        yield request.param


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
    torch.testing.assert_close(got, tuple(torch.stack(g) for g in zip(*alone)), **GRADIENT)


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

    torch.testing.assert_close(meta(fused), meta(plain), **STEPS)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, of every Function
def test_compiles_as_one_graph(backend: str) -> None:
    check_one_graph()


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
