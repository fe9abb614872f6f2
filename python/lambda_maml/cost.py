"""What a network's operations cost, layer by layer: counted on a run without arithmetic, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lambda_kernels import to_torch
from lambda_kernels.program import flatten, shadow, tensors_of

from .network import layers_of, module_of

__all__ = ["Operation", "Operations", "layer_costs", "operations_of"]


class Operation(NamedTuple):
    """One operator of a forward pass; memory is told by the number of its storage."""

    layer: int  # which of the network's layers
    forward: int  # multiply-adds
    factors: tuple[int, ...]  # memory of what is multiplied: the gradient of each costs as much as the forward pass
    reads: frozenset[int]
    makes: frozenset[int]  # memory of its results, and what it writes to in place
    writes: frozenset[int]
    random: bool


class Operations(NamedTuple):
    """The operators of a network's forward pass in their order."""

    steps: tuple[Operation, ...]
    parameters: dict[str, int]  # memory, by name

    def moving(self, updated: Sequence[str]) -> tuple[set[int], list[int]]:
        """The indices of those that an updated parameter reaches, or random numbers; of each operator, how many of its
        factors an updated parameter reaches."""
        rewritten: set[int] = set()  # memory that has to be made anew for each run, as the rest writes into it
        while True:
            reached = {self.parameters[n] for n in updated}
            other, known = set(reached), len(rewritten)
            moving: set[int] = set()
            passes = []
            for index, step in enumerate(self.steps):
                passes.append(sum(factor in reached for factor in step.factors))
                if not reached.isdisjoint(step.reads):
                    reached |= step.makes
                if step.random or not other.isdisjoint(step.reads) or not rewritten.isdisjoint(step.makes):
                    moving.add(index)
                    other |= step.makes
                    rewritten |= step.writes
            if len(rewritten) == known:
                return moving, passes

    def costs(self, updated: Sequence[str]) -> tuple[int, int, int]:
        """Multiply-adds of what runs once, of a step, and of a step that runs everything; see `patterns.Cost`."""
        moving, passes = self.moving(updated)
        forward = [operation.forward for operation in self.steps]
        every = [f * (1 + gradients) for f, gradients in zip(forward, passes)]
        return sum(f for i, f in enumerate(forward) if i not in moving), sum(every[i] for i in moving), sum(every)


def layer_costs(model: nn.Module, sample: Any) -> list[int]:
    """Multiply-adds of the forward pass of each layer, in the order of `layers_of`; see `operations_of`."""
    costs = [0] * len(layers_of(model))
    for step in operations_of(model, sample).steps:
        costs[step.layer] += step.forward
    return costs


def operations_of(model: nn.Module, sample: Any) -> Operations:
    """The operators of the network's forward pass on an input, counted by `torch.utils.flop_counter`.

    The network runs on torch's meta device, in its present mode: no arithmetic is done. What runs outside of all layers
    counts for the layer whose parameter it multiplies, else for the layer in front.

    Args:
        sample: the input's shape, for one of the parameters' dtype; or the input itself.

    Raises:
        ValueError: the network does not run on such an input, or asks for the values of tensors.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        return _run(model, sample)


def _run(model: nn.Module, sample: Any) -> Operations:
    parameters, buffers = tensors_of(model)
    meta = {id(t): torch.empty_like(t, device="meta") for t in buffers.values()}
    meta.update(
        {id(p): torch.empty_like(p, device="meta").requires_grad_(_is_differentiable(p)) for p in parameters.values()}
    )
    state = {n: meta[id(t)] for n, t in (*parameters.items(), *buffers.items())}
    twin = to_torch(shadow(model, state))
    for module in twin.modules():
        plain = {n: torch.empty_like(t, device="meta") for n, t in module.__dict__.items() if isinstance(t, Tensor)}
        module.__dict__.update(plain)
    if isinstance(sample, (tuple, torch.Size)) and all(isinstance(side, int) for side in sample):
        x: Any = torch.empty(sample, dtype=next(iter(parameters.values())).dtype)
    else:
        tensors, rebuild = flatten(sample)
        x = rebuild([torch.empty_like(t, device="meta") for t in tensors])
    counter = _Counter(twin)
    try:
        with counter:
            twin(x)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"cost: {type(model).__name__} cannot be counted on an input {_told(sample)}: {reason}. It runs on torch's "
            "meta device, where tensors have no values; give the input itself where its shape does not tell its dtype"
        ) from error
    return Operations(tuple(counter.steps), counter.parameters)


class _Counter(TorchDispatchMode):
    """Notes every operator that runs under it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.steps: list[Operation] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # storages, so that none has the address of an earlier one
        own = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = {name: self._memory(p) for name, p in own.items()}
        self._layers = layers_of(model)
        self._owners: dict[int, int] = {}
        for at, layer in enumerate(self._layers):
            self._owners.update({self.parameters[n]: at for n in layer.weights + layer.norm})
        self._running: list[int] = []
        self._last = 0
        for at, layer in enumerate(self._layers):
            module = module_of(model, layer)
            module.register_forward_pre_hook(lambda *_, at=at: self._enter(at))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, layer: int) -> None:
        self._running.append(layer)
        self._last = layer

    def _leave(self) -> None:
        self._running.pop()

    def _memory(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self._numbers)
            self._alive.append(storage)
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        named = [(s, args[i] if i < len(args) else kwargs.get(s.name)) for i, s in enumerate(func._schema.arguments)]
        given = [(s, [self._memory(t) for t in flatten(value)[0]]) for s, value in named]
        writes = {m for s, memory in given for m in memory if s.alias_info is not None and s.alias_info.is_write}
        formula = flop_registry.get(func._overloadpacket)
        forward, factors = 0, []
        if formula is not None:
            forward = int(formula(*args, **kwargs, out_val=result)) // 2
            tensors = [value for _, value in named if isinstance(value, Tensor)]
            # An operator with a `beta` adds its first tensor to a product of others; a bias has one axis.
            added = any(s.name == "beta" for s in func._schema.arguments)
            factors = [self._memory(t) for t in tensors[added:] if t.dim() > 1]
        owners = [self._owners[m] for m in factors if m in self._owners]
        self.steps.append(
            Operation(
                (self._running[-1:] or owners or [self._last])[0],
                forward,
                tuple(factors),
                frozenset(m for _, memory in given for m in memory),
                frozenset(self._memory(t) for t in flatten(result)[0]) | writes,
                frozenset(writes),
                torch.Tag.nondeterministic_seeded in func.tags,
            )
        )
        return result


def _is_differentiable(t: Tensor) -> bool:
    """Whether a tensor may require a gradient."""
    return t.is_floating_point() or t.is_complex()


def _told(sample: Any) -> str:
    shapes = [list(t.shape) for t in flatten(sample)[0]]
    return ", ".join(map(str, shapes)) if shapes else str(list(sample))
