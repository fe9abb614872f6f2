"""The state of an adaptation, all parameters and buffers by name, and what it came to: its place in autograd's
graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lambda_kernels._torch import for_good

__all__ = ["Outcome", "tied", "verdict", "version_of"]


class Outcome:
    """The state that an adaptation came to. What makes it a part of autograd's graph is made when it is first read."""

    def __init__(
        self, meta: dict[str, Tensor], adapted: dict[str, Tensor], updated: Sequence[str], aliases: Mapping[str, str],
        in_graph: bool = False,
    ) -> None:  # fmt: skip
        self._meta, self._adapted = meta, {**meta, **adapted}
        self.updated, self._aliases = updated, aliases
        self._in_graph, self._attach = in_graph, torch.is_grad_enabled()

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """In first order, its gradient with respect to the model's parameters is the identity. What was computed in
        autograd's graph (`in_graph`: second order, learned rates) stays there. It is of plain tensors, whatever mode or
        transform of torch is on when it is first read."""
        return for_good(self._made)

    def _made(self) -> dict[str, Tensor]:
        meta, adapted = self._meta, self._adapted
        if self._in_graph:
            return adapted
        if not self._attach:
            return {n: t.detach() if t.requires_grad else t for n, t in adapted.items()}
        with torch.inference_mode(False), torch.enable_grad():
            attached = _Attached.apply(*(meta[n] for n in self.updated), *(adapted[n] for n in self.updated))
        frozen = {n: meta[n] if t.requires_grad else adapted[n] for n, t in meta.items()}
        return tied({**frozen, **dict(zip(self.updated, attached))}, self._aliases)


def tied(state: dict[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The state with every second name of a shared parameter holding what its first name holds."""
    for alias, name in aliases.items():
        state[alias] = state[name]
    return state


def version_of(t: Tensor) -> int:
    """How often the tensor was written in place, as far as torch knows."""
    return -1 if t.is_inference() else t._version


def verdict(rows: Sequence[Tensor], state: Mapping[str, Tensor], updated: Sequence[str]) -> Tensor:
    """[steps + 1, T], in at least float32: each task's support losses, and below them a number that is finite if all
    parameters are; empty without steps. `rows` are the losses [T] or [] of one step each, and what a chain gave for
    several."""
    if not rows:
        return torch.empty(0)
    with torch.no_grad():
        if len(rows) == 1 and rows[0].dim() == 2:
            return rows[0]
        losses = torch.cat([v[:-1] if v.dim() == 2 else v.reshape(1, -1) for v in rows]).double()
        sums = [state[n].sum() for n in updated]
        after = torch.stack([s.abs() if s.is_complex() else s for s in sums]).double().sum()
        return torch.cat([losses, after.expand(1, losses.shape[1])])


class _Attached(torch.autograd.Function):
    """The adapted tensors, with the model's parameters in their places for gradients."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # with setup_context each call costs 80 us more
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in tensors[len(tensors) // 2 :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *gradients, *(None for _ in gradients)
