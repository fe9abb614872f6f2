"""The inner loop as anyone would write it, for a network of any kind: what users' cases are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Plain:
    """A network with fast weights: call it as the network, step it by a loss."""

    def __init__(self, model: nn.Module, lr: float = 0.1, names: Sequence[str] | None = None, order: int = 2) -> None:
        self.model, self.lr, self.order = model, lr, order
        self.fast: dict[str, Tensor] = dict(model.named_parameters())
        self.names = list(self.fast) if names is None else list(names)
        self.buffers = {n: b.detach().clone() for n, b in model.named_buffers()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, {**self.fast, **self.buffers}, args, kwargs)

    def step(self, loss: Tensor) -> None:
        own = [self.fast[n] for n in self.names]
        grads = torch.autograd.grad(loss, own, create_graph=self.order == 2, allow_unused=True)
        self.fast.update({n: p - self.lr * g for n, p, g in zip(self.names, own, grads) if g is not None})


def plain(model: nn.Module, loss: Callable[[Any], Tensor], steps: int = 3, **given: Any) -> Plain:
    """The network after `steps` steps on loss(network)."""
    twin = Plain(model, **given)
    for _ in range(steps):
        twin.step(loss(twin))
    return twin


def far(a: Tensor, b: Tensor) -> float:
    """The greatest difference."""
    return float((a - b).detach().abs().max())
