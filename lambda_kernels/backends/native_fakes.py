"""What the native operators return for tensors without data; what they refuse is in `native_checks`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from . import native
from .native_checks import GEOMETRY, OWN, SOME, Operands


def norm_relu_pool(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int) -> tuple[Tensor, ...]:
    height, width = Operands("norm_relu_pool", z, z).norm(z, pool, gamma=gamma, beta=beta)
    y, index = (_images(z, height, width, dtype) for dtype in (z.dtype, torch.uint8))
    return y, index, z.new_empty(z.shape[0], z.shape[2]), z.new_empty(z.shape[0], z.shape[2])


def norm_relu_pool_grad(
    gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    operands = Operands("norm_relu_pool_grad", z, z)
    operands.saved(z, operands.norm(z, pool, gamma=gamma), gy, index, mean, rstd)
    dz = _images(z, z.shape[-2], z.shape[-1], z.dtype) if need_z else z.new_empty(0)
    return dz, z.new_empty(z.shape[0], z.shape[2]), z.new_empty(z.shape[0], z.shape[2])


def norm_relu_pool_grad_grad(
    gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, v: Tensor | None,
    v_gamma: Tensor, v_beta: Tensor, need_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    operands = Operands("norm_relu_pool_grad_grad", z, z)
    sides = operands.norm(z, pool, gamma=gamma, v_gamma=v_gamma, v_beta=v_beta)
    operands.saved(z, sides, gy, index, mean, rstd)
    if v is not None:
        operands.check("v", v, *z.shape)
    d_z = _images(z, z.shape[-2], z.shape[-1], z.dtype) if need_z else z.new_empty(0)
    return _images(z, sides[0], sides[1], z.dtype), d_z, z.new_empty(z.shape[0], z.shape[2])


def frozen_block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, geometry: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    operands = Operands("frozen_block", x, x, weight, gamma, beta)
    height, width = operands.block(x, weight, geometry)
    tasks, outputs = operands.tasks, weight.shape[1]
    operands.check("gamma", gamma, OWN, outputs)
    operands.check("beta", beta, OWN, outputs)
    operands.kernel(x.shape, weight.shape, geometry, filters=True)
    y = _images(x, height, width, x.dtype, tasks=tasks, channels=outputs)
    return y, x.new_empty(tasks, outputs), x.new_empty(tasks, outputs)


def affine_block(x: Tensor, weight: Tensor, bias: Tensor, geometry: list[int]) -> Tensor:
    operands = Operands("affine_block", x, x, weight, bias)
    height, width = operands.block(x, weight, geometry)
    operands.check("bias", bias, OWN, weight.shape[1])
    operands.kernel((1, *x.shape[2:]), weight.shape, geometry, filters=True)
    return _images(x, height, width, x.dtype, tasks=operands.tasks, channels=weight.shape[1])


def _affine_chain(
    operands: Operands, images: int, size: Sequence[int], parameters: list[Tensor], geometry: list[int]
) -> list[int]:
    """Values of what is made of each block's weight and of the linear layer's."""
    blocks, name = len(geometry) // 7, operands.name
    fits = blocks > 0 and len(geometry) == 7 * blocks and len(parameters) == 2 * blocks + 2
    torch._check(fits, lambda: f"{name}: {len(parameters)} parameters and {len(geometry)} numbers")
    size, made = list(size), []
    for b in range(blocks):
        numbers, (weight, bias) = geometry[7 * b : 7 * b + 7], parameters[2 * b : 2 * b + 2]
        operands.check(f"the weight of layer {b}", weight, SOME, size[0], SOME, SOME)
        sides = operands.convolution((images, *size), weight.shape, numbers[:6], 1, numbers[6])
        operands.check(f"the bias of layer {b}", bias, weight.shape[0])
        operands.kernel((1, *size), weight.shape, numbers, filters=True)
        taps = prod(weight.shape[1:])
        by_patches = taps <= native.MOST_TAPS and numbers[6] in (1, 2)
        made.append((taps + 3 if by_patches else 16 * weight.shape[1]) * _rounded_up(weight.shape[0]))
        size = [weight.shape[0], *(side // numbers[6] for side in sides)]
    operands.check(f"the weight of layer {blocks}", parameters[-2], SOME, prod(size))
    operands.check(f"the bias of layer {blocks}", parameters[-1], parameters[-2].shape[0])
    return [*made, prod(size) * _rounded_up(parameters[-2].shape[0])]


def _rounded_up(channels: int) -> int:
    return (channels + 15) // 16 * 16


def affine_chain_prepare(parameters: list[Tensor], geometry: list[int], size: list[int]) -> list[Tensor]:
    torch._check(bool(parameters), lambda: "affine_chain_prepare: no parameters")
    operands = Operands("affine_chain_prepare", parameters[0])
    operands.count("size", size, 3)
    torch._check(min(size) > 0, lambda: f"affine_chain_prepare: size must be positive numbers, got {size}")
    return [parameters[0].new_empty(values) for values in _affine_chain(operands, 1, size, parameters, geometry)]


def affine_chain(x: Tensor, parameters: list[Tensor], geometry: list[int], ready: list[Tensor]) -> Tensor:
    operands = Operands("affine_chain", x)
    operands.check("x", x, SOME, SOME, SOME, SOME)
    made = _affine_chain(operands, x.shape[0], x.shape[1:], parameters, geometry)
    if ready:
        operands.count("ready", ready, len(made))
        for t, values in zip(ready, made):
            operands.check("ready", t, values)
            torch._check(t.is_contiguous(), lambda: "affine_chain: ready must be contiguous")
    return x.new_empty(x.shape[0], parameters[-2].shape[0])


def image_moments(x: Tensor, kernel: list[int], geometry: list[int]) -> Tensor:
    operands = Operands("image_moments", x, x)
    operands.check("x", x, OWN, SOME, SOME, SOME, SOME)
    operands.count("kernel", kernel, 2)
    operands.count("geometry", geometry, GEOMETRY - 1)
    weight = (1, x.shape[2], *kernel)
    operands.convolution(x.shape, weight, geometry, 1, geometry[6])
    operands.kernel(x.shape, weight, geometry, filters=False)
    side = prod(weight) + 1
    return x.new_empty(x.shape[0], side, side, dtype=torch.float64)


def image_block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, geometry: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = Operands("image_block", x, x, weight, gamma, beta)
    height, width = operands.block(x, weight, geometry)
    tasks, outputs = operands.tasks, weight.shape[1]
    operands.check("gamma", gamma, OWN, outputs)
    operands.check("beta", beta, OWN, outputs)
    _moments(operands, moments, x, weight, geometry)
    y = _images(x, height, width, x.dtype, tasks=tasks, channels=outputs)
    index = _images(x, height, width, torch.uint8, tasks=tasks, channels=outputs)
    return y, index, x.new_empty(tasks, outputs), x.new_empty(tasks, outputs)


def image_block_grad(
    gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, rstd: Tensor, moments: Tensor,
    geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    operands = Operands("image_block_grad", x, gy, x, weight, gamma)
    sides = operands.block(x, weight, geometry)
    tasks, outputs = operands.tasks, weight.shape[1]
    _moments(operands, moments, x, weight, geometry)
    operands.check("gy", gy, tasks, x.shape[1], outputs, *sides)
    operands.check("index", index, tasks, x.shape[1], outputs, *sides, dtype=torch.uint8)
    operands.check("gamma", gamma, OWN, outputs)
    operands.check("rstd", rstd, tasks, outputs)
    return x.new_empty(tasks, *weight.shape[1:]), x.new_empty(tasks, outputs), x.new_empty(tasks, outputs)


def inner_loop(
    x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[int], geometry: list[int], eps: list[float],
    steps: int, rates: list[float], query: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    operands = Operands("inner_loop", x, x)
    operands.steps(steps, updated, parameters, len(rates), each=False)
    tasks, axes = operands.tasks, ([4, 1, 1] * len(eps))[: max(0, len(parameters) - 2)] + [2, 1]
    own = [p.unsqueeze(0) if p.dim() == n else p for p, n in zip(parameters, axes)]
    _, ways = operands.chain(x, own, geometry, len(eps))
    torch._check(ways is not None, lambda: f"inner_loop: there is no linear layer behind {len(eps)} blocks")
    operands.check("labels", labels, tasks, x.shape[1], dtype=torch.int64)
    if query is not None:
        operands.check("query images", query, tasks, SOME, *x.shape[2:])
    new = [
        p.new_empty(p.shape if tasks == 1 else (tasks, *p.shape[p.dim() - n :]))
        for p, n, flag in zip(parameters, axes, updated)
        if flag
    ]
    logits = x.new_empty([0] if query is None else [tasks, query.shape[1], ways or 0])
    return x.new_empty(steps + 1, tasks, dtype=torch.float64), new, logits


def chain_steps(
    x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[int], geometry: list[int], eps: list[float],
    steps: int, rates: list[float], from_images: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    numbers = _outer(Operands("chain_steps", x, x), x, labels, parameters, updated, geometry, eps, steps, rates)
    losses = x.new_empty(steps, x.shape[0], dtype=torch.float64)
    return losses, x.new_empty(x.shape[0], steps + 1, numbers)


def chain_steps_grad(
    v: Tensor, x: Tensor, labels: Tensor, parameters: list[Tensor], path: Tensor, updated: list[int],
    geometry: list[int], eps: list[float], steps: int, rates: list[float], wanted: list[int], from_images: bool,
    want_x: bool, want_rates: bool, second_order: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    operands = Operands("chain_steps_grad", x, x)
    numbers = _outer(operands, x, labels, parameters, updated, geometry, eps, steps, rates)
    operands.check("v", v, x.shape[0], numbers)
    operands.check("path", path, x.shape[0], steps + 1, numbers)
    torch._check(path.is_contiguous(), lambda: "chain_steps_grad: path must be contiguous")
    _wanted(operands, parameters, wanted, from_images and want_x)
    others = [flag and not moves for flag, moves in zip(wanted, updated)]
    rows = x.new_empty((x.shape[0], steps, sum(map(bool, updated))) if want_rates else 0, dtype=torch.float64)
    whole = torch.empty_like(v, memory_format=torch.contiguous_format)
    return whole, _each(x, parameters, others), _of(x, want_x), rows


def chain_logits(
    x: Tensor, parameters: list[Tensor], geometry: list[int], eps: list[float], from_images: bool
) -> tuple[Tensor, Tensor]:
    operands = Operands("chain_logits", x, x)
    sizes, ways = operands.chain(x, parameters, geometry, len(eps))
    size = _kept_bytes(operands, x, parameters, geometry, sizes, from_images)
    kept = x.new_empty(x.shape[0], size, dtype=torch.uint8)
    if ways is None:
        channels, height, width = sizes[-1]
        return _images(x, height, width, x.dtype, channels=channels), kept
    return x.new_empty(*x.shape[:2], ways), kept


def chain_logits_grad(
    g: Tensor, x: Tensor, parameters: list[Tensor], kept: Tensor, geometry: list[int], eps: list[float],
    wanted: list[int], from_images: bool, want_x: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    operands = Operands("chain_logits_grad", x, x)
    sizes, ways = operands.chain(x, parameters, geometry, len(eps))
    operands.check("g", g, *x.shape[:2], *(sizes[-1] if ways is None else [ways]))
    _wanted(operands, parameters, wanted, from_images and want_x)
    size = _kept_bytes(operands, x, parameters, geometry, sizes, from_images)
    operands.check("kept", kept, x.shape[0], size, dtype=torch.uint8)
    torch._check(kept.is_contiguous(), lambda: "chain_logits_grad: kept must be contiguous")
    return _each(x, parameters, wanted), _of(x, want_x)


def winograd(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    operands = Operands("winograd", x, x, weight)
    operands.check("x", x, OWN, SOME, SOME, SOME, SOME)
    rows, columns = _winograd(operands, x.shape, weight, padding)
    return _images(x, rows, columns, x.dtype, tasks=operands.tasks, channels=weight.shape[1])


def _check_tasks(given: int, tasks: int) -> None:
    """Of sizes that are given as numbers."""
    fits = 1 in (given, tasks) or given == tasks
    torch._check(fits, lambda: f"winograd: sizes of {given} tasks do not fit operands of {tasks}")


def winograd_input_grad(gy: Tensor, weight: Tensor, x: list[int], padding: list[int]) -> Tensor:
    operands = Operands("winograd_input_grad", gy, gy, weight)
    sides = _winograd(operands, x, weight, padding)
    operands.check("gy", gy, OWN, x[1], weight.shape[1], *sides)
    _check_tasks(x[0], operands.tasks)
    return _images(gy, x[3], x[4], gy.dtype, tasks=operands.tasks, channels=x[2])


def winograd_weight_grad(gy: Tensor, x: Tensor, weight: list[int], padding: list[int]) -> Tensor:
    operands = Operands("winograd_weight_grad", gy, gy, x)
    operands.check("x", x, OWN, SOME, SOME, SOME, SOME)
    sides = _winograd(operands, x.shape, weight, padding)
    operands.check("gy", gy, OWN, x.shape[1], weight[1], *sides)
    _check_tasks(weight[0], operands.tasks)
    return gy.new_empty(1 if weight[0] == 1 else operands.tasks, *weight[1:])


def _winograd(
    operands: Operands, x: Sequence[int], weight: Tensor | Sequence[int], padding: Sequence[int]
) -> list[int]:
    """Height and width of the convolution's result; the weight and its gradient are [tasks, O, C, 3, 3]."""
    if isinstance(weight, Tensor):
        operands.check("the weight", weight, OWN, SOME, SOME, 3, 3)
        weight = weight.shape
    operands.count("the sizes of x", x, 5)
    operands.count("the sizes of the weight", weight, 5)
    operands.count("padding", padding, 2)
    torch._check(tuple(weight[3:]) == (3, 3), lambda: f"winograd: a weight must be 3x3, got {list(weight)}")
    return operands.convolution(x, weight, [1, 1, *padding, 1, 1], 1, 1)


def _moments(operands: Operands, moments: Tensor, x: Tensor, weight: Tensor, geometry: list[int]) -> None:
    side = prod(weight.shape[2:]) + 1
    operands.check("moments", moments, x.shape[0], side, side, dtype=torch.float64)
    operands.kernel(x.shape, weight.shape, geometry, filters=False)


def _outer(
    operands: Operands, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[int], geometry: list[int],
    eps: list[float], steps: int, rates: list[float],
) -> int:  # fmt: skip
    """How many numbers all updated parameters have."""
    _, ways = operands.chain(x, parameters, geometry, len(eps))
    operands.steps(steps, updated, parameters, len(rates), each=True)
    torch._check(ways is not None and bool(rates), lambda: f"{operands.name}: a linear layer and a step are needed")
    operands.check("labels", labels, *x.shape[:2], dtype=torch.int64)
    return sum(p[0].numel() for p, flag in zip(parameters, updated) if flag)


def _wanted(operands: Operands, parameters: list[Tensor], wanted: list[int], wants_images: bool) -> None:
    operands.count("wanted", wanted, len(parameters))
    torch._check(not wants_images, lambda: f"{operands.name}: with from_images there is no gradient of x")


def _each(x: Tensor, parameters: list[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """Gradients per task of the parameters that are wanted."""
    return [x.new_empty(x.shape[0], *p.shape[1:]) for p, flag in zip(parameters, wanted) if flag]


def _of(x: Tensor, wanted: bool) -> Tensor:
    """A gradient of x; empty where it is not wanted."""
    if not wanted:
        return x.new_empty(0)
    return _images(x, x.shape[3], x.shape[4], x.dtype) if x.dim() == 5 else x.new_empty(x.shape)


def _kept_bytes(
    operands: Operands, x: Tensor, parameters: list[Tensor], geometry: list[int], sizes: list[list[int]],
    from_images: bool,
) -> int:  # fmt: skip
    """What a chain's forward pass leaves of a task for its way back, as QueryBlock::lay_out in csrc/outer/query.h lays
    it out."""
    size, images, width, blocks = 0, x.shape[1], x.element_size(), len(geometry) // GEOMETRY
    for b in range(blocks):
        numbers, weight = geometry[8 * b : 8 * b + 8], parameters[3 * b].shape
        (groups, pool), taps = numbers[6:], prod([sizes[b][0], *weight[3:]])
        by_moments = b == 0 and from_images and groups == 1 and bool(taps <= native.MOST_TAPS)
        y = 0 if by_moments and b + 1 < blocks else images * prod(sizes[b + 1])
        if by_moments:
            z = 0
        elif pool == 2 and operands.by_filters((images, *sizes[b]), weight, numbers, groups):
            z = y
        else:
            z = images * weight[1] * prod(operands.convolution((images, *sizes[b]), weight, numbers[:6], groups, pool))
        counts = [(z, width), (y, width), (weight[1], width), (weight[1], width), (y, 1)]
        counts.append(((taps + 1) ** 2 if by_moments else 0, 8))
        size += sum(((count + 16) * bytes_of + 63) // 64 * 64 for count, bytes_of in counts if count)
    return size


def _images(
    z: Tensor, height: int, width: int, dtype: torch.dtype, *, tasks: int | None = None, channels: int | None = None
) -> Tensor:
    """An empty channels-last [tasks, images, channels, height, width]; tasks and channels as z's unless given."""
    tasks = z.shape[0] if tasks is None else tasks
    channels = z.shape[2] if channels is None else channels
    return z.new_empty(tasks, z.shape[1], height, width, channels, dtype=dtype).permute(0, 1, 4, 2, 3)


OPERATORS = (
    norm_relu_pool, norm_relu_pool_grad, norm_relu_pool_grad_grad, frozen_block, affine_block, affine_chain,
    affine_chain_prepare, image_moments, image_block, image_block_grad, inner_loop, chain_steps, chain_steps_grad,
    chain_logits, chain_logits_grad, winograd, winograd_input_grad, winograd_weight_grad,
)  # fmt: skip

if not native._WHY:
    for _fake in OPERATORS:
        torch.library.register_fake(f"lambda_kernels::{_fake.__name__}", _fake)
