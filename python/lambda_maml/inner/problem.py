"""One task as a method sees it: its support set, the parameters to start from, and the network, whose frozen prefix is
run once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lambda_kernels import to_torch
from lambda_kernels.program import LinearCall, flatten

from ..cost import operations_of
from ..patterns import Pattern
from ..plan import Part
from . import autograd, checks
from .adaptation import Adaptation, Support
from .loop import classify
from .rule import Params, Rule

__all__ = ["FIRST", "Problem", "Stage", "Turn", "generator"]


class Turn(NamedTuple):
    """Whose turn it is: what a method's random numbers and memory go by.

    >>> torch.rand(2, generator=generator(Turn(seed=1, iteration=7, task=2), step=0)).shape      # the same in each run
    torch.Size([2])
    """

    seed: int = 0
    iteration: int = 0  # meta-updates so far
    task: int = 0  # place in the meta-batch
    key: int | None = None  # place in a finite pool of tasks, None for endless ones


FIRST = Turn()


def generator(turn: Turn, step: int) -> torch.Generator:
    """Random numbers of a step, on the CPU: the same ones for the same turn and step, whatever was drawn before."""
    words = np.random.SeedSequence(turn.seed, spawn_key=(turn.iteration, turn.task, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


class Stage(NamedTuple):
    """Steps in succession that update the same parameters."""

    names: tuple[str, ...]
    first: int  # step, counted from 0
    steps: int


class Problem:
    """One task: find parameters that fit its support set, of those that the pattern lets move.

    A `Solver` gets it. Parameters are handed in by name, all of `names`; what they do not reach is run once, when it is
    first needed. In second order the prefix and `meta` are in autograd's graph; in first order they are constants.

    >>> def one_step(problem):
    ...     loss = problem.loss(problem.meta)
    ...     grads = torch.autograd.grad(loss, list(problem.meta.values()))
    ...     return Learned({n: p - 0.1 * g for (n, p), g in zip(problem.meta.items(), grads)})
    """

    def __init__(
        self, a: Adaptation, support: Support, turn: Turn, part: Part | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._a, self._support, self.turn = a, support, turn
        self._part = a.plan.part(a.updated) if part is None else part
        with torch.enable_grad():
            self._state = autograd.leaves(a, dict(a.start(None) if state is None else state), self._part)
        self.names = self._part.updated
        self.key, self.labels, self.second_order = turn.key, support.ys, a.second_order
        self.rows = flatten(support.xs)[0][0].shape[0]
        """The support set's size N: images, points."""
        self.inputs = support.xs

    @property
    def in_graph(self) -> bool:
        """Whether what is learned is a part of autograd's graph: in second order, or if the solver has parameters."""
        return self._a.in_graph

    @property
    def start(self) -> Params:
        """The network's own parameters, of `names`: a prediction from them has a gradient in first order too."""
        return {n: self._a.parameters[n] for n in self.names}

    @property
    def everything(self) -> Params:
        """All of the network's own parameters, frozen ones too."""
        return dict(self._a.parameters)

    @property
    def pattern(self) -> str:
        return str(self._a.pattern)

    @property
    def network(self) -> str:
        """The network's class, for what is said of it."""
        return self._a.plan.network

    @cached_property
    def meta(self) -> Params:
        """The values to start from, of the parameters that the pattern lets move."""
        return {name: self._state[name] for name in self.names}

    @cached_property
    def layers(self) -> dict[str, str]:
        """The layer that each of `names` belongs to."""
        return {n: layer.name for layer in self._a.plan.layers for n in layer.weights + layer.norm if n in self.names}

    @property
    def mixes_rows(self) -> bool:
        """Whether a row's output depends on the other rows: batch norms take their statistics from all of them."""
        return self._a.plan.normalises_batches

    def random(self, step: int) -> torch.Generator:
        """Random numbers of a step, from (seed, iteration, task, step)."""
        return generator(self.turn, step)

    def constants(self, params: Mapping[str, Tensor]) -> Params:
        """The parameters as a step's arithmetic takes them: cut off from the graph in first order."""
        return {n: p if self.second_order else p.detach() for n, p in params.items()}

    def bound(self, rule: Rule, steps: int) -> Rule:
        """A rule for this network, its pattern and so many steps.

        Raises:
            ValueError: it does not fit them.
        """
        bound: Rule = rule.bind(self._a.plan.layers, self._a.parameters) if isinstance(rule, Rule) else rule
        if isinstance(bound, Rule):
            bound.check_steps(steps)
            bound.constants(self._a.updated, steps)
        return bound

    def stages(self, steps: int) -> Iterator[Stage]:
        """The steps of the pattern, or of its schedule."""
        step, plan = 0, self._a.plan
        for bits, count in self._a.pattern.segments(steps):
            names = tuple(n for n in plan.updated(bits, self._a.norm) if n in self._a.updated)
            yield Stage(names, step, count)
            step += count

    def at(self, params: Mapping[str, Tensor], names: tuple[str, ...]) -> Problem:
        """The same task from other values on, where only `names` move: the prefix in front of these is their own."""
        return Problem(self._a, self._support, self.turn, self._a.plan.part(names), {**self._state, **params})

    @cached_property
    def _prefix(self) -> autograd.Prefix:
        return autograd.Prefix(self._a, self._part, self._state, self._support)

    def _with(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._a.tie({**self._state, **params})

    def _boundary(self, rows: Tensor | None) -> tuple[Any, ...]:
        """What the prefix hands over, of the chosen rows."""
        if rows is None:
            return self._prefix.boundary
        values, rebuild = flatten(self._prefix.boundary)
        chosen: tuple[Any, ...] = rebuild([v[rows] if v.dim() and len(v) == self.rows else v for v in values])
        return chosen

    def outputs(self, params: Mapping[str, Tensor], rows: Tensor | None = None) -> Any:
        """What the network gives for the support set, [N, ...], or for the rows of it with these indices."""
        if rows is None:
            return self._prefix.outputs(self._with(params))
        return self._part.finish(self._a.modules, self._with(params), self._boundary(rows))

    def features(self, params: Mapping[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """[N, F]: what the last layer, a linear one, reads.

        Raises:
            ValueError: the network does not end in a linear layer.
        """
        program = self._a.plan.program
        if rows is None and (known := self._chained) is not None:
            return known
        last = program.steps[-1]
        if not isinstance(last.call, LinearCall) or program.result_slots != [last.slot]:
            raise ValueError(f"{self.network} does not end in a linear layer, whose inputs are asked for")
        env: dict[int, Any] = dict(zip(self._part.boundary, self._boundary(rows)))
        (slot,) = last.reads
        before = [step for step, _ in self._part.rest if step is not last]
        program.run([(step, ()) for step in before], self._a.modules, self._with(params), env)
        found: Tensor = env[slot]
        return found

    def layerwise(self, params: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """What each updated layer gives, with its norm and what follows it up to the next layer's first operation, as
        images where these are flattened; input first. The last one is the network's result."""
        program = self._a.plan.program
        env: dict[int, Any] = dict(zip(self._part.boundary, self._boundary(None)))
        owners = {n: layer.name for layer in self._a.plan.layers for n in layer.weights + layer.norm}
        found: dict[str, Any] = {}
        state, now = self._with(params), ""
        for step, _ in self._part.rest:
            now = next((owners[n] for n in step.parameters if n in owners), now)
            program.run([(step, ())], self._a.modules, state, env)
            if step.kind not in ("flatten", "size"):
                found[now] = env[step.slot]
        found[now] = program.take(env)
        return [(layer, value) for layer, value in found.items() if layer in self.layers.values()]

    @cached_property
    def _chained(self) -> Tensor | None:
        """[N, F]: in first order what the blocks of a chain hand to a head that moves alone, by one operation; None
        where there is none."""
        whole, chain, xs = self._part.whole, self._part.chain, self._support.xs
        if self.second_order or whole is None or chain is None or chain.blocks or not whole.blocks:
            return None
        if not isinstance(xs, Tensor) or xs.dim() != 4:
            return None
        found = whole.constants(self._state, xs.unsqueeze(0), len(whole.blocks))
        return None if found is None else found.squeeze(0).flatten(1)

    @cached_property
    def head(self) -> tuple[str, str]:
        """The names of the last layer's weight [C, F] and bias [C], "" for one that it does not have."""
        call: Any = self._a.plan.program.steps[-1].call
        weight, bias = call.names if isinstance(call, LinearCall) else ("", "")
        return weight, bias

    def targets(self, rows: Tensor | None = None) -> Any:
        """The labels, of the chosen rows."""
        if rows is None:
            return self.labels
        values, rebuild = flatten(self.labels)
        return rebuild([v[rows] for v in values])

    def loss(self, params: Mapping[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """The support loss, the mean over the rows."""
        return checks.scalar(self._a.loss(self.outputs(params, rows), self.targets(rows)))

    def loss_of(self, outputs: Any) -> Tensor:
        """The support loss of what a network gave."""
        return checks.scalar(self._a.loss(outputs, self.labels))

    def losses(self, outputs: Tensor) -> Tensor:
        """[N]: the loss of each row by itself, of what a network gave."""
        rows = range(self.rows)
        return torch.stack([checks.scalar(self._a.loss(outputs[n : n + 1], self.labels[n : n + 1])) for n in rows])

    def twin(self) -> nn.Module:
        """A copy of the network in torch's own layers, to look into."""
        return to_torch(self._a.model)

    def costs(self, patterns: Iterable[Pattern]) -> dict[Pattern, int]:
        """Multiply-adds of a step under other patterns; see `Pattern.cost`."""
        operations = operations_of(self._a.model, self.inputs)
        return {p: operations.costs(p.parameters(self._a.model))[1] for p in patterns}

    def predict(self, params: Mapping[str, Tensor], x: Any) -> Any:
        """What the network gives for other inputs, with these parameters in the places of the model's."""
        return classify(self._a, self._a.tie({**self._a.start(None), **params}), x, None)
