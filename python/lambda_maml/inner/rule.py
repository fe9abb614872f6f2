"""What a rule is: how an inner step goes from gradients to new parameters, and rules one after another.

A rule is pure, in the shape of optax's transformations: what it remembers from step to step is handed along, and its
result is added to the parameters. Its parameters are meta-parameters: they get gradients from the outer loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..network import Layer

__all__ = ["Params", "Rule", "State", "Step", "is_learned", "is_rule", "links", "update_of_rows"]

Params = dict[str, Tensor]
State = Any
"""What a rule remembers: tensors in tuples and dicts, those by parameter name of the parameter's shape or of none."""


class Step(NamedTuple):
    """What a rule is told of a step."""

    index: int  # type: ignore[assignment]  # counted from 0
    steps: int | None  # in all, where it is known beforehand
    loss: Tensor  # the support loss
    second_order: bool


class Rule(nn.Module):
    """The base of all rules. A rule of your own defines `update`, and `init` where it remembers something.

    >>> class SignDescent(rules.Rule):
    ...     def update(self, grads, state, params, step):
    ...         return {name: -0.01 * g.sign() for name, g in grads.items()}, state
    >>> learner = adapt(model, xs, ys, pattern="00011", rule=SignDescent())

    `a | b` applies a's result as b's gradients. With many tasks at once, `update` sees one task's tensors (it runs
    under `torch.func.vmap`), unless the class sets `elementwise`: then tensors may have a task axis in front.
    """

    elementwise = False
    ends = True  # whether the result is a step; False for what changes gradients alone, such as `clip`

    def init(self, params: Params) -> State:
        """What the rule remembers before the first step; `params` are all parameters that will be updated."""
        return ()

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        """What is added to the parameters, by name, and what is remembered for the next step.

        grads: those of the parameters that this step updates and that the loss depends on, of the parameters' shapes.
        """
        raise NotImplementedError(f"{type(self).__name__} is a rule without `update`")

    def constants(self, names: Sequence[str], steps: int) -> Sequence[Sequence[float]] | Tensor | None:
        """[steps, names]: the rates, where the rule is gradient descent with rates known beforehand; else None.

        With rates an adaptation may run without autograd (see `lambda_maml.explain`), and 0 freezes exactly.
        """
        return None

    def bind(self, layers: Sequence[Layer], params: Mapping[str, Tensor]) -> Rule:
        """The rule for a network: what it says per layer becomes what it says per parameter."""
        return self

    def check_steps(self, steps: int) -> None:
        """ValueError where the rule is made for another number of steps."""

    @property
    def learned(self) -> bool:
        """Whether the result depends on tensors that require a gradient, beside `grads` and `params`."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def __or__(self, other: Rule) -> Rule:
        if not is_rule(other):
            return NotImplemented
        return _Joined([*links(self), *links(other)])


class _Joined(Rule):
    """Rules one after another, each on the result of the one before."""

    def __init__(self, links: Sequence[Rule]) -> None:
        super().__init__()
        self.links = nn.ModuleList(links) if all(isinstance(r, nn.Module) for r in links) else list(links)
        self.elementwise = all(getattr(r, "elementwise", False) for r in links)
        self.ends = any(getattr(r, "ends", True) for r in links)

    def __repr__(self) -> str:
        return " | ".join(map(repr, links(self)))

    def init(self, params: Params) -> State:
        return tuple(r.init(params) for r in links(self))

    def update(self, grads: Params, state: State, params: Params, step: Step) -> tuple[Params, State]:
        remembered = []
        for link, own in zip(links(self), state, strict=True):
            grads, own = link.update(grads, own, params, step)
            remembered.append(own)
        return grads, tuple(remembered)

    def bind(self, layers: Sequence[Layer], params: Mapping[str, Tensor]) -> Rule:
        return _Joined([r.bind(layers, params) if isinstance(r, Rule) else r for r in links(self)])

    def check_steps(self, steps: int) -> None:
        for link in links(self):
            if isinstance(link, Rule):
                link.check_steps(steps)

    @property
    def learned(self) -> bool:
        return any(is_learned(r) for r in links(self))


def links(rule: Rule) -> list[Rule]:
    return list(rule.links) if isinstance(rule, _Joined) else [rule]  # type: ignore[arg-type]


def is_rule(value: object) -> bool:
    """Whether a value has what a rule needs, a `Rule` or not."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def update_of_rows(rule: Any) -> Callable[[Tensor, Tensor, Sequence[str], Sequence[int], Step], Tensor] | None:
    """A rule's `update_row`, where the class that says how it updates has one: the same as `update`, of tensors that
    lie side by side, (gradients, parameters, names, sizes, step) -> what is added, [T, numbers], or of one task
    [numbers].

    It is for a rule that remembers nothing and does the same for all tensors, in far fewer operations of autograd.
    """
    for kind in type(rule).__mro__:
        if "update" in vars(kind):
            return rule.update_row if "update_row" in vars(kind) else None
    return None


def is_learned(rule: Rule) -> bool:
    """Whether a rule, also one that is no `Rule`, has tensors that require a gradient."""
    known: Any = rule
    if isinstance(known, Rule):
        return known.learned
    parameters = getattr(known, "parameters", None)
    return torch.is_grad_enabled() and callable(parameters) and any(p.requires_grad for p in parameters())
