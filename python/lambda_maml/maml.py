"""LambdaMAML: learn2learn's verbs, clone() and adapt(loss), with a pattern and prefix reuse."""

from __future__ import annotations

import weakref
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
        if not isinstance(lr, (int, float)) or not 0.0 < lr < float("inf"):
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
        plan = plan_of(self.module)
        updated = {n for bits in self.pattern.stages for n in plan.part(bits, self.norm).updated}
        for name, parameter in self.module.named_parameters():
            if name in updated and not parameter.requires_grad:
                copies[id(parameter)].requires_grad_()
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
            self._forget_when_freed(held.frozen)
        return held.frozen(modules, self._state)

    def _forget_when_freed(self, frozen: Frozen) -> None:
        """Drop the prefix once a backward pass has gone through it: that frees its graph."""
        me = weakref.ref(self)

        def forget(_: Tensor) -> None:
            learner = me()
            if learner is not None and learner._held is not None and learner._held.frozen.boundary is boundary:
                learner._held = None

        boundary = frozen.boundary
        for value in boundary:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                value.register_hook(forget)

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
                f"step {self._step + 1} of the inner loop: the loss is {float(loss.detach())}; lower lr={maml.lr}, "
                "or look for NaN in the images"
            )
        plan = plan_of(maml.module)
        names = plan.part(maml.pattern.at(self._step), maml.norm).updated
        weights = [self._state[n] for n in names]
        gradients: tuple[Tensor | None, ...] = (None,)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, weights, create_graph=not first_order, allow_unused=True)
        if all(g is None for g in gradients):
            raise ValueError(
                f"adapt: the loss does not depend on the parameters that {maml.pattern} updates: compute it from "
                "this clone's result"
            )
        for name, weight, gradient in zip(names, weights, gradients):
            if gradient is not None:
                self._state[name] = weight - maml.lr * gradient
        self._step += 1
        # A step's gradient is by the present values, not by what a layer, frozen so far, was to earlier steps.
        for name in set(plan.part(maml.pattern.at(self._step), maml.norm).updated).difference(names):
            self._state[name] = self._state[name].view_as(self._state[name])
        for alias, name in plan.program.aliases.items():
            self._state[alias] = self._state[name]

    def clone(self) -> TaskLearner:
        """A learner that goes on from here on its own."""
        state = dict(self._state)
        copies = {id(state[n]): state[n].clone() for n, _ in self._maml[0].module.named_buffers()}
        return TaskLearner(self._maml[0], {n: copies.get(id(t), t) for n, t in state.items()}, self._step)

    def parameters_dict(self) -> dict[str, Tensor]:
        """All parameters by name, as adapted so far."""
        return {name: self._state[name] for name, _ in self._maml[0].module.named_parameters()}
