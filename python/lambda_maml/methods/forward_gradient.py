"""Gradient estimates without a backward pass: directional derivatives by forward-mode differentiation.

Ren, Kornblith, Liao, Hinton, *Scaling Forward Gradient With Local Losses*, ICLR 2023, arXiv 2210.03310. For a layer z =
W x (p inputs, q outputs) and a loss L, both unbiased, averaged over M directions:

    weights:     V ~ N(0, I) of W's shape,  g = <dL/dW, V> V          error per entry about (p q + 1) times the squared
    entry activities:  u ~ N(0, I_q) per example, g = <dL/dz, u> u x^T      about q + 1 times, as x is known

What differs here: the updated layers alone are perturbed, in one pass, so that a frozen prefix needs no tangent and is
run once. Activities are those of the head, under a pattern of the head alone: a batch norm behind a perturbed layer
mixes the examples, whose derivatives then cannot be told apart. Local losses are those of `local_losses`. It does not
beat a backward pass in time, which costs about two forwards; its merit is memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..places import Params, Problem
from .catalogue import method
from .ridge import is_head_alone

__all__ = ["forward_gradient"]


@method("estimator", needs="first order", chain="no: it has no backward pass")
class forward_gradient(nn.Module):
    """An estimator by `directions` directions in weights or activities; in first order.

    >>> solver = descend(rules.sgd(0.01), 5, estimator=forward_gradient(directions=8, at="activities"))
    >>> learner = adapt(model, xs, ys, pattern="00001", solver=solver)

    Directions come from (seed, iteration, task, step), see `places.Turn`.

    Raises:
        ValueError: a setting is out of range; when it adapts: in second order, or with activities under another pattern
            than that of the head.
    """

    def __init__(self, directions: int = 1, at: str = "weights") -> None:
        super().__init__()
        if directions < 1 or at not in ("weights", "activities"):
            raise ValueError(
                "forward_gradient: directions of at least 1 at 'weights' or 'activities' expected, got "
                f"{directions} at {at!r}"
            )
        self.directions, self.at = directions, at

    def extra_repr(self) -> str:
        return f"directions={self.directions}, at={self.at!r}"

    def check(self, problem: Problem) -> None:
        if problem.second_order:
            raise ValueError("forward_gradient has no graph to differentiate through: adapt in first order")
        if self.at == "activities" and not is_head_alone(problem):
            raise ValueError(
                f"forward_gradient: activities are those of the head, pattern {problem.pattern} moves "
                f"{', '.join(problem.names)}: give the pattern 'head', or at='weights'"
            )

    def forward(self, problem: Problem, params: Params, step: int) -> tuple[Tensor, Params]:
        self.check(problem)
        draw = problem.random(step)
        own = {n: p.detach() for n, p in params.items()}
        with torch.no_grad():
            one = self._by_weights if self.at == "weights" else self._by_activities
            found = [one(problem, own, draw) for _ in range(self.directions)]
        means = {n: torch.stack([grads[n] for _, grads in found]).mean(0) for n in own}
        return found[0][0], means

    def _by_weights(self, problem: Problem, params: Params, draw: torch.Generator) -> tuple[Tensor, Params]:
        ways = {n: _normal(p.shape, p, draw) for n, p in params.items()}
        with forward_ad.dual_level():
            dual = {n: forward_ad.make_dual(p, ways[n]) for n, p in params.items()}
            loss, slope = forward_ad.unpack_dual(problem.loss(dual))
        return loss, {n: slope * way for n, way in ways.items()}

    def _by_activities(self, problem: Problem, params: Params, draw: torch.Generator) -> tuple[Tensor, Params]:
        weight, bias = problem.head
        x = problem.features(params)
        z = F.linear(x, params[weight], params.get(bias))
        u = _normal(z.shape, z, draw)
        with forward_ad.dual_level():
            loss, slopes = forward_ad.unpack_dual(problem.losses(forward_ad.make_dual(z, u)))
        slopes = slopes / len(z)  # of the mean, by each example's logits
        grads = {weight: (slopes.unsqueeze(1) * u).T @ x}
        return loss.mean(), grads if not bias else {**grads, bias: (slopes.unsqueeze(1) * u).sum(0)}


def _normal(shape: torch.Size, like: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=like.dtype).to(like.device)
