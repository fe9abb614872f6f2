"""A CUDA graph's rules on the CPU: operators are written down while a function runs, and run again on the same memory.

What Python does in the function is not done again, results lie where they lay, and a wait for a value is an error. So a
recording that would be wrong on a device is wrong here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lambda_kernels import cuda_graph
from lambda_kernels._capture import Rules


class Tape(Rules):
    """Notes every operator with its operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = super().__torch_dispatch__(func, types, args, kwargs)
        self.entries.append((func, args, kwargs or {}, [t for t in tree_leaves(results) if isinstance(t, Tensor)]))
        return results

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.entries:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for mine, new in zip(results, again, strict=True):
                    if mine.data_ptr() != new.data_ptr():  # else a view, or written in place
                        mine.detach().copy_(new.detach())


class Rehearsed:
    """Stands in for `cuda_graph.Graph`."""

    made = 0
    replays = 0

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], memory: cuda_graph.Memory
    ) -> None:
        for _ in range(2):
            function(*inputs)
        self.tape = Tape()
        with self.tape:
            self.results = function(*inputs)
        Rehearsed.made += 1

    @contextmanager
    def turn(self) -> Iterator[Callable[[], None]]:
        def replay() -> None:
            Rehearsed.replays += 1
            self.tape.replay()

        yield replay


def rehearse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings are made on the CPU, of tapes."""
    monkeypatch.setattr(cuda_graph, "Graph", Rehearsed)
    monkeypatch.setattr(cuda_graph, "refusal", lambda device: None)
    Rehearsed.made = Rehearsed.replays = 0
