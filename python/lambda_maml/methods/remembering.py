"""A memory of each task's own parameters: MAML with momentum between the visits of a task.

Wang, Yuan, Ying, Yang, *Memory-Based Optimization Methods for Model-Agnostic Meta-Learning and Personalized Federated
Learning* (MOML), JMLR 2023, arXiv 2106.04911. A finite pool of M tasks, each with parameters u_i; meta-parameters w, b
= beta, w'_i what the solver finds from w:

    v1, sampled tasks:   u_i <- (1 - b) u_i + b w'_i                                 the outer loss is L_i(u_i)
    v2, sampled tasks:   u_i <- (1 - b) u_i + b w + b (M / B) (w'_i - w)
        all others:      u_i <- (1 - b) u_i + b w                                    B tasks an iteration

The remembered u_i are constants, so the meta-gradient carries a factor b; b = 1 is MAML. What differs here: the memory
holds the updated tensors only; any solver, of any number of steps, may give w'_i; u_i starts at its first visit, with
w'_i; v2 moves all M sets at the cost of one, by their mean part E <- (1 - b) E + b w and D_i = u_i - E, which between
two visits, s iterations apart, only shrinks to (1 - b)^s D_i. A task without a key (a new one) gets what the solver
finds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..patterns import Pattern
from ..places import Learned, Params, Problem, Solver, checked
from .catalogue import method

__all__ = ["remembering"]


@method(
    "solver", needs="a pool of tasks, and the pattern that it was made for", chain="as the solver within",
    fill={"solver": "solver", "model": "model", "pattern": "pattern", "tasks": "pool", "norm": "norm"},
)  # fmt: skip
class remembering(nn.Module):
    """A solver with a memory [tasks, ...] of every tensor that the pattern updates in `model`.

    >>> solver = remembering(descend(rules.sgd(0.05), 1), model, "00011", tasks=25, beta=0.3)
    >>> learner = adapt(model, xs, ys, pattern="00011", solver=solver, turn=Turn(key=7), second_order=True)
    >>> solver.seen.nonzero().tolist()
    [[7]]

    Args:
        solver: what finds a task's parameters from the meta-parameters.
        model, pattern, norm: whose tensors are remembered.
        tasks: M, the size of the pool; keys are 0 to M - 1.
        beta: in (0, 1], how much of a visit goes into the memory.
        version: 1 or 2.
        batch: B, tasks an iteration, for version 2.

    Raises:
        ValueError: a number is out of range; when it adapts: the pattern updates other tensors, or a key lies beyond
            the memory.
    """

    in_graph = True  # the factor b, in first order too
    pooled = True  # its tasks are those of a finite pool
    seen: Tensor
    clock: Tensor
    visited: Tensor

    def __init__(
        self, solver: Solver, model: nn.Module, pattern: str | Pattern, *, tasks: int, beta: float = 0.3,
        version: int = 1, batch: int | None = None, norm: str = "follow",
    ) -> None:  # fmt: skip
        super().__init__()
        if tasks < 1 or not 0.0 < beta <= 1.0 or version not in (1, 2):
            raise ValueError(
                f"remembering: tasks of at least 1, beta in (0, 1] and version 1 or 2 expected, got {tasks}, {beta} "
                f"and {version}"
            )
        if (version == 2) != (batch is not None) or (batch is not None and not 1 <= batch <= tasks):
            raise ValueError(
                f"remembering: version 2, and it alone, needs the number of tasks an iteration, 1 to {tasks}: batch is "
                f"{batch} for version {version}"
            )
        self.solver, self.beta, self.version, self.batch = solver, beta, version, batch
        chosen = Pattern.of(model, pattern)
        moved = [n for step in range(len(chosen.stages)) for n in chosen.parameters(model, norm, step)]
        self.names = tuple(dict.fromkeys(moved))
        self.register_buffer("seen", torch.zeros(tasks, dtype=torch.bool))
        self.register_buffer("visited", torch.zeros(tasks, dtype=torch.int64))  # v2: D_i is that of this iteration
        self.register_buffer("clock", torch.tensor(-1))  # v2: the iteration that `next` follows
        own = {n: model.get_parameter(n).detach() for n in self.names}
        self.own = _tensors({n: p.new_zeros(tasks, *p.shape) for n, p in own.items()})  # u_i, v2: D_i
        shared = {n: torch.zeros_like(p) for n, p in own.items()} if version == 2 else {}
        self.mean, self.next = _tensors(shared), _tensors(shared)  # E before and after the present iteration

    def extra_repr(self) -> str:
        return f"tasks={len(self.seen)}, beta={self.beta}, version={self.version}"

    @property
    def steps(self) -> int | None:
        """Those of the solver."""
        steps: int | None = getattr(self.solver, "steps", None)
        return steps

    def check(self, problem: Problem) -> None:
        if set(problem.names) != set(self.names):
            raise ValueError(
                f"remembering holds {', '.join(self.names)}, the pattern updates {', '.join(problem.names)}: make it "
                f"for {problem.pattern}"
            )
        checked(self.solver, problem)

    def forward(self, problem: Problem) -> Learned:
        self.check(problem)
        key = problem.key
        if key is not None and not 0 <= key < len(self.seen):
            raise ValueError(
                f"remembering: the task has the key {key}, the memory {len(self.seen)} tasks: draw from pool("
                f"{len(self.seen)}), or remember more"
            )
        found = self.solver(problem)
        if key is None:
            return found
        params = self._first(problem, key, found) if self.version == 1 else self._second(problem, key, found)
        self.seen[key] = True
        return Learned(params)

    def _first(self, problem: Problem, key: int, found: Learned) -> Params:
        start = {n: self._memory("own", n)[key] if self.seen[key] else p.detach() for n, p in found.params.items()}
        new = {n: (1 - self.beta) * start[n] + self.beta * p for n, p in found.params.items()}
        for n, p in new.items():
            self._memory("own", n)[key] = p.detach()
        return new

    def _second(self, problem: Problem, key: int, found: Learned) -> Params:
        b, iteration, fresh = self.beta, problem.turn.iteration, int(self.clock) != problem.turn.iteration
        assert self.batch is not None
        weight = b * len(self.seen) / self.batch
        missed = iteration - int(self.visited[key])  # iterations in which D_i only shrank
        new: Params = {}
        for n, p in found.params.items():
            w = problem.meta[n]
            mean, after, own = self._memory("mean", n), self._memory("next", n), self._memory("own", n)
            if fresh:
                mean.copy_(w.detach() if int(self.clock) < 0 else after)
            e = (1 - b) * mean + b * w
            if fresh:
                after.copy_(e.detach())
            rest = (1 - b) ** missed * own[key] if self.seen[key] else (p - w).detach()
            d = (1 - b) * rest + weight * (p - w)
            own[key] = d.detach()
            new[n] = e + d
        self.clock.fill_(iteration)
        self.visited[key] = iteration + 1
        return new

    def _memory(self, part: str, name: str) -> Tensor:
        found: Tensor = getattr(getattr(self, part), name.replace(".", "/"))
        return found


def _tensors(values: Params) -> nn.Module:
    """A module with these buffers; a name may not have a dot."""
    module = nn.Module()
    for name, value in values.items():
        module.register_buffer(name.replace(".", "/"), value.clone())
    return module
