"""A program against its module, once, on the first real input of a shape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..agreement import TOLERANCES, apart
from .shadow import shadow
from .steps import Program
from .structure import flatten
from .watch import by_name, is_random, written

__all__ = ["Incomparable", "Rehearsal", "difference", "with_little_memory"]

T = TypeVar("T")


class Incomparable(Exception):
    """The module itself refuses the call."""


def difference(
    program: Program, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: bool
) -> str | None:
    """What a program gives other than its module for a call, or None where they agree.

    Both run on copies of the buffers and with the same random numbers, which are drawn from neither generator of
    torch's: the module and the process are left as they are.

    Raises:
        Incomparable: the module raises an exception, which is its caller's to see.
    """

    def theirs() -> tuple[Any, Any]:
        twin = shadow(root, {**parameters, **_copies(root)})
        with _alike(program):
            return twin, twin(*args, **kwargs) if called else type(twin).forward(twin, *args, **kwargs)

    def ours() -> tuple[dict[str, Tensor], Any]:
        state = {**parameters, **_copies(root)}
        with _alike(program):
            return state, program.evaluate(program.bind(root), state, *args, **kwargs)

    parameters = dict(root.named_parameters(remove_duplicate=False))
    try:
        shadow(root, parameters)
    except TypeError:  # it cannot be copied, and adapted neither
        return None
    try:
        twin, want = with_little_memory(theirs)
    except Exception as error:
        raise Incomparable from error
    try:
        state, got = with_little_memory(ours)
    except Exception as error:
        return f"its program fails where the network does not ({type(error).__name__}: {error})"
    if (why := _unlike(flatten(got)[0], flatten(want)[0], "results")) is not None:
        return why
    names = [name for name, _ in twin.named_buffers() if name in state]
    buffers = dict(twin.named_buffers())
    return _unlike([state[n] for n in names], [buffers[n] for n in names], "buffers")


def _alike(program: Program) -> contextlib.AbstractContextManager[object]:
    """What both runs draw is the same."""
    return Rehearsal() if any(step.not_reusable for step in program.steps) else contextlib.nullcontext()


def with_little_memory(run: Callable[[], T]) -> T:
    """What `run` gives: nobody goes back through its graph, which keeps no activations; unless it does so itself."""

    def missing(_: object) -> Tensor:
        raise RuntimeError("nothing was kept for the way back")

    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, missing):
            return run()
    except Exception:  # it needs what was not kept, or fails anyway
        return run()


def _copies(root: nn.Module) -> dict[str, Tensor]:
    copies: dict[int, Tensor] = {}
    return {
        name: copies.setdefault(id(buffer), buffer.detach().clone())
        for name, buffer in root.named_buffers(remove_duplicate=False)
    }


def _unlike(got: list[Tensor], want: list[Tensor], what: str) -> str | None:
    if len(got) != len(want):
        return f"its program gives {len(got)} {what} where the network gives {len(want)}"
    for mine, theirs in zip(got, want):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return f"its program's {what} are {list(mine.shape)} {mine.dtype}, the network's {list(theirs.shape)}"
        if theirs.dtype.to_real() not in TOLERANCES:  # whole numbers and truth values
            if not torch.equal(mine, theirs):
                return f"its program's {what} are not the network's"
        elif theirs.numel() and (off := apart(mine.detach(), theirs.detach())) is not None:
            return f"its program's {what} differ from the network's by {off:.1e}"
    return None


class Rehearsal(TorchDispatchMode):
    """Operators that draw get their numbers from a generator of this mode's own: two runs draw alike."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()
        self._generator.manual_seed(0)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = by_name(op, args, kwargs or {})
        if not is_random(op, given):
            return op(*args, **(kwargs or {}))
        filled = [value for value in written(op, given) if isinstance(value, Tensor)]
        if filled:
            for value in filled:
                value.copy_(self._numbers(value, None))
            return filled[0]
        on_meta = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs or {}))
        source = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
        device = given.get("device") if source is None else source.device
        if any(argument.name == "device" for argument in op._schema.arguments):
            on_meta[1]["device"] = "meta"
        results = op(*on_meta[0], **on_meta[1])
        return tree_map_only(Tensor, lambda t: self._numbers(t, source).to(device or "cpu"), results)

    def _numbers(self, like: Tensor, source: Tensor | None) -> Tensor:
        """Numbers of a tensor's shape and dtype, times `source`'s values where the shapes agree."""
        numbers = torch.rand(like.shape, generator=self._generator)
        if source is None or not like.is_floating_point():
            return (2 * numbers).to(like.dtype)
        own = numbers.to(like.dtype).to(source.device)
        return own * source.detach() if source.shape == like.shape and source.dtype == like.dtype else own
