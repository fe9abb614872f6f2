"""Drop-in conversion of whole models, and the account of what was done."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from .fused import Fused, fused_class
from .fused import _revive as _revive  # earlier pickles ask for it here
from .layers import TORCH_CLASS, Conv2d, ConvBlock, Linear, torch_class
from .program import NORMS, Program, program_for, program_seen

__all__ = ["convert", "report", "to_torch"]

_DROP_IN: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: Conv2d, nn.Linear: Linear}


Model = TypeVar("Model", bound=nn.Module)


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
            model.__class__ = fused_class(cls, blocks, False)  # type: ignore[assignment]
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
