# Kernels are not typed: triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Softmax cross-entropy and its gradient, each task's own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, power
from .outputs import loss_outputs

# Logits a program holds at a time.
TILE = 4096


@triton.jit
def cross_entropy(
    logits,
    labels,
    loss,
    gradient,
    images,
    ways,
    l_task,
    l_image,
    l_way,
    label_task,
    label_image,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    WAYS: tl.constexpr,
):
    """loss [T] and gradient [T, images, ways] of a task's mean loss, ROWS images at a time."""
    task = tl.program_id(0).to(tl.int64)
    way = tl.arange(0, WAYS)
    way_inside = way < ways
    total = tl.zeros((ROWS,), SUM)
    count = tl.cast(images, SUM)  # a constant where there is one image
    for first in range(0, images, ROWS):
        image = first + tl.arange(0, ROWS)
        image_inside = image < images
        image = image.to(tl.int64)
        inside = image_inside[:, None] & way_inside[None, :]
        at = (task * l_task + image * l_image)[:, None] + (way.to(tl.int64) * l_way)[None, :]
        v = tl.load(logits + at, inside, other=0.0).to(SUM)
        v = tl.where(way_inside[None, :], v, float("-inf"))
        label = tl.load(labels + task * label_task + image * label_image, image_inside, other=0)
        v -= tl.max(v, 1)[:, None]
        e = tl.exp(v)
        each = tl.sum(e, 1)
        target = way[None, :] == label[:, None]
        own = tl.log(each) - tl.sum(tl.where(target, v, 0.0), 1)
        own = tl.where((label >= 0) & (label < ways), own, float("nan"))
        total += tl.where(image_inside, own, 0.0)
        g = (e / each[:, None] - tl.where(target, 1.0, 0.0)) / count
        out = (task * images + image)[:, None] * ways + way[None, :]
        tl.store(gradient + out, g.to(gradient.dtype.element_ty), mask=inside)
    tl.store(loss + task, tl.sum(total, 0) / count)


def cross_entropy_grad(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `Reference.cross_entropy_grad`."""
    loss, gradient = loss_outputs(logits)
    tasks, images, ways = logits.shape
    abreast = power(ways)
    launch(
        cross_entropy, tasks, logits,
        logits, labels, loss, gradient, images, ways, *logits.stride(),
        0 if labels.shape[0] == 1 else labels.stride(0), labels.stride(1),
        tl.float64 if logits.dtype == torch.float64 else tl.float32,
        min(max(1, TILE // abreast), power(max(images, 1))), abreast,
    )  # fmt: skip
    return loss, gradient
