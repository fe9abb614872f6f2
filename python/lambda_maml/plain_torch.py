"""The yardstick: the full pattern in plain PyTorch, layers and loop, with no kernel of ours in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import agreement, to_torch
from lambda_kernels.program import NORMS

from . import models
from .adapt import adapt
from .patterns import Pattern


def inner_parameters(model: nn.Module, norm: str) -> list[nn.Parameter]:
    """What the full pattern updates: every parameter, less the norms' gamma and beta with norm="never"."""
    if norm not in ("follow", "never"):
        raise ValueError(f"norm is {norm!r}, expected 'follow' or 'never'")
    fixed = (
        {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()} if norm == "never" else set()
    )
    return [p for p in model.parameters() if id(p) not in fixed]


@torch.enable_grad()
def inner_loop(
    model: nn.Module, free: list[nn.Parameter], xs: Tensor, ys: Tensor, *, steps: int, lr: float,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:  # fmt: skip
    """MAML's inner loop as anyone would write it (Finn et al. 2017, equation 1), in place: `steps` SGD steps on the
    support loss. xs [N, C, H, W], ys [N]."""
    for _ in range(steps):
        grads = torch.autograd.grad(loss(model(xs), ys), free)
        with torch.no_grad():
            for p, g in zip(free, grads, strict=True):
                p.sub_(g, alpha=lr)


def plain_adapt(
    model: nn.Module, xs: Tensor, ys: Tensor, *, steps: int, lr: float, norm: str = "follow",
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Module:  # fmt: skip
    """A plain PyTorch copy of `model`, adapted under the full pattern. `model` stays as it was."""
    twin = to_torch(model)
    inner_loop(twin, inner_parameters(twin, norm), xs, ys, steps=steps, lr=lr, loss=loss)
    return twin


def disagreement(
    model: nn.Module, xs: Tensor, ys: Tensor, *, steps: int, lr: float, norm: str = "follow",
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> str | None:  # fmt: skip
    """Compare `adapt` with the plain loop under the full pattern: None if they agree, else a sentence with the figures.

    Both are held against the plain loop in float64, by the rule of `lambda_kernels.agreement`. Distances are Euclidean
    over all parameters, in units of how far adaptation moved them.
    """
    given: dict[str, Any] = {"steps": steps, "lr": lr, "norm": norm, "loss": loss}
    full = Pattern.full(len(models.layer_names(model)))
    exactly = ys.double() if ys.is_floating_point() else ys
    truth = dict(plain_adapt(copy.deepcopy(model).double(), xs.double(), exactly, **given).named_parameters())
    plain = dict(plain_adapt(model, xs, ys, **given).named_parameters())
    ours = {**plain, **adapt(model, xs, ys, pattern=full, **given).parameters_dict()}

    start = dict(model.named_parameters())
    began, got, stock, exact = ([named[k] for k in truth] for named in (start, ours, plain, truth))
    found = agreement.errors(got, stock, exact, length=agreement.distance(began, exact))
    if found.agree:
        return None
    return (
        f"adapt() is {found.mine:.3g} away from the plain float64 loop, plain PyTorch in the same dtype "
        f"{found.stock:.3g} (in units of the adaptation's own length): no speed-up is reported"
    )
