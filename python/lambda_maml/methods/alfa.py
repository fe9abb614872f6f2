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
        tasks = step.loss.shape  # [T], or of one task []
        zero = self.rates.new_zeros(tasks)

        def means(of: Params) -> list[Tensor]:
            return [of[n].flatten(len(tasks)).mean(-1).to(zero) if n in of else zero for n in self.names]

        slopes = means({n: g.detach() for n, g in grads.items()})
        found = self.generator(torch.stack(means(params) + slopes, -1))  # [T, 2 L]
        row = min(step.index, len(self.rates) - 1)
        own = found * torch.cat([self.rates[row], self.decays[row]])
        factors = dict(zip(self.names, zip(*(half.unbind(-1) for half in own.chunk(2, -1)))))
        return {n: _change(params[n], g, *factors[n]) for n, g in grads.items()}, state


def _change(theta: Tensor, gradient: Tensor, rate: Tensor, decay: Tensor) -> Tensor:
    shape = (*rate.shape, *(1,) * (theta.dim() - rate.dim()))
    return torch.addcmul(gradient * -rate.to(theta).view(shape), theta, decay.to(theta).view(shape), value=-1)
