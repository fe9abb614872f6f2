"""Rates and decay that a small network generates from the present weights and gradients, step by step.

Baik, Choi, Choi, Kim, Lee, *Meta-Learning with Adaptive Hyperparameters* (ALFA), NeurIPS 2020, arXiv 2011.00209. For
the L tensors that the pattern updates, in step k:

    tau = [mean(theta_1), .., mean(theta_L), mean(g_1), .., mean(g_L)]          the gradients' means are constants
    (h_a, h_b) = W_2 relu(W_1 tau + b_1) + b_2                                  2L -> 2L -> 2L
    theta_l <- (1 - h_b,l B_l,k) theta_l - h_a,l A_l,k g_l

A, B [steps, L] and the generator are meta-parameters. What differs here: L counts what the pattern updates, norms too
under norm="follow"; a tensor that a schedule leaves out in a step enters tau as 0; one gradient a step serves tau and
the step; the last bias starts at 1, so that training starts from gradient descent with decay, where the paper starts
from random numbers around 0. The random-start variant (a learned decay per weight) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..inner.rule import Params, Rule, State, Step
from .catalogue import method

__all__ = ["alfa"]


@method(
    "rule", needs="the pattern that it was made for", chain="yes, step by step",
    fill={"names": "names", "steps": "steps", "lr": "lr"},
)  # fmt: skip
class alfa(Rule):
    """The rule with generated rates and decay, for named tensors in this order and so many steps.

    >>> names = Pattern("00011").parameters(model)
    >>> learner = adapt(model, xs, ys, pattern="00011", steps=5, rule=alfa(names, 5, lr=0.01), second_order=True)
    >>> loss_fn(learner(xq), yq).backward()                       # reaches the generator's weights too

    Args:
        names: the tensors that the pattern updates, `Pattern.parameters(model, norm)`.
        steps: steps that have rates of their own; later ones have the last one's.
        lr, decay: A and B / lr at the start.

    Raises:
        ValueError: there are no names or steps; when it adapts: the pattern updates other tensors.
    """

    elementwise = True  # tasks may have an axis in front

    def __init__(self, names: Sequence[str], steps: int, lr: float = 0.01, decay: float = 5e-4) -> None:
        super().__init__()
        if not names or steps < 1:
            raise ValueError(f"alfa: at least one name and one step expected, got {len(names)} and {steps}")
        self.names, count = tuple(names), len(names)
        self.rates = nn.Parameter(torch.full((steps, count), lr))
        self.decays = nn.Parameter(torch.full((steps, count), lr * decay))
        self.generator = nn.Sequential(nn.Linear(2 * count, 2 * count), nn.ReLU(), nn.Linear(2 * count, 2 * count))
        nn.init.ones_(self.generator.get_parameter("2.bias"))

    def __repr__(self) -> str:
        return f"alfa({', '.join(self.names)}; steps={len(self.rates)})"

    def constants(self, names: Sequence[str], steps: int) -> None:
        if tuple(names) != self.names:
            raise ValueError(
                f"alfa generates rates for {', '.join(self.names)}, the pattern updates {', '.join(names)}: use the "
                "pattern and norm= that it was made and trained for, or make another one"
            )

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        tasks, names = step.loss.dim(), list(grads)  # 1, or 0 of one task
        own = [params[n] for n in names]
        sizes = [p.shape[tasks:].numel() for p in own]
        theta, g = (torch.cat([t.reshape(*t.shape[:tasks], -1) for t in of], -1) for of in (own, list(grads.values())))
        parts = self.update_row(g, theta, names, sizes, step).split(sizes, -1)
        return {n: part.view(p.shape) for n, part, p in zip(names, parts, own)}, state

    def update_row(
        self, grads: Tensor, params: Tensor, names: Sequence[str], sizes: Sequence[int], step: Step
    ) -> Tensor:
        """What is added to the tensors of these names and sizes, which lie side by side: [T, numbers], or [numbers] of
        one task."""
        count, sizes = len(self.names), tuple(sizes)
        places = _places(self.names, tuple(names), params.device)
        tau = _Means.apply(params, grads, sizes).to(self.rates)
        tau = tau.new_zeros(*tau.shape[:-1], 2 * count).index_copy(-1, places, tau)
        row = min(step.index, len(self.rates) - 1)
        found = self.generator(tau) * torch.cat([self.rates[row], self.decays[row]])  # [T, 2 L]
        return _Changes.apply(found.index_select(-1, places).to(params.dtype), params, grads, sizes)


@lru_cache(64)
def _places(all_names: tuple[str, ...], names: tuple[str, ...], device: torch.device) -> Tensor:
    """Where the rates and the decays of these names stand among those of all."""
    own = [all_names.index(n) for n in names]
    return torch.tensor([*own, *(len(all_names) + i for i in own)], device=device)


@lru_cache(64)
def _owners(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each number of tensors side by side, which tensor it belongs to; and the sizes."""
    each = torch.tensor(sizes, device=device)
    return torch.arange(len(sizes), device=device).repeat_interleave(each), each


def _sums(row: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The sum of each tensor, [T]."""
    return [part.sum(-1) for part in row.split(sizes, -1)]


class _Means(torch.autograd.Function):
    """[T, 2 L]: the means of tensors that lie side by side, and of their gradients, which are constants. One node of
    autograd's graph, where one for each tensor would take longer than the network's steps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, g: Tensor, sizes: tuple[int, ...]) -> Tensor:
        _, each = _owners(sizes, theta.device)
        return torch.stack(_sums(theta, sizes) + _sums(g, sizes), -1) / each.repeat(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sizes = inputs[2]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        owner, each = _owners(ctx.sizes, v.device)
        return (v[..., : len(each)] / each).index_select(-1, owner), None, None


class _Changes(torch.autograd.Function):
    """- a_l g_l - b_l theta_l of tensors that lie side by side, from (a, b) [T, 2 L]; one node as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(factors: Tensor, theta: Tensor, g: Tensor, sizes: tuple[int, ...]) -> Tensor:
        a, b = _each(-factors, sizes)
        return a.mul_(g).addcmul_(b, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.sizes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        factors, theta, g = ctx.saved_tensors
        a, b = _each(-factors, ctx.sizes)
        wanted, v_factors = ctx.needs_input_grad, None
        if wanted[0]:
            parts = [t.split(ctx.sizes, -1) for t in (v, g, theta)]
            v_factors = -torch.stack([torch.linalg.vecdot(p, q) for of in parts[1:] for p, q in zip(parts[0], of)], -1)
        return v_factors, v * b if wanted[1] else None, v * a if wanted[2] else None, None


def _each(factors: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Factors (a, b) [T, 2 L] at every number of their tensors, twice [T, numbers]."""
    owner, _ = _owners(sizes, factors.device)
    return tuple(half.index_select(-1, owner) for half in factors.chunk(2, -1))
