"""What torch's flop counter counts for the native operators: two per multiply-add of the convolutions and products that
they stand for, as for torch's own; Winograd's algorithm does fewer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

__all__ = ["register"]

_OPS = torch.ops.lambda_kernels
_PER_BLOCK = 8  # numbers of a block's geometry: stride, padding, dilation, each a pair, groups, pool

Shape = Sequence[int]


def register() -> None:
    """Give the flop counter the formulas of all operators that the extension has."""
    formulas: dict[str, Any] = {
        "winograd": lambda x, weight, padding, *_, out_shape, **__: _convolution(out_shape, weight),
        "winograd_input_grad": lambda gy, weight, *_, **__: _convolution(gy, weight, weight[0]),
        "winograd_weight_grad": lambda gy, x, weight, *_, **__: _convolution(gy, weight, x[0]),
        "frozen_block": _block,
        "image_block": lambda x, weight, gamma, beta, moments, geometry, *_, **__: _block(
            x, weight, gamma, beta, geometry
        ),
        "image_block_grad": lambda gy, x, weight, gamma, index, rstd, moments, geometry, **_: _block(
            (gy[0], *x[1:]), weight, gamma, gamma, geometry
        ),
        "inner_loop": _inner_loop,
    }
    for name, formula in formulas.items():
        register_flop_formula(getattr(_OPS, name))(formula)


def _convolution(y: Shape, weight: Shape, tasks: int = 1) -> int:
    """Of y [T, N, O, H', W'], or that with T = 1 for `tasks`, by a weight [1|T, O, C/groups, kh, kw]."""
    return int(2 * max(y[0], tasks) * prod(y[1:]) * prod(weight[2:]))


def _result(x: Shape, weight: Shape, geometry: Shape) -> tuple[int, ...]:
    """[T, N, O, H', W'] of a block's convolution, at full resolution."""
    height, width = (
        (x[3 + a] + 2 * geometry[2 + a] - geometry[4 + a] * (weight[3 + a] - 1) - 1) // geometry[a] + 1 for a in (0, 1)
    )
    return max(x[0], weight[0]), x[1], weight[1], height, width


def _block(x: Shape, weight: Shape, gamma: Shape, beta: Shape, geometry: Shape, *_: Any, **__: Any) -> int:
    return _convolution(_result(x, weight, geometry), weight)


def _inner_loop(
    x: Shape, labels: Shape, parameters: Sequence[Shape], updated: Shape, geometry: Shape, eps: Sequence[float],
    steps: int, rates: Sequence[float], query: Shape | None = None, **_: Any,
) -> int:  # fmt: skip
    """Blocks ahead of the first updated one once; then each step's forward pass, and what its rates ask for."""
    tasks, count = labels[0], len(eps)
    moving = [i for i, flag in enumerate(updated) if flag]
    blocks = [geometry[_PER_BLOCK * b : _PER_BLOCK * (b + 1)] for b in range(count)]
    weights = [_with_tasks(parameters[i], 4 if i < 3 * count else 2, tasks if updated[i] else 1)
               for i in (*range(0, 3 * count, 3), 3 * count)]  # fmt: skip

    def forward(images: Shape) -> list[int]:
        """Of each block, and of the linear layer."""
        each = []
        for weight, numbers in zip(weights, blocks):
            y = _result(images, weight, numbers)
            each.append(_convolution(y, weight))
            images = (*y[:3], y[3] // numbers[7], y[4] // numbers[7])
        return [*each, 2 * max(images[0], weights[-1][0]) * images[1] * prod(weights[-1][1:])]

    each = forward(x)
    first = min([i // 3 for i in moving] + [count])
    total = sum(each[:first])
    for step in range(steps):
        row = [rates[0]] * len(moving) if len(rates) == 1 else rates[step * len(moving) : (step + 1) * len(moving)]
        asked = {i for i, rate in zip(moving, row) if rate != 0.0}
        lowest = min(asked, default=3 * count + 2) // 3
        total += sum(each[first:])
        total += each[-1] * ((3 * count in asked) + (lowest < count))
        # torch counts the gradient of a weight as that of one group.
        total += sum(each[b] * (blocks[b][6] * (3 * b in asked) + (b > lowest)) for b in range(lowest, count))
    return total + (0 if query is None else sum(forward(query)))


def _with_tasks(shape: Shape, rank: int, tasks: int) -> tuple[int, ...]:
    """A parameter's shape with its task axis, of size `tasks` where it had none or 1."""
    own = (1, *shape) if len(shape) == rank else tuple(shape)
    return max(own[0], tasks), *own[1:]
