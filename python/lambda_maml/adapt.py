"""Adaptation of a network to few examples: `adapt` for one task, `adapt_tasks` for many at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lambda_kernels.program import modes_of, tensors_of

from .inner import batch, channels, checks, recorded, remembered
from .inner.adaptation import Adaptation, describe
from .inner.checks import Loss
from .inner.loop import descend, outcome
from .inner.problem import FIRST, Turn
from .inner.rates import DEFAULT_LR, Rate
from .inner.rule import Rule
from .inner.rules import rule_of
from .learner import Learner, network_of, support_of
from .patterns import Pattern
from .places import PatternChooser, Solver, descent_of
from .say import say_once
from .solved import chosen, solve, turns_of
from .statistics import warn_of_few

__all__ = ["STATISTICS", "adapt", "adapt_tasks"]

STATISTICS = ("batch", "support")
"""What batch norms may take their statistics from when an adapted network classifies."""


def adapt(
    model: nn.Module,
    xs: Any,
    ys: Any,
    *,
    pattern: str | Pattern | PatternChooser | None,
    steps: int = 5,
    lr: Rate = DEFAULT_LR,
    rule: Rule | None = None,
    norm: str = "follow",
    second_order: bool = False,
    loss: Loss = F.cross_entropy,
    statistics: str = "batch",
    solver: Solver | None = None,
    turn: Turn = FIRST,
) -> Learner:
    """Adapt a network to one task: theta <- theta - lr grad loss(f_theta(xs), ys), `steps` times, under a pattern.

    Computed is what a plain loop with `torch.autograd.grad` over the updated parameters gives; what no updated
    parameter reaches is run once. The model is left as it was. Buffers (running statistics) are updated in the
    learner's own copies.

    >>> learner = adapt(model, xs, ys, pattern="00011", steps=5, lr=0.03)
    >>> learner(xq).shape                                   # 75 query images, 5 ways
    torch.Size([75, 5])

    `explain` says which way it takes, and why it takes no faster one. The inner loop is that of Finn et al. 2017,
    algorithm 1; the patterns are those of Khabarlak 2022 (arXiv 2206.05930).

    Args:
        model: any module that maps xs to logits, or a `Learner`, which is adapted further.
        xs: [N, C, H, W], support images, or a tuple or dict of tensors that the network takes as its one argument.
        ys: [N], class numbers 0..ways-1, or whatever `loss` takes: tensors in any structure, None.
        pattern: one bit per layer, a name such as "ANIL", or a schedule; see `Pattern`. A parameter that it names is
            updated, whatever its `requires_grad`; None updates all parameters that require a gradient. Or what chooses
            a pattern for the task, see `places.PatternChooser`.
        steps: number of gradient steps, K.
        lr: inner learning rate: a number, or one per layer, tensor or step, learned or not; see `rules.sgd`.
        rule: how a step goes, in place of `lr`: `rules.adam(0.01)`, `rules.clip(norm=1.0) | rules.sgd(0.1)`, your own.
        norm: "follow": a layer's norm gamma and beta follow its bit; "never": they stay (the original MAML code).
        second_order: differentiate through the inner gradients. Without it the gradient of a query loss with respect to
            the model's parameters is that at the adapted ones (first-order MAML).
        loss: from the network's result and ys to a scalar, the mean over the support set.
        statistics: of the batch norms when the learner is called. "batch": of the images that it is called with
            together, as published results have it; "support": of the support set, see `Learner.freeze_statistics`.
        solver: what finds the parameters in place of `steps` steps of `lr` or `rule`: `methods.ridge_head(1.0)`, say.
        turn: which task of which iteration this is, for what a solver draws or remembers.

    Raises:
        ValueError, TypeError: pattern, shapes, labels, dtypes or devices do not fit, or solver and rates are given.
        RuntimeError: torch.inference_mode() is on.
        FloatingPointError: the support loss or the adapted parameters became infinite or NaN.
    """
    _check_statistics(statistics)
    model = network_of(model)
    if callable(pattern):
        pattern = chosen(model, xs, ys, pattern, norm, loss, turn)
    if solver is not None:
        steps, rule = _solver_alone(solver, steps, lr, rule)
    if solver is not None and rule is None:
        learner = solve(model, xs, ys, pattern, norm, second_order, loss, solver, turn)
    else:
        learner = _adapted(model, xs, ys, pattern, steps, lr, rule, norm, second_order, loss)
    learner.__dict__["_support"] = support_of(xs)
    return learner.freeze_statistics() if statistics == "support" else learner


def _check_statistics(statistics: str) -> None:
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, got {statistics!r}")


def _solver_alone(solver: Solver, steps: int, lr: Rate, rule: Rule | None) -> tuple[int, Rule | None]:
    """The steps and the rule of a solver that is the core's gradient descent; no rule of any other."""
    if rule is not None or lr is not DEFAULT_LR:
        raise ValueError(f"give solver={solver!r} or {f'lr={lr!r}' if rule is None else f'rule={rule!r}'}, not both")
    descent = descent_of(solver)
    return (steps, None) if descent is None else (descent[1], descent[0])


def _adapted(
    model: nn.Module, xs: Any, ys: Any, pattern: str | Pattern | None, steps: int, lr: Rate, rule: Rule | None,
    norm: str, second_order: bool, loss: Loss,
) -> Learner:  # fmt: skip
    if rule is not None or type(lr) is not float:
        lr, rule = DEFAULT_LR, rule_of(lr, rule)
    if isinstance(pattern, Pattern) and pattern.rows:
        return _by_channels(model, xs, ys, pattern, steps, rule_of(lr, rule), norm, second_order, loss)
    plain = loss is F.cross_entropy and not second_order
    if plain and (known := remembered.again(model, xs, ys, pattern, steps, lr, rule, norm)) is not None:
        return Learner(model, known.plan.program.modes, known.outcome)
    a = describe(model, xs, pattern, rule_of(lr, rule), steps, norm, second_order, loss)
    checks.check_support(a.parameters, xs, ys)
    support = a.support(xs, ys)
    state = recorded.adapted(a, support)
    replayed = state is not None
    if state is None:
        support = a.check_labels(support)
        result = descend(a, support)
        a.check_finite(result.verdict.tolist(), xs)
        state = result.state
    if plain:
        remembered.keep(a, support, pattern, rule, replayed)
    return Learner(model, a.plan.program.modes, outcome(a, state))


def _by_channels(
    model: nn.Module, xs: Any, ys: Any, pattern: Pattern, steps: int, rule: Rule, norm: str, second_order: bool,
    loss: Loss,
) -> Learner:  # fmt: skip
    """`adapt` under a pattern of channels: the network with split layers is adapted, the learner is the model's."""
    checks.check_support(tensors_of(model)[0], xs, ys)
    network = channels.split(model, xs, pattern, norm, rule)
    a = describe(network.model, xs, network.pattern, rule, steps, norm, second_order, loss)
    support = a.check_labels(a.support(xs, ys))
    result = descend(a, support)
    a.check_finite(result.verdict.tolist(), xs)
    return Learner(model, modes_of(model), network.outcome(outcome(a, result.state).state))


def adapt_tasks(
    model: nn.Module,
    xs: Any,
    ys: Any = None,
    xq: Any = None,
    *,
    pattern: str | Pattern | PatternChooser | None,
    steps: int = 5,
    lr: Rate = DEFAULT_LR,
    rule: Rule | None = None,
    norm: str = "follow",
    second_order: bool = False,
    loss: Loss = F.cross_entropy,
    statistics: str = "batch",
    solver: Solver | None = None,
    turns: Sequence[Turn] | None = None,
) -> Any:
    """Adapt to T tasks, each by itself as `adapt` does, and give their query results; the tasks run as batches.

    Frozen layers see all tasks of a batch at once, updated layers have weights of each task's own, norm statistics are
    each task's own. Networks that cannot be looked into, that draw random numbers, that update running statistics or
    that `torch.func.vmap` cannot follow are adapted one task at a time, and that is said once. On the CPU so are those
    for which that is faster (`plan.MAPPED_ON_CPU`): no chains, or under another loss than cross-entropy.

    >>> xs, ys, xq, yq = (torch.stack(part) for part in zip(*tasks))             # each with T in front
    >>> adapt_tasks(model, xs, ys, xq, pattern="00011", steps=5, lr=0.03).shape  # [T, Q, ways]
    torch.Size([2, 75, 5])

    Tasks that differ in their numbers of images, ways or queries are given as lists, one entry per task. Those of equal
    shapes run as one batch; the results are a list, in the order of the tasks.

    >>> [logits.shape for logits in adapt_tasks(model, tasks, pattern="00011", steps=5, lr=0.03)]
    [torch.Size([75, 5]), torch.Size([75, 5])]

    Args:
        xs: [T, N, C, H, W]; ys: [T, N]; xq: [T, Q, C, H, W], or structures of tensors with T in front; the others as in
            `adapt`. Or three lists of what `adapt` and its learner take, [N, C, H, W], [N] and [Q, C, H, W], where ys
            may be None; or one list of tasks, `Task` or plain tuples (xs, ys, xq, yq). With statistics="support", and
            under solvers and choosers of their own, the tasks are adapted one after another; `turns` are theirs.

    Returns:
        Query logits [T, Q, ways], or what the network gives, in its own structure, with T in front of every tensor; for
        lists a list of them, without T. Gradients reach the model's parameters as in `adapt`.

    Raises:
        ValueError: lists of unequal length; else as `adapt`.
    """
    model = network_of(model)
    if solver is not None:
        steps, rule = _solver_alone(solver, steps, lr, rule)
    given: dict[str, Any] = dict(
        pattern=pattern, steps=steps, rule=rule_of(lr, rule), norm=norm, second_order=second_order, loss=loss
    )
    _check_statistics(statistics)
    tasks = batch.listed(xs, ys, xq)
    alone: dict[str, Any] = {} if statistics == "batch" else {"statistics": statistics}
    why = ""  # a pass over each support set, which is what was asked for
    if solver is not None and rule is None:
        alone["solver"], why = solver, f"{solver!r} sees one task"
        given = {**given, "rule": None}
    if callable(pattern):
        why = f"{pattern!r} chooses a pattern for each"
    if alone or callable(pattern):
        given |= alone
        if tasks is not None:
            return _one_by_one(model, why, tasks, given, turns_of(len(tasks), turns))
        count = turns_of(checks.check_tasks(xs, ys, xq), turns)
        return batch.stacked(_one_by_one(model, why, batch.unstacked(xs, ys, xq), given, count))
    if isinstance(pattern, Pattern) and pattern.rows:
        if tasks is None:
            checks.check_tasks(xs, ys, xq)
        x, y = (batch.task(xs, 0), batch.task(ys, 0)) if tasks is None else tasks[0][:2]
        checks.check_support(tensors_of(model)[0], x, y)
        network = channels.split(model, x, pattern, norm, given["rule"])
        model, given["pattern"] = network.model, network.pattern
    if tasks is None:
        return _together(_described(model, xs, ys, xq, given), xs, ys, xq, given)
    return _listed(model, tasks, given)


def _listed(model: nn.Module, tasks: list[batch.Given], given: dict[str, Any]) -> list[Any]:
    """The query results of each task of a list; tasks of equal shapes run as one batch, one of its own as `adapt`."""
    groups = []
    for places in batch.alike(tasks):
        values = batch.stacked_tasks([tasks[i] for i in places])
        with checks.told_of(places):
            a = _described(model, *values, given) if len(places) > 1 else None
        if a is not None and (why := _why_alone(a)) is not None:
            return _one_by_one(model, why, tasks, given)  # random numbers are drawn in the order of the tasks
        groups.append((places, values, a))
    results: list[Any] = [None] * len(tasks)
    for places, values, a in groups:
        with checks.told_of(places):
            if a is None:
                x, y, q = tasks[places[0]]
                checks.check_query(x, q)
                results[places[0]] = adapt(model, x, y, **given)(q)
                continue
            found = _together(a, *values, given)
            for at, place in enumerate(places):
                results[place] = batch.task(found, at)
    return results


def _described(model: nn.Module, xs: Any, ys: Any, xq: Any, given: dict[str, Any]) -> Adaptation:
    """The adaptation to stacked tasks, which are checked."""
    tasks = checks.check_tasks(xs, ys, xq)
    a = describe(model, batch.task(xs, 0), **given)
    checks.check_support(a.parameters, xs, ys, tasks)
    checks.check_query(xs, xq)
    return a


def _why_alone(a: Adaptation) -> str | None:
    return a.plan.why_not_batched or a.why_unmapped


def _together(a: Adaptation, xs: Any, ys: Any, xq: Any, given: dict[str, Any]) -> Any:
    """The query results of stacked tasks, with T in front."""

    def one_by_one(why: str) -> Any:
        return batch.stacked(_one_by_one(a.model, why, batch.unstacked(xs, ys, xq), given))

    if (why := _why_alone(a)) is not None:
        return one_by_one(why)
    if a.why_faster_alone(a.support(batch.task(xs, 0), batch.task(ys, 0))) is not None:
        return one_by_one("")
    if a.plan.normalises_batches and not torch.is_grad_enabled():
        warn_of_few(batch.task(xq, 0))
    try:
        return batch.adapt_and_classify(a, xs, ys, xq)
    except RuntimeError as error:
        if checks.lacks_memory(error):
            raise
        # Whatever vmap has no rule for. Should the fault be the user's, adapting the first task raises it again.
        reason = f"torch.func.vmap cannot follow ({' '.join(str(error).split())[:160]})"
        found = one_by_one(reason)
        a.plan.unmapped.put(a.code, reason)
        return found


def _one_by_one(
    model: nn.Module, why: str, tasks: Iterable[batch.Given], given: dict[str, Any], turns: Iterable[Turn] | None = None
) -> list[Any]:
    if why:
        say_once(f"{type(model).__name__} is adapted one task at a time: {why}. `explain` lists what each way needs")
    own = itertools.repeat(FIRST) if turns is None else turns
    return [adapt(model, x, y, **given, turn=turn)(q) for (x, y, q), turn in zip(tasks, own)]
