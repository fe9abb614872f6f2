"""The inner loop as the papers write it, beside which every adaptation stands, and what is compared with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from awkward import (
    AsksType,
    Configured,
    Counts,
    NoGrad,
    StraightThrough,
    Untraceable,
    WritesInput,
    scaled,
    three,
    tied,
    untraceable,
    writes_prefix,
)
from networks import (
    Case,
    Groups,
    batch_norm_mlp,
    branches,
    conv1d,
    conv4_groups,
    group_norm,
    layer_norm,
    linear_only,
    odd_conv,
    pair,
    residual,
    sequential,
    torch_conv4,
)
from torch import Tensor, nn
from torch.func import functional_call

from lambda_kernels.agreement import TOLERANCES
from lambda_maml import adapt, models

__all__ = [
    "CONV4",
    "NETWORKS",
    "Adapted",
    "Case",
    "Configured",
    "Counts",
    "NoGrad",
    "Untraceable",
    "WritesInput",
    "all_close",
    "batch_norm_mlp",
    "branches",
    "close",
    "compare",
    "conv1d",
    "conv4_groups",
    "gradients_of",
    "own_conv4",
    "pair",
    "plain_loop",
    "residual",
    "scaled",
    "sequential",
    "stage",
    "three",
    "tied",
    "torch_conv4",
    "untraceable",
    "updated_names",
    "writes_prefix",
]
CONV4 = Case(torch_conv4(), conv4_groups(), (1, 16, 16))
RTOL = TOLERANCES[torch.float64].steps


class Adapted(NamedTuple):
    parameters: dict[str, Tensor]
    logits: Tensor
    gradients: dict[str, Tensor]  # of the query loss, by the network's own parameters
    buffers: dict[str, Tensor]


def updated_names(groups: Groups, bits: str, norm: str) -> list[str]:
    assert len(groups) == len(bits)
    return [
        n
        for bit, (weights, gamma_beta) in zip(bits, groups)
        if bit == "1"
        for n in (weights + gamma_beta if norm == "follow" else weights)
    ]


def stage(pattern: str, step: int) -> str:
    stages = pattern.split(",")
    return stages[min(step, len(stages) - 1)]


def plain_loop(
    network: nn.Module,
    groups: Groups,
    pattern: str,
    xs: Tensor,
    ys: Tensor,
    xq: Tensor,
    yq: Tensor,
    *,
    steps: int,
    lr: float,
    norm: str = "follow",
    second_order: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Adapted:
    """MAML's inner loop as anyone would write it, on a copy of the network."""
    network = copy.deepcopy(network)
    meta = dict(network.named_parameters())
    for parameter in meta.values():
        parameter.requires_grad_()
    fast: dict[str, Tensor] = dict(meta)
    for step in range(steps):
        names = updated_names(groups, stage(pattern, step), norm)
        fast.update({n: fast[n].view_as(fast[n]) for n in names})  # gradient by these values, not by their past
        value = loss(functional_call(network, fast, (xs,)), ys)
        gradients = torch.autograd.grad(value, [fast[n] for n in names], create_graph=second_order, allow_unused=True)
        for name, gradient in zip(names, gradients):
            if gradient is not None:
                fast[name] = fast[name] - lr * gradient
    logits = functional_call(network, fast, (xq,))
    outer = torch.autograd.grad(loss(logits, yq), list(meta.values()), allow_unused=True)
    return Adapted(
        {n: t.detach() for n, t in fast.items()},
        logits.detach(),
        {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(meta.items(), outer)},
        dict(network.named_buffers()),
    )


def close(got: Tensor, want: Tensor, what: str, rtol: float = RTOL, scale: float = 1e-12) -> None:
    """Equal to rounding: relative, or small beside the tensor's greatest value (or 1), as gradients are often tiny."""
    atol = scale * max(1.0, float(want.detach().abs().max()) if want.numel() else 1.0)
    torch.testing.assert_close(got.detach(), want.detach(), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def all_close(got: dict[str, Tensor], want: dict[str, Tensor], what: str, **tolerance: float) -> None:
    assert list(got) == list(want)
    for name in want:
        close(got[name], want[name], f"{what} {name}", **tolerance)


NETWORKS: dict[str, Callable[[], Case]] = {
    "residual": residual,
    "branches": branches,
    "in-place-relu": lambda: writes_prefix("relu"),
    "in-place-value": lambda: writes_prefix("value"),
    "in-place-view": lambda: writes_prefix("view"),
    "in-place-setitem": lambda: writes_prefix("setitem"),
    "in-place-order": lambda: writes_prefix("order"),
    "scaled": scaled,
    "tied": tied,
    "untraceable": untraceable,
    "no-grad-inside": lambda: three(NoGrad),
    "straight-through": lambda: three(StraightThrough),
    "asks-type": lambda: three(AsksType),
    "layer-norm": layer_norm,
    "group-norm": group_norm,
    "batch-norm-mlp": batch_norm_mlp,
    "linear-only": linear_only,
    "conv1d": conv1d,
    "odd-conv": odd_conv,
}


def own_conv4(network: nn.Module, image_size: int = 16) -> nn.Module:
    model = models.conv4(ways=2, in_channels=1, width=3, image_size=image_size).double()
    model.load_state_dict(network.state_dict())
    return model


def compare(
    model: nn.Module,
    case: Case,
    pattern: str,
    *,
    steps: int = 3,
    lr: float = 0.1,
    norm: str = "follow",
    second_order: bool = False,
    rtol: float = 1e-9,
    scale: float = 1e-12,
    **options: Any,
) -> None:
    """Adapted parameters, query logits, and the query loss's gradient by every parameter, against the plain loop."""
    dtype = next(model.parameters()).dtype
    xs, ys, xq, yq = case.task(dtype=dtype)
    want = plain_loop(
        case.network,
        case.groups,
        pattern,
        xs.clone(),
        ys,
        xq.clone(),
        yq,
        steps=steps,
        lr=lr,
        norm=norm,
        second_order=second_order,
        **options,
    )
    learner = adapt(
        model, xs.clone(), ys, pattern=pattern, steps=steps, lr=lr, norm=norm, second_order=second_order, **options
    )
    tolerance = {"rtol": rtol, "scale": scale}
    all_close(learner.parameters_dict(), want.parameters, "adapted", **tolerance)
    logits = learner(xq.clone())
    close(logits, want.logits, "logits", **tolerance)
    model.zero_grad()
    options.get("loss", F.cross_entropy)(logits, yq).backward()
    all_close(gradients_of(model), want.gradients, "gradient of", **tolerance)
