"""How a run goes: metrics.jsonl in its folder, TensorBoard if it is asked for, pace and time left."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import atomic, written
from .progress import time_left

__all__ = ["METRICS", "Metrics", "Pace"]

METRICS = "metrics.jsonl"


class Metrics:
    """One JSON object a line: {"kind": "train", "iteration": ..., ...} and {"kind": "validation", ...}.

    iteration, validated: where the run is resumed; lines behind that are cut off, so that no iteration has two of them.
    folder: None: nothing is written, as on every rank but the first. tensorboard: write the numbers for TensorBoard
    too, into the same folder.

    Raises:
        ValueError: TensorBoard is asked for and not installed, or the file holds something else.
        OSError: the file cannot be written; names it.
    """

    def __init__(self, folder: Path | None, iteration: int, validated: int, tensorboard: bool = False) -> None:
        self.path, self._writer = None if folder is None else folder / METRICS, None
        if folder is None or self.path is None:
            return
        self._writer = _writer(folder, iteration) if tensorboard else None
        last = {"train": iteration, "validation": validated}
        kept = [line for line in _lines(self.path) if line["iteration"] <= last[line["kind"]]]
        with atomic(self.path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, kind: str, iteration: int, values: Mapping[str, float | None]) -> None:
        """Add a line."""
        if self.path is None:
            return
        with written(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "iteration": iteration, **values}, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(f"{kind}/{name}", value, iteration)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines so far; a last one that a kill cut short is left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line for line in lines if line["kind"] in ("train", "validation") and line["iteration"] >= 0]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: a line of it is none of a run ({error!r}): move the file away") from error


def _writer(folder: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"TensorBoard is not installed ({error}): pip install tensorboard, or leave --tensorboard out; {METRICS} "
            "has the same numbers"
        ) from error
    return SummaryWriter(str(folder), purge_step=iteration + 1)


class Pace:
    """Tasks per second of the last iterations, validations left out, and the time left."""

    def __init__(self, tasks: int, window: int = 50) -> None:
        self.tasks = tasks  # per iteration
        self._seconds: deque[float] = deque(maxlen=window)
        self._since: float | None = None

    def begin(self) -> None:
        self._since = time.perf_counter()

    def end(self) -> None:
        assert self._since is not None
        self._seconds.append(time.perf_counter() - self._since)

    @property
    def tasks_per_second(self) -> float:
        return self.tasks * len(self._seconds) / max(sum(self._seconds), 1e-9)

    def left(self, iterations: int, minutes: float | None = None) -> str:
        """How long so many iterations will take, at most the minutes that are left: "3 h 20 min left"."""
        seconds = iterations * self.tasks / self.tasks_per_second
        if minutes is not None:
            seconds = min(seconds, 60 * max(minutes, 0.0))
        return time_left(seconds)
