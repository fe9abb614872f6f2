"""The built-in rules: plain gradient descent is one of many. `Rule` is the base of a rule of your own."""

from __future__ import annotations

import marshal
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lambda_kernels._torch import mode_active
from lambda_kernels.cache import Bounded

from ..network import Layer
from .rates import DEFAULT_LR, Rate, Rates
from .rule import Params, Rule, State, Step, is_rule

__all__ = ["Params", "Rule", "State", "Step", "adam", "clip", "momentum", "rmsprop", "rule_of", "sgd", "weight_decay"]


class sgd(Rule):
    """Gradient descent: theta <- theta - lr g (Finn et al. 2017, equation 1). `lr`: see `Rate`; learned where it
    requires a gradient, as in Meta-SGD (Li et al. 2017) and MAML++ (Antoniou et al. 2019).

    >>> learner = adapt(model, xs, ys, pattern="00011", rule=rules.sgd([0.1, 0.1, 0.1, 0.05, 0.05]))  # per layer
    >>> rates = nn.Parameter(torch.full((5, 1), 0.1))                                                # per step, learned
    >>> loss_fn(adapt(model, xs, ys, pattern="00011", steps=5, rule=rules.sgd(rates))(xq), yq).backward()
    >>> rates.grad.shape
    torch.Size([5, 1])

    Raises:
        ValueError: a rate is no finite number of at least 0; where it is used, the rates do not fit layers or steps.
    """

    elementwise = True

    def __init__(self, lr: Rate) -> None:
        super().__init__()
        self.rates = Rates(lr)
        for at, parameter in enumerate(self.rates.parameters):
            self.register_parameter(f"rate{at}", parameter)

    @property
    def lr(self) -> Any:
        """The rates as they were given, arrays as lists."""
        return self.rates.value

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        return {name: g * -self.rates.at(name, step.index) for name, g in grads.items()}, state

    def constants(self, names: Sequence[str], steps: int) -> Sequence[Sequence[float]] | None:
        own = type(self).update is not sgd.update  # a class made of this one may do anything with the rates
        return None if own else self.rates.constants(names, steps)

    def bind(self, layers: Sequence[Layer], params: Mapping[str, Tensor]) -> Rule:
        rates = self.rates.bound(layers, params)
        if rates is self.rates:
            return self
        bound = object.__new__(type(self))
        bound.__dict__.update(self.__dict__, rates=rates)
        return bound

    def check_steps(self, steps: int) -> None:
        self.rates.check_steps(steps)

    @property
    def learned(self) -> bool:
        return self.rates.learned or super().learned

    @cached_property
    def fixed(self) -> bytes | None:
        """The rates of plain gradient descent where all are numbers, which do not change, as a key; else None."""
        return marshal.dumps(self.rates.value) if type(self) is sgd and not self.rates.tensors else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = dict(self._parameters)
        super()._load_from_state_dict(*args, **kwargs)
        new = {id(p): self._parameters[n] for n, p in before.items() if self._parameters[n] is not p}
        if new:  # load_state_dict(assign=True)
            self.rates = self.rates.replaced(new)

    def extra_repr(self) -> str:
        own = [f"{name}={value!r}" for name, value in self._settings().items()]
        return ", ".join([f"lr={self.rates!r}", *own])

    def _settings(self) -> dict[str, Any]:
        """What else the rule was made with."""
        return {}


class _Adaptive(sgd):
    """A rule with rates that remembers something: its rates alone do not tell its steps."""

    def init(self, params: Params) -> State:
        return {name: torch.zeros_like(_real(p)) for name, p in params.items()}

    def _step(self, directions: Params, grads: Params, step: Step) -> Params:
        """The rates on directions that are as `_real` gives them."""
        own = {n: torch.view_as_complex(d) if grads[n].is_complex() else d for n, d in directions.items()}
        return super().update(own, (), {}, step)[0]


class momentum(_Adaptive):
    """Gradient descent with momentum: v <- decay v + g, theta <- theta - lr v; with `nesterov` - lr (g + decay v).
    Computed as by `torch.optim.SGD` (without dampening); v is 0 before the first step.

    >>> learner = adapt(model, xs, ys, pattern="00011", rule=rules.momentum(0.03, decay=0.9, nesterov=True))

    Raises:
        ValueError: a rate as in `sgd`, or `decay` is not in [0, 1).
    """

    def __init__(self, lr: Rate, decay: float = 0.9, nesterov: bool = False) -> None:
        super().__init__(lr)
        self.decay, self.nesterov = _share("decay", decay), nesterov

    def _settings(self) -> dict[str, Any]:
        return {"decay": self.decay, "nesterov": self.nesterov}

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        real = {n: _real(g) for n, g in grads.items()}
        velocity = {n: self.decay * state[n] + g for n, g in real.items()}
        ahead = {n: g + self.decay * velocity[n] for n, g in real.items()} if self.nesterov else velocity
        return self._step(ahead, grads, step), {**state, **velocity}


class adam(_Adaptive):
    """Adam (Kingma, Ba 2015, algorithm 1), with the bias of both moments corrected. Computed as by `torch.optim.Adam`;
    a parameter that only later steps update begins with its own first step.

    >>> learner = adapt(model, xs, ys, pattern="00011", rule=rules.adam(0.01, betas=(0.9, 0.99)))

    Raises:
        ValueError: a rate as in `sgd`, or one of `betas` is not in [0, 1).
    """

    def __init__(self, lr: Rate, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(lr)
        self.betas, self.eps = (_share("betas[0]", betas[0]), _share("betas[1]", betas[1])), eps

    def _settings(self) -> dict[str, Any]:
        return {"betas": self.betas, "eps": self.eps}

    def init(self, params: Params) -> State:
        # Both moments, and the number of a parameter's steps so far, of its shape: with many tasks it has their axis
        # too.
        return tuple(super(adam, self).init(params) for _ in range(3))

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        first, second, count = state
        b1, b2 = self.betas
        real = {n: _real(g) for n, g in grads.items()}
        count = {**count, **{n: count[n] + 1 for n in real}}
        first = {**first, **{n: b1 * first[n] + (1 - b1) * g for n, g in real.items()}}
        second = {**second, **{n: b2 * second[n] + (1 - b2) * g * g for n, g in real.items()}}
        mean = {n: first[n] / (1 - b1 ** count[n]) for n in real}
        spread = {n: _root(second[n] / (1 - b2 ** count[n])) for n in real}
        directions = {n: mean[n] / (spread[n] + self.eps) for n in real}
        return self._step(directions, grads, step), (first, second, count)


class rmsprop(_Adaptive):
    """RMSprop: s <- alpha s + (1 - alpha) g^2, theta <- theta - lr g / (sqrt(s) + eps). Computed as by
    `torch.optim.RMSprop`.

    >>> learner = adapt(model, xs, ys, pattern="00011", rule=rules.rmsprop(0.003, alpha=0.9))

    Raises:
        ValueError: a rate as in `sgd`, or `alpha` is not in [0, 1).
    """

    def __init__(self, lr: Rate, alpha: float = 0.99, eps: float = 1e-8) -> None:
        super().__init__(lr)
        self.alpha, self.eps = _share("alpha", alpha), eps

    def _settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "eps": self.eps}

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        real = {n: _real(g) for n, g in grads.items()}
        squares = {n: self.alpha * state[n] + (1 - self.alpha) * g * g for n, g in real.items()}
        directions = {n: g / (_root(squares[n]) + self.eps) for n, g in real.items()}
        return self._step(directions, grads, step), {**state, **squares}


class weight_decay(Rule):
    """Adds `rate` theta to the gradient, as the argument of this name does in `torch.optim`.

    >>> learner = adapt(model, xs, ys, pattern="00011", rule=rules.weight_decay(1e-4) | rules.sgd(0.1))

    Raises:
        ValueError: `rate` is no finite number of at least 0.
    """

    elementwise, ends = True, False

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < float("inf"):
            raise ValueError(f"weight_decay: rate must be at least 0, got {rate!r}")
        self.rate = rate

    def extra_repr(self) -> str:
        return f"{self.rate!r}"

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        return {name: g + self.rate * params[name] for name, g in grads.items()}, state


class clip(Rule):
    """Bounds the gradient: its norm over all parameters of a task (`norm`), or each of its numbers (`value`).

    >>> learner = adapt(model, xs, ys, pattern="00011", rule=rules.clip(norm=1.0) | rules.sgd(0.1))

    Computed as by `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`.

    Raises:
        ValueError: not exactly one of `norm` and `value` is given, or it is not above 0.
    """

    ends = False

    def __init__(self, norm: float | None = None, value: float | None = None) -> None:
        super().__init__()
        if (norm is None) == (value is None):
            raise ValueError("clip: give either norm (of all gradients) or value (of each number)")
        limit = norm if norm is not None else value
        if limit is None or not limit > 0.0:
            raise ValueError(f"clip: the bound must be above 0, got {limit!r}")
        self.norm, self.value = norm, value

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}" if self.norm is not None else f"value={self.value!r}"

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        if self.value is not None:
            bounded = {n: _real(g).clamp(-self.value, self.value) for n, g in grads.items()}
            return {n: torch.view_as_complex(b) if grads[n].is_complex() else b for n, b in bounded.items()}, state
        assert self.norm is not None
        squares = torch.stack([_real(g).square().sum() for g in grads.values()]).sum()
        # Where all gradients are 0 the root has no derivative, and nothing is to be clipped.
        total = torch.where(squares > 0, squares, 1.0).sqrt()
        factor = torch.where(squares > 0, self.norm / (total + 1e-6), 1.0).clamp(max=1.0)
        return {name: g * factor.to(g.dtype) for name, g in grads.items()}, state


_DESCENTS: Bounded[sgd] = Bounded(256)


def _descent(lr: Any) -> sgd:
    """sgd(lr); the same object for the same numbers, so that what was made of them is found again."""
    lr = _numbers(lr)
    try:
        numbers = isinstance(lr, np.ndarray) and lr.dtype != object
        key = (lr.shape, lr.dtype, lr.tobytes()) if numbers else marshal.dumps(lr, 2)
    except ValueError:  # tensors, mappings with tensors
        return sgd(lr)
    rule = _DESCENTS.get(key)
    return _DESCENTS.setdefault(key, sgd(lr)) if rule is None else rule


def _numbers(lr: Any) -> Any:
    """Constant rates in a tensor as the numbers that it holds now, which are known beforehand; others as they are."""
    constant = type(lr) is Tensor and lr.dim() in (1, 2) and lr.is_floating_point() and not lr.requires_grad
    if not constant or lr.device.type != "cpu" or lr.numel() == 0 or mode_active() is not None:
        return lr
    low, high = lr.aminmax()
    return lr.tolist() if low >= 0.0 and high < math.inf else lr


def rule_of(lr: Rate, rule: Rule | None = None) -> Rule:
    """The rule that `lr` and `rule` name: `lr` alone is `sgd(lr)`.

    Raises:
        ValueError: both are given, or the rule changes gradients only.
        TypeError: `rule` is no rule.
    """
    if rule is None:
        return _descent(lr)
    given: Any = rule
    if isinstance(given, type):
        raise TypeError(f"rule must be a rule, got the class {given.__name__}: make one, as in {given.__name__}(...)")
    if not is_rule(rule):
        raise TypeError(f"rule must have init and update, as lambda_maml.rules.sgd(0.1) has, got {rule!r}")
    if lr is not DEFAULT_LR:
        raise ValueError(f"give lr={lr!r} or rule={rule!r}, not both: a rule has its own rates")
    if not getattr(rule, "ends", True):
        raise ValueError(
            f"{rule!r} changes gradients only: end with a rule that takes the step, as in clip(norm=1.0) | sgd(0.1)"
        )
    return rule


def _share(name: str, value: float) -> float:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
    return value


def _real(t: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, as torch's optimisers see it."""
    return torch.view_as_real(t) if t.is_complex() else t


def _root(square: Tensor) -> Tensor:
    """The square root, with the derivative 0 at 0, where torch's is infinite."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())
