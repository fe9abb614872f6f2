# Kernels are not typed: triton reads their annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""A linear layer of few ways under softmax cross-entropy, and all of its gradients, in two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, blocks, launch, power

# Features that a program takes at a time: of one image, and of all images.
FORWARD, BACKWARD = (4096, 4096) if INTERPRETED else (256, 64)
ROWS = 32  # images whose share of the gradients is summed at a time


@triton.jit
def head_forward(
    x,
    weight,
    bias,
    labels,
    losses,
    gradient,
    gx,
    images,
    ways,
    features,
    x_task,
    x_image,
    w_task,
    w_way,
    bias_task,
    label_task,
    NEED_X: tl.constexpr,
    SUM: tl.constexpr,
    WAYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """losses [T, images], gradient [T, images, ways] of the logits and gx [T, images, features], an image a program."""
    pid = tl.program_id(0)
    task = (pid // images).to(tl.int64)
    image = (pid % images).to(tl.int64)
    way = tl.arange(0, WAYS)
    way_inside = way < ways
    x += task * x_task + image * x_image
    w_rows = task * w_task + way.to(tl.int64) * w_way
    acc = tl.zeros((WAYS, FEATURES), SUM)
    for first in range(0, features, FEATURES):
        feature = first + tl.arange(0, FEATURES)
        inside = feature < features
        v = tl.load(x + feature, inside, other=0.0).to(SUM)
        w = tl.load(weight + (w_rows[:, None] + feature[None, :]), way_inside[:, None] & inside[None, :], other=0.0)
        acc += w.to(SUM) * v[None, :]
    logits = tl.sum(acc, 1) + tl.load(bias + task * bias_task + way, way_inside, other=0.0).to(SUM)
    logits = tl.where(way_inside, logits, float("-inf"))
    label = tl.load(labels + task * label_task + image)
    logits -= tl.max(logits, 0)
    e = tl.exp(logits)
    each = tl.sum(e, 0)
    target = way == label
    own = tl.log(each) - tl.sum(tl.where(target, logits, 0.0), 0)
    own = tl.where((label >= 0) & (label < ways), own, float("nan"))
    tl.store(losses + task * images + image, own)
    g = (e / each - tl.where(target, 1.0, 0.0)) / tl.cast(images, SUM)
    tl.store(gradient + (task * images + image) * ways + way, g, mask=way_inside)
    if NEED_X:
        g = tl.where(way_inside, g, 0.0)
        for first in range(0, features, FEATURES):
            feature = first + tl.arange(0, FEATURES)
            inside = feature < features
            w = tl.load(weight + (w_rows[:, None] + feature[None, :]), way_inside[:, None] & inside[None, :], other=0.0)
            slope = tl.sum(w.to(SUM) * g[:, None], 0)
            tl.store(gx + (task * images + image) * features + feature, slope.to(gx.dtype.element_ty), mask=inside)


@triton.jit
def head_backward(
    x,
    losses,
    gradient,
    loss,
    gw,
    gb,
    images,
    ways,
    features,
    feature_tiles,
    x_task,
    x_image,
    NEED_W: tl.constexpr,
    NEED_B: tl.constexpr,
    SUM: tl.constexpr,
    WAYS: tl.constexpr,
    IMAGES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """loss [T], gw [T, ways, features] and gb [T, ways]: sums over the images, FEATURES features a program."""
    pid = tl.program_id(0)
    tile = pid % feature_tiles
    task = (pid // feature_tiles).to(tl.int64)
    way = tl.arange(0, WAYS)
    way_inside = way < ways
    feature = tile * FEATURES + tl.arange(0, FEATURES)
    inside = feature < features
    acc = tl.zeros((WAYS, FEATURES), SUM)
    total = tl.zeros((WAYS,), SUM)
    mean = tl.zeros((IMAGES,), SUM)
    for first in range(0, images, IMAGES):
        image = first + tl.arange(0, IMAGES)
        there = image < images
        at = (task * images + image) * ways
        g = tl.load(gradient + (at[:, None] + way[None, :]), there[:, None] & way_inside[None, :], other=0.0)
        if NEED_W:
            rows = task * x_task + image.to(tl.int64) * x_image
            v = tl.load(x + (rows[:, None] + feature[None, :]), there[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(tl.trans(g), v.to(SUM), acc, input_precision="ieee", out_dtype=SUM)
        total += tl.sum(g, 0)
        mean += tl.load(losses + task * images + image, there, other=0.0)
    if NEED_W:
        at = (task * ways + way)[:, None] * features + feature[None, :]
        tl.store(gw + at, acc.to(gw.dtype.element_ty), mask=way_inside[:, None] & inside[None, :])
    if tile == 0:
        if NEED_B:
            tl.store(gb + task * ways + way, total.to(gb.dtype.element_ty), mask=way_inside)
        tl.store(loss + task, tl.sum(mean, 0) / tl.cast(images, SUM))


def head_grad(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `Backend.head_grad`, for at least one image and one feature."""
    tasks, images = max(t.shape[0] for t in (x, weight, bias, labels)), x.shape[1]
    _, ways, features = weight.shape
    x, weight = (t if t.stride(2) == 1 else t.contiguous() for t in (x, weight))
    bias, labels = bias.contiguous(), labels.contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)
    total = tl.float64 if wide == torch.float64 else tl.float32
    need_w, need_b, need_x = wanted
    losses, gradient = x.new_empty((tasks, images), dtype=wide), x.new_empty((tasks, images, ways), dtype=wide)
    loss, gx = x.new_empty(tasks, dtype=wide), x.new_empty((tasks, images, features) if need_x else 0)
    gw = x.new_empty((tasks, ways, features) if need_w else 0)
    gb = x.new_empty((tasks, ways) if need_b else 0)
    own = [0 if t.shape[0] == 1 else t.stride(0) for t in (x, weight, bias, labels)]
    launch(
        head_forward, tasks * images, x,
        x, weight, bias, labels, losses, gradient, gx, images, ways, features,
        own[0], x.stride(1), own[1], weight.stride(1), own[2], own[3],
        need_x, total, power(ways), min(FORWARD, power(features)),
    )  # fmt: skip
    abreast = min(BACKWARD, max(16, power(features))) if need_w else 16
    tiles = blocks(features, abreast) if need_w else 1
    launch(
        head_backward, tasks * tiles, x,
        x, losses, gradient, loss, gw, gb, images, ways, features, tiles, own[0], x.stride(1),
        need_w, need_b, total, max(16, power(ways)), ROWS, abreast,
    )  # fmt: skip
    return loss, gw if need_w else None, gb if need_b else None, gx if need_x else None
