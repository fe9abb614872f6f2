"""The head's closed form: ridge regression on the features of a frozen prefix, one N x N system in place of steps.

Bertinetto, Henriques, Torr, Vedaldi, *Meta-learning with differentiable closed-form solvers*, ICLR 2019, section 3.1
(R2-D2), and the stand-in for the inner loop of Park, Kang, *Fast Adaptation with Kernel and Gradient based Meta
Learning*, arXiv 2411.00404, whose equations we have not seen: an inner loop that is a closed form in function space.
With Phi = [features, 1] [N, F + 1], one-hot targets Y [N, C] and the head's meta-trained W0 [C, F + 1]:

    W = argmin 1/2 |Phi W^T - Y|^2 + lam/2 |W - W0|^2 = W0 + (Y - Phi W0^T)^T (Phi Phi^T + lam I)^-1 Phi

What differs here: the way is from W0, not from 0, so it is the limit of gradient descent on the same objective; R2-D2
regresses from 0 and learns a scale and a shift of the outputs. Here Y may be scaled: cross-entropy asks for logits that
lie further apart than 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..places import Learned, Problem
from .catalogue import method

__all__ = ["fitted_head", "is_head_alone", "refitted", "regularised", "ridge_head", "targets_of"]


@method("solver", needs="the pattern of a linear head", chain="no steps: one pass and one system")
class ridge_head(nn.Module):
    """Fits the last layer, a linear one, to the support set's labels as numbers; the pattern is that of the head.

    >>> learner = adapt(model, xs, ys, pattern="00001", solver=ridge_head(1.0))
    >>> learner(xq).shape
    torch.Size([75, 5])

    In second order it is differentiated in features, W0 and lam, so that meta-training makes features for it.

    Args:
        lam: the ridge, at least 0; with 0 the support set is fitted exactly, if Phi has rank N.
        learned: whether lam, and scale where it is given, are meta-parameters; their logarithms are then learned, from
            these values on.
        scale: what class numbers are fitted to in place of 1, above 0; numbers as labels stay as they are.

    Raises:
        ValueError: lam or scale is out of range; when it adapts: another layer than the head moves, the labels are
            neither class numbers nor of the outputs' shape, or lam is 0 and Phi has a lower rank than N.
    """

    def __init__(self, lam: float = 1.0, learned: bool = False, scale: float | None = None) -> None:
        super().__init__()
        if not 0.0 <= lam < math.inf or (learned and lam == 0.0):
            raise ValueError(f"ridge_head: lam must be {'above' if learned else 'at least'} 0, got {lam!r}")
        if scale is not None and not 0.0 < scale < math.inf:
            raise ValueError(f"ridge_head: scale must be above 0, got {scale!r}")
        self.fixed_lam, self.fixed_scale = lam, scale
        self.log_lam = nn.Parameter(torch.tensor(math.log(lam))) if learned else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learned and scale is not None else None

    def extra_repr(self) -> str:
        scale = "" if self.fixed_scale is None else f", scale={self.fixed_scale}"
        return f"lam={self.fixed_lam}" + (", learned=True" if self.log_lam is not None else "") + scale

    def check(self, problem: Problem) -> None:
        if not is_head_alone(problem):
            raise ValueError(
                f"ridge_head: pattern {problem.pattern} moves {', '.join(problem.names)}, the closed form is of the "
                "last layer alone: give the pattern 'head', or take ntk() for other layers"
            )

    def forward(self, problem: Problem) -> Learned:
        self.check(problem)
        return fitted_head(problem, self._solve, self._scale)

    def of_head(self, phi: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> list[Tensor]:
        """The new head from features [N, F] and class numbers [N]: what a prepared call needs of a solver."""
        return refitted(phi, weight, bias, labels, self._solve, self._scale)

    @property
    def _scale(self) -> Any:
        return self.fixed_scale if self.log_scale is None else self.log_scale.exp()

    def _solve(self, kernel: Tensor, rest: Tensor) -> Tensor:
        return regularised(kernel, rest, self.fixed_lam if self.log_lam is None else self.log_lam.exp())


def is_head_alone(problem: Problem) -> bool:
    """Whether a linear last layer is all that moves."""
    return set(problem.names) == {n for n in problem.head if n}


def fitted_head(problem: Problem, solve: Callable[[Tensor, Tensor], Tensor], scale: Any = None) -> Learned:
    """The head that `refitted` gives, in the problem's graph."""
    weight, bias = problem.head
    start = problem.constants(problem.meta)
    phi, own = problem.features(start), start[bias] if bias else None
    dual, sums = _dual(phi, start[weight], own, lambda outputs: targets_of(problem, outputs, scale), solve)
    new = {weight: problem.meta[weight] + dual.T @ phi}
    if bias:
        new[bias] = problem.meta[bias] + sums
    return Learned({n: new[n] for n in problem.names})


def refitted(
    phi: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, solve: Callable[[Tensor, Tensor], Tensor],
    scale: Any = None,
) -> list[Tensor]:  # fmt: skip
    """The head W0 + solve(Phi Phi^T, Y - Phi W0^T)^T Phi; `solve` gets [N, N] and [N, C], and gives [N, C].

    phi: [N, F]; labels: [N] class numbers; scale: what Y has in the places of the ones, where it is given.
    """
    dual, sums = _dual(phi, weight, bias, lambda outputs: _one_hot(labels, outputs, scale), solve)
    new = torch.addmm(weight, dual.T, phi)
    return [new] if bias is None else [new, bias + sums]


def _dual(
    phi: Tensor, weight: Tensor, bias: Tensor | None, targets: Callable[[Tensor], Tensor],
    solve: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The dual variables [N, C], and their sums [C]."""
    logits = F.linear(phi, weight, bias)
    kernel = phi @ phi.T
    dual = solve(kernel if bias is None else kernel + 1.0, targets(logits) - logits)
    return dual, dual.sum(0)


def regularised(kernel: Tensor, rest: Tensor, lam: Any) -> Tensor:
    """(kernel + lam I)^-1 rest.

    Raises:
        ValueError: the matrix is singular.
    """
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    try:
        found: Tensor = torch.linalg.solve(kernel + lam * eye, rest)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            f"the kernel of {len(kernel)} support outputs is singular with the ridge {float(lam):g}: raise the ridge"
        ) from error
    return found


def targets_of(problem: Problem, outputs: Tensor, scale: Any = None) -> Tensor:
    """What a squared loss compares the support outputs [N, C] with: labels of their shape, or class numbers one-hot,
    times `scale` where it is given.

    Raises:
        ValueError: the labels are neither.
    """
    labels: Any = problem.labels
    if isinstance(labels, Tensor) and labels.shape == outputs.shape and labels.is_floating_point():
        return labels
    if isinstance(labels, Tensor) and labels.shape == outputs.shape[:1] and not labels.is_floating_point():
        return _one_hot(labels.long(), outputs, scale)
    told = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise ValueError(
        f"a closed form needs labels for a squared loss, class numbers [N] or numbers {list(outputs.shape)} as "
        f"{problem.network} gives them, got {told}"
    )


def _one_hot(labels: Tensor, outputs: Tensor, scale: Any) -> Tensor:
    ones = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    rows = ones.index_select(0, labels)
    return rows if scale is None else rows * scale
