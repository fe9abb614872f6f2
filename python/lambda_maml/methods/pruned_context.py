"""Learning a signal from the points that teach most, and the longer descent that such a start is pulled towards.

Tack, Kim, Yu, Lee, Shin, Schwarz, *Learning Large-scale Neural Fields via Context Pruned Meta-Learning* (GradNCP),
NeurIPS 2023, arXiv 2302.00617. With e(x) = y - f(x) and phi(x) what the last layer reads:

    select      the share of points with the highest s(x) = |e(x)| sqrt(1 + |phi(x)|^2), in every step; s is the norm of
                the error's gradient with respect to the last layer
    training    theta <- theta - lr grad of the mean loss over these points
    adapting    theta <- theta - lr (|g_sel| / |g_full|) g_full: the whole context's direction, the pruned one's length
    bootstrap   outer loss + weight |theta_boot - theta_K|, theta_boot a constant, `steps` first-order steps further on

What differs here: for class numbers e is softmax minus one-hot; the points are rows of what the frozen prefix hands
over, so that it runs once, on all of them; the norms are over the tensors that the pattern updates. Scoring is a
forward pass over all points, so what is saved is the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inner import autograd
from ..places import Learned, Objective, Params, Problem, Selector, checked
from .catalogue import method
from .ridge import targets_of

__all__ = ["bootstrap", "rescaled", "top_gradient"]


@method("selector", needs="no batch norms, a linear head", chain="no: a step sees some of the rows")
class top_gradient(nn.Module):
    """A selector: the share of the support rows with the largest gradients, in their own order.

    >>> solver = descend(rules.sgd(0.01), 16, estimator=backward(select=top_gradient(0.25)))
    >>> field, (xs, ys, xq, yq) = siren(2, 1, width=16, layers=3), pictures(data.load("glyphs", split="val"))(0, 1)[0]
    >>> adapt(field, xs, ys, pattern="011", solver=solver, loss=torch.nn.functional.mse_loss)(xq).shape
    torch.Size([784, 1])

    Raises:
        ValueError: the share is not in (0, 1]; when it adapts: batch norms make a row's output depend on the others,
            or labels fit no squared loss.
    """

    def __init__(self, share: float = 0.25) -> None:
        super().__init__()
        if not 0.0 < share <= 1.0:
            raise ValueError(f"top_gradient: share must be in (0, 1], got {share!r}")
        self.share = share

    def extra_repr(self) -> str:
        return f"{self.share}"

    def check(self, problem: Problem) -> None:
        if problem.mixes_rows:
            raise ValueError(
                f"top_gradient: the batch norms of {problem.network} take their statistics from all rows, a part of "
                "them is normalised otherwise: use a network without batch norms"
            )

    def scores(self, problem: Problem, params: Params) -> Tensor:
        """[N]: s of each row."""
        self.check(problem)
        with torch.no_grad():
            features = problem.features(params)
            weight, bias = problem.head
            head = {**problem.start, **params}
            known = weight in head  # else the head is frozen
            outputs = F.linear(features, head[weight], head.get(bias)) if known else problem.outputs(params)
            targets = targets_of(problem, outputs)
            given = outputs if torch.is_floating_point(problem.labels) else outputs.softmax(1)
            return (targets - given).norm(dim=1) * (1 + features.square().sum(1)).sqrt()

    def forward(self, problem: Problem, params: Params, step: int) -> Tensor:
        scores = self.scores(problem, params)
        kept = scores.topk(max(1, int(self.share * len(scores)))).indices
        return kept.sort().values


@method("estimator", needs="what its selector needs", chain="no: two gradients a step", fill={"select": "select"})
class rescaled(nn.Module):
    """An estimator: the whole support set's gradient, with the norm of that of the selected rows.

    >>> solver = descend(rules.sgd(0.01), 16, estimator=rescaled(top_gradient(0.25)))
    >>> solver.descent is None                                # so the steps run by autograd
    True

    In first order; the factor is a constant.
    """

    def __init__(self, select: Selector) -> None:
        super().__init__()
        self.select = select

    def check(self, problem: Problem) -> None:
        checked(self.select, problem)

    def forward(self, problem: Problem, params: Params, step: int) -> tuple[Tensor, Params]:
        rows = self.select(problem, params, step)
        some = autograd.gradients(problem.pattern, params, problem.loss(params, rows), create_graph=False)
        loss = problem.loss(params)
        whole = autograd.gradients(problem.pattern, params, loss, create_graph=problem.second_order)
        factor = _norm(some) / (_norm(whole).detach() + 1e-16)
        return loss, {n: factor * g for n, g in whole.items()}


@method("objective", chain="no: its own steps go by autograd")
class bootstrap(Objective):
    """weight |theta_boot - theta_K|_2 over all tensors that moved; added to `query_loss()`.

    >>> query_loss(torch.nn.functional.mse_loss) + bootstrap(steps=5, lr=0.05, weight=100.0)
    query_loss(mse_loss) + bootstrap(steps=5, lr=0.05, weight=100.0)

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, steps: int = 5, lr: float = 0.05, weight: float = 100.0) -> None:
        super().__init__()
        if steps < 1 or not 0.0 < lr < math.inf or not 0.0 <= weight < math.inf:
            raise ValueError(
                f"bootstrap: steps of at least 1, lr above 0 and weight of at least 0 expected, got {steps}, {lr} and "
                f"{weight}"
            )
        self.steps, self.lr, self.weight = steps, lr, weight

    def extra_repr(self) -> str:
        return f"steps={self.steps}, lr={self.lr}, weight={self.weight}"

    def forward(self, problem: Problem, learned: Learned, xq: Any, yq: Any) -> Tensor:
        ahead = {n: p.detach() for n, p in learned.params.items()}
        for _ in range(self.steps):
            now = {n: p.requires_grad_() for n, p in ahead.items()}
            grads = autograd.gradients(problem.pattern, now, problem.loss(now), create_graph=False)
            ahead = {n: (p - self.lr * grads[n] if n in grads else p).detach() for n, p in now.items()}
        return self.weight * _norm({n: p - ahead[n] for n, p in learned.params.items()})


def _norm(tensors: Params) -> Tensor:
    """Of all numbers together; its derivative at 0 is 0."""
    square = torch.stack([t.square().sum() for t in tensors.values()]).sum()
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
