"""A random call of `lambda_kernels.functional`, with first and second derivatives, beside ATen in float64 on contiguous
copies, task by task."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels import functional

from .adaptations import Found

__all__ = ["Call", "call", "check_call", "describe_call"]

ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-2}
"""The worst allowed difference, relative to the greatest value of what is compared, or to 1. In float32 it is there to
tell rubbish from rounding: second derivatives of a norm over a few pixels lose half of the digits."""
RANKS = {"x": 4, "weight": 4, "bias": 1, "gamma": 1, "beta": 1}


class Call(NamedTuple):
    op: str  # "conv2d", "linear" or "conv_block"
    backend: str
    operands: dict[str, Tensor | None]  # by name; what requires a gradient is a leaf
    constants: dict[str, Any]
    ranks: dict[str, int]  # of each operand without a task axis
    wanted: list[str]  # operands that the second derivative is taken by


def _laid(rng: random.Random, generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random values in some layout: in order, sliced, transposed, expanded, or with the channels last."""
    how = rng.choice(
        ["order", "order", "order", "sliced", "every-other", "transposed", "last", "last", "offset", "expanded"]
    )
    shape = list(shape)

    def values(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    if how == "sliced" and shape:
        return values(*shape[:-1], shape[-1] + 2)[..., 1:-1]
    if how == "every-other" and shape:
        return values(shape[0] * 2, *shape[1:])[::2]
    if how == "transposed" and len(shape) > 1:
        return values(*shape[:-2], shape[-1], shape[-2]).mT
    if how == "last" and len(shape) >= 4:
        return values(*shape[:-3], *shape[-2:], shape[-3]).movedim(-1, -3)
    if how == "offset" and shape:
        return values(shape[0] + 1, *shape[1:])[1:]
    if how == "expanded" and len(shape) > 1:
        return values(1, *shape[1:]).expand(*shape)
    return values(*shape)


def call(seed: int) -> Call:
    """The call of a seed."""
    rng, generator = random.Random(f"call {seed}"), torch.Generator().manual_seed(seed)
    op = rng.choice(["conv2d", "conv2d", "linear", "conv_block", "conv_block"])
    dtype = rng.choice([torch.float64, torch.float64, torch.float64, torch.float32])
    tasks = rng.choice([0, 0, 1, 2, 3])
    ranks = dict(RANKS)
    constants: dict[str, Any] = {}
    if op == "linear":
        features, outputs = rng.choice([1, 2, 5, 9]), rng.choice([1, 3, 8])
        rows = [rng.choice([1, 2, 5]) for _ in range(rng.choice([0, 1, 1, 2]) if not tasks else rng.choice([1, 2]))]
        shapes = {"x": [*rows, features], "weight": [outputs, features], "bias": [outputs]}
        ranks.update(x=len(rows) + 1, weight=2)
    else:
        groups = rng.choice([1, 1, 1, 2, 3])
        c, o = groups * rng.choice([1, 1, 2, 3, 8, 16]), groups * rng.choice([1, 2, 3, 8])
        n, h, w = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 3, 5, 6, 8, 9]), rng.choice([1, 2, 3, 4, 7, 8])
        kernel = [rng.choice([1, 2, 3, 3, 4]), rng.choice([1, 2, 3, 3, 4])]
        both = rng.random() < 0.6

        def sides(*options: int) -> Any:
            first, second = rng.choice(options), rng.choice(options)
            return first if both else (first, second)

        constants = {
            "stride": sides(1, 1, 2, 3),
            "padding": sides(0, 1, 1, 2),
            "dilation": sides(1, 1, 2),
            "groups": groups,
        }
        pads, apart = (v if isinstance(v, tuple) else (v, v) for v in (constants["padding"], constants["dilation"]))
        for axis, size in enumerate((h, w)):
            while size + 2 * pads[axis] < apart[axis] * (kernel[axis] - 1) + 1:
                kernel[axis] -= 1
        shapes = {"x": [n, c, h, w], "weight": [o, c // groups, *kernel], "bias": [o]}
        if op == "conv2d" and rng.random() < 0.1:
            constants["padding"] = "valid"
            if any(d * (k - 1) + 1 > size for d, k, size in zip(apart, kernel, (h, w))):
                constants["padding"] = pads
        if op == "conv2d" and rng.random() < 0.1:
            constants.update(padding="same", stride=1)
        if op == "conv_block":
            steps = constants["stride"] if isinstance(constants["stride"], tuple) else (constants["stride"],) * 2
            out = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in zip((h, w), pads, apart, kernel, steps)]
            pool = rng.choice([p for p in (1, 2, 2, 3) if p <= min(out)])
            constants.update(pool=pool, eps=rng.choice([1e-5, 1e-2]))
            if n * out[0] * out[1] < 4:  # too few values for a variance that is not itself rounding
                shapes["x"][0] = 4
            shapes.update(gamma=[o], beta=[o])
    operands: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        if name in ("bias", "gamma", "beta") and rng.random() < 0.3:
            operands[name] = None
            continue
        own = tasks and rng.random() < (0.8 if name == "x" else 0.5)
        operands[name] = _laid(rng, generator, [tasks, *shape] if own else shape, dtype)
    if op == "linear" and tasks:  # its x has to have the task axis where a parameter has it
        per_task = any(t is not None and t.dim() > ranks[n] for n, t in operands.items() if n != "x")
        x = operands["x"]
        assert x is not None
        if per_task and x.dim() == ranks["x"]:
            operands["x"] = x.expand(tasks, *x.shape)
    if op == "linear" and not any(t is not None and t.dim() > ranks[n] for n, t in operands.items() if n != "x"):
        x = operands["x"]
        assert x is not None
        ranks["x"] = x.dim()  # the axis is then one of the rows
    given = [n for n, t in operands.items() if t is not None]
    chosen = [n for n in given if rng.random() < 0.6]
    for name in given:
        t = operands[name]
        assert t is not None
        operands[name] = t.detach().requires_grad_(name in chosen)
    wanted = [n for n in chosen if rng.random() < 0.8]
    backend = rng.choice(["auto", "auto", "reference"])
    return Call(op, backend, operands, constants, ranks, wanted)


def describe_call(seed: int) -> str:
    """The call of a seed in words."""
    c = call(seed)
    told = [
        f"{n}: {'None' if t is None else f'{list(t.shape)} strides {t.stride()}'}"
        + (" requires_grad" if t is not None and t.requires_grad else "")
        for n, t in c.operands.items()
    ]
    x = c.operands["x"]
    assert x is not None
    constants = ", ".join(f"{n}={v!r}" for n, v in c.constants.items())
    return "\n".join([f"call {seed}: {c.op}({constants}) on {c.backend} in {x.dtype}", *told, f"second by {c.wanted}"])


def _plain(
    op: str, constants: dict[str, Any], x: Tensor, weight: Tensor, bias: Any, gamma: Any = None, beta: Any = None
) -> Tensor:
    """One task by ATen."""
    if op == "linear":
        return F.linear(x, weight, bias)
    parts = {n: v for n, v in constants.items() if n not in ("pool", "eps")}
    z = F.conv2d(x, weight, bias, **parts)
    if op == "conv2d":
        return z
    variance, mean = torch.var_mean(z, (0, 2, 3), correction=0, keepdim=True)
    y = (z - mean) / torch.sqrt(variance + constants["eps"])
    y = y if gamma is None else y * gamma[:, None, None]
    y = y if beta is None else y + beta[:, None, None]
    return F.max_pool2d(F.relu(y), constants["pool"])


def _derivatives(
    c: Call, operands: dict[str, Tensor | None], function: Callable[..., Tensor], weights: list[Tensor]
) -> dict[str, Tensor]:
    """The result, its gradients by what requires one, and the gradients of those."""
    y = function(**operands)
    found = {"result": y.detach()}
    leaves = {n: t for n, t in operands.items() if t is not None and t.requires_grad}
    if not leaves:
        return found
    gy = weights[0].to(y.dtype).view(-1)[: y.numel()].view(y.shape).clone().requires_grad_()
    first = torch.autograd.grad((y * gy).sum(), list(leaves.values()), create_graph=True, allow_unused=True)
    grads = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), first)}
    found |= {f"grad {n}": g.detach() for n, g in grads.items()}
    scalar = sum((g * weights[1].to(y.dtype).view(-1)[: g.numel()].view(g.shape)).sum() for g in grads.values())
    by = {"gy": gy, **{n: leaves[n] for n in c.wanted}}
    if isinstance(scalar, Tensor) and scalar.requires_grad:
        second = torch.autograd.grad(scalar, list(by.values()), allow_unused=True)
        found |= {f"second {n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(by.items(), second)}
    return found


def check_call(seed: int) -> Found:
    """Make the call of a seed and say what came of it."""
    c = call(seed)
    x = c.operands["x"]
    assert x is not None
    generator = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(60_000, generator=generator, dtype=torch.float64) for _ in range(2)]
    tasks = max((t.shape[0] for n, t in c.operands.items() if t is not None and t.dim() > c.ranks[n]), default=0)

    def plain(**operands: Any) -> Tensor:
        if not tasks:
            return _plain(c.op, c.constants, **operands)
        each = [
            {n: t[i] if t is not None and t.dim() > c.ranks[n] else t for n, t in operands.items()}
            for i in range(tasks)
        ]
        return torch.stack([_plain(c.op, c.constants, **own) for own in each])

    copies = {
        n: None
        if t is None
        else t.detach().double().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad)
        for n, t in c.operands.items()
    }
    want = _derivatives(c, copies, plain, weights)
    before = [None if t is None else t.detach().clone() for t in c.operands.values()]
    try:
        with lk.use_backend(c.backend):
            got = _derivatives(c, c.operands, lambda **o: getattr(functional, c.op)(**o, **c.constants), weights)
    except Exception as error:
        return Found("RAISES", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    wrong = []
    for name in sorted(got.keys() | want.keys()):
        a, b = got.get(name), want.get(name)
        if a is None or b is None:
            other = a if b is None else b
            assert other is not None
            if other.abs().max() > ALLOWED[x.dtype]:  # no graph and a zero are the same
                wrong.append(f"{name} is missing")
        elif a.shape != b.shape:
            wrong.append(f"{name} is {list(a.shape)}, expected {list(b.shape)}")
        elif b.numel() and not (far := float((a - b).abs().max()) / max(1.0, float(b.abs().max()))) <= ALLOWED[x.dtype]:
            wrong.append(f"{name} by {far:.1e}")
    if c.op == "conv_block" and x.is_contiguous() and not got["result"].is_contiguous():
        wrong.append("the result of contiguous images is not contiguous")
    if any(a is not None and b is not None and not torch.equal(a, b) for a, b in zip(before, c.operands.values())):
        wrong.append("an operand was written to")
    return Found("WRONG", ", ".join(wrong)) if wrong else Found("ok")
