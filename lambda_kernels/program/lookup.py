"""The program of a call: walked or captured once, then found again for as long as the network is what it was."""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from .._torch import (
    functorch_active,
    is_functorch_wrapped_tensor,
    looked_at,
    temporarily_clear_interpreter_stack,
)
from ..cache import Bounded
from .build import aliases, build, modes, opaque
from .capture import Capture, Refusal, capture, hooked_everywhere
from .check import Incomparable, difference
from .shadow import shadow, stands_for
from .snapshot import Snapshot, Stamp, fingerprint, outline
from .steps import Program
from .structure import flatten
from .walk import is_walkable, look, plain_class, plain_view, walk

__all__ = ["aliases_of", "memo_of", "modes_of", "notes_of", "program_for", "program_seen", "snapshot_of", "tensors_of"]

_MOST = 64  # captures of one structure: more of them, and the forward asks for something that never stays
_LOCK = threading.RLock()  # one thread makes a program, the others wait for it


class _Captured(NamedTuple):
    capture: Capture
    stamp: Stamp
    forms: Any  # of the parameters and buffers
    program: Program


class _Family:
    """The programs of all networks of one structure."""

    def __init__(self, walkable: bool) -> None:
        self.walkable = walkable
        self.walked: Program | None = None
        self.captured: list[_Captured] = []
        self.last: _Captured | None = None  # that held last
        self.opaque: Bounded[Program] = Bounded(_MOST)  # by why
        self.refused: Bounded[str] = Bounded(_MOST)  # why an input is not walked with, by its form
        self.checked: Bounded[str] = Bounded(4 * _MOST)  # why not, "" where it is right, by program and form


class _Known:
    """What is known of one network."""

    def __init__(self, root: nn.Module, snapshot: Snapshot, family: _Family) -> None:
        self.snapshot, self.family = snapshot, family
        self.modes, self.aliases = modes(root), aliases(root)
        cls = plain_class(root)
        self.view = None if cls is type(root) else plain_view(root, cls)
        self.notes: dict[Any, Any] = {}
        self.memos: Bounded[dict[Any, Any]] = Bounded(_MOST)  # by program
        self.seen: Program | None = None  # the last one


_FAMILIES: Bounded[_Family] = Bounded(128)
_KNOWN: MutableMapping[nn.Module, _Known] = WeakIdKeyDictionary()
# Why a call is not captured, by its form: of a module, and of all its shadows, which are made anew for each call.
_REFUSED: MutableMapping[nn.Module, Bounded[str]] = WeakIdKeyDictionary()


def _known(root: nn.Module) -> _Known:
    """What is known of a network, anew where it is not what it was."""
    known = _KNOWN.get(root)
    if known is not None and known.snapshot.holds(root):
        return known
    walkable = is_walkable(root)
    snapshot = Snapshot(root, attributes=walkable)
    key = (fingerprint(root) if walkable else outline(root), walkable)
    family = _FAMILIES.get(key) or _FAMILIES.setdefault(key, _Family(walkable))
    known = _Known(root, snapshot, family)
    if snapshot.complete:  # else it is never found to hold, and what it keeps may lead back to the root
        _KNOWN[root] = known
    return known


def program_for(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool = True) -> Program:
    """The program of a call of a module in its present mode; one opaque step where no graph stands for the call.

    The program does what calling the module does, its hooks included; without `called`, what its forward does.

        program = program_for(model, (x,), {"mask": mask})
        program.evaluate(program.bind(model), state, x, mask=mask)
    """
    known = _known(root)
    found = _find(root, known, args, kwargs, called)
    known.seen = found
    return found


def program_seen(root: nn.Module) -> Program | None:
    """The program of the last call that was looked up for the network as it is; None before the first."""
    known = _known(root)
    return known.seen or (build(root, walk(root)) if known.family.walkable else None)


def _find(root: nn.Module, known: _Known, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool) -> Program:
    family = known.family
    if (why := hooked_everywhere()) is not None:
        return _opaque(root, family, why)
    if family.walkable:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return _opaque(root, family, _other_call(args, kwargs))
    if family.walked is not None:
        program = family.walked
    elif functorch_active():
        program = _outside(root, known, args, kwargs, called)
    elif family.walkable:
        program = _walked(root, family, args[0])
    else:
        program = _captured(root, known, known.view or root, args, kwargs, called)
    return program if program.untraceable else _checked(root, known, program, args, kwargs, called)


def _outside(root: nn.Module, known: _Known, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool) -> Program:
    """The program of a call under transforms of torch.func, looked for outside of them by a call of the same shapes."""
    try:
        seen, args, kwargs = _stand_ins(known.view or root, args, kwargs)
    except TypeError as error:
        return _opaque(root, known.family, str(error))
    with temporarily_clear_interpreter_stack():
        if known.family.walkable:
            return _walked(seen, known.family, args[0])
        return _captured(root, known, seen, args, kwargs, called)


def _other_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    if kwargs:
        return f"it is called with the keyword {next(iter(kwargs))!r}"
    if len(args) != 1:
        return f"it is called with {len(args)} arguments, its layers take 1"
    return f"it is called with a {type(args[0]).__name__}, its layers take a tensor"


def _opaque(root: nn.Module, family: _Family, why: str) -> Program:
    return family.opaque.get(why) or family.opaque.setdefault(why, opaque(root, why))


def _checked(
    root: nn.Module, known: _Known, program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool
) -> Program:
    """The program, once it is seen to give what the module gives; else an opaque one."""
    family = known.family
    form = (program, _form(args[0]) if family.walkable else None)  # the guards of a capture hold for one form
    good = family.checked.get(form)
    if good is None:
        if not _is_real(args, kwargs, root):
            return program
        with _LOCK:
            good = family.checked.get(form)
            if good is None:
                try:
                    why = difference(program, known.view or root, args, kwargs, called)
                except Incomparable:
                    return program
                good = "" if why is None else why
                family.checked.put(form, good)
    return _opaque(root, family, good) if good else program


def _walked(root: nn.Module, family: _Family, x: Tensor) -> Program:
    """The program of a network of torch's layers; an opaque one where that is refused, for inputs like x."""
    form = _form(x)
    why = family.refused.get(form)
    if why is None:
        with _LOCK:
            try:
                family.walked = family.walked or _walk(root, x)
                return family.walked
            except Refusal as refusal:
                why = str(refusal)
                family.refused.put(form, why)
    return _opaque(root, family, why)


def _walk(root: nn.Module, x: Tensor) -> Program:
    graph = walk(root)
    program = build(root, graph)
    if all(step.kind != "module" for step in program.steps):
        return program
    if (why := look(root, graph, x)) is not None:
        raise Refusal(why)
    return build(root, graph)


def _captured(
    root: nn.Module, known: _Known, seen: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool
) -> Program:
    """The program of a call that was captured, now or before; an opaque one where that is refused."""
    family = known.family
    program = _held(known, seen, args, kwargs, called)
    if program is None:
        own, classes = stands_for(root), frozenset(map(type, _tensors(args, kwargs, seen)))
        form = own is root, classes, called, torch.is_grad_enabled(), root.training, _form(args, kwargs)
        refused = _REFUSED.get(own) or _REFUSED.setdefault(own, Bounded(_MOST))
        why = refused.get(form)
        if why is None:
            with _LOCK:
                program = _held(known, seen, args, kwargs, called)
                if program is None:
                    program, why = _made(root, known, seen, args, kwargs, called)
            if why is not None:
                refused.put(form, why)
        if program is None:
            return _opaque(root, family, why or "")
    return program


def _held(
    known: _Known, seen: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool
) -> Program | None:
    named, forms = kwargs if type(kwargs) is dict else dict(kwargs), known.snapshot.forms()
    family = known.family
    last = family.last
    for made in ((last,) if last is not None else ()) + tuple(reversed(family.captured)):
        fits = made.program.called is called and made.forms == forms
        if fits and made.capture.holds(seen, args, named) and made.stamp.holds():
            family.last = made
            return made.program
    return None


def _made(
    root: nn.Module, known: _Known, seen: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool
) -> tuple[Program | None, str | None]:
    """A new program, or why there is none."""
    family = known.family
    if len(family.captured) >= _MOST:
        return None, f"its forward asks for something that was another in each of {_MOST} calls"
    if any(type(t) not in (Tensor, nn.Parameter) for t in _tensors(args, kwargs, seen)):
        return None, "it is called with tensors of a class of their own, or holds such"
    try:
        with _disable_current_modes():  # a mode that looks on shall see the call, not the capture of it
            made = capture(seen, args, kwargs, called)
        program = build(root, made.graph, called)
    except Refusal as refusal:  # by the capture, or of what the graph does
        return None, str(refusal)
    stamp = Stamp(made.classes, made.functions)
    family.captured.append(_Captured(made, stamp, known.snapshot.forms(), program))
    return program, None


def _form(value: Any, *more: Any) -> Any:
    """What a call is, without the values of its tensors."""
    if more:
        return _form(value), *map(_form, more)
    if isinstance(value, Tensor):
        stride = value.stride() if value.layout is torch.strided else None
        return type(value), value.shape, stride, value.dtype, value.device
    if isinstance(value, dict):
        return tuple((key, _form(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_form, value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any], root: nn.Module) -> list[Tensor]:
    return [*flatten((args, dict(kwargs)))[0], *root.parameters(), *root.buffers()]


def _is_real(args: tuple[Any, ...], kwargs: Mapping[str, Any], root: nn.Module) -> bool:
    """Whether all tensors of a call have values, which may be computed with here and now."""
    if functorch_active() or torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    if looked_at():
        return False
    return all(type(t) in (Tensor, nn.Parameter) and not t.is_meta for t in _tensors(args, kwargs, root))


def _stand_ins(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A network and a call of the same shapes, outside of the transforms of torch.func that are active."""

    def empty(t: Tensor) -> Tensor:
        with temporarily_clear_interpreter_stack():
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            return made.requires_grad_(t.requires_grad) if t.is_floating_point() else made

    tensors, rebuild = flatten((args, dict(kwargs)))
    new_args, new_kwargs = rebuild([empty(t) for t in tensors])
    held = dict((*root.named_parameters(), *root.named_buffers()))
    wrapped = {name: empty(t) for name, t in held.items() if is_functorch_wrapped_tensor(t)}
    return (shadow(root, {**held, **wrapped}) if wrapped else root), new_args, new_kwargs


def modes_of(root: nn.Module) -> dict[str, bool]:
    """Training or not, by the path of each module."""
    return _known(root).modes


def aliases_of(root: nn.Module) -> dict[str, str]:
    """The second names of shared parameters and buffers, and their first."""
    return _known(root).aliases


def snapshot_of(root: nn.Module) -> Snapshot | None:
    """What the module is at present; None where changes of it cannot be told."""
    snapshot = _known(root).snapshot
    return snapshot if snapshot.complete else None


def notes_of(root: nn.Module) -> dict[Any, Any]:
    """A place for what was read off a module's structure, empty once that is another."""
    return _known(root).notes


def memo_of(root: nn.Module, *args: Any) -> dict[Any, Any] | None:
    """A place for what was made of a module for calls like this one, empty once the module is not what it was; None
    where that cannot be told.

    Its parameters are the same objects for as long; their values, shapes and devices may change.
    """
    known = _KNOWN.get(root)
    if known is None or not known.snapshot.holds(root):
        return None
    if known.family.walkable:
        return known.snapshot.memo if hooked_everywhere() is None else None
    if functorch_active() or hooked_everywhere() is not None:
        return None
    program = _held(known, known.view or root, args, {}, True)
    if program is None:
        return None
    return known.memos.get(program) or known.memos.setdefault(program, {})


def tensors_of(root: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters and the buffers of a module, by every name that they have.

    Raises:
        TypeError: a part is a module of torch.jit.
    """
    snapshot = _known(root).snapshot
    if not snapshot.complete:
        for path, module in root.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"{path or type(root).__name__} is a module of torch.jit: its tensors cannot be replaced; adapt "
                    "the network that it was made of"
                )
    parameters, buffers = ({n: group[k] for n, group, k in found} for found in (snapshot.parameters, snapshot.buffers))
    return parameters, buffers
