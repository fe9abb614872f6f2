"""Steps by autograd: for any network, loss, rule and order. The frozen prefix runs once, the rest in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lambda_kernels.program import flatten

from ..plan import Frozen, Part
from . import checks
from .adaptation import Adaptation, Stretch, Support
from .rule import Params, Rule, State, Step, is_learned
from .rules import sgd

__all__ = ["Prefix", "gradients", "leaves", "moved", "remembered", "run", "take_step"]


def leaves(a: Adaptation, state: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    """The state that a part's steps begin with.

    In first order frozen tensors are cut off from autograd's graph, updated ones are new leaves. In second order a
    step's gradient is by the present values, not by what they were to earlier steps.
    """
    if a.in_graph:
        own = {n: state[n] if state[n].requires_grad else state[n].detach().requires_grad_() for n in a.updated}
        own.update((n, own[n].view_as(own[n])) for n in part.updated)
        return a.tie({**state, **own})
    with torch.no_grad():
        own = {n: state[n].clone(memory_format=torch.contiguous_format).requires_grad_() for n in a.updated}
        return a.tie({**{n: t.detach() if t.requires_grad else t for n, t in state.items()}, **own})


class Prefix:
    """What a part's frozen prefix hands over, for one task or for each of a batch of tasks; it is run once.

    `boundary` are the values that the rest reads, of one task, or with the tasks' axis in front of tensors.
    """

    def __init__(self, a: Adaptation, part: Part, state: dict[str, Tensor], support: Support) -> None:
        self.a, self.part, self.support = a, part, support
        if a.second_order and (value := self._as_one(state)) is not None:
            self.boundary = (value,)
            self._frozen = Frozen(part, self.boundary, [])
            return
        with torch.set_grad_enabled(a.second_order):
            if support.tasks is None:
                self._frozen = part.freeze(a.modules, state, self._laid_out(a.inputs(support.xs)))
                self.boundary = self._frozen.boundary
            else:
                self.boundary = a.each_task(state, support.tasks, self._freeze, support.xs)

    def _as_one(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """What a chain's first blocks hand over, as one operation with its own way back; None where there is none."""
        part, xs, single = self.part, self.support.xs, self.support.tasks is None
        if part.whole is None or part.chain is None or not isinstance(xs, Tensor):
            return None
        count = len(part.whole.blocks) - len(part.chain.blocks)
        if count == 0 or xs.dim() != (4 if single else 5):
            return None
        features = part.whole.features(state, xs.unsqueeze(0) if single else xs, count)
        if features is None:
            return None
        features = features if part.chain.blocks else features.flatten(2)
        return features.squeeze(0) if single else features

    @property
    def value(self) -> Any:
        """What is handed over, where it is one value; else None."""
        return self.boundary[0] if len(self.boundary) == 1 else None

    def _freeze(self, state: Mapping[str, Tensor], x: Any) -> tuple[Any, ...]:
        return self.part.freeze(self.a.modules, state, self.a.inputs(x)).boundary

    def _laid_out(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Images that only fused blocks see, in the memory layout in which a CPU's convolutions are fastest: laid out
        once, not in every step. Any other input stays as it was given."""
        program = self.a.plan.program
        return tuple(
            x.contiguous(memory_format=torch.channels_last)
            if isinstance(x, Tensor) and x.dim() == 4 and not x.is_cuda and program.blocks_alone_read(slot)
            else x
            for slot, x in enumerate(inputs)
        )

    def outputs(self, state: Mapping[str, Tensor]) -> Any:
        """The network's result for one task's support inputs, with the parameters of the moment."""
        return self._frozen(self.a.modules, state)

    def losses(self, state: dict[str, Tensor]) -> Tensor:
        """The support loss, or [T] of them, with the parameters of the moment."""
        a = self.a
        if self.support.tasks is None:
            return checks.scalar(a.loss(self.outputs(state), self.support.ys))

        def one(state: Mapping[str, Tensor], boundary: tuple[Any, ...], ys: Any) -> Tensor:
            return checks.scalar(a.loss(self.part.finish(a.modules, state, boundary), ys))

        losses: Tensor = a.each_task(state, self.support.tasks, one, self.boundary, self.support.ys)
        return losses

    def count(self, runs: int) -> None:
        """Note runs that were made without this prefix's help: running statistics are updated for each."""
        if self.support.tasks is None:
            self._frozen.count(runs)


def run(
    a: Adaptation, stretch: Stretch, prefix: Prefix, state: dict[str, Tensor], memory: State
) -> tuple[list[Tensor], dict[str, Tensor], State]:
    """All steps of a stretch: the losses before each, the state after the last, and what the rule remembers."""
    names, rows = stretch.part.updated, []
    detached = a.in_graph and not a.second_order
    for index in range(stretch.first, stretch.first + stretch.steps):
        now = {n: state[n].detach().requires_grad_() for n in names} if detached else {n: state[n] for n in names}
        losses = prefix.losses(a.tie({**state, **now}) if detached else state)
        grads = gradients(a.pattern, now, losses, create_graph=a.second_order)
        rates = None if a.in_graph or stretch.rates is None else stretch.rates
        if rates is not None:  # in place: plain gradient descent, and nothing reads earlier values
            with torch.no_grad():
                if isinstance(rates, float):
                    torch._foreach_add_([now[n] for n in grads], list(grads.values()), alpha=-rates)
                else:
                    for n, g in grads.items():
                        now[n].add_(g, alpha=-rates[index - stretch.first][n])
        else:
            step = Step(index, a.steps, losses.detach(), a.second_order)
            own = now if a.second_order else {n: state[n] for n in grads}
            with torch.set_grad_enabled(a.in_graph):
                new, memory = moved(a.rule, memory, own, grads, step, batched=prefix.support.tasks is not None)
            state.update(new if a.in_graph else ((n, t.detach().requires_grad_()) for n, t in new.items()))
            a.tie(state)
        rows.append(losses.detach())
    return rows, state, memory


def gradients(pattern: object, now: Params, losses: Tensor, *, create_graph: bool, none: bool = False) -> Params:
    """The gradients of the losses' sum, those that there are, by name; with `none`, there may be none.

    Raises:
        ValueError: there are none.
    """
    found: Sequence[Tensor | None] = [None] * len(now)
    if losses.requires_grad:
        found = torch.autograd.grad(
            losses.sum() if losses.dim() else losses, list(now.values()), create_graph=create_graph, allow_unused=True
        )
    if not none:
        checks.check_gradients(pattern, tuple(now), losses, list(found))
    return {n: g for n, g in zip(now, found) if g is not None}


def remembered(a: Adaptation, state: dict[str, Tensor], support: Support) -> State:
    """What the rule remembers before the first step, of one task or per task of a batch."""
    params = {n: state[n].detach() for n in a.updated}
    if support.tasks is None or getattr(a.rule, "elementwise", False):
        return a.rule.init(params)
    return _per_task(a.rule.init, params)


def moved(
    rule: Rule, memory: State, params: Params, grads: Params, step: Step, *, batched: bool = False
) -> tuple[Params, State]:
    """The parameters after a step, those that have gradients, and what the rule remembers."""
    if getattr(rule, "fixed", None) is not None and isinstance(rule, sgd):  # rates are numbers: nothing else to ask
        constants = grads if step.second_order else {n: g.detach() for n, g in grads.items()}
        return {n: params[n] - rule.rates.at(n, step.index) * g for n, g in constants.items()}, memory
    changes, memory = take_step(rule, memory, params, grads, step, batched=batched)
    return {n: params[n] + change for n, change in changes.items()}, memory


def take_step(
    rule: Rule, memory: State, params: Params, grads: Params, step: Step, *, batched: bool = False
) -> tuple[Params, State]:
    """What a rule adds to the parameters in a step, and what it remembers. In first order gradients and parameters are
    constants to it, so that only what it learns is in autograd's graph."""
    own = {n: params[n] for n in grads}
    learned = is_learned(rule)
    if learned and not step.second_order:
        grads, own = ({n: t.detach() for n, t in tensors.items()} for tensors in (grads, own))
    with torch.set_grad_enabled(step.second_order or learned):
        if not batched or getattr(rule, "elementwise", False):
            changes, memory = rule.update(grads, memory, own, step)
        else:

            def one(grads: Params, memory: State, own: Params, loss: Tensor) -> tuple[Params, State]:
                return rule.update(grads, memory, own, step._replace(loss=loss))

            changes, memory = _per_task(one, grads, memory, own, step.loss)
    wrong = {n: list(c.shape) for n, c in changes.items() if n in own and c.shape != own[n].shape}
    if wrong or changes.keys() - own.keys():
        raise ValueError(
            f"{rule!r} gave {wrong or sorted(changes.keys() - own.keys())}: a rule's update gives a tensor of each "
            f"parameter's shape, by the names that it got ({', '.join(own)})"
        )
    return {n: c if c.dtype == own[n].dtype else c.to(own[n].dtype) for n, c in changes.items()}, memory


def _per_task(function: Any, *values: Any) -> Any:
    """The function of each task's tensors, by `torch.func.vmap`; the structures are kept."""
    parts = [flatten(value) for value in values]
    built: list[Any] = []

    def one(*tensors: list[Tensor]) -> tuple[Tensor, ...]:
        found, rebuild = flatten(function(*(rebuild(own) for (_, rebuild), own in zip(parts, tensors))))
        built.append(rebuild)
        return tuple(found)

    results = torch.func.vmap(one, randomness="error")(*(tensors for tensors, _ in parts))
    return built[0](results)
