"""All steps of an inner loop by one launch, where only the last block and the linear layer move, or the latter alone.

The frozen prefix runs once, in a backend's operations; then one kernel (csrc/cuda/steps.cuh) does all steps, with
the weights in shared memory. Of half precision, what is kept there are floats: values are rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...spec import BlockSpec, output_size
from ..base import Backend, Call, InnerLoop
from .library import DTYPES, MOST_STEPS, MOVED, LastSteps
from .operands import allows_tf32, fill, named, wide

if TYPE_CHECKING:
    from . import Cuda

__all__ = ["inner_loop", "planned"]

PER_BLOCK = 3  # weight, gamma, beta


def planned(
    cuda: Cuda, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
    steps: int, rates: Sequence[float],
) -> LastSteps | list[str]:  # fmt: skip
    """How one launch takes these steps, or why it does not. The arguments are those of `inner_loop`."""
    why = cuda.refusals(Call("inner_loop", x.device, x.dtype))
    first, at = _first(updated), sum(updated)
    if first < len(blocks) - 1:
        why.append(f"block {first + 1} of {len(blocks)} moves: it takes the last one and the linear layer")
    if not 0 < steps <= MOST_STEPS or len(rates) not in (1, steps * at):
        why.append(f"it takes 1 to {MOST_STEPS} steps, with one rate for all or one per step and updated parameter")
    if x.dtype not in DTYPES or any(p.dtype != x.dtype for p in parameters):
        found = sorted({str(t.dtype).removeprefix("torch.") for t in (x, *parameters)})
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        why.append(f"all its tensors are of one dtype of {known}, not {', '.join(found)}")
    if labels.dtype != torch.int64 or labels.dim() != 2 or not labels.numel() or not x.numel():
        why.append("it takes labels [T, N] in int64 of at least one image")
    if blocks and blocks[-1].conv.groups != 1:
        why.append(f"it has no convolution of {blocks[-1].conv.groups} groups")
    if blocks and blocks[-1].pool not in (1, 2):
        why.append(f"it pools by 1 or 2, not {blocks[-1].pool}")
    if x.device.type == "cuda" and (version := torch.cuda.get_device_capability(x.device)) < (8, 0):
        why.append(f"it needs compute capability 8.0, the device has {version[0]}.{version[1]}")
    if why:
        return why
    table, limits = _sizes(x.shape, labels, parameters, updated, blocks, steps), cuda.limits(x.device)
    if cuda.plan(table, x.dtype, limits):
        return table
    return [
        f"the last layers' weights and one image do not fit into {limits.shared} bytes of shared memory on "
        f"{limits.processors} multiprocessors"
    ]


def inner_loop(
    cuda: Cuda, prefix: Backend, table: LastSteps, x: Tensor, labels: Tensor, parameters: list[Tensor],
    updated: list[bool], blocks: list[BlockSpec], steps: int, rates: Sequence[float], query: Tensor | None = None,
) -> InnerLoop:  # fmt: skip
    """`Backend.inner_loop` as `planned` laid it out in `table`. The frozen blocks, and the query's pass, run on
    `prefix`."""
    tasks, first = labels.shape[0], _first(updated)
    own = [p if p.dim() == n else p.unsqueeze(0) for p, n in zip(parameters, _ranks(blocks))]
    x = prefix.layout(x) if blocks else x
    x = _through(prefix, x, own, blocks[:first])
    given = cuda.layout(x) if first < len(blocks) else x.flatten(2).contiguous()
    labels = labels.contiguous()
    table.x_task, table.labels_task = (0 if t.shape[0] == 1 else t.stride(0) for t in (given, labels))
    table.tf32 = allows_tf32(x)

    kept = []  # copies, until the launch
    moving = iter([rates[i :: sum(updated)] for i in range(sum(updated))] if len(rates) > 1 else [rates] * sum(updated))
    for i in range(PER_BLOCK * first, len(own)):
        which = i - len(own) + MOVED
        source = own[i] if own[i][0].is_contiguous() else own[i].contiguous()
        kept.append(source)
        table.from_[which] = source.data_ptr()
        table.from_task[which] = 0 if source.shape[0] == 1 else source.stride(0)
        if not updated[i]:
            continue
        own[i] = torch.empty(tasks, *source.shape[1:], dtype=x.dtype, device=x.device)
        table.to[which] = own[i].data_ptr()
        row = next(moving)
        for step in range(steps):
            table.rates[step][which] = row[step if len(row) > 1 else 0]
    rows = torch.empty(steps + 1, tasks, dtype=wide(x), device=x.device)
    scratch = torch.empty(tasks * table.scratch_bytes, dtype=torch.uint8, device=x.device)
    counters = torch.empty(tasks, dtype=torch.int32, device=x.device)
    fill(table, x=given, labels=labels, rows=rows, scratch=scratch, counters=counters)
    cuda.launch("last_steps", table, given, f"{named(x=given, labels=labels, head=own[-2])}, {steps} steps")
    logits = None
    if query is not None:
        query = _through(prefix, prefix.layout(query) if blocks else query, own, blocks)
        logits = prefix.linear(query.flatten(2), *own[-2:])
    new = [o[0] if tasks == 1 and o.dim() > p.dim() else o for o, p, moves in zip(own, parameters, updated) if moves]
    return InnerLoop(rows, new, logits)


def _first(updated: list[bool]) -> int:
    """The block with the first updated parameter; the number of blocks where none is."""
    return (updated.index(True) if True in updated else len(updated)) // PER_BLOCK


def _through(backend: Backend, x: Tensor, parameters: list[Tensor], blocks: list[BlockSpec]) -> Tensor:
    """What blocks make of x."""
    for number, block in enumerate(blocks):
        weight, gamma, beta = parameters[PER_BLOCK * number : PER_BLOCK * (number + 1)]
        x = backend.block(x, weight, gamma, beta, block)[0]
    return x


def _ranks(blocks: list[BlockSpec]) -> list[int]:
    """The dimensions of the parameters with a task axis."""
    return [4 + 1, 1 + 1, 1 + 1] * len(blocks) + [2 + 1, 1 + 1]


def _sizes(
    x: torch.Size, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec], steps: int
) -> LastSteps:
    """The structure without its pointers and strides."""
    first, size = min(_first(updated), len(blocks)), x
    table = LastSteps(
        tasks=labels.shape[0], images=labels.shape[1], ways=parameters[-2].shape[-2], features=parameters[-2].shape[-1],
        steps=steps, pool=1,
    )  # fmt: skip
    for block, spec in enumerate(blocks):
        weight = parameters[PER_BLOCK * block].shape[-4:]
        height, width = output_size(size, weight, spec.conv)
        if block == first:
            table.inputs, table.height, table.width, table.outputs = size[-3], size[-2], size[-1], weight[0]
            table.kernel_height, table.kernel_width, table.pool, table.eps = weight[2], weight[3], spec.pool, spec.eps
            table.stride_y, table.stride_x, table.padding_y, table.padding_x = *spec.conv.stride, *spec.conv.padding
            table.dilation_y, table.dilation_x = spec.conv.dilation
            table.out_height, table.out_width = height, width
        size = torch.Size((*size[:-3], weight[0], height // spec.pool, width // spec.pool))
    return table
