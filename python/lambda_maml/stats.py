"""Means, intervals and bounds over tasks, by Student's t distribution."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def t_central(t: float, dof: int) -> float:
    """P(|X| <= t) for Student's t with a whole number of degrees of freedom: the finite series of Abramowitz and
    Stegun, 26.7.3 (odd) and 26.7.4 (even)."""
    theta = math.atan(t / math.sqrt(dof))
    sin, cos = math.sin(theta), math.cos(theta)
    if dof == 1:
        return 2 * theta / math.pi
    odd = dof % 2
    term = total = cos if odd else 1.0
    for k in range(2 + odd, dof - 1, 2):
        term *= (k - 1) / k * cos * cos
        total += term
    return 2 / math.pi * (theta + sin * total) if odd else sin * total


def t_tail(t: float, dof: int) -> float:
    """P(X > t) for Student's t with `dof` degrees of freedom, to about 1e-15.

    >>> round(t_tail(2.0, 10), 4), t_tail(0.0, 3)
    (0.0367, 0.5)
    """
    inside = t_central(abs(t), dof)
    return (1 - inside) / 2 if t >= 0 else (1 + inside) / 2


@lru_cache(maxsize=256)
def t_quantile(p: float, dof: int) -> float:
    """The value below which Student's t with `dof` degrees of freedom lies with probability `p`, by bisection.

    Infinite for dof < 1, where there is no spread to estimate. Raises ValueError unless 0.5 <= p < 1.
    """
    if not 0.5 <= p < 1:
        raise ValueError(f"t_quantile: p is {p}, expected 0.5 <= p < 1")
    if dof < 1:
        return math.inf
    low, high = 0.0, 1.0
    while t_central(high, dof) < 2 * p - 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_central(middle, dof) < 2 * p - 1 else (low, middle)
    return (low + high) / 2


def mean_ci95(values: Tensor) -> tuple[float, float]:
    """Mean of `values` [n] and the half width of its two-sided 95% t interval (infinite for n = 1)."""
    n = values.numel()
    mean = float(values.double().mean())
    if n < 2:
        return mean, math.inf
    return mean, t_quantile(0.975, n - 1) * float(values.double().std()) / math.sqrt(n)


def upper_bound95(values: Tensor) -> float:
    """One-sided 95% upper confidence bound of the mean of `values` [n] (infinite for n = 1)."""
    n = values.numel()
    if n < 2:
        return math.inf
    return float(values.double().mean()) + t_quantile(0.95, n - 1) * float(values.double().std()) / math.sqrt(n)


def ratio_upper_bound95(numerator: Tensor, denominator: Tensor) -> float:
    """One-sided 95% upper confidence bound of mean(numerator) / mean(denominator) for paired samples [n].

    Fieller's theorem: the largest m with mean(numerator - m * denominator) + t * standard error >= 0. Infinite for
    n = 1 and where the denominator's mean is not clearly above zero.
    """
    n = numerator.numel()
    if n < 2:
        return math.inf
    a, b = float(numerator.double().mean()), float(denominator.double().mean())
    (var_a, cov), (_, var_b) = torch.cov(torch.stack([numerator.double(), denominator.double()])).tolist()
    weight = t_quantile(0.95, n - 1) ** 2 / n
    # (b m - a)^2 = weight * Var(numerator - m * denominator), a quadratic in m; its larger root is the bound.
    p, q, r = b * b - weight * var_b, a * b - weight * cov, a * a - weight * var_a
    if b <= 0 or p <= 0:
        return math.inf
    return (q + math.sqrt(max(q * q - p * r, 0.0))) / p
