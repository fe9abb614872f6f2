"""MAML meta-training (Finn, Abbeel, Levine 2017, algorithm 2) under any Lambda pattern, with exact resume."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, data, models, schedule
from .data.episodes import Task
from .data.imageset import ImageSet
from .evaluate import Progress, evaluate
from .inner.rule import Rule
from .learned_rates import check_rates, fixed_rates, learned_rule
from .outer import descent, meta_gradient
from .run_state import BEST, LAST, Result, State, Validation
from .settings import Settings

__all__ = ["BEST", "LAST", "Result", "Settings", "Validation", "meta_gradient", "train"]


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

    Raises FloatingPointError when the loss, its gradient or a learned rate is no longer finite; last.safetensors is
    then as the last validation left it. ValueError if `out` holds a run and neither `resume` nor `overwrite` is set, or
    if the settings differ from those of the run to resume.
    """
    run = _Run(model, train_set, val_set, Path(out), settings or Settings(), rule, batched)
    if resume:
        run.state.resume(run.out / LAST)
    elif (run.out / LAST).exists() and not overwrite:
        raise ValueError(f"{run.out / LAST} holds an earlier run: resume it (--resume) or choose another folder")
    result, settings = run.state.result, run.settings
    start, begun = time.perf_counter(), result.iteration
    run.seconds_before = result.history[-1].seconds if result.history else 0.0
    run.start = start
    model.train()
    with _interruptible() as interrupted:
        while True:
            if interrupted.is_set():
                result.stopped = "interrupt"
                break
            if result.iteration % settings.val_every == 0 and result.validated < result.iteration:
                run.validate()
                run.state.save(run.out / LAST)
            if result.iteration >= iterations:
                break
            if minutes is not None and result.iteration > begun and time.perf_counter() - start >= 60 * minutes:
                result.stopped = "minutes"
                break
            run.update(run.tasks(result.iteration))
            if progress is not None:
                best = f", best validation {result.best.accuracy:.1%}" if result.best else ""
                progress(result.iteration, iterations, f"iterations, loss {result.losses[-1]:.3f}{best}")
        if result.stopped != "interrupt" and result.validated < result.iteration:
            run.validate()
        run.state.save(run.out / LAST)
    return result


class _Run:
    """A run on its way: what one iteration and one validation do."""

    def __init__(
        self, model: nn.Module, train_set: ImageSet, val_set: ImageSet, out: Path, settings: Settings,
        rule: Rule | None, batched: bool,
    ) -> None:  # fmt: skip
        if settings.learn_lr is not None and rule is not None:
            raise ValueError(
                f"give rule={rule!r} or learn_lr={settings.learn_lr!r}, not both: a rule has its own rates"
            )
        self.model, self.out, self.settings, self.batched = model, out, settings, batched
        self.train_set = train_set
        self.rule = rule if settings.learn_lr is None else learned_rule(model, settings)
        self.learned = list(self.rule.parameters()) if isinstance(self.rule, nn.Module) else []
        optimizer = torch.optim.Adam([*model.parameters(), *self.learned], lr=settings.meta_lr)
        self.state = State(model, self.rule, optimizer, _about(model, self.rule, settings, train_set))
        self.val_tasks = data.sample_tasks(
            val_set, settings.val_tasks, ways=settings.ways, shots=settings.shots, query=settings.query,
            seed=settings.seed,
        )  # fmt: skip
        self.start = self.seconds_before = 0.0
        self._told: set[str] = set()  # what was said of learned rates

    def tasks(self, iteration: int) -> list[Task]:
        """The meta-batch of an iteration, counted from 0."""
        settings = self.settings
        return data.sample_tasks(
            self.train_set, settings.meta_batch, ways=settings.ways, shots=settings.shots, query=settings.query,
            seed=settings.seed, first=iteration * settings.meta_batch,
        )  # fmt: skip

    def update(self, tasks: list[Task]) -> None:
        """One iteration: the gradient over the tasks, and the optimiser's step."""
        state, result = self.state, self.state.result
        where = f"at iteration {result.iteration + 1} (inner lr {self.settings.lr}, meta lr {self.settings.meta_lr})"
        state.optimizer.zero_grad(set_to_none=True)
        try:
            loss = meta_gradient(
                self.model, tasks, self.settings, rule=self.rule, batched=self.batched, iteration=result.iteration
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"training diverged {where}: {error}") from error
        if not math.isfinite(loss):
            raise FloatingPointError(f"training diverged: the loss is {loss} {where}: lower the rates")
        state.optimizer.step()
        if isinstance(self.rule, nn.Module):
            check_rates(self.model, self.rule, where, self._told)
        result.losses.append(loss)
        result.iteration += 1

    def validate(self) -> None:
        """One line of the history, and the best checkpoint where it is the best."""
        settings, result = self.settings, self.state.result
        pattern = schedule.validation_pattern(settings, len(models.layer_names(self.model)))
        found = evaluate(
            self.model, self.val_tasks, pattern=pattern, steps=settings.evaluation_steps, norm=settings.norm,
            **self._descent(),
        )  # fmt: skip
        seconds = self.seconds_before + time.perf_counter() - self.start
        mean_loss = sum(result.losses) / len(result.losses) if result.losses else None
        ci95 = found.ci95 if len(self.val_tasks) > 1 else 0.0
        line = Validation(result.iteration, found.mean, ci95, mean_loss, seconds)
        result.losses.clear()
        result.history.append(line)
        if result.best is None or line.accuracy > result.best.accuracy:
            result.best = line
            metrics = {"iteration": line.iteration, "val_accuracy": line.accuracy, "val_ci95": line.ci95}
            checkpoint.save(self.out / BEST, self.model, {**self.state.about, "metrics": metrics}, self.rule)

    def _descent(self) -> dict[str, Any]:
        """The inner loop's rates in validation: learned ones as they stand."""
        form = self.settings.learn_lr
        if form is None:
            return descent(self.settings, self.rule)
        return {"lr": fixed_rates(self.rule, form, self.settings.evaluation_steps)}  # type: ignore[arg-type]


def _about(model: nn.Module, rule: Rule | None, settings: Settings, train_set: ImageSet) -> dict[str, Any]:
    """What a checkpoint says of its run: settings, network, rule, and how the images' pixels become tensors."""
    about: dict[str, Any] = {
        "settings": asdict(settings),
        "network": models.config_of(model),
        "dataset": {"name": train_set.name, "mean": list(train_set.mean), "std": list(train_set.std)},
    }
    if rule is not None:
        told = type(rule).__qualname__ if type(rule).__repr__ is object.__repr__ else repr(rule)  # no address
        about["rule"] = {"name": " ".join(told.split())}
    return about


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
