"""Classes of networks whose forward is a program, or one operation, in place of what is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import fx, nn

from ._say import say_once
from ._torch import being_traced
from .evaluated import logits_of
from .layers import as_torchs, runs_as_written
from .neighbours import unpatched
from .norms import exact_norms
from .program import plain_view, program_for

__all__ = ["Fused", "as_one_operation", "fused_class"]

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
def fused_class(cls: Any, blocks: bool, whole: bool) -> type[nn.Module]:
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
    fused = fused_class(cls, blocks, whole)
    return fused.__new__(fused)


def as_one_operation(model: Model) -> Model:
    """Let a module's call be one operation where it can, and return it: a chain of blocks without norms of their own,
    and a linear layer, where no derivative is asked for. Any other call is what it was.

    >>> model = as_one_operation(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)))
    >>> type(model).__name__, list(model.state_dict())
    ('Sequential', ['0.weight', '0.bias', '3.weight', '3.bias'])
    """
    cls: Any = type(model)
    fused = (cls._lambda_fuses, cls._lambda_blocks) if isinstance(model, Fused) else (cls, False)
    model.__class__ = fused_class(*fused, True)  # type: ignore[assignment]
    return model
