"""What an adaptation came to: the adapted state, and its place in autograd's graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["Outcome", "tied"]


class Outcome:
    """The state that an adaptation came to. What makes it a part of autograd's graph waits until it is asked for."""

    def __init__(
        self, meta: dict[str, Tensor], adapted: dict[str, Tensor], updated: Sequence[str], aliases: Mapping[str, str],
        second_order: bool = False,
    ) -> None:  # fmt: skip
        self._meta, self._adapted = meta, {**meta, **adapted}
        self._updated, self._aliases = updated, aliases
        self._second_order, self._attach = second_order, torch.is_grad_enabled()

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """In first order, its gradient with respect to the model's parameters is the identity."""
        meta, adapted = self._meta, self._adapted
        if self._second_order:
            return adapted
        if not self._attach:
            return {n: t.detach() if t.requires_grad else t for n, t in adapted.items()}
        with torch.inference_mode(False), torch.enable_grad():
            attached = _Attached.apply(*(meta[n] for n in self._updated), *(adapted[n] for n in self._updated))
        frozen = {n: meta[n] if t.requires_grad else adapted[n] for n, t in meta.items()}
        return tied({**frozen, **dict(zip(self._updated, attached))}, self._aliases)


def tied(state: dict[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The state with every second name of a shared parameter holding what its first name holds."""
    for alias, name in aliases.items():
        state[alias] = state[name]
    return state


class _Attached(torch.autograd.Function):
    """The adapted tensors, with the model's parameters in their places for gradients."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # with setup_context each call costs 80 us more
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in tensors[len(tensors) // 2 :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *gradients, *(None for _ in gradients)
