"""Adaptation in closed form by the neural tangent kernel of the layers that move.

Zhou, Wang, Wang, Wang, Ma, Xu, *Meta-Learning with Neural Tangent Kernels*, ICLR 2021 (arXiv 2102.03909), equations 5
and 6. The network is linearised at the meta-parameters; with J the Jacobian of the support outputs f(X) [N C], with H =
J J^T and the squared loss 1/2 |f(X) - Y|^2, gradient flow for time t, or K steps of rate e, give

    theta_t = theta + J^T phi(H) (Y - f(X)),  f_t(x) = f(x) + J(x) (theta_t - theta)
    phi(h) = (1 - e^{-t h}) / h   (t at h = 0),   or   (1 - (1 - e h)^K) / h   (K e at h = 0)

and with a ridge r on the way from theta, h + r in the places of h in phi; time inf and r = lam is the stand-in of
`ridge` for all layers.

What differs here: phi by the eigenvectors of H, exact where the paper's Pade approximation of e^{-tH} is wrong at large
t; steps as well as time; the Jacobian of the updated layers only, behind their frozen prefix, and for the head alone
none at all: H is (Phi Phi^T) x I. Batch norms take each set's own statistics, as the network's forward does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..inner.checks import check_steps
from ..places import Learned, Params, Problem
from .catalogue import method
from .ridge import fitted_head, is_head_alone, refitted, regularised, targets_of

__all__ = ["ntk"]


@method("solver", needs="one pattern, no schedule", chain="no steps: one pass and one system")
class ntk(nn.Module):
    """Gradient descent on the squared loss of the linearised network, all of it at once.

    >>> learner = adapt(model, xs, ys, pattern="00011", solver=ntk(time=10.0))
    >>> learner = adapt(model, xs, ys, pattern="00001", solver=ntk(steps=50, lr=0.01))
    >>> learner(xq).shape                       # of the linearised network, for the head alone the network's own
    torch.Size([75, 5])

    Args:
        time: of gradient flow; math.inf is its limit.
        steps, lr: K steps of this rate, in place of time.
        ridge: r of r/2 |theta_t - theta|^2, at least 0.

    Raises:
        ValueError: a number is out of range, or not exactly one of time and steps is given; when it adapts: the pattern
            is a schedule, labels fit no squared loss, or the limit is asked of a singular kernel without a ridge.
    """

    linearises = True  # its predictions may be those of the linearised network

    def __init__(
        self, time: float | None = None, steps: int | None = None, lr: float | None = None, ridge: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        if (time is None) == (steps is None) or (steps is None) != (lr is None):
            raise ValueError(f"ntk: give either time, or steps and lr, got time={time}, steps={steps}, lr={lr}")
        if time is not None and not time >= 0.0 or lr is not None and not 0.0 < lr < math.inf:
            raise ValueError(f"ntk: time must be at least 0 and lr above 0, got time={time}, lr={lr}")
        if not 0.0 <= ridge < math.inf:
            raise ValueError(f"ntk: ridge must be at least 0, got {ridge!r}")
        self.time, self.count, self.lr, self.ridge = time, None if steps is None else check_steps(steps), lr, ridge

    def extra_repr(self) -> str:
        way = f"time={self.time}" if self.count is None else f"steps={self.count}, lr={self.lr}"
        return way + (f", ridge={self.ridge}" if self.ridge else "")

    def check(self, problem: Problem) -> None:
        if "," in problem.pattern:
            raise ValueError(f"ntk: {problem.pattern} is a schedule, a closed form has no steps: give one pattern")

    def forward(self, problem: Problem) -> Learned:
        self.check(problem)
        if is_head_alone(problem):
            return fitted_head(problem, self._dual)
        now = problem.meta if problem.second_order else _leaves(problem.meta)
        outputs = problem.outputs(now)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise ValueError(f"ntk: outputs [N, C] expected, {problem.network} gives {_told(outputs)}")
        rows = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device).view(-1, *outputs.shape)
        jacobian = torch.autograd.grad(
            outputs, list(now.values()), rows, is_grads_batched=True, create_graph=problem.second_order,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        flat = torch.cat([j.flatten(1) for j in jacobian], 1)  # [N C, parameters]
        constant = outputs if problem.second_order else outputs.detach()
        rest = (targets_of(problem, constant) - constant).reshape(-1, 1)
        way = flat.T @ self._dual(flat @ flat.T, rest)
        sizes = [p.numel() for p in now.values()]
        change = {n: w.view_as(now[n]) for n, w in zip(now, way.squeeze(1).split(sizes))}
        params = {n: problem.meta[n] + change[n] for n in now}
        return Learned(params, lambda x: _linearised(problem, change, x))

    def of_head(self, phi: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> list[Tensor]:
        """The new head from features [N, F] and class numbers [N]: what a prepared call needs of a solver."""
        return refitted(phi, weight, bias, labels, self._dual)

    def _dual(self, kernel: Tensor, rest: Tensor) -> Tensor:
        """phi(kernel + ridge) rest."""
        if self.time == math.inf:
            return regularised(kernel, rest, self.ridge)
        matrix: Tensor = MatrixFunction.apply(kernel, lambda h: self._phi(h + self.ridge), self._limit)
        return matrix @ rest

    @property
    def _limit(self) -> float:
        """phi(0), for how long the numbers of small eigenvalues go on."""
        if self.count is not None:
            assert self.lr is not None
            return self.count * self.lr
        assert self.time is not None
        return self.time

    def _phi(self, h: Tensor) -> Tensor:
        """phi of each number; for small ones without the difference that would leave no digits of it."""
        if self.count is None:
            done = -torch.expm1(-self._limit * h)
        else:
            assert self.lr is not None
            z = self.lr * h
            by_logarithm = -torch.expm1(self.count * torch.log1p(-z.clamp(max=0.5)))
            done = torch.where(z < 0.5, by_logarithm, 1 - (1 - z) ** self.count)
        return torch.where(h == 0, self._limit, done / torch.where(h == 0, 1.0, h))


class MatrixFunction(torch.autograd.Function):
    """phi of a symmetric matrix, by its eigenvectors: U phi(h) U^T.

    The derivative in direction D is U (G * (U^T D U)) U^T with the divided differences G_ij = (phi_i - phi_j) / (h_i -
    h_j), phi'(h_i) for equal ones (Higham, *Functions of Matrices*, 2008, theorem 3.11): that of `eigh` alone would
    divide by 0 there.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, phi: Callable[[Tensor], Tensor], limit: float) -> Tensor:
        try:
            h, u = torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            if torch.isfinite(matrix).all():
                raise
            raise FloatingPointError(
                f"the kernel of {len(matrix)} support outputs diverged: it holds infinite numbers or NaN: look at the "
                "images' scale"
            ) from error
        ctx.phi, ctx.limit = phi, limit  # at h = 0
        ctx.save_for_backward(h, u)
        found: Tensor = (u * phi(h)) @ u.T
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        h, u = ctx.saved_tensors
        values = ctx.phi(h)
        gap, middle = h[:, None] - h, (h[:, None] + h) / 2
        # phi bends where h is about 1 / phi(0), and beyond on the scale of h itself.
        wide = torch.finfo(h.dtype).eps ** (1 / 3) * (middle.abs() + (1 / ctx.limit if ctx.limit else 1.0))
        near = gap.abs() < wide
        slope = (ctx.phi(middle + wide) - ctx.phi(middle - wide)) / (2 * wide)
        g = torch.where(near, slope, (values[:, None] - values) / torch.where(near, 1.0, gap))
        symmetric = (gradient + gradient.T) / 2
        return u @ (g * (u.T @ symmetric @ u)) @ u.T, None, None


def _linearised(problem: Problem, change: Params, x: Any) -> Tensor:
    """f(x) + J(x) change, for inputs x [Q, ...]."""
    with forward_ad.dual_level():
        moving = {n: forward_ad.make_dual(problem.start[n], change[n]) for n in change}
        value, slope = forward_ad.unpack_dual(problem.predict(moving, x))
    found: Tensor = value if slope is None else value + slope
    return found


def _leaves(params: Params) -> Params:
    return {n: p.detach().requires_grad_() for n, p in params.items()}


def _told(outputs: Any) -> str:
    return str(list(outputs.shape)) if isinstance(outputs, Tensor) else type(outputs).__name__
