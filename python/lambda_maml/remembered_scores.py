"""What a selection has evaluated so far, in a file beside its own, so that one that is ended goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from .checkpoint import digest
from .files import read_json, write_json
from .forms import Finite, checked

__all__ = ["Scores"]


class _Form(msgspec.Struct):
    of: str
    scores: dict[str, list[Finite]]


class Scores:
    """Scores by pattern, each one number a task, of one network, one list of tasks and one kind of adaptation.

    >>> scores = Scores(folder / "pattern.evaluated.json", model.state_dict(), tasks, "5 steps of 0.1")
    >>> scores.get("00011") is None
    True

    path: the file; None: nothing is kept. `about` says in words whatever else the scores depend on. A file of other
    weights, tasks or words, or one that cannot be read, counts as none.
    """

    def __init__(
        self, path: Path | None, weights: Mapping[str, Tensor], tasks: Iterable[Sequence[Tensor]], about: str
    ) -> None:
        self.path, self._known = path, dict[str, list[float]]()
        if path is None:
            return
        images = {f"task {i} {k}": part for i, task in enumerate(tasks) for k, part in enumerate(task)}
        self._of = digest({**weights, **images}, about)
        try:
            found: _Form = checked(read_json(path), _Form, path, "")
        except (OSError, ValueError):
            return
        self._known = dict(found.scores) if found.of == self._of else {}

    def get(self, pattern: str) -> Tensor | None:
        """The scores [tasks], float64; None where they are not known."""
        return torch.tensor(self._known[pattern], dtype=torch.float64) if pattern in self._known else None

    def put(self, pattern: str, scores: Tensor) -> None:
        """Keep a pattern's scores."""
        if self.path is not None:
            self._known[pattern] = scores.tolist()
            write_json(self.path, {"of": self._of, "scores": self._known})

    def remove(self) -> None:
        """The selection is made."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
