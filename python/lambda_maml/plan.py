"""The plan: what of a network has to be run again in every inner step, and what is frozen prefix and runs once.

The network is evaluated partially with respect to the updated parameters: a step of its program belongs to the frozen
prefix when no updated parameter reaches it and it may be left out the second time (no random numbers, no unknown code).
A batch norm with running statistics may: its update is noted and made again for each run that is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lambda_kernels.cache import Bounded
from lambda_kernels.chain import Chain
from lambda_kernels.evaluated import EvaluatedChain
from lambda_kernels.program import LinearCall, Program, flatten

from .cost import operations_of
from .network import layers_of
from .say import say_once
from .statistics import norms_of_batches

__all__ = ["Frozen", "Layout", "Part", "Plan", "plan_of", "why_opaque", "with_copies"]


def _moving(program: Program, updated: frozenset[str]) -> set[int]:
    """The indices of a program's steps that differ from one inner step to the next."""
    moving: set[int] = set()
    while True:
        known = len(moving)
        slots: set[int] = set()
        seen: set[int] = set()  # memory that a step of the rest has read or made so far
        written: set[int] = set()  # memory that a step of the rest writes to in place
        for index, step in enumerate(program.steps):
            names = {program.aliases.get(n, n) for n in step.parameters}
            reads = {program.memory[slot] for slot in step.reads}
            writes = {program.memory[slot] for slot in step.writes}
            reached = not (names.isdisjoint(updated) and slots.isdisjoint(step.reads) and writes.isdisjoint(seen))
            if index in moving or step.not_reusable or reached:
                moving.add(index)
                slots.add(step.slot)
                seen |= reads | {program.memory[step.slot]}
                written |= writes
        # What the rest writes into in place has to be made anew for each of its runs.
        moving |= {i for i, step in enumerate(program.steps) if program.memory[step.slot] in written}
        if len(moving) == known:
            return moving


def _write_that_vmap_may_lose(program: Program) -> str | None:
    """Why an in-place write of a program might go elsewhere under torch.func.vmap, which lays tensors out in its own
    way; None where it cannot."""
    loose = {
        program.memory[slot]: step for step in program.steps if step.uncertain for slot in (step.slot, *step.reads)
    }
    for step in program.steps:
        for slot in step.writes:
            if (view := loose.get(program.memory[slot])) is not None:
                return f"{step.label} writes in place, and {view.label} gives a view or a copy, as the memory lies"
    return None


def with_copies(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and copies of buffers as one state; shared buffers stay shared."""
    state = dict(parameters)
    copies: dict[int, Tensor] = {}
    for name, buffer in buffers.items():
        if id(buffer) not in copies:
            copies[id(buffer)] = buffer.detach().clone()
        state[name] = copies[id(buffer)]
    return state


def whole_chain(program: Program) -> Chain | None:
    """The chain that a program is, from its inputs on; None where it is another one."""
    chain = Chain.find(program, program.steps)
    return chain if chain is not None and chain.source == 0 else None


class Part:
    """A program cut in two by the parameters that are updated: the frozen prefix and the rest.

    `chain` is the rest where it is one, `whole` the prefix and the rest together where both are.
    """

    def __init__(self, program: Program, updated: tuple[str, ...]) -> None:
        moving = _moving(program, frozenset(updated))
        computed = {step.slot for i, step in enumerate(program.steps) if i not in moving} | set(range(program.inputs))
        read = {slot for i in moving for slot in program.steps[i].reads} | set(program.result_slots)
        self.program = program
        self.updated = updated
        self.boundary = tuple(sorted(computed & read))
        self.prefix = program.part([i for i in range(len(program.steps)) if i not in moving], self.boundary)
        self.rest = program.part(sorted(moving), ())
        chain = Chain.find(program, [program.steps[i] for i in sorted(moving)])
        self.chain = chain if chain is not None and self.boundary == (chain.source,) else None
        self._moving = sorted(moving)
        self.whole = None if self.chain is None else whole_chain(program)

    @cached_property
    def why_no_chain(self) -> str:
        """Why the rest is no chain, where `chain` is None."""
        if self.program.untraceable is not None:
            return why_opaque(self.program)
        return Chain.why_not(self.program, [self.program.steps[i] for i in self._moving])

    def freeze(self, modules: Mapping[str, nn.Module], state: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Frozen:
        """Run the prefix on the network's inputs, as `Program.pack` gives them."""
        env: dict[int, Any] = dict(enumerate(inputs))
        effects: list[Callable[[], None]] = []
        self.program.run(self.prefix, modules, state, env, effects)
        return Frozen(self, tuple(env[slot] for slot in self.boundary), effects)

    def finish(self, modules: Mapping[str, nn.Module], state: Mapping[str, Tensor], boundary: tuple[Any, ...]) -> Any:
        """The network's result from the prefix's values."""
        env: dict[int, Any] = dict(zip(self.boundary, boundary))
        self.program.run(self.rest, modules, state, env)
        return self.program.take(env)


class Frozen:
    """The prefix's values for one input. Every call finishes the network from them and counts as one run of it."""

    def __init__(self, part: Part, boundary: tuple[Any, ...], effects: list[Callable[[], None]]) -> None:
        self.part, self.boundary, self.effects, self.runs = part, boundary, effects, 0

    def __call__(self, modules: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> Any:
        self.count(1)
        return self.part.finish(modules, state, self.boundary)

    def count(self, runs: int) -> None:
        """Note that so many further runs were left out: running statistics are updated once for each."""
        for _ in range(max(0, runs - (self.runs == 0))):
            for update in self.effects:
                update()
        self.runs += runs


class Layout:
    """A network's layers, and what a pattern's bits stand for."""

    def __init__(self, model: nn.Module) -> None:
        self.network, self.layers = type(model).__name__, layers_of(model)

    def updated(self, bits: str, norm: str) -> tuple[str, ...]:
        """The names of the parameters that a pattern's step updates; `norm` is "follow" or "never"."""
        return tuple(n for bit, layer in zip(bits, self.layers) if bit == "1" for n in layer.adapted(norm))


class Plan(Layout):
    """A network's program for a call, its layers, and the parts that the program is cut into."""

    def __init__(self, model: nn.Module, program: Program) -> None:
        super().__init__(model)
        self.program = program
        self.outlines: Bounded[Any] = Bounded(_LIMIT)  # what an adaptation made of its pattern, steps and rates
        self.unmapped: Bounded[str] = Bounded(_LIMIT)  # by `Adaptation.code`: why vmap could not follow
        self._parts: Bounded[Part] = Bounded(_LIMIT)
        self._costs: Bounded[int] = Bounded(_LIMIT)  # multiply-adds of a forward pass, by the inputs' shapes
        self.normalises_batches = bool(norms_of_batches(model))
        self._evaluated: tuple[EvaluatedChain | None] | None = None  # once it was looked for

    def part(self, updated: tuple[str, ...]) -> Part:
        """The program cut by the parameters that are updated."""
        part = self._parts.get(updated)
        if part is None:
            part = Part(self.program, updated)
            self._parts.put(updated, part)
        return part

    @cached_property
    def why_not_batched(self) -> str | None:
        """Why several tasks cannot be adapted as one batch, or None where they can."""
        if any(step.tracks for step in self.program.steps):
            return "it updates running statistics"
        if (why := _write_that_vmap_may_lose(self.program)) is not None:
            return why
        return next((step.not_reusable for step in self.program.steps if step.not_reusable), None)

    @cached_property
    def chain(self) -> Chain | None:
        """The whole network, where it is a chain from its inputs on."""
        return whole_chain(self.program)

    def why_faster_alone(self, model: nn.Module, x: Any) -> str | None:
        """Why several tasks are adapted faster one after another than under `torch.func.vmap`, or None where they are
        not; `x` are the inputs of one task's support set, `model` is one of the program's structure.

        On the CPU the convolutions and products of vmap take up to 2.6 times as long as those of one task, and memory
        that fits no cache; of small networks that is less than what every call costs besides.
        """
        tensors = flatten(x)[0]
        if any(t.device.type != "cpu" for t in tensors):
            return None
        shapes = tuple((t.shape, t.dtype) for t in tensors)
        cost = self._costs.get(shapes)
        if cost is None:
            try:
                cost = sum(step.forward for step in operations_of(model, x).steps)
            except ValueError:  # it cannot be counted
                cost = 0
            self._costs.put(shapes, cost)
        if cost < MAPPED_ON_CPU:
            return None
        return f"{cost / 1e6:,.0f} million multiply-adds for a support set are faster so on a CPU"

    def classify(self, state: Mapping[str, Tensor], xq: Any, tasks: int | None = None) -> Tensor | None:
        """The logits of query images [Q, ...], or of T tasks [T, Q, ...], as one operation of autograd; None where
        there is no such operation, or nothing requires a gradient."""
        if self.chain is None or not isinstance(xq, Tensor) or not torch.is_grad_enabled():
            return None
        logits = self.chain.classify(state, xq if tasks is not None else xq.unsqueeze(0))
        return logits if logits is None or tasks is not None else logits.squeeze(0)

    def evaluated(self, model: nn.Module) -> EvaluatedChain | None:
        """The whole network, where it is a chain of blocks with fixed statistics; `model` is one of its structure."""
        if self._evaluated is None:
            self._evaluated = (EvaluatedChain.find(self.program, model),)
        return self._evaluated[0]

    @cached_property
    def outputs(self) -> int | None:
        """The number of logits, where the network ends in a linear layer."""
        step = self.program.steps[-1]
        last = self.program.result_slots == [step.slot]
        return step.call.outputs if last and isinstance(step.call, LinearCall) else None


def why_opaque(program: Program) -> str:
    """Why a network is one operation that is not looked into."""
    return program.untraceable or ""


MAPPED_ON_CPU = 20_000_000
"""From so many multiply-adds on, a forward pass over a support set, tasks are adapted one after another on the CPU."""

_LIMIT = 128
_PLANS: Bounded[Plan] = Bounded(_LIMIT)


def plan_of(model: nn.Module, program: Program) -> Plan:
    """The plan of a network for one of its programs. Says once when the network is not looked into."""
    plan = _PLANS.get(program)
    if plan is None:
        plan = Plan(model, program)
        if program.untraceable is not None:
            say_once(f"{type(model).__name__} is adapted without prefix reuse: {why_opaque(program)}")
        _PLANS.put(program, plan)
    return plan
