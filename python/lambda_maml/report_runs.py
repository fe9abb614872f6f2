"""What lies in the folder of a run, for a report: selections, the checkpoint's header, and how the training went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .files import parse_json, read_json
from .metrics import METRICS
from .pattern_json import read_selection

__all__ = ["ABOUT", "Run", "read_runs"]

ABOUT = "best.json"
"""The readable copy of the checkpoint's header."""


class Run(NamedTuple):
    """A folder, or a selection's file alone. A selection stands beside its file's name; the one with the most steps is
    the first."""

    name: str
    selections: list[tuple[str, dict[str, Any]]] = []
    about: dict[str, Any] = {}
    metrics: list[dict[str, Any]] = []


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of some folders or files of selections, each read and checked.

    >>> [run.name for run in read_runs([Path("runs/demo")])]
    ['demo']

    A folder's selections are its pattern*.json. Runs of equal names are called by their paths.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder holds neither a selection nor metrics.jsonl, or a file is none of a run; names it.
    """
    names = [path.resolve().name for path in paths]
    return [_read(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        return Run(name, [(path.name, read_selection(path))])
    files = [file for file in sorted(path.glob("pattern*.json")) if not file.name.endswith(".evaluated.json")]
    selections = [(file.name, read_selection(file)) for file in files]
    selections.sort(key=lambda one: -one[1]["steps"])
    metrics = _lines(path / METRICS) if (path / METRICS).is_file() else []
    if not selections and not metrics:
        raise ValueError(
            f"{path}: holds neither a selection (pattern*.json) nor {METRICS}: give the folder of lambda-maml train, "
            "select or demo"
        )
    return Run(name, selections, _about(path / ABOUT) if (path / ABOUT).is_file() else {}, metrics)


def _about(path: Path) -> dict[str, Any]:
    found = read_json(path)
    parts = ("settings", "network", "dataset", "metrics", "images")
    if not isinstance(found, dict) or not all(isinstance(found.get(part, {}), dict) for part in parts):
        raise ValueError(f"{path}: is no copy of a checkpoint's header: move it away")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of each the kind, the iteration, and what else is a number. A last line that is not
    whole yet is left out."""
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            value = parse_json(line)
            kept = {k: v for k, v in value.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
            found.append({**kept, "kind": str(value["kind"]), "iteration": int(value["iteration"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: line {number} is none of a run ({error!r}): move the file away") from error
    return found
