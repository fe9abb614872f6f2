"""A run as last.safetensors holds it: everything that the next iteration depends on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from . import checkpoint
from .average import Average
from .forms import Count, Finite, NotBelow0, checked
from .inner.rule import Rule
from .ranks import ALONE, Ranks
from .settings import Settings

__all__ = ["BEST", "LAST", "Result", "State", "Validation"]

BEST, LAST = "best.safetensors", "last.safetensors"


class Validation(NamedTuple):
    """One line of the history: accuracy (or the mean of the run's own metric) and the half width of its 95% interval
    on the validation tasks, the mean training loss since the line before, and seconds of training in all runs so
    far."""

    iteration: Count
    accuracy: Finite
    ci95: NotBelow0
    train_loss: Finite | None
    seconds: NotBelow0


@dataclass
class Result:
    """Where a run stands: `losses` are those since the last validation, `recent` those since the last line of metrics;
    `stopped` says why the run ended ("iterations", "minutes", "patience", or a word of `stopping.SIGNALS`)."""

    iteration: int = 0
    best: Validation | None = None
    history: list[Validation] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stopped: str = "iterations"
    recent: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        best = f", best validation {self.best.accuracy:.4g} at {self.best.iteration}" if self.best else ""
        return f"Result({self.iteration} iterations, ended by {self.stopped}{best})"

    @property
    def validated(self) -> int:
        """The iteration of the last validation."""
        return self.history[-1].iteration if self.history else 0


class _Progress(msgspec.Struct):
    """What the header says of a `Result`."""

    iteration: Count
    best: Validation | None
    history: list[Validation]
    losses: list[Finite]
    recent: list[Finite] = []


class _Run(msgspec.Struct):
    settings: Settings
    network: dict[str, Any]
    dataset: checkpoint.Dataset | None = None
    images: dict[str, str] = {}
    rule: dict[str, Any] = {}
    start: dict[str, str] = {}


class _Header(msgspec.Struct):
    run: _Run
    result: _Progress


@dataclass
class State:
    """What a run changes. `about` says which run it is: settings, network, images; a resumed one must be the same."""

    model: nn.Module
    rule: Rule | None
    optimizer: torch.optim.Optimizer
    about: dict[str, Any]
    average: Average | None = None
    result: Result = field(default_factory=Result)

    def tensors(self) -> dict[str, Tensor]:
        """All that the ranks of a run have alike: parameters and buffers of network and rule."""
        held = [("model", self.model), *([("rule", self.rule)] if isinstance(self.rule, nn.Module) else [])]
        return {
            f"{part}.{name}": tensor
            for part, module in held
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers())
        }

    def save(self, path: Path) -> None:
        """Parameters as model.NAME, a rule's as rule:NAME, the optimiser's state as adam.INDEX.NAME, the average of the
        parameters as average.INDEX, torch's CPU random state; the rest in the header."""
        tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        tensors |= checkpoint.tensors_of_rule(self.rule)
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
        if self.average is not None:
            tensors |= {f"average.{index}": value for index, value in enumerate(self.average.values)}
        tensors["random"] = torch.get_rng_state()
        checkpoint.write_tensors(path, tensors, {"run": self.about, "result": asdict(self.result)})

    def resume(self, path: Path, ranks: Ranks = ALONE) -> None:
        """Go on from what `save` wrote; rank 0 reads it for all.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no training state, or that of another run; says what differs.
        """
        if not ranks.first(path.is_file):
            raise FileNotFoundError(f"{path}: there is no run to resume here")
        tensors, meta = ranks.first(lambda: checkpoint.read_tensors(path))
        header = _header(path, meta)
        _check_same(path, meta["run"], self.about)
        if "start" in meta["run"]:  # the weights it began with need not be at hand any more
            self.about.setdefault("start", meta["run"]["start"])
        _check_progress(path, header.result, header.run.settings.val_every)
        parts = _by_part(tensors)
        moments = self._moments(path, parts, header.result.iteration)
        random = tensors.get("random")
        if random is None or random.dtype != torch.uint8 or random.shape != torch.get_rng_state().shape:
            raise ValueError(f"{path}: random, the state of torch's random numbers, is missing or damaged; {_REMEDY}")
        checkpoint.load_tensors(self.model, parts["model"], str(path))
        if isinstance(self.rule, nn.Module):
            checkpoint.load_tensors_of_rule(tensors, self.rule, str(path))
        if self.average is not None:
            self.average.values = [v.to(p.device) for v, p in zip(_rows(parts["average"]), self.average.parameters)]
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        torch.set_rng_state(random)
        found = header.result
        self.result = Result(found.iteration, found.best, found.history, found.losses, recent=found.recent)

    def _moments(self, path: Path, parts: Mapping[str, dict[str, Tensor]], done: int) -> dict[int, dict[str, Tensor]]:
        """The optimiser's state by the place of its parameter; ValueError where that or the average's is not whole."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        found: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["adam"].items():
            place, _, name = key.partition(".")
            found.setdefault(int(place) if place.isdigit() else -1, {})[name] = value
        wanted = {"step", "exp_avg", "exp_avg_sq"} if isinstance(self.optimizer, torch.optim.AdamW) else set()
        for index, state in found.items():
            fits = 0 <= index < len(parameters) and state.keys() == wanted
            if not fits or any(n != "step" and t.shape != parameters[index].shape for n, t in state.items()):
                raise ValueError(
                    f"{path}: the optimiser's state of parameter {index} is {_told(state)}, expected "
                    f"{' and '.join(sorted(wanted)) or 'none'} of its shape; {_REMEDY}"
                )
        steps = [float(state["step"]) for state in found.values() if state["step"].numel() == 1]
        if wanted and (len(steps) < len(found) or max(steps, default=0) != done):
            made = f"the optimiser has made {max(steps, default=0):g} steps"
            raise ValueError(f"{path}: result.iteration is {done}, but {made}; {_REMEDY}")
        if not all(torch.isfinite(t).all() for state in found.values() for t in state.values()):
            raise ValueError(f"{path}: the optimiser's state holds numbers that are infinite or NaN; {_REMEDY}")
        average = [] if self.average is None or done == 0 else [p.shape for p in self.average.parameters]
        if [value.shape for value in _rows(parts["average"])] != average:
            raise ValueError(f"{path}: average, that of the parameters, is not of their shapes; {_REMEDY}")
        return found


_REMEDY = "take another copy of the file, or train in another folder"


def _header(path: Path, meta: Mapping[str, Any]) -> _Header:
    if "run" not in meta:
        raise ValueError(f"{path}: holds no training state: resume from the {LAST} that training wrote")
    header: _Header = checked(meta, _Header, path, _REMEDY)
    return header


def held_by(folder: Path) -> Path | None:
    """The file by which a folder holds a run that would be lost, if one does: of one that has made no iteration nothing
    would."""
    if (folder / BEST).exists():
        return folder / (LAST if (folder / LAST).exists() else BEST)
    try:
        _, meta = checkpoint.read_tensors(folder / LAST)
        return folder / LAST if _header(folder / LAST, meta).result.iteration > 0 else None
    except FileNotFoundError:
        return None
    except ValueError:
        return folder / LAST


def is_same_run(path: Path, settings: Settings, network: Mapping[str, Any], dataset: str, iterations: int) -> bool:
    """Whether `path` holds a run of these settings, this network and this set that got no farther than `iterations`: to
    begin it anew loses nothing. A file that cannot be read is none."""
    try:
        _, meta = checkpoint.read_tensors(path)
        header = _header(path, meta)
    except (OSError, ValueError):
        return False
    run, held = header.run, meta["run"]["network"]
    fits = run.settings == settings and run.dataset is not None and run.dataset.name == dataset
    return fits and header.result.iteration <= iterations and network.items() <= held.items()


def _by_part(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by what stands in front of the first point of their names."""
    found: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}, "average": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        if part in found:
            found[part][name] = value
    return found


def _rows(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Tensors named 0, 1, ... up to the first that is missing."""
    return [tensors[str(i)] for i in itertools.takewhile(lambda i: str(i) in tensors, itertools.count())]


def _told(state: Mapping[str, Tensor]) -> str:
    return " and ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(state.items())) or "nothing"


def _check_progress(path: Path, result: _Progress, val_every: int) -> None:
    """ValueError where the history is none that a run can have had: `losses` has one for each iteration since the last
    validation, of which none was left out."""
    lines = [line.iteration for line in result.history]
    validated = lines[-1] if lines else 0
    is_whole = lines == sorted(set(lines)) and validated >= (result.iteration - 1) // val_every * val_every
    if not is_whole or len(result.losses) != result.iteration - validated:
        raise ValueError(
            f"{path}: result.iteration is {result.iteration}, but there are {len(lines)} validations, the last at "
            f"{validated}, and {len(result.losses)} losses since; {_REMEDY}"
        )
    if result.best is not None and result.best not in result.history:
        raise ValueError(f"{path}: result.best is {result.best}, which is no line of its history; {_REMEDY}")


def _check_same(path: Path, saved: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    saved = {**saved, "settings": {**asdict(Settings()), **saved.get("settings", {})}}  # settings since then: not set
    if "images" not in saved:  # a run of an earlier version
        about = {name: value for name, value in about.items() if name != "images"}
    parts = ["dataset", "images", "network", "settings", "rule", "goal", *(["start"] if "start" in about else [])]
    for part in parts:
        old, new = saved.get(part, {}), about.get(part, {})
        for name in {**old, **new}:
            if name == "settings" and old and "settings" not in old:  # a run of an earlier version
                continue
            if old.get(name) != new.get(name):
                where, was, now = _first_difference(name, old.get(name), new.get(name))
                raise ValueError(
                    f"{path}: the run to resume has {part} {where} {was}, this one {now}: "
                    "give the same, or train in another folder"
                )


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Where two values differ, in them the first place that does, and what each has there."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        key = next(key for key in old if old[key] != new[key])
        return _first_difference(f"{name}.{key}", old[key], new[key])
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        at = next(i for i in range(len(old)) if old[i] != new[i])
        return _first_difference(f"{name}[{at}]", old[at], new[at])
    return name, old, new
