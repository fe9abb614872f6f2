"""Steps whose gradients a chain takes, without autograd's graph of the network, and whose changes a rule makes of them:
for any rule. In second order each gradient is one operation with its own way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lambda_kernels.chain import Chain
from lambda_kernels.outer import apart, side_by_side, slopes

from . import autograd, outer
from .adaptation import Adaptation, Stretch, Support
from .rule import State as Memory
from .rule import Step, update_of_rows

__all__ = ["refusals", "run"]


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
    images, rows, updated = x.unsqueeze(0) if single else x, [], stretch.part.updated
    names = chain.order(updated)
    names += [n for n in updated if n not in names]  # a bias that cancels in a norm is in no chain: its gradient is 0
    like = [a.parameters[n].unsqueeze(0) for n in names]
    flags, tasks = [n in updated for n in chain.names], len(labels)
    parameters = [a.parameters[n] if flag else state[n] for n, flag in zip(chain.names, flags)]

    def row_of(values: Mapping[str, Tensor]) -> Tensor:
        return side_by_side([values[n].unsqueeze(0) if single else values[n] for n in names], tasks)

    def named(row: Tensor) -> dict[str, Tensor]:
        return {n: t.squeeze(0) if single else t for n, t in zip(names, apart(row, like))}

    whole, sizes = update_of_rows(a.rule), [p.numel() for p in like]
    row = row_of(state)
    for index in range(stretch.first, stretch.first + stretch.steps):
        now = row if a.second_order else row.detach()
        with torch.set_grad_enabled(a.second_order):
            losses, grads = slopes(chain.backend(images, labels), images, labels, now, parameters, flags, chain.specs)
        losses = losses.detach()
        step = Step(index, a.steps, losses.squeeze(0) if single else losses, a.second_order)
        with torch.set_grad_enabled(a.in_graph):
            if whole is not None:
                row = row + whole(grads, now, names, sizes, step)
            else:
                given = named(now if a.second_order else row)
                new, memory = autograd.moved(a.rule, memory, given, named(grads), step, batched=not single)
                row = row_of(new)
        if not a.in_graph:
            row = row.detach()
        rows.append(step.loss)
    state.update({n: t if a.in_graph else t.detach().requires_grad_() for n, t in named(row).items()})
    a.tie(state)
    return rows, state, memory
