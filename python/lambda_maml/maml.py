"""LambdaMAML: learn2learn's verbs, clone() and adapt(loss), with a pattern and prefix reuse."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .patterns import Pattern
from .plan import Frozen, Part, plan_of, state_of

__all__ = ["LambdaMAML", "TaskLearner"]


class LambdaMAML(nn.Module):
    """A model to be meta-trained, whose clones adapt to one task each.

        maml = LambdaMAML(model, lr=0.03, pattern="00011")
        task = maml.clone()
        for _ in range(5):
            task.adapt(loss_fn(task(xs), ys))
        loss_fn(task(xq), yq).backward()          # reaches model.parameters(), frozen layers too

    Args:
        model: any module; it becomes the submodule `module`.
        lr: inner learning rate.
        pattern: one bit a layer, or a schedule over the calls of `adapt`; None updates every layer.
        first_order: treat the inner gradients as constants (first-order MAML).
        norm: "follow" or "never": do norm gamma and beta follow their layer's bit.

    Raises:
        ValueError: the pattern does not fit the model, or a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        pattern: str | Pattern | None = None,
        first_order: bool = False,
        norm: str = "follow",
    ) -> None:
        super().__init__()
        if not 0.0 < lr < float("inf"):
            raise ValueError(f"lr must be a positive number, got {lr!r}")
        if norm not in ("follow", "never"):
            raise ValueError(f"norm must be 'follow' or 'never', got {norm!r}")
        plan = plan_of(model)
        self.module = model
        self.lr, self.first_order, self.norm = lr, first_order, norm
        self.pattern = Pattern.full(len(plan.layers)) if pattern is None else Pattern.parse(pattern)
        self.pattern.check(plan)

    def forward(self, x: Tensor) -> Any:
        """The model's own result."""
        return self.module(x)

    def clone(self) -> TaskLearner:
        """A learner that starts from the model's present parameters; gradients of what it computes reach them."""
        state = state_of(self.module)
        copies = {id(p): p.clone() for p in self.module.parameters()}  # an optimiser's step must not reach the learner
        return TaskLearner(self, {n: copies.get(id(t), t) for n, t in state.items()}, 0)


class _Held(NamedTuple):
    """The frozen prefix of the last input."""

    x: Tensor
    key: tuple[Part, int, bool]  # what is updated, the input's version, whether gradients are recorded
    frozen: Frozen


class TaskLearner(nn.Module):
    """A model on its way through a task's inner loop: call it, give the loss to `adapt`, and so on."""

    def __init__(self, maml: LambdaMAML, state: dict[str, Tensor], step: int) -> None:
        super().__init__()
        self._maml = (maml,)  # in a tuple: not a submodule
        self._state, self._step = state, step
        self._held: _Held | None = None

    def forward(self, x: Tensor) -> Any:
        """The model's result with the parameters adapted so far; for the same x the frozen prefix is not run again."""
        maml = self._maml[0]
        plan = plan_of(maml.module)
        part = plan.part(maml.pattern.at(self._step), maml.norm)
        modules = plan.program.bind(maml.module)
        held = self._held
        if held is None or held.x is not x or held.key != (part, x._version, torch.is_grad_enabled()):
            key = (part, x._version, torch.is_grad_enabled())
            held = self._held = _Held(x, key, part.freeze(modules, self._state, x))
        return held.frozen(modules, self._state)

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One inner step: theta <- theta - lr grad loss for the parameters that the pattern updates in this step.

        Raises:
            ValueError: no updated parameter has a part in the loss.
            FloatingPointError: the loss is infinite or NaN.
        """
        maml = self._maml[0]
        first_order = maml.first_order if first_order is None else first_order
        if not bool(torch.isfinite(loss.detach()).all()):
            raise FloatingPointError(
                f"step {self._step + 1} of the inner loop: the loss is {float(loss)}; lower lr={maml.lr}, or look "
                "for NaN in the images"
            )
        plan = plan_of(maml.module)
        names = plan.part(maml.pattern.at(self._step), maml.norm).updated
        weights = [self._state[n] for n in names]
        gradients = torch.autograd.grad(loss, weights, create_graph=not first_order, allow_unused=True)
        if all(g is None for g in gradients):
            raise ValueError(
                f"adapt: the loss does not depend on the parameters that {maml.pattern} updates: compute it from "
                "this clone's result"
            )
        for name, weight, gradient in zip(names, weights, gradients):
            if gradient is not None:
                self._state[name] = weight - maml.lr * gradient
        for alias, name in plan.program.aliases.items():
            self._state[alias] = self._state[name]
        self._step += 1

    def clone(self) -> TaskLearner:
        """A learner that goes on from here on its own."""
        return TaskLearner(self._maml[0], dict(self._state), self._step)

    def parameters_dict(self) -> dict[str, Tensor]:
        """All parameters by name, as adapted so far."""
        return {name: self._state[name] for name, _ in self._maml[0].module.named_parameters()}
