"""MAML meta-training (Finn, Abbeel, Levine 2017, algorithm 2) under any Lambda pattern, with exact resume."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint, models, run_tasks, schedule
from .ahead import Ahead
from .average import Average
from .data.episodes import Task
from .data.imageset import ImageSet
from .evaluate import ACCURACY, Metric, check_metric, evaluate, worded
from .files import remove_leftovers
from .fingerprint import fingerprint
from .goal import Goal
from .inner.checks import Loss, lacks_memory
from .inner.rule import Rule
from .learned_rates import check_rates, fault_in, fixed_rates, learned_rule
from .lock import locked
from .metrics import METRICS, Metrics, Pace
from .network import zero_last
from .outer import descent, meta_gradient
from .parts import Parts, check_fit, trained_with
from .pretrain import start_from
from .progress import Progress, shown
from .ranks import ALONE, Lost, Ranks, Stopped
from .run_state import BEST, LAST, Result, State, Validation, held_by
from .run_tasks import Sample, sampled, told_of
from .saved_parts import told_of_inner
from .say import say_once
from .settings import Settings
from .stopping import Stop, stoppable

__all__ = ["BEST", "LAST", "Parts", "Result", "Settings", "Validation", "meta_gradient", "train"]


def train(
    model: nn.Module, train_set: ImageSet | Sample, val_set: ImageSet | Sample, *, out: str | Path,
    settings: Settings | None = None, rule: Rule | None = None, loss: Loss = F.cross_entropy,
    metric: Metric = ACCURACY, lower_is_better: bool = False, iterations: int, minutes: float | None = None,
    resume: bool = False, overwrite: bool = False, batched: bool = True, progress: Progress | bool | None = None,
    log_every: int = 50, tensorboard: bool = False, ranks: Ranks = ALONE,
    parts: Parts | None = None, start: str | Path | None = None,
) -> Result:  # fmt: skip
    """Meta-train `model` in place until `iterations` are done, `minutes` of this run are over, or a signal comes.

    >>> images = data.load("glyphs", split="val")
    >>> settings = Settings(steps=1, query=2, val_tasks=2)
    >>> train(model, images, images, out=folder, settings=settings, iterations=2).iteration
    2

    A set is an `ImageSet`, or a function `sample(first, count)` that gives the tasks `first` to `first + count - 1` of
    an endless sequence, always the same; the settings' ways, shots and query then say nothing.

    `loss` is that of the inner loop and of the query set, `metric` (with `lower_is_better`) what validation judges by,
    as in `evaluate`: `loss=F.mse_loss, metric=F.mse_loss, lower_is_better=True` for regression. `accuracy` in the
    history is then that metric's mean.

    `rule` takes the place of the settings' inner rate; its parameters (learned rates) are meta-trained with the
    model's, and both checkpoints hold them: `checkpoint.load_rule`. So it is with `parts`, which have other places than
    the inner step: see `Parts`.

    `start`: a checkpoint, of `pretrain` or of an earlier run, whose weights to begin with; see `start_from`. A resumed
    run begins with its own, and needs none.

    In `out`: best.safetensors and best.json (the checkpoint of the best validation accuracy), last.safetensors (the
    state to resume from), and metrics.jsonl (a line per validation and per `log_every` iterations; with `tensorboard`
    also TensorBoard's files). The tasks depend on the seed and the iteration alone, so that a run that is interrupted
    or killed and resumed ends with the same bits as one that is not (on the same machine and number of threads).

    `progress` is called as progress(done, total, what); True shows a bar, or lines, on stderr.

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end the run after the present iteration; its state is saved. Validations take
    place every `settings.val_every` iterations and nowhere else, so that where a run is stopped has no part in its
    result; one that ends before the first of them is validated once, for a checkpoint, of which the state to resume
    from knows nothing.

    `ranks` divide each meta-batch and the validation tasks; rank 0 writes, a signal to one of them ends all after the
    same iteration. The state does not depend on their number, but for rounding and for what a network draws (dropout).

    Raises:
        Lost: another rank ended; the first one that is left has saved the state after the last iteration.
        FloatingPointError: the loss, a gradient or a learned rate is no longer finite. last.safetensors is then as the
            last validation left it.
        ValueError: `out` holds a run or its checkpoint and neither `resume` nor `overwrite` is set; or settings,
            network, rule or images differ from those of the run to resume; or another run writes into `out`; or
            `iterations` is below 1, or `minutes` no positive number.
        RuntimeError: a meta-batch does not fit in memory; says what would.
        OSError: a file cannot be written; names it. Files that were there before are whole.
    """
    for name, number in (("log_every", log_every), ("iterations", iterations)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}, expected above 0")
    with locked(out, "train") if ranks.rank == 0 else contextlib.nullcontext():
        goal = Goal(loss, metric, lower_is_better)
        begun = None if start is None else start_from(start, model, train_set, val_set)
        run = _Run(model, train_set, val_set, Path(out), settings or Settings(), rule, goal, batched, ranks, parts)
        if begun is not None:
            run.state.about["start"] = begun
        if resume:
            run.state.resume(run.out / LAST, ranks)
        elif not overwrite and (held := ranks.first(lambda: held_by(run.out))):
            way = "resume it (--resume) or choose" if held.name == LAST else "choose"
            raise ValueError(f"{held}: the folder holds an earlier run: {way} another folder")
        run.start(log_every, tensorboard)
        bar = shown(progress, "training", here=ranks.rank == 0, left=False)
        # Who sees the state that a run begins with may send it a signal.
        with stoppable() as stop, bar as told, contextlib.closing(run.metrics), _saved_by_those_left(run):
            if not resume:
                ranks.first(run.begin)
            _iterate(run, stop, iterations, minutes, told)
        return run.state.result


def _iterate(run: _Run, stop: Stop, iterations: int, minutes: float | None, progress: Progress | None) -> None:
    """The run, from where it stands to its end."""
    result, ranks, begun = run.state.result, run.ranks, run.state.result.iteration

    def reason() -> str | None:
        """Why this rank would stop; of the time, rank 0 judges for all."""
        if stop.reason is not None or minutes is None or ranks.rank != 0:
            return stop.reason
        return "minutes" if result.iteration > begun and run.seconds >= 60 * minutes else None

    run.model.train()
    with Ahead(run.tasks, 0 if run.parts is not None and run.parts.listens else iterations) as ahead:
        while (why := ranks.agreed(reason)) is None or why == "minutes":
            if result.iteration % run.settings.val_every == 0 and result.validated < result.iteration:
                run.validate(stop)
                ranks.first(run.save)
                continue
            if result.iteration >= iterations:
                break
            if run.out_of_patience:
                result.stopped = "patience"
                break
            if why is not None:
                result.stopped = why
                break
            run.update(ahead.take(result.iteration))
            if progress is not None:
                left = None if minutes is None else minutes - run.seconds / 60
                progress(result.iteration, iterations, run.told(iterations - result.iteration, left))
        result.stopped = result.stopped if why in (None, "minutes") else why
        ranks.first(run.save)
        if why in (None, "minutes") and result.best is None:
            why = run.validate(stop)
            result.stopped = result.stopped if why is None else why


class _Run:
    """A run on its way: what one iteration and one validation do."""

    def __init__(
        self, model: nn.Module, train_set: ImageSet | Sample, val_set: ImageSet | Sample, out: Path,
        settings: Settings, rule: Rule | None, goal: Goal, batched: bool, ranks: Ranks, parts: Parts | None,
    ) -> None:  # fmt: skip
        if settings.learn_lr is not None and rule is not None:
            raise ValueError(
                f"give rule={rule!r} or learn_lr={settings.learn_lr!r}, not both: a rule has its own rates"
            )
        self.model, self.out, self.settings, self.batched, self.ranks = model, out, settings, batched, ranks
        self.goal = goal
        self.share = ranks.share(settings.meta_batch)
        run_tasks.check(train_set, settings)
        self.train_set, self.pattern = train_set, schedule.validation_pattern(settings, model)
        self.rule = rule if settings.learn_lr is None else learned_rule(model, settings)
        self.parts = parts
        self.held = trained_with(self.rule, parts, settings, ranks.count)
        self.learned = list(self.held.parameters()) if isinstance(self.held, nn.Module) else []
        head: list[nn.Parameter] = []
        if settings.zero_head:
            schedule.check_zero_head(settings, model)
            head = zero_last(model)
        self.of_network = [p for p in model.parameters() if all(p is not own for own in head)]
        self.parameters = [*self.of_network, *self.learned]
        about = _about(model, self.held, settings, goal, train_set, val_set)
        average = None if settings.average is None else Average(self.parameters, settings.average)
        self.state = State(model, self.held, self._optimizer(), about, average)
        self.val_tasks = sampled(val_set, settings, settings.val_tasks)
        check_metric(goal.metric, self.val_tasks)
        if rule is not None or parts is not None:
            check_fit(model, self.val_tasks[0], settings, self.rule, parts, self.pattern, goal.loss)
        self.pace = Pace(settings.meta_batch)
        self._rates_told: set[str] = set()
        self.numbers: dict[int, list[int]] = {}  # of the tasks that were made and not yet learned from

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        groups: list[dict[str, Any]] = [{"params": self.of_network, "weight_decay": settings.weight_decay}]
        if self.learned:
            groups.append({"params": self.learned, "weight_decay": 0.0})
        kind: Any = torch.optim.AdamW if settings.optimizer == "adam" else torch.optim.SGD
        optimizer: torch.optim.Optimizer = kind(groups, lr=settings.meta_lr)
        return optimizer

    def start(self, log_every: int, tensorboard: bool) -> None:
        """Open the folder, once the state is that of the iteration to go on from, which the ranks then have alike."""
        result, first = self.state.result, self.ranks.rank == 0
        for name in (BEST, LAST, METRICS, Path(BEST).with_suffix(".json")) if first else ():
            remove_leftovers(self.out / name)
        if result.best is not None and not self.ranks.first((self.out / BEST).is_file):
            say_once(
                f"{self.out / BEST}, of iteration {result.best.iteration}, is gone: the best of the validations from "
                "now on takes its place"
            )
            result.best = None
        self.log_every = log_every
        self.metrics = Metrics(self.out if first else None, result.iteration, result.validated, tensorboard)
        self.ranks.start_alike(self.state.tensors())
        self.ranks.own_random_numbers(self.settings.seed, result.iteration)
        self._begun = time.perf_counter()
        self._seconds_before = result.history[-1].seconds if result.history else 0.0

    def begin(self) -> None:
        """Leave nothing of an earlier run, and a state to resume from."""
        for name in (BEST, Path(BEST).with_suffix(".json")):
            (self.out / name).unlink(missing_ok=True)
        self.save()

    @property
    def seconds(self) -> float:
        """Since the start of this run."""
        return time.perf_counter() - self._begun

    def told(self, left: int, minutes: float | None) -> str:
        """The run in a few words, for who waits."""
        result = self.state.result
        best = f", best validation {worded(result.best.accuracy, self.goal.name)}" if result.best else ""
        pace = f"{self.pace.tasks_per_second:.3g} tasks/s, {self.pace.left(left, minutes)}"
        return f"iterations, loss {result.losses[-1]:.3f}, {pace}{best}"

    def tasks(self, iteration: int) -> list[Task]:
        """This rank's share of the meta-batch of an iteration, counted from 0."""
        if self.parts is not None:
            numbers = self.numbers[iteration] = self.parts.numbers(iteration, self.settings.meta_batch)
            augment = self.settings.augment
            return [t for n in numbers for t in sampled(self.train_set, self.settings, 1, n, augment)]
        first = iteration * self.settings.meta_batch + self.share.start
        return sampled(self.train_set, self.settings, len(self.share), first, self.settings.augment)

    def update(self, tasks: list[Task]) -> None:
        """One iteration: the gradient over the tasks, and the optimiser's step."""
        state, result = self.state, self.state.result
        where = f"at iteration {result.iteration + 1} (inner lr {self.settings.lr}, meta lr {self.settings.meta_lr})"
        self.pace.begin()
        for p in (*self.model.parameters(), *self.learned):  # a zero head's too, which the optimiser has not
            p.grad = None
        loss = self._gradient(tasks, where)
        self._clip(where)
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.meta_rate(self.settings, result.iteration)
        state.optimizer.step()
        if self.parts is not None:
            self.parts.after_step(result.iteration)
        if state.average is not None:
            state.average.update()
        if isinstance(self.held, nn.Module):
            check_rates(self.model, self.held, where, self._rates_told)
        result.losses.append(loss)
        result.recent.append(loss)
        result.iteration += 1
        self.pace.end()
        if result.iteration % self.log_every == 0:
            self._log()

    def _gradient(self, tasks: list[Task], where: str) -> float:
        """The gradient of all ranks' tasks, in the parameters' `.grad`, and the loss; both are finite."""
        weight = len(tasks) / self.settings.meta_batch
        try:
            loss = self.ranks.mean_gradient(self.parameters, weight, lambda: self._own_gradient(tasks, where))
        except FloatingPointError as error:
            raise FloatingPointError(f"training diverged {where}: {error}") from error
        if not math.isfinite(loss):
            raise FloatingPointError(f"training diverged: the loss is {loss} {where}: lower the rates")
        return loss

    def _own_gradient(self, tasks: list[Task], where: str) -> float:
        iteration = self.state.result.iteration
        try:
            if self.parts is not None:
                numbers = self.numbers.pop(iteration)
                return self.parts.gradient(
                    self.model, tasks, numbers, self.settings, iteration, self.batched, self.goal.loss
                )
            return meta_gradient(
                self.model, tasks, self.settings, rule=self.rule, batched=self.batched, iteration=iteration,
                loss=self.goal.loss,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            raise RuntimeError(
                f"{len(tasks)} tasks of {len(tasks[0].xs)} support and {len(tasks[0].xq)} query images do not fit in "
                f"memory {where}: adapt them one by one (--one-by-one), or take a smaller --meta-batch, fewer --query "
                f"images or --first-order ({' '.join(str(error).split())[:200]})"
            ) from error

    def _clip(self, where: str) -> None:
        """Bound the gradient as the settings say; FloatingPointError for one that is not finite."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not torch.isfinite(norm):
            named = self.model.named_parameters()
            wrong = [n for n, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
            fault = fault_in(self.model, self.held, of_gradient=True) if isinstance(self.held, nn.Module) else None
            of = f"the learned rate of {fault[0]}" if fault is not None else wrong[0] if wrong else "all weights"
            raise FloatingPointError(
                f"training diverged: the gradient of {of} is {fault[1] if fault is not None else norm.item()} {where}: "
                "lower the inner rate or the meta rate"
            )
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        if self.settings.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters, self.settings.clip_value)

    def _log(self) -> None:
        result = self.state.result
        values = {
            "meta_lr": schedule.meta_rate(self.settings, result.iteration - 1),
            "loss": sum(result.recent) / len(result.recent),
            "tasks_per_second": self.pace.tasks_per_second,
            "seconds": self._seconds_before + self.seconds,
        }
        self.metrics.write("train", result.iteration, values)
        result.recent.clear()

    def validate(self, stop: Stop) -> str | None:
        """One line of the history, and the best checkpoint where it is the best. Where the run is to end: why, and
        nothing is done."""
        self.ranks.check_alike(self.state.tensors())
        random, average = torch.get_rng_state(), self.state.average
        try:
            with contextlib.nullcontext() if average is None else average.in_place():
                self._validate(stop)
        except Stopped as stopped:
            torch.set_rng_state(random)
            return str(stopped)
        return None

    def _validate(self, stop: Stop) -> None:
        settings, result = self.settings, self.state.result
        found = evaluate(
            self.model, self.val_tasks, pattern=self.pattern, steps=settings.evaluation_steps, norm=settings.norm,
            loss=self.goal.loss, metric=self.goal.metric, progress=_stopping(stop), ranks=self.ranks,
            **self._descent(),
        )  # fmt: skip
        seconds = self._seconds_before + self.seconds
        mean_loss = sum(result.losses) / len(result.losses) if result.losses else None
        ci95 = found.ci95 if len(self.val_tasks) > 1 else 0.0
        line = Validation(result.iteration, found.mean, ci95, mean_loss, seconds)
        result.losses.clear()
        result.history.append(line)
        if result.best is None or self.goal.better(line.accuracy, result.best.accuracy):
            result.best = line
            metrics = {"iteration": line.iteration, f"val_{self.goal.name}": line.accuracy, "val_ci95": line.ci95}
            about = {**self.state.about, "metrics": metrics}
            self.ranks.first(lambda: checkpoint.save(self.out / BEST, self.model, about, self.held))
        values = {self.goal.name if key == "accuracy" else key: value for key, value in line._asdict().items()}
        self.metrics.write("validation", values.pop("iteration"), values)

    @property
    def out_of_patience(self) -> bool:
        """Whether so many regular validations as the settings say brought nothing better."""
        best, every = self.state.result.best, self.settings.val_every
        if self.settings.patience is None or best is None:
            return False
        regular = [line for line in self.state.result.history if line.iteration % every == 0]
        return sum(line.iteration > best.iteration for line in regular) >= self.settings.patience

    def save(self) -> None:
        """Write last.safetensors."""
        self.state.save(self.out / LAST)

    def _descent(self) -> dict[str, Any]:
        """The inner loop's rates in validation: learned ones as they stand."""
        if self.parts is not None and self.parts.solver is not None:
            return {"solver": self.parts.solver}
        form = self.settings.learn_lr
        if form is None:
            return descent(self.settings, self.rule)
        return {"lr": fixed_rates(self.rule, form, self.settings.evaluation_steps)}  # type: ignore[arg-type]


def _stopping(stop: Stop) -> Progress:
    """A progress that raises once the run is to end."""

    def look(done: int, total: int, what: str) -> None:
        if stop.reason is not None and done < total:
            raise Stopped(stop.reason)

    return look


@contextlib.contextmanager
def _saved_by_those_left(run: _Run) -> Iterator[None]:
    """Where a rank is lost, the first one that is left saves what all had after the last iteration."""
    result, begun = run.state.result, run.state.result.iteration
    try:
        yield
    except Lost as lost:
        if result.iteration == begun or not run.ranks.is_heir(lost.ranks):
            raise
        with locked(run.out, "train") if run.ranks.rank != 0 else contextlib.nullcontext():
            run.save()
        told = f"{lost}. The state after iteration {result.iteration} is saved: continue with --resume"
        raise Lost(told, lost.ranks) from lost


def _about(
    model: nn.Module, rule: Rule | None, settings: Settings, goal: Goal, train_set: ImageSet | Sample,
    val_set: ImageSet | Sample,
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint says of its run: settings, network, rule, images, and how their pixels become tensors."""
    about: dict[str, Any] = {
        "settings": asdict(settings), "network": models.config_of(model), **told_of(train_set, val_set)
    }  # fmt: skip
    if goal != Goal():
        about["goal"] = {"loss": goal.loss_name, "metric": goal.name, "lower_is_better": goal.lower_is_better}
        about["goal"]["settings"] = fingerprint({"loss": goal.loss, "metric": goal.metric})
    if rule is not None:
        told = type(rule).__qualname__ if type(rule).__repr__ is object.__repr__ else repr(rule)  # no address
        about["rule"] = {"name": " ".join(told.split()), "settings": fingerprint(rule)}
        if settings.learn_lr is None and (inner := told_of_inner(rule)):
            about["parts"] = inner
    return about
