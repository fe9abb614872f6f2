"""Steps whose gradients a chain takes, without autograd's graph of the network, and whose changes a rule makes of them:
for any rule. In second order each gradient is one operation with its own way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lambda_kernels.chain import Chain
from lambda_kernels.outer import adapted

from . import autograd, outer
from .adaptation import Adaptation, Stretch, Support
from .rule import State as Memory
from .rule import Step

__all__ = ["refusals", "run"]

_RATE = -(2.0**20)
"""Of one step of descent that a gradient is read off: (theta + 2^20 g) - theta has the digits of g, not of theta, and a
power of two rounds nothing."""


def refusals(a: Adaptation, stretch: Stretch, chain: Chain | None, support: Support, value: object) -> list[str]:
    """Why a chain does not take these steps' gradients; empty where it does. value: what the prefix hands over."""
    why = outer.unfit(a, stretch, chain, value, support)
    if not why and stretch.rates is not None:
        why.append("its rates are known")
    return why


def run(
    a: Adaptation, stretch: Stretch, chain: Chain, state: dict[str, Tensor], x: Tensor, support: Support, memory: Memory
) -> tuple[list[Tensor], dict[str, Tensor], Memory]:
    """All steps of a stretch: the losses before each, the state after the last, and what the rule remembers."""
    labels, single = support.labels, support.tasks is None
    assert labels is not None
    images, rows = x.unsqueeze(0) if single else x, []
    for index in range(stretch.first, stretch.first + stretch.steps):
        now = {n: state[n] if a.second_order else state[n].detach() for n in stretch.part.updated}
        losses, found = _gradients(a, chain, {**state, **now}, now, images, labels)
        losses = losses.squeeze(0) if single else losses
        # A bias that cancels in a norm is in no chain: its gradient is 0.
        grads = {n: found[n].view_as(p) if n in found else torch.zeros_like(p) for n, p in now.items()}
        step = Step(index, a.steps, losses, a.second_order)
        own = now if a.second_order else {n: state[n] for n in grads}
        with torch.set_grad_enabled(a.in_graph):
            new, memory = autograd.moved(a.rule, memory, own, grads, step, batched=not single)
        state.update(new if a.in_graph else ((n, t.detach().requires_grad_()) for n, t in new.items()))
        a.tie(state)
        rows.append(losses)
    return rows, state, memory


def _gradients(
    a: Adaptation, chain: Chain, state: Mapping[str, Tensor], now: Mapping[str, Tensor], x: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [T], and the gradients [T, ...] of the updated tensors that the chain has; in second order in
    autograd's graph."""
    order = chain.order(now)
    rates = torch.full((1, len(order)), _RATE, dtype=torch.float64)
    with torch.set_grad_enabled(a.second_order):
        losses, new = adapted(
            chain.backend(x, labels), x, labels, [state[n] for n in chain.names], [n in now for n in chain.names],
            chain.specs, rates, second_order=a.second_order,
        )  # fmt: skip
        found = {n: (value - now[n]) / -_RATE for n, value in zip(order, new)}
    return losses[0].detach(), found
