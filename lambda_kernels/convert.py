"""Drop-in conversion of whole models, and the account of what was done."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from ._say import say_once
from ._torch import being_traced
from .evaluated import logits_of
from .layers import TORCH_CLASS, Conv2d, ConvBlock, Linear, as_torchs, runs_as_written, torch_class
from .neighbours import unpatched
from .norms import exact_norms
from .program import NORMS, Program, plain_view, program_for, program_seen

__all__ = ["as_one_operation", "convert", "report", "to_torch"]

_DROP_IN: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: Conv2d, nn.Linear: Linear}


Model = TypeVar("Model", bound=nn.Module)


class Fused:
    """Runs a module's program, in which conv-norm-ReLU-pool runs are one block, in place of its forward; with `whole`
    one operation in place of all of it, where it can. A name on the class hides a module's child of that name, so that
    these are unlike any."""

    _lambda_fuses: type[nn.Module]
    _lambda_blocks: bool
    _lambda_whole: bool

    def __init_subclass__(cls, **named: Any) -> None:
        """Without the model's own, which may keep a register of its classes."""

    def __prepare_scriptable__(self) -> nn.Module:
        return as_torchs(self, self._lambda_fuses)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        made_of = self._lambda_fuses, self._lambda_blocks, self._lambda_whole
        return _revive, made_of, super().__reduce_ex__(2)[2]


def _forward_of(cls: Any, blocks: bool, whole: bool) -> Callable[..., Any]:
    """The forward of a fused class, with the signature of the one that it takes the place of; without `blocks` there
    are none to be found, and only norms are other than torch's under a transform."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if being_traced() or any(isinstance(x, fx.Proxy) for x in inputs):
            with exact_norms():
                return cls.forward(self, *inputs, **named)
        self = unpatched(self)
        if whole and len(inputs) == 1 and not named and not runs_as_written():
            if (logits := logits_of(self, inputs[0])) is not None:
                return logits
        program = program_for(self, inputs, named, called=False) if blocks and not runs_as_written() else None
        if program is not None and program.untraceable is not None:
            say_once(f"{cls.__name__} runs layer by layer, without fused blocks: {program.untraceable}")
            program = None
        with exact_norms():
            if program is None:
                return cls.forward(plain_view(self, cls), *inputs, **named)
            return program(self, *inputs, **named)

    return forward


@cache
def _fused_class(cls: Any, blocks: bool, whole: bool) -> type[nn.Module]:
    names = {
        "_lambda_fuses": cls,
        "_lambda_blocks": blocks,
        "_lambda_whole": whole,
        "forward": _forward_of(cls, blocks, whole),
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type(cls)(cls.__name__, (Fused, cls), names)


def _revive(cls: Any, blocks: bool = True, whole: bool = False) -> nn.Module:
    fused = _fused_class(cls, blocks, whole)
    return fused.__new__(fused)


def convert(model: Model) -> Model:
    """Put the drop-in layers into a model, in place, and return it.

    Every `nn.Conv2d` and `nn.Linear` becomes the layer of the same name here, and conv-norm-ReLU-pool runs in the
    model's forward are computed as one block. A forward of a user's is captured by TorchDynamo at the first call of a
    shape, with guards on all that it read; one that cannot be captured runs as it is written, and that is said once.
    Parameters, state_dict keys, the modules' places and identity, hooks and training mode stay as they are. Subclasses
    of these layers are left alone. `report` says what was done.

    >>> model = convert(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)))
    >>> type(model[0]) is Conv2d, list(model.state_dict())
    (True, ['0.weight', '0.bias', '3.weight', '3.bias'])
    """
    _check_module("convert", model)
    for module in model.modules():
        drop_in = _DROP_IN.get(type(module))
        if drop_in is not None:
            module.__class__ = drop_in
    cls: Any = type(model)
    if not isinstance(model, Fused) and cls not in TORCH_CLASS:
        kinds = {type(module) for module in model.modules()}
        blocks = bool(kinds & {nn.Conv2d, Conv2d}) and nn.BatchNorm2d in kinds or ConvBlock in kinds
        if blocks or any(issubclass(kind, NORMS) for kind in kinds):
            model.__class__ = _fused_class(cls, blocks, False)  # type: ignore[assignment]
    return model


def as_one_operation(model: Model) -> Model:
    """Let a module's call be one operation where it can, and return it: a chain of blocks without norms of their own,
    and a linear layer, where no derivative is asked for. Any other call is what it was.

    >>> model = as_one_operation(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)))
    >>> type(model).__name__, list(model.state_dict())
    ('Sequential', ['0.weight', '0.bias', '3.weight', '3.bias'])
    """
    cls: Any = type(model)
    fused = (cls._lambda_fuses, cls._lambda_blocks) if isinstance(model, Fused) else (cls, False)
    model.__class__ = _fused_class(*fused, True)  # type: ignore[assignment]
    return model


def _check_module(what: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what}: a torch.nn.Module expected, got {type(model).__name__}: {what}(model), not its class")


def to_torch(model: Model) -> Model:
    """A deep copy of the model in which every layer of this package is torch's own again: the yardstick's network.

    >>> type(to_torch(convert(nn.Linear(8, 5)))) is nn.Linear
    True
    """
    _check_module("to_torch", model)
    held = [t for m in model.modules() for t in m.__dict__.values() if isinstance(t, Tensor) and not t.is_leaf]
    twin = copy.deepcopy(model, {id(t): t.detach().clone() for t in held})  # what hooks computed, as those of prune do
    for module in twin.modules():
        module.__class__ = type(module)._lambda_fuses if isinstance(module, Fused) else torch_class(module)
    return twin


def report(model: nn.Module, *inputs: Any) -> str:
    """What the layers of a model became, which runs of layers are one fused block, and what was left alone and why.

    A forward of a user's is captured when it is called: the report is of a call with these inputs, and without any of
    the last call.

    >>> norm = nn.BatchNorm2d(8, track_running_stats=False)
    >>> print(report(convert(nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)))))
    Sequential: 1 fused block, 3 steps
      0: lambda_kernels.Conv2d, fused with 1 (norm, ReLU)
      1: BatchNorm2d, computed in the block of 0
      2: ReLU, computed in the block of 0
      4: lambda_kernels.Linear
    """
    _check_module("report", model)
    program = program_for(model, inputs, {}) if inputs else program_seen(model)
    lines = [f"{type(model).__name__}: {_summary(program)}"]
    fusions = () if program is None else program.fusions
    left_alone = {} if program is None else program.left_alone
    fused = {f.conv: f for f in fusions}
    parts = {path: f.conv for f in fusions for path in (f.norm, f.relu, f.pool) if path}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            lines.append(f"  {path or '(model)'}: {_became(module)}{_place(path, fused, left_alone)}")
        elif path in parts:
            lines.append(f"  {path}: {type(module).__name__}, computed in the block of {parts[path]}")
        elif isinstance(module, NORMS):
            lines.append(f"  {path}: {type(module).__name__}, torch's")
    return "\n".join(lines)


def _summary(program: Program | None) -> str:
    if program is None:
        return "not called yet, and what is fused is seen in a call: report(model, x)"
    if program.untraceable is not None:
        return f"nothing is fused: {program.untraceable}"
    return f"{len(program.fusions)} fused block{'' if len(program.fusions) == 1 else 's'}, {len(program.steps)} steps"


def _became(module: nn.Module) -> str:
    name = type(module).__name__
    if type(module) in (Conv2d, Linear):
        return f"lambda_kernels.{name}"
    if type(module) in _DROP_IN:
        return f"{name}, torch's"
    return f"{name}, left alone: a subclass of {'Conv2d' if isinstance(module, nn.Conv2d) else 'Linear'}"


def _place(path: str, fused: dict[str, Any], left_alone: dict[str, str]) -> str:
    if path in fused:
        run = fused[path]
        pool = f", max-pool {run.size}" if run.size > 1 else ""
        return f", fused with {run.norm} (norm, ReLU{pool})"
    return f", not fused: {left_alone[path]}" if path in left_alone else ""
