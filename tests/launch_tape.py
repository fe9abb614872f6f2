"""A CUDA graph's rules on the CPU for code that launches kernels past torch's operators: by ctypes, or by Triton.

A function runs once while its operators and launches are written down, with the places of their operands in memory and
the bytes of their structures; a replay runs these again, and nothing of Python. As of a graph's own memory, what the
function allocates stays for as long as the tape; what was there before is not kept. Memory that the function gives back
is poisoned, and a replay begins with all of the tape's memory poisoned: who reads what another one left there gets NaN.

    with taping() as tape:
        results = function(*inputs)
    tape.replay()                        # the same tensors hold the results for what the inputs' memory holds now
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from nodes import is_view
from tape import Rehearsed
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lambda_kernels import cuda_graph
from lambda_kernels.backends.cuda import Library

__all__ = ["LaunchTape", "rehearse_launches", "taping"]

POISON = 255  # in every byte: NaN, or a number that is no place


class Place(NamedTuple):
    """Where a tensor lies: in memory of the tape's own, or in memory that was there before."""

    memory: torch.UntypedStorage | StorageWeakRef
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        held = self.memory
        storage = _alive(held) if isinstance(held, StorageWeakRef) else held
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


class LaunchTape(TorchDispatchMode):
    """Notes operators and launches; `replay` runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[str, Callable[[], None]]] = []
        self._own: dict[int, torch.UntypedStorage] = {}  # by the number of a storage
        self._freed: set[int] = set()
        self._before: dict[int, StorageWeakRef] = {}

    @property
    def names(self) -> list[str]:
        """What is replayed, in order."""
        return [name for name, _ in self.entries]

    def replay(self) -> None:
        for storage in self._own.values():
            _poison(storage)
        with torch.no_grad():
            for _, again in self.entries:
                again()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        self._poison_what_was_given_back()
        places = tree_map_only(Tensor, self._place, (args, kwargs))
        results = func(*args, **kwargs)
        made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        for t in made:
            self._place(t, made=True)
        name = func.overloadpacket.__name__
        computes = bool(made) or func._schema.is_mutable
        if computes and not is_view(func) and not name.startswith(("empty", "new_empty")):
            self._note(name, func, places, [self._place(t) for t in made])
        return results

    def launch(self, library: Library, name: str, parameters: ctypes.Structure, *rest: Any) -> None:
        """A launcher of the CUDA library, which reads its structure at once and what that points to later."""
        self._poison_what_was_given_back()
        before = [m for m in (self._memory(address, name) for address in _addresses(parameters)) if m is not None]
        twin = type(parameters).from_buffer_copy(parameters)

        def run() -> None:
            for held in before:
                _alive(held)
            LAUNCH(library, name, twin, *rest)

        run()
        self.entries.append((f"cuda {name}", run))

    def start(self, kernel: Any, programs: int, where: Tensor, *arguments: Any, **constants: Any) -> None:
        """A Triton kernel."""
        self._poison_what_was_given_back()
        places = tree_map_only(Tensor, self._place, (where, arguments))

        def run() -> None:
            on, given = tree_map(lambda p: p.tensor() if isinstance(p, Place) else p, places, is_leaf=_is_place)
            with _disable_current_modes():
                _triton("launch").launch(kernel, programs, on, *given, **constants)

        run()
        self.entries.append((f"triton {kernel.fn.__name__}", run))

    def _note(self, name: str, func: Any, places: Any, results: list[Place]) -> None:
        def again() -> None:
            args, kwargs = tree_map(lambda p: p.tensor() if isinstance(p, Place) else p, places, is_leaf=_is_place)
            new = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for place, t in zip(results, new, strict=True):
                mine = place.tensor()
                if mine.data_ptr() != t.data_ptr():  # else written in place
                    mine.copy_(t)

        self.entries.append((name, again))

    def _place(self, t: Tensor, made: bool = False) -> Place:
        storage = t.untyped_storage()
        number = storage._cdata
        held: torch.UntypedStorage | StorageWeakRef | None = self._own.get(number) or self._before.get(number)
        if held is None:
            if made:
                held = self._own[number] = storage
            else:
                held = self._before[number] = StorageWeakRef(storage)
        return Place(held, t.dtype, t.shape, t.stride(), int(t.storage_offset()))

    def _poison_what_was_given_back(self) -> None:
        """Where nothing but the tape holds memory, it is free for others from here on."""
        for number in [n for n, s in self._own.items() if n not in self._freed and _holders(s) == 1]:
            storage = self._own[number]
            self._freed.add(number)
            _poison(storage)
            self.entries.append(("freed", partial(_poison, storage)))

    def _memory(self, address: int, name: str) -> StorageWeakRef | None:
        """The memory of before in which an address lies, None where it is the tape's own.

        RuntimeError where it lies in none that a launch may use.
        """
        for number, storage in self._own.items():
            if _contains(storage, address):
                if number in self._freed:
                    raise RuntimeError(f"{name} is launched on memory that was given back")
                return None
        for held in self._before.values():
            if not held.expired() and _contains(_alive(held), address):
                return held
        gc.unfreeze()  # what is frozen is left out of:
        for found in gc.get_objects():
            if not issubclass(type(found), Tensor) or is_lazy(found):  # of other tests too
                continue
            if found.layout is torch.strided and found.device.type == "cpu":
                storage = found.untyped_storage()
                if storage.device.type == "cpu" and _contains(storage, address):
                    return self._before.setdefault(storage._cdata, StorageWeakRef(storage))
        raise RuntimeError(f"{name} is launched on memory of no tensor")


LAUNCH = Library.launch


def _poison(storage: torch.UntypedStorage) -> None:
    with _disable_current_modes():
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(POISON)


def _holders(storage: torch.UntypedStorage) -> int:
    return int(torch._C._storage_Use_Count(storage._cdata))


def _alive(held: StorageWeakRef) -> torch.UntypedStorage:
    storage = None if held.expired() else torch.UntypedStorage._new_with_weak_ptr(held.cdata)
    if storage is None:
        raise RuntimeError("a replay reads memory that was there before the recording, and was given back since")
    return storage


def _contains(storage: torch.UntypedStorage, address: int) -> bool:
    return 0 <= address - storage.data_ptr() < max(storage.nbytes(), 1)


def _addresses(parameters: ctypes.Structure) -> Iterator[int]:
    for name, kind, *_ in parameters._fields_:
        value = getattr(parameters, name)
        if kind is ctypes.c_void_p and value:
            yield value
        elif isinstance(value, ctypes.Array) and value._type_ is ctypes.c_void_p:
            yield from filter(None, value)


def _is_place(value: Any) -> bool:
    return isinstance(value, Place)


def _triton(name: str) -> Any:
    return importlib.import_module(f"lambda_kernels.backends.triton.{name}")


@contextmanager
def taping() -> Iterator[LaunchTape]:
    """Operators and launches inside are noted on the tape that is given."""
    tape, start = LaunchTape(), _triton("launch").launch
    package = importlib.import_module("lambda_kernels.backends.triton")
    modules = [_triton(m.name) for m in pkgutil.iter_modules(package.__path__) if m.name != "launch"]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Library, "launch", lambda library, *given: tape.launch(library, *given)))
        for module in modules:
            if getattr(module, "launch", None) is start:
                stack.enter_context(mock.patch.object(module, "launch", tape.start))
        stack.enter_context(tape)
        yield tape


class RehearsedLaunches(Rehearsed):
    """Stands in for `cuda_graph.Graph`, with a tape that holds launches too."""

    tape: Any

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *rest: Any) -> None:
        inputs: Sequence[Tensor] = rest[0] if len(rest) > 1 else ()
        function(*inputs)
        with taping() as tape:
            self.results = function(*inputs)
        self.tape = tape
        Rehearsed.made += 1


def rehearse_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings are made on the CPU, of tapes that hold launches too."""
    monkeypatch.setattr(cuda_graph, "Graph", RehearsedLaunches)
    monkeypatch.setattr(cuda_graph, "refusal", lambda device: None)
    Rehearsed.made = Rehearsed.replays = 0
