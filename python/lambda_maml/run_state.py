"""A run as last.safetensors holds it: everything that the next iteration depends on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .average import Average
from .inner.rule import Rule
from .ranks import ALONE, Ranks
from .settings import Settings

__all__ = ["BEST", "LAST", "Result", "State", "Validation"]

BEST, LAST = "best.safetensors", "last.safetensors"


class Validation(NamedTuple):
    """One line of the history: accuracy (or the mean of the run's own metric) and the half width of its 95% interval
    on the validation tasks, the mean training loss since the line before, and seconds of training in all runs so
    far."""

    iteration: int
    accuracy: float
    ci95: float
    train_loss: float | None
    seconds: float


@dataclass
class Result:
    """Where a run stands: `losses` are those since the last validation, `recent` those since the last line of metrics;
    `stopped` says why the run ended ("iterations", "minutes", "patience", "interrupt", "SIGTERM" or "SIGUSR1")."""

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
        if "run" not in meta:
            raise ValueError(f"{path}: holds no training state: resume from the {LAST} that training wrote")
        _check_same(path, meta["run"], self.about)
        parameters = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        checkpoint.load_tensors(self.model, parameters, str(path))
        if isinstance(self.rule, nn.Module):
            checkpoint.load_tensors_of_rule(tensors, self.rule, str(path))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self.average is not None:
            self.average.values = [
                tensors[key].to(p.device)
                for key, p in zip(map("average.{}".format, itertools.count()), self.average.parameters)
                if key in tensors
            ]
        torch.set_rng_state(tensors["random"])
        saved = meta["result"]
        history = [Validation(*line) for line in saved["history"]]
        best = Validation(*saved["best"]) if saved["best"] else None
        self.result = Result(saved["iteration"], best, history, saved["losses"], recent=saved.get("recent", []))


def _check_same(path: Path, saved: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    saved = {**saved, "settings": {**asdict(Settings()), **saved.get("settings", {})}}  # settings since then: not set
    if "images" not in saved:  # a run of an earlier version
        about = {name: value for name, value in about.items() if name != "images"}
    for part in ("dataset", "images", "network", "settings", "rule", "goal"):
        old, new = saved.get(part, {}), about.get(part, {})
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{path}: the run to resume has {part} {name} {old.get(name)}, this one {new.get(name)}: "
                    "give the same, or train in another folder"
                )
