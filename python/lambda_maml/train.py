"""MAML meta-training (Finn, Abbeel, Levine 2017, algorithm 2) under any Lambda pattern, with exact resume."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, data, models
from .adapt import adapt_tasks
from .data.episodes import Task
from .data.imageset import ImageSet
from .evaluate import Progress, evaluate, stack
from .inner.batch import alike
from .inner.rates import DEFAULT_LR
from .inner.rule import Rule
from .patterns import Pattern

BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True)
class Settings:
    """What a run is trained by; a resumed run must have the same. The defaults are the paper's protocol.

    query: query images per class. steps, lr: the inner loop's steps and rate in training. test_steps: inner steps in
    validation and, by default, in all that is later done with the checkpoint (None: as in training). meta_lr: Adam's
    rate. meta_batch: tasks per iteration. pattern: what is adapted in training (None: all layers). val_tasks: fixed
    tasks that the best checkpoint is chosen by, every `val_every` iterations.
    """

    ways: int = 5
    shots: int = 1
    query: int = 15
    steps: int = 5
    test_steps: int | None = None
    lr: float = 0.01
    meta_lr: float = 1e-3
    meta_batch: int = 4
    pattern: str | None = None
    norm: str = "follow"
    second_order: bool = True
    seed: int = 0
    val_tasks: int = 100
    val_every: int = 250

    def __post_init__(self) -> None:
        for name in ("shots", "query", "steps", "meta_batch", "val_tasks", "val_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.ways < 2:
            raise ValueError(f"ways is {self.ways}, expected at least 2")
        for name in ("lr", "meta_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0")
        if self.norm not in ("follow", "never"):
            raise ValueError(f"norm is {self.norm!r}, expected 'follow' or 'never'")

    @property
    def evaluation_steps(self) -> int:
        return self.steps if self.test_steps is None else self.test_steps


class Validation(NamedTuple):
    """One line of the history: accuracy and the half width of its 95% interval on the validation tasks, the mean
    training loss since the line before, and seconds of training in all runs so far."""

    iteration: int
    accuracy: float
    ci95: float
    train_loss: float | None
    seconds: float


@dataclass
class Result:
    """Where a run stands: `losses` are those since the last validation, `stopped` says why the run ended ("iterations",
    "minutes" or "interrupt")."""

    iteration: int = 0
    best: Validation | None = None
    history: list[Validation] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stopped: str = "iterations"


def meta_gradient(
    model: nn.Module, tasks: list[Task], settings: Settings, *, rule: Rule | None = None, batched: bool = True
) -> float:
    """Add the gradient of the mean query loss after adaptation to the parameters' `.grad`; return that loss.

    tasks: they may differ in their numbers of images, ways and queries; each counts as much as any other.

    rule: how an inner step goes, in place of the settings' lr; its parameters get gradients too.
    batched: adapt tasks of equal shapes together, else all of them one after another, which needs less memory.
    """
    pattern = settings.pattern or Pattern.full(len(models.layer_names(model)))
    parts = [[tasks[i] for i in places] for places in alike(tasks)] if batched else [[task] for task in tasks]
    total = 0.0
    for part in parts:
        xs, ys, xq, yq = stack(part, model)
        logits = adapt_tasks(
            model, xs, ys, xq, pattern=pattern, steps=settings.steps, norm=settings.norm,
            second_order=settings.second_order, **_descent(settings, rule),
        )  # fmt: skip
        loss = F.cross_entropy(logits.flatten(0, 1), yq.flatten()) / (len(tasks) / len(part))
        loss.backward()
        total += loss.item()
    return total


def _descent(settings: Settings, rule: Rule | None) -> dict[str, Any]:
    """The inner loop's rates: the rule's, else the settings'."""
    return {"lr": settings.lr if rule is None else DEFAULT_LR, "rule": rule}


def train(
    model: nn.Module, train_set: ImageSet, val_set: ImageSet, *, out: str | Path, settings: Settings | None = None,
    rule: Rule | None = None, iterations: int, minutes: float | None = None, resume: bool = False,
    overwrite: bool = False, batched: bool = True, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Meta-train `model` in place until `iterations` are done, `minutes` of this run are over, or Ctrl-C.

    `rule` takes the place of the settings' inner rate; its parameters (learned rates) are meta-trained with the
    model's, and both checkpoints hold them: `checkpoint.load_rule`.

    In `out`: best.safetensors and best.json (the checkpoint of the best validation accuracy), and last.safetensors (the
    state to resume from). The tasks depend on the seed and the iteration alone, so that a run that is interrupted and
    resumed ends with the same bits as one that is not (on the same machine and number of threads).

    Raises FloatingPointError when the loss is no longer finite, ValueError if `out` holds a run and neither `resume`
    nor `overwrite` is set, or if the settings differ from those of the run to resume.
    """
    settings = settings or Settings()
    out = Path(out)
    learned = list(rule.parameters()) if isinstance(rule, nn.Module) else []
    optimizer = torch.optim.Adam([*model.parameters(), *learned], lr=settings.meta_lr)
    run = {"settings": asdict(settings), "network": models.config_of(model), "dataset": _dataset(train_set)}
    if rule is not None:
        told = type(rule).__qualname__ if type(rule).__repr__ is object.__repr__ else repr(rule)  # no address
        run["rule"] = {"name": " ".join(told.split())}
    result = Result()
    if resume:
        result = _resume(out / LAST, model, rule, optimizer, run)
    elif (out / LAST).exists() and not overwrite:
        raise ValueError(f"{out / LAST} holds an earlier run: resume it (--resume) or choose another folder")
    val_tasks = data.sample_tasks(
        val_set, settings.val_tasks, ways=settings.ways, shots=settings.shots, query=settings.query, seed=settings.seed
    )
    start, spent = time.perf_counter(), result.history[-1].seconds if result.history else 0.0

    def validate() -> None:
        pattern = settings.pattern or Pattern.full(len(models.layer_names(model)))
        found = evaluate(
            model, val_tasks, pattern=pattern, steps=settings.evaluation_steps, norm=settings.norm,
            **_descent(settings, rule),
        )  # fmt: skip
        seconds = spent + time.perf_counter() - start
        mean_loss = sum(result.losses) / len(result.losses) if result.losses else None
        line = Validation(result.iteration, found.mean, found.ci95 if len(val_tasks) > 1 else 0.0, mean_loss, seconds)
        result.losses.clear()
        result.history.append(line)
        if result.best is None or line.accuracy > result.best.accuracy:
            result.best = line
            metrics = {"iteration": line.iteration, "val_accuracy": line.accuracy, "val_ci95": line.ci95}
            checkpoint.save(out / BEST, model, {**run, "metrics": metrics}, rule)

    def validated() -> int:
        return result.history[-1].iteration if result.history else 0

    begun = result.iteration
    model.train()
    with _interruptible() as interrupted:
        while True:
            if interrupted.is_set():
                result.stopped = "interrupt"
                break
            if result.iteration % settings.val_every == 0 and validated() < result.iteration:
                validate()
                _save_state(out / LAST, model, rule, optimizer, run, result)
            if result.iteration >= iterations:
                break
            if minutes is not None and result.iteration > begun and time.perf_counter() - start >= 60 * minutes:
                result.stopped = "minutes"
                break
            tasks = data.sample_tasks(
                train_set, settings.meta_batch, ways=settings.ways, shots=settings.shots, query=settings.query,
                seed=settings.seed, first=result.iteration * settings.meta_batch,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            where = f"at iteration {result.iteration + 1} (inner lr {settings.lr}, meta lr {settings.meta_lr})"
            try:
                loss = meta_gradient(model, tasks, settings, rule=rule, batched=batched)
            except FloatingPointError as error:
                raise FloatingPointError(f"training diverged {where}: {error}") from error
            if not math.isfinite(loss):
                raise FloatingPointError(f"training diverged: the loss is {loss} {where}: lower the rates")
            optimizer.step()
            result.losses.append(loss)
            result.iteration += 1
            if progress is not None:
                best = f", best validation {result.best.accuracy:.1%}" if result.best else ""
                progress(result.iteration, iterations, f"iterations, loss {loss:.3f}{best}")
        if result.stopped != "interrupt" and validated() < result.iteration:
            validate()
    _save_state(out / LAST, model, rule, optimizer, run, result)
    return result


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that is looked at between iterations; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def on_signal(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _save_state(
    path: Path, model: nn.Module, rule: Rule | None, optimizer: torch.optim.Adam, run: dict[str, Any], result: Result
) -> None:
    """Parameters as model.NAME, a rule's as rule:NAME, Adam's state as adam.INDEX.NAME, torch's CPU random state;
    the rest in the header."""
    tensors: dict[str, Tensor] = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= checkpoint.tensors_of_rule(rule)
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
    tensors["random"] = torch.get_rng_state()
    checkpoint.write_tensors(path, tensors, {"run": run, "result": asdict(result)})


def _resume(
    path: Path, model: nn.Module, rule: Rule | None, optimizer: torch.optim.Adam, run: dict[str, Any]
) -> Result:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no run to resume here")
    tensors, meta = checkpoint.read_tensors(path)
    if "run" not in meta:
        raise ValueError(f"{path}: holds no training state: resume from the {LAST} that training wrote")
    _check_same(path, meta["run"], run)
    parameters = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    checkpoint.load_tensors(model, parameters, str(path))
    if isinstance(rule, nn.Module):
        checkpoint.load_rule(path, rule)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    torch.set_rng_state(tensors["random"])
    saved = meta["result"]
    history = [Validation(*line) for line in saved["history"]]
    best = Validation(*saved["best"]) if saved["best"] else None
    return Result(saved["iteration"], best, history, saved["losses"])


def _check_same(path: Path, saved: dict[str, Any], run: dict[str, Any]) -> None:
    for part in ("dataset", "network", "settings", "rule"):
        old, new = saved.get(part, {}), run.get(part, {})
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{path}: the run to resume has {part} {name} {old.get(name)}, this one {new.get(name)}: "
                    "give the same, or train in another folder"
                )


def _dataset(images: ImageSet) -> dict[str, Any]:
    """What a checkpoint must know of its images: their name, and how pixels become tensors."""
    return {"name": images.name, "mean": list(images.mean), "std": list(images.std)}
