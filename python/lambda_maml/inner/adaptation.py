"""One adaptation, described: what is updated in which step, by which rule, for which loss."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lambda_kernels.program import Program, flatten, program_for, tensors_of

from ..patterns import Pattern
from ..plan import Layout, Part, Plan, plan_of, with_copies
from ..say import say_once
from . import checks
from .checks import Loss
from .rule import Rule, is_learned, links
from .state import tied

__all__ = ["Adaptation", "Stretch", "Support", "describe"]


class Support(NamedTuple):
    """The support set of one task, or of T tasks, whose tensors then have T in front."""

    xs: Any  # [N, ...], a tensor or what holds tensors
    ys: Any
    tasks: int | None  # T, None for one task without the axis
    labels: Tensor | None  # class numbers [T or 1, N, ...] where the loss is a cross-entropy
    ignores: bool = False  # whether the cross-entropy leaves some labels out


@dataclass(frozen=True)
class Stretch:
    """Steps in succession that update the same parameters."""

    part: Part
    first: int  # step, counted from 0
    steps: int
    rates: float | tuple[Mapping[str, float], ...] | None
    """One rate for all, or per step a rate by parameter name; None where they are not known beforehand."""

    def row_by_row(self, names: Sequence[str]) -> list[float]:
        """The rates as an inner loop takes them: one for all, or those of each step, in the order of the names."""
        if isinstance(self.rates, float):
            return [self.rates]
        return [row[n] for row in self.rates or () for n in names]


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What an adaptation does; `descend` does it. Made by `describe`, which checks all settings."""

    model: nn.Module
    plan: Plan
    pattern: Pattern
    rule: Rule
    steps: int
    norm: str
    loss: Loss
    second_order: bool
    stretches: tuple[Stretch, ...]
    updated: tuple[str, ...]  # the names of all parameters that a step updates
    parameters: dict[str, Tensor]  # the network's own, by name
    buffers: dict[str, Tensor]
    in_graph: bool
    """Whether the adapted parameters are computed in autograd's graph: through the inner gradients, or through what the
    rule learns."""

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that the program's steps use, by path."""
        return self.plan.program.bind(self.model)

    @cached_property
    def device(self) -> torch.device:
        """Where the network's first parameter lies."""
        return next(iter(self.parameters.values())).device

    @cached_property
    def meta(self) -> dict[str, Tensor]:
        """The network's own parameters, and copies of its buffers, by name."""
        return with_copies(self.parameters, self.buffers)

    @property
    def code(self) -> Hashable:
        """Which code of a user's the loss and the rule are, without what they hold."""
        loss: Any = self.loss
        while isinstance(loss, partial):
            loss = loss.func
        return getattr(loss, "__code__", type(loss)), tuple(type(link) for link in links(self.rule))

    @property
    def why_unmapped(self) -> str | None:
        """Why `torch.func.vmap` could not follow such a loss or rule, or the network, when it was tried."""
        return self.plan.unmapped.get(self.code)

    def why_faster_alone(self, support: Support) -> str | None:
        """Why several tasks are adapted faster one after another, or None where they are not; `support` is one's."""
        if self.plan.chain is not None and support.labels is not None:
            return None  # a chain under cross-entropy has kernels of its own for many tasks
        return self.plan.why_faster_alone(self.model, support.xs)

    def start(self, tasks: int | None) -> dict[str, Tensor]:
        """The state before the first step; of T tasks, with T in front of what is updated."""
        if tasks is None:
            return self.meta
        meta = self.meta
        return {**meta, **{n: meta[n].expand(tasks, *meta[n].shape) for n in self.updated}}

    def tie(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state with second names of shared parameters holding what their first names hold."""
        return tied(state, self.plan.program.aliases)

    def inputs(self, xs: Any) -> tuple[Any, ...]:
        """The values of the program's input slots for the network's argument."""
        return self.plan.program.pack((xs,), {})

    def each_task(self, state: dict[str, Tensor], tasks: int | None, function: Callable[..., Any], *values: Any) -> Any:
        """function(state, *values) for one task; for T tasks, for each of them at once, by `torch.func.vmap`.

        What `function` gives may be any structure of tensors; what is no tensor in it is that of the first task.
        """
        if tasks is None:
            return function(state, *values)
        built: list[Callable[[Sequence[Tensor]], Any]] = []
        parts = [flatten(value) for value in values]
        own = [state[n] for n in self.updated]

        def one(*tensors: Tensor) -> Any:
            rest = iter(tensors)
            mine = {n: next(rest) for n in self.updated}
            given = [rebuild([next(rest) for _ in mapped]) for mapped, rebuild in parts]
            result = function(self.tie({**state, **mine}), *given)
            if isinstance(result, Tensor):
                return result
            found, rebuild = flatten(result)
            built.append(rebuild)
            return tuple(found)

        # Tensors side by side: vmap looks several times through every structure that it is given.
        results = torch.func.vmap(one, randomness="error")(*own, *(t for mapped, _ in parts for t in mapped))
        return built[0](results) if built else results

    def query(self, xq: Any, tasks: int | None) -> tuple[Program, Mapping[str, nn.Module]]:
        """The program of a call with one task's query inputs, and the modules that its steps use."""
        if tasks is not None:
            tensors, rebuild = flatten(xq)
            xq = rebuild([t[0] for t in tensors])
        program = program_for(self.model, (xq,), {})
        same = program is self.plan.program or program.untraceable is not None is not self.plan.program.untraceable
        return program, self.modules if same else program.bind(self.model)

    def same_chain(self, xq: Any, tasks: int | None) -> bool:
        """Whether the network computes the query by the chain, from the inputs on, of the first steps."""
        program, _ = self.query(xq, tasks)
        whole = self.stretches[0].part.whole if self.stretches else None
        if program is self.plan.program or whole is None:
            return whole is not None
        other = plan_of(self.model, program).part(self.stretches[0].part.updated).whole
        return other is not None and whole.is_like(other)

    def support(self, xs: Any, ys: Any, tasks: int | None = None) -> Support:
        """The support set as the ways take it: class numbers as int64, ready to be checked by `check_labels`."""
        numbers = checks.class_numbers(self.loss, ys)
        labels = numbers if numbers is None or tasks is not None else numbers.unsqueeze(0)
        return Support(xs, ys if numbers is None else numbers, tasks, labels)

    def check_labels(self, support: Support) -> Support:
        """The support set with what is known of its labels; ValueError where one lies beyond the network's outputs."""
        if support.labels is None:
            return support
        return support._replace(ignores=checks.check_labels(self.plan, self.loss, support.labels))

    def check_finite(self, rows: list[list[float]], xs: Any) -> None:
        """FloatingPointError where a `verdict` holds an infinite number or NaN."""
        if (why := checks.diverged(self.pattern, self.rule, rows, xs)) is not None:
            raise FloatingPointError(why)


class _Outline(NamedTuple):
    """What an adaptation makes of pattern, steps, norm and frozen parameters, whatever the rates."""

    segments: list[tuple[tuple[str, ...], int]]  # the names that steps in succession update, and how many steps
    updated: tuple[str, ...]


def describe(
    model: nn.Module, xs: Any, pattern: str | Pattern | None, rule: Rule, steps: Any, norm: str, second_order: bool,
    loss: Loss,
) -> Adaptation:  # fmt: skip
    """The adaptation of a network that is called with xs.

    Raises:
        ValueError, TypeError: a setting is out of range or does not fit the network.
    """
    checks.check_norm(norm)
    checks.check_loss(loss)
    steps = checks.check_steps(steps)
    checks.check_mode()
    checks.check_images(model, xs)
    with torch.enable_grad():  # as the steps run
        program = program_for(model, (xs,), {})
    if program.untraceable is not None:
        checks.check_one_input(model)
    plan = plan_of(model, program)
    parameters, buffers = tensors_of(model)
    chosen, frozen = named(parameters, plan, pattern, norm)
    second_order = second_order and torch.is_grad_enabled()
    key = chosen, steps, norm, frozen
    outline: _Outline | None = plan.outlines.get(key)
    if outline is None:
        segments = [
            (tuple(n for n in plan.updated(bits, norm) if n not in frozen), count)
            for bits, count in chosen.segments(steps)
        ]
        outline = _Outline(segments, tuple(dict.fromkeys(n for names, _ in segments for n in names)))
        plan.outlines.put(key, outline)
    fixed = getattr(rule, "fixed", None)
    found: tuple[Rule, tuple[Stretch, ...]] | None = plan.outlines.get((key, fixed)) if fixed else None
    if found is None:
        bound = rule.bind(plan.layers, parameters) if isinstance(rule, Rule) else rule
        if isinstance(bound, Rule):
            bound.check_steps(steps)
        found = bound, tuple(_stretches(plan, outline, bound, steps))
        if fixed:
            plan.outlines.put((key, fixed), found)
    bound, stretches = found
    # Asked here, with the caller's gradient mode. Learned rates of layers that nothing updates take no part.
    in_graph = second_order or (is_learned(bound) and any(s.rates is None for s in stretches))
    return Adaptation(
        model,
        plan,
        chosen,
        bound,
        steps,
        norm,
        loss,
        second_order,
        stretches,
        outline.updated,
        parameters,
        buffers,
        in_graph,
    )


def named(
    parameters: Mapping[str, Tensor], plan: Layout, pattern: str | Pattern | None, norm: str
) -> tuple[Pattern, frozenset[str]]:
    """The pattern, all ones for None, and the parameters that stay frozen whatever it says.

    Without a pattern, what does not require a gradient is not updated. A pattern that names such a parameter updates
    it, and it is said once.
    """
    chosen = Pattern.parse("MAML" if pattern is None else pattern).on(plan.layers, plan.network)
    if chosen.rows:
        raise ValueError(
            f"pattern {chosen}: patterns of channels are for adapt, adapt_tasks and explain; "
            f"{str(chosen.whole())!r} updates the whole layers"
        )
    fixed = frozenset([n for n, p in parameters.items() if not p.requires_grad])
    if not fixed:
        return chosen, fixed
    touched = [n for n in dict.fromkeys(n for bits in chosen.stages for n in plan.updated(bits, norm)) if n in fixed]
    if pattern is not None:
        if touched:
            say_once(
                f"pattern {chosen} updates parameters of {plan.network} that do not require a gradient: "
                f"{', '.join(touched)}. Give their layers the bit 0 to leave them as they are"
            )
        return chosen, frozenset()
    if all(n in fixed for bits in chosen.stages for n in plan.updated(bits, norm)):
        raise ValueError(
            f"no parameter of {plan.network} requires a gradient, so nothing is adapted: name the layers to update by "
            "a pattern, or call requires_grad_() on their parameters"
        )
    return chosen, fixed


def _stretches(plan: Plan, outline: _Outline, rule: Rule, steps: int) -> list[Stretch]:
    """The outline with the rule's rates; a parameter whose rates are 0 throughout is frozen like one with the bit 0."""
    constants = rule.constants(outline.updated, steps) if hasattr(rule, "constants") else None
    rows = constants.tolist() if isinstance(constants, Tensor) else constants
    stretches: list[Stretch] = []
    step = 0
    for names, count in outline.segments:
        mine = None if rows is None else [dict(zip(outline.updated, row)) for row in rows[step : step + count]]
        if mine is None:
            stretches.append(Stretch(plan.part(names), step, count, None))
            step += count
            continue
        for row in mine:
            moved = tuple(n for n in names if row[n] != 0.0) or names
            rates = {n: float(row[n]) for n in moved}
            last = stretches[-1] if stretches else None
            if last is not None and last.part is plan.part(moved) and isinstance(last.rates, tuple):
                stretches[-1] = Stretch(last.part, last.first, last.steps + 1, (*last.rates, rates))
            else:
                stretches.append(Stretch(plan.part(moved), step, 1, (rates,)))
            step += 1
    return [_simplified(s) for s in stretches]


def _simplified(stretch: Stretch) -> Stretch:
    """The stretch with one rate in place of many equal ones."""
    values = {rate for row in stretch.rates for rate in row.values()} if isinstance(stretch.rates, tuple) else set()
    if len(values) != 1:
        return stretch
    return Stretch(stretch.part, stretch.first, stretch.steps, values.pop())
