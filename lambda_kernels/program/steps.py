"""A program: steps that say what they read and compute, and how they run with parameters that are handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import Update
from .structure import Frame, flatten

__all__ = ["LAYERS", "NORMS", "Arguments", "Built", "Effects", "Fusion", "OwnState", "Program", "Slot", "State", "Step"]

State = Mapping[str, Tensor]
Effects = list[Update]

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Slot:
    """The place of a value in the environment of a run."""

    index: int


@dataclass(frozen=True)
class Built:
    """A value of a class of its own, made of others: see `structure.Frame`."""

    frame: Frame
    parts: tuple[Any, ...]


class Arguments(NamedTuple):
    """What an opaque program is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Fusion:
    """A run of layers that one fused block computes; paths are "" for a function in place of a module."""

    conv: str
    norm: str
    relu: str
    pool: str
    size: int  # pooling window, 1 for none


@dataclass(frozen=True)
class Step:
    """One computation of a program."""

    slot: int
    label: str
    kind: str  # "block", "conv", "linear", "norm", "flatten", "size", "module", "function" or "attribute"
    call: Callable[..., Any]  # call(modules, state, effects, *args, **kwargs)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]  # slots
    parameters: tuple[str, ...]  # names, as in named_parameters
    layer: str | None = None  # the path of the convolution or linear layer that it computes
    not_reusable: str | None = None  # why a second run with the same inputs may not be left out
    writes: tuple[int, ...] = ()  # slots whose tensors are written in place
    tracks: bool = False  # updates running statistics
    uncertain: bool = False  # gives a view or a copy, as the memory of what it reads lies


@dataclass(frozen=True, eq=False)
class Program:
    """The steps of a module in the order of execution. It holds paths, no modules: those of one structure share it."""

    steps: tuple[Step, ...]
    inputs: int
    result: Any
    fusions: tuple[Fusion, ...]
    left_alone: dict[str, str]  # path of a convolution that no block computes -> why
    paths: tuple[str, ...]  # modules that the steps use
    modes: Mapping[str, bool]  # training or not, by the path of each module
    untraceable: str | None = None  # why the module is one opaque step
    aliases: dict[str, str] = field(default_factory=dict)  # second names of shared tensors -> their first
    memory: tuple[int, ...] = (0, 1)  # for each slot a number; slots that may share memory have the same
    called: bool = True  # what a call of the module does, its hooks included; else what its forward does

    def __post_init__(self) -> None:
        for step in self.steps:
            if step.kind == "block":
                step.call.between = self.blocks_alone_read(step.slot)  # type: ignore[attr-defined]

    def blocks_alone_read(self, slot: int) -> bool:
        """Whether fused blocks, and sizes, are all that reads a value, so that nobody sees how it lies in memory."""
        readers = {step.kind for step in self.steps if slot in step.reads}
        return slot not in self.result_slots and "block" in readers and readers <= {"block", "size"}

    def bind(self, root: nn.Module) -> dict[str, nn.Module]:
        """The modules that the steps use, by path.

        A step that runs code of the user's puts a copy of its module there, which holds what that code wrote to it:
        so each adaptation binds for itself.
        """
        return {path: _at(root, path) for path in self.paths}

    def pack(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The values of the first slots, a tensor each, for a call of the module like the one that it is of.

        Raises:
            TypeError: the program is of calls with another number of tensors.
        """
        if self.untraceable is not None:
            return (Arguments(tuple(args), dict(kwargs)),)
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            tensors = list(args)
        else:
            tensors = flatten((tuple(args), dict(kwargs)))[0]
        if len(tensors) != self.inputs:
            raise TypeError(
                f"the program is of calls with {self.inputs} tensors, got {len(tensors)}: program_for gives the "
                "program of a call"
            )
        return tuple(tensors)

    def __call__(self, root: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The module's result, with its own parameters."""
        return self.evaluate(self.bind(root), OwnState(root), *args, **kwargs)

    def evaluate(self, modules: Mapping[str, nn.Module], state: State, /, *args: Any, **kwargs: Any) -> Any:
        """The module's result with the given parameters and buffers.

        Buffers are updated in `state`: in place, as the module's own would be; one that a forward replaces is replaced,
        where `state` is a dict.
        """
        env = dict(enumerate(self.pack(args, kwargs)))
        self.run(self.whole, modules, state, env)
        return self.take(env)

    @cached_property
    def whole(self) -> list[tuple[Step, tuple[int, ...]]]:
        """All steps."""
        return self.part(range(len(self.steps)), ())

    @property
    def result_slots(self) -> list[int]:
        """The slots that the program's result is made of."""
        return slots(self.result)

    def take(self, env: dict[int, Any]) -> Any:
        """The program's result out of a run's environment."""
        return _resolve(self.result, env)

    def part(self, indices: Iterable[int], keep: Iterable[int]) -> list[tuple[Step, tuple[int, ...]]]:
        """Some steps, each with the slots that no later one of them reads and that are neither result nor in `keep`."""
        steps = [self.steps[i] for i in indices]
        needed = {*keep, *self.result_slots, *range(self.inputs)}
        part = []
        for step in reversed(steps):
            last = {step.slot, *step.reads} - needed
            needed |= last
            part.append((step, tuple(last)))
        return part[::-1]

    def run(
        self,
        part: Sequence[tuple[Step, tuple[int, ...]]],
        modules: Mapping[str, nn.Module],
        state: State,
        env: dict[int, Any],
        effects: Effects | None = None,
    ) -> None:
        """Run a part with the given parameters and buffers; results go to `env`, updates of running statistics are made
        and, for a caller that will leave out later runs, noted in `effects`."""
        for step, done in part:
            args, kwargs = _resolve(step.args, env), _resolve(step.kwargs, env)
            env[step.slot] = step.call(modules, state, effects, *args, **kwargs)
            for slot in done:
                env.pop(slot, None)


def _at(root: nn.Module, path: str) -> nn.Module:
    """root.get_submodule(path), in a tenth of its time."""
    module: Any = root
    for name in path.split(".") if path else ():
        module = module._modules[name]
    return module


class OwnState(Mapping[str, Tensor]):
    """The parameters and buffers that a module has at the moment, by name."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __getitem__(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        return getattr(self.root.get_submodule(path), leaf)

    def __iter__(self) -> Any:
        return iter(self.root.state_dict(keep_vars=True))

    def __len__(self) -> int:
        return len(self.root.state_dict(keep_vars=True))


def slots(value: Any) -> list[int]:
    """The slots that a step's arguments or a result are made of."""
    found: list[int] = []
    _resolve(value, None, found)
    return found


def _resolve(value: Any, env: dict[int, Any] | None, found: list[int] | None = None) -> Any:
    """The value with each Slot replaced by what `env` holds; with env None, the slots are noted in `found` instead."""
    kind = type(value)
    if kind is Slot:
        if env is None:
            assert found is not None
            found.append(value.index)
            return None
        return env[value.index]
    if kind is tuple or kind is list:
        return kind([_resolve(v, env, found) for v in value])
    if kind is dict:
        return {k: _resolve(v, env, found) for k, v in value.items()}
    if kind is slice:
        return slice(*(_resolve(v, env, found) for v in (value.start, value.stop, value.step)))
    if kind is Built:
        parts = [_resolve(v, env, found) for v in value.parts]
        return None if env is None else value.frame(*parts)
    return value
