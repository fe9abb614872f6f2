"""The program of a module, found by the module's snapshot where it is unchanged, else by its structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..cache import Bounded
from ..layers import has_hooks
from .build import build, opaque
from .snapshot import Snapshot, fingerprint
from .steps import Program

__all__ = ["memo_of", "program_for", "program_of", "tensors_of"]


class _Known(NamedTuple):
    snapshot: Snapshot
    program: Program
    others: dict[str, Program]  # opaque ones, by why


_PROGRAMS: Bounded[Program] = Bounded(128)  # by structure
_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def program_of(root: nn.Module, called: bool = False) -> Program:
    """The program of a module in its present mode; a module that torch.fx cannot trace is one opaque step.

    The program does what the module's forward does; with `called`, what calling it does, its own hooks included.

        program = program_of(model)
        program(model, x)                       # model.forward(x)
    """
    known = _known(root)
    if known is not None:
        return known.program
    hooked = called and has_hooks(root)
    key, snapshot = (fingerprint(root), hooked), Snapshot(root)
    program = _PROGRAMS.get(key)
    if program is None:
        program = _PROGRAMS.setdefault(key, opaque(root, "it has hooks of its own") if hooked else build(root))
    if snapshot.complete:  # else it is never found to hold, and what it keeps may lead back to the root
        _KNOWN[root] = _Known(snapshot, program, {})
    return program


def program_for(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool = True) -> Program:
    """The program of a module that takes such a call: `program_of`, or an opaque one where its trace is of another.

    A trace stands for a call with its positional inputs, each of them a tensor. For any other call, `untraceable` says
    what is different.

        program = program_for(model, (x,), {"mask": mask})
        program.evaluate(program.bind(model), state, x, mask=mask)
    """
    program = program_of(root, called)
    why = None if program.untraceable is not None else _other_call(program, args, kwargs)
    if why is None:
        return program
    known = _known(root)
    if known is not None:
        return known.others.setdefault(why, known.others.get(why) or opaque(root, why))
    key = (fingerprint(root), why)
    return _PROGRAMS.get(key) or _PROGRAMS.setdefault(key, opaque(root, why))


def _other_call(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    if kwargs:
        return f"it is called with the keyword {next(iter(kwargs))!r}"
    if len(args) != program.inputs:
        return f"it is called with {len(args)} arguments, its trace has {program.inputs}"
    for arg in args:
        if not isinstance(arg, Tensor):
            return f"it is called with a {type(arg).__name__}, where its trace has a tensor"
    return None


def memo_of(root: nn.Module) -> dict[Any, Any] | None:
    """A place for what was made of a module, empty once the module is not what it was; None where that cannot be told.

    Its parameters are the same objects for as long; their values, shapes and devices may change.
    """
    known = _known(root)
    return None if known is None else known.snapshot.memo


def tensors_of(root: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and the buffers of a module, by every name that they have."""
    known = _known(root)
    snapshot = Snapshot(root) if known is None else known.snapshot
    parameters, buffers = ({n: group[k] for n, group, k in found} for found in (snapshot.parameters, snapshot.buffers))
    return parameters, buffers


def _known(root: nn.Module) -> _Known | None:
    """What is known of a module, where it still is what it was."""
    known = _KNOWN.get(root)
    return known if known is not None and known.snapshot.holds(root) else None
