"""The inner loop: K gradient steps on a support set, for one task or many at once (Finn et al. 2017, algorithm 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import capture
from lambda_kernels.chain import Chain

from . import ready
from .outcome import Outcome, tied
from .patterns import Pattern
from .plan import Part, plan_of, say_once, state_of
from .recorded import adapted_by_graph, classified_by_graph

__all__ = ["Learner", "adapt", "adapt_tasks"]

Loss = Callable[[Tensor, Tensor], Tensor]
Adapted = tuple[list[Tensor], dict[str, Tensor]]


def adapt(
    model: nn.Module,
    xs: Tensor,
    ys: Tensor,
    *,
    pattern: str | Pattern,
    steps: int = 5,
    lr: float = 0.01,
    norm: str = "follow",
    second_order: bool = False,
    loss: Loss = F.cross_entropy,
) -> Learner:
    """Adapt a network to one task: theta <- theta - lr grad loss(f_theta(xs), ys), `steps` times, under a pattern.

    Computed is what a plain loop with `torch.autograd.grad` over the updated parameters gives; what no updated
    parameter reaches is run once. The model is left as it was. Updated are the parameters that the pattern names,
    whatever their `requires_grad`; buffers (running statistics) are updated in the learner's own copies.

    Args:
        model: any module that maps images to logits.
        xs: [N, C, H, W], support images; ys: [N], their labels 0..ways-1 (or what `loss` takes).
        pattern: one bit a layer, or a schedule; see `Pattern`.
        steps: number of gradient steps, K.
        lr: inner learning rate.
        norm: "follow": a layer's norm gamma and beta follow its bit; "never": they stay (the original MAML code).
        second_order: differentiate through the inner gradients. Without it the gradient of a query loss with respect to
            the model's parameters is that at the adapted ones (first-order MAML).
        loss: from logits and ys to a scalar, the mean over the support set.

    Returns:
        A `Learner`: `learner(xq)` are query logits, `learner.parameters_dict()` the adapted parameters.

    Raises:
        ValueError, TypeError: pattern, shapes, labels, dtypes or devices do not fit.
        FloatingPointError: the support loss or the adapted parameters became infinite or NaN.
    """
    plain = loss is F.cross_entropy and not second_order
    if plain and (outcome := ready.again(model, xs, ys, pattern, steps, lr, norm)) is not None:
        return Learner(model, outcome)
    loop = Loop(model, pattern, steps, lr, norm, second_order)
    loop.check(xs, ys)

    def run(xs: Tensor, ys: Tensor) -> Adapted:
        return _adapt_one(loop, loss, state_of(model), xs, ys)

    state = adapted_by_graph(loop, model, loss, run, xs, ys, per_task=False)
    if state is None:
        loop.check_labels(ys.unsqueeze(0))
        losses, state = _adapt_one(loop, loss, loop.meta, xs, ys)
        loop.check_finite(loop.verdict(losses, state).tolist(), xs)
        if plain:
            ready.keep(loop, model, xs, ys, pattern, norm)
    return Learner(model, loop.outcome(loop.meta, state))


def _adapt_one(loop: Loop, loss: Loss, meta: dict[str, Tensor], xs: Tensor, ys: Tensor) -> Adapted:
    """The support losses before each step, and the state after the last."""
    state = meta
    losses: list[Tensor] = []
    with torch.enable_grad():
        for part, count in loop.parts:
            if (known := loop.descend(part, part.whole, loss, state, xs, ys, count, per_task=False)) is not None:
                state = loop.note(losses, state, known)
                continue
            state = loop.start(state, part)
            with torch.set_grad_enabled(loop.second_order):
                frozen = part.freeze(loop.modules, state, loop.layout(xs))
            start = frozen.boundary[0] if frozen.boundary else xs
            if (known := loop.descend(part, part.chain, loss, state, start, ys, count, per_task=False)) is not None:
                state = loop.note(losses, state, known)
                frozen.count(count)
                continue
            for _ in range(count):
                value = _scalar(loss(frozen(loop.modules, state), ys))
                loop.update(state, part, value)
                losses.append(value.detach())
    return losses, state


class Learner(nn.Module):
    """A network with the parameters of one adapted task. The network itself is left as it is, and shared.

    Frozen parameters are the network's own: a later change of them shows here. `to_module` gives a copy of its own.
    """

    def __init__(self, model: nn.Module, outcome: Outcome) -> None:
        super().__init__()
        self._held = (model, outcome)  # in a tuple: the model is no submodule of the learner

    def forward(self, x: Tensor) -> Tensor:
        """The adapted network's result for x [N, C, H, W]."""
        model, outcome = self._held
        program = plan_of(model).program
        return program.evaluate(program.bind(model), outcome.state, x)

    def parameters_dict(self) -> dict[str, Tensor]:
        """All parameters by name, the adapted ones in place of the model's."""
        model, outcome = self._held
        return {name: outcome.state[name] for name, _ in model.named_parameters()}

    def to_module(self) -> nn.Module:
        """A copy of the network with the adapted parameters and buffers as its own."""
        model, outcome = self._held
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
                tensor.copy_(outcome.state[name])
        return twin


def adapt_tasks(
    model: nn.Module,
    xs: Tensor,
    ys: Tensor,
    xq: Tensor,
    *,
    pattern: str | Pattern,
    steps: int = 5,
    lr: float = 0.01,
    norm: str = "follow",
    second_order: bool = False,
    loss: Loss = F.cross_entropy,
) -> Tensor:
    """Adapt to T tasks, each by itself as `adapt` does, and give their query logits; the tasks run as batches.

    Frozen layers see all tasks of a batch at once, updated layers have weights of each task's own, norm statistics are
    each task's own. Networks that torch.fx cannot trace, that draw random numbers or update running statistics are
    adapted one task at a time.

    Args:
        xs: [T, N, C, H, W]; ys: [T, N]; xq: [T, Q, C, H, W]; the others as in `adapt`.

    Returns:
        Query logits [T, Q, ways]; gradients reach the model's parameters as in `adapt`.

    Raises:
        As `adapt`.
    """
    for name, tensor in (("xs", xs), ("ys", ys), ("xq", xq)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"adapt_tasks: {name} must be a tensor, got {type(tensor).__name__}")
    if xs.dim() < 3 or ys.dim() < 2 or not xs.shape[0] == ys.shape[0] == xq.shape[0]:
        raise ValueError(
            f"adapt_tasks: xs [T, N, C, H, W], ys [T, N] and xq [T, Q, C, H, W] must agree on T, got {list(xs.shape)}, "
            f"{list(ys.shape)}, {list(xq.shape)}"
        )
    if xs.shape[0] == 0:
        raise ValueError("adapt_tasks: there are no tasks (T = 0)")
    loop = Loop(model, pattern, steps, lr, norm, second_order)
    if (why := loop.plan.why_not_batched) is not None:
        say_once(f"{type(model).__name__} is adapted one task at a time: {why}")
        given: dict[str, Any] = dict(
            pattern=pattern, steps=steps, lr=lr, norm=norm, second_order=second_order, loss=loss
        )
        return torch.stack([adapt(model, x, y, **given)(q) for x, y, q in zip(xs, ys, xq)])
    loop.check(xs[0], ys[0])
    if xq.dtype != xs.dtype or xq.device != xs.device:
        raise TypeError(
            f"adapt_tasks: xq is {xq.dtype} on {xq.device}, xs {xs.dtype} on {xs.device}: convert xq with .to(xs)"
        )
    if not torch.is_grad_enabled() and (logits := _classify_together(loop, loss, xs, ys, xq)) is not None:
        return logits
    at_once = max(1, _values_at_once(xs.device) // max(1, xs[0].numel()))
    batches = zip(*(t.split(at_once) for t in (xs, ys, xq)))
    return torch.cat([_adapt_batch(model, loop, loss, *batch) for batch in batches])


def _values_at_once(device: torch.device) -> int:
    """Values of the support images of one batch of tasks.

    On a CPU, with more of them the activations fall out of the cache. On a GPU, a block of 64 channels makes about 300
    bytes a value of 3-channel images, of which several are held at a time: they shall fit in its memory.
    """
    if device.type != "cuda":
        return 1 << 16
    return int(torch.cuda.get_device_properties(device).total_memory) // 2048


def _classify_together(loop: Loop, loss: Loss, xs: Tensor, ys: Tensor, xq: Tensor) -> Tensor | None:
    """The query logits of all tasks, where an inner loop takes the whole network and no graph holds it; else None."""
    if capture.refusal(xs.device) is None or len(loop.parts) != 1 or xq.shape[2:] != xs.shape[2:] or not xq.numel():
        return None
    part, steps = loop.parts[0]
    if part.whole is None or not loop.takes(part.whole, loss, xs, ys):
        return None
    loop.check_labels(ys)
    rows, _, logits = part.whole.inner_loop(
        loop.meta, part.updated, xs, ys, steps=steps, rates=[loop.lr], query=xq
    )
    assert logits is not None
    loop.check_finite(rows.tolist(), xs)
    return logits


def _adapt_batch(model: nn.Module, loop: Loop, loss: Loss, xs: Tensor, ys: Tensor, xq: Tensor) -> Tensor:
    """The query logits of a batch of tasks."""

    def start() -> dict[str, Tensor]:
        meta = state_of(model)
        return {**meta, **{n: meta[n].expand(xs.shape[0], *meta[n].shape) for n in loop.updated}}

    def run(xs: Tensor, ys: Tensor) -> Adapted:
        return _adapt_together(loop, loss, start(), xs, ys)

    def classify(state: dict[str, Tensor], xq: Tensor) -> Tensor:
        return loop.each_task(state, lambda own, x: loop.plan.program.evaluate(loop.modules, own, x), xq)

    if torch.is_grad_enabled():
        state = adapted_by_graph(loop, model, loss, run, xs, ys, per_task=True)
    elif (logits := classified_by_graph(loop, model, loss, run, classify, xs, ys, xq)) is not None:
        return logits
    else:
        state = None
    meta = start()
    if state is None:
        loop.check_labels(ys)
        losses, state = _adapt_together(loop, loss, meta, xs, ys)
        loop.check_finite(loop.verdict(losses, state).tolist(), xs)
    return classify(loop.outcome(meta, state).state, xq)


def _adapt_together(loop: Loop, loss: Loss, meta: dict[str, Tensor], xs: Tensor, ys: Tensor) -> Adapted:
    """As `_adapt_one` for xs [T, N, ...], ys [T, N], with [T, ...] losses and updated tensors."""
    state = meta
    losses: list[Tensor] = []
    with torch.enable_grad():
        for part, count in loop.parts:
            if (known := loop.descend(part, part.whole, loss, state, xs, ys, count, per_task=True)) is not None:
                state = loop.note(losses, state, known)
                continue
            state = loop.start(state, part)
            frozen = _FrozenBatch(part, loop.modules, loss)
            with torch.set_grad_enabled(loop.second_order):
                boundary = loop.each_task(state, frozen.freeze, xs)
            start = boundary[0] if boundary else xs
            if (known := loop.descend(part, part.chain, loss, state, start, ys, count, per_task=True)) is not None:
                state = loop.note(losses, state, known)
                continue
            for _ in range(count):
                values = loop.each_task(state, frozen.loss_of, boundary, ys)
                loop.update(state, part, values.sum())
                losses.append(values.detach())
    return losses, state


class _FrozenBatch:
    """A part's prefix for a batch of tasks; only tensors are mapped over tasks, sizes, equal for all, are set aside."""

    def __init__(self, part: Part, modules: Mapping[str, nn.Module], loss: Loss) -> None:
        self.part, self.modules, self.loss = part, modules, loss
        self.sizes: list[Any] = []

    def freeze(self, state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        boundary = self.part.freeze(self.modules, state, x).boundary
        self.sizes = [None if isinstance(v, Tensor) else v for v in boundary]
        return tuple(v for v in boundary if isinstance(v, Tensor))

    def loss_of(self, state: Mapping[str, Tensor], tensors: tuple[Tensor, ...], y: Tensor) -> Tensor:
        values = iter(tensors)
        boundary = tuple(next(values) if v is None else v for v in self.sizes)
        return _scalar(self.loss(self.part.finish(self.modules, state, boundary), y))


class Loop:
    """The inner loop's settings, and its parts that one task and a batch of tasks share."""

    def __init__(
        self, model: nn.Module, pattern: str | Pattern, steps: int, lr: float, norm: str, second_order: bool
    ) -> None:
        if norm not in ("follow", "never"):
            raise ValueError(f"norm must be 'follow' or 'never', got {norm!r}")
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be a whole number of at least 0, got {steps!r}")
        if not isinstance(lr, (int, float)) or not 0.0 < lr < float("inf"):
            raise ValueError(f"lr must be a positive number, got {lr!r}")
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "adaptation needs gradients: call it under torch.no_grad() instead of torch.inference_mode()"
            )
        self.steps, self.lr = steps, lr
        self.plan, self._model = plan_of(model), model
        self.pattern = Pattern.parse(pattern)
        key = (self.pattern, steps, norm)
        schedule = self.plan.schedules.get(key)
        if schedule is None:
            self.pattern.check(self.plan)
            parts = [(self.plan.part(bits, norm), count) for bits, count in self.pattern.segments(steps)]
            schedule = parts, tuple(dict.fromkeys(n for part, _ in parts for n in part.updated))
            self.plan.keep(key, schedule)
        self.parts: list[tuple[Part, int]] = schedule[0]
        self.updated: tuple[str, ...] = schedule[1]
        self.meta = state_of(model)
        self.parameter = next(iter(self.meta.values()))
        self.second_order = second_order and torch.is_grad_enabled()

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that the program's steps use, by path."""
        return self.plan.program.bind(self._model)

    def check(self, xs: Tensor, ys: Tensor) -> None:
        """ValueError or TypeError for a support set that the network cannot be adapted to."""
        for name, tensor in (("xs", xs), ("ys", ys)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"support set: {name} must be a tensor, got {type(tensor).__name__}")
        if xs.dim() < 2 or xs.shape[0] == 0 or ys.dim() < 1 or ys.shape[0] != xs.shape[0]:
            raise ValueError(
                "support set: xs [N, C, H, W] and ys [N] with N of at least 1 expected, "
                f"got {list(xs.shape)} and {list(ys.shape)}"
            )
        if not self.parameter.device == xs.device == ys.device:
            raise ValueError(
                f"support set: xs is on {xs.device}, ys on {ys.device}, the network on {self.parameter.device}: "
                "move them together with .to(device)"
            )
        if xs.dtype != self.parameter.dtype and not torch.is_autocast_enabled(xs.device.type):
            raise TypeError(
                f"support set: xs is {xs.dtype}, the network {self.parameter.dtype}: "
                f"convert xs with .to({self.parameter.dtype})"
            )
        if not ys.is_floating_point() and ys.dtype not in (torch.int64, torch.uint8):
            raise TypeError(
                f"support set: ys is {ys.dtype}: convert labels with .long(), regression targets with .float()"
            )

    @property
    def outputs(self) -> int | None:
        """The number of logits, where it is known."""
        return self.plan.outputs

    def check_labels(self, ys: Tensor, lowest: list[int] | None = None, highest: list[int] | None = None) -> None:
        """ValueError where class labels [T, N] are all one class in a task, or beyond the outputs; `lowest` and
        `highest` are each task's, where they are known."""
        if ys.is_floating_point():
            return  # regression targets
        tasks = ys.flatten(1)
        if lowest is None or highest is None:
            rows = tasks.tolist()
            lowest, highest = [min(row) for row in rows], [max(row) for row in rows]
        outputs = self.outputs
        for low, high in zip(lowest, highest):
            if low == high:
                raise ValueError(
                    f"support set: all {tasks.shape[1]} labels are {low}; at least two classes are needed"
                )
            if low < 0 or (outputs is not None and high >= outputs):
                raise ValueError(
                    f"support set: labels run from {low} to {high}, the network's outputs from 0 to "
                    f"{'ways-1' if outputs is None else outputs - 1}: renumber them or build it with more ways"
                )

    def start(self, state: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
        """The state that a part's steps begin with under autograd.

        In first order frozen tensors are cut off from it, updated ones are new leaves. In second order a step's
        gradient is by the present values, not by what they were to earlier steps.
        """
        if self.second_order:
            own = {n: state[n] if state[n].requires_grad else state[n].detach().requires_grad_() for n in self.updated}
            own.update((n, own[n].view_as(own[n])) for n in part.updated)
            return self.tie({**state, **own})
        with torch.no_grad():
            own = {n: state[n].clone(memory_format=torch.contiguous_format).requires_grad_() for n in self.updated}
            return self.tie({**{n: t.detach() if t.requires_grad else t for n, t in state.items()}, **own})

    def outcome(self, meta: dict[str, Tensor], adapted: dict[str, Tensor]) -> Outcome:
        return Outcome(meta, adapted, self.updated, self.plan.program.aliases, self.second_order)

    def tie(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return tied(state, self.plan.program.aliases)

    def note(
        self, losses: list[Tensor], state: dict[str, Tensor], known: tuple[Tensor, dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The state after what `descend` did; its losses are added to the others."""
        losses.append(known[0])
        return self.tie({**state, **known[1]})

    def descend(
        self,
        part: Part,
        chain: Chain | None,
        loss: Loss,
        state: dict[str, Tensor],
        x: Tensor,
        labels: Tensor,
        steps: int,
        per_task: bool,
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """All steps of a part that is a chain from x on, in first order, as a backend's inner loop; None for another.

        Returns:
            [steps + 1, T] as `verdict` gives it, and the updated tensors by name.
        """
        x = x if per_task else x.unsqueeze(0)
        labels = labels if per_task else labels.unsqueeze(0)
        if chain is None or not self.takes(chain, loss, x, labels):
            return None
        return chain.inner_loop(state, part.updated, x, labels, steps=steps, rates=[self.lr])[:2]

    def layout(self, x: Tensor) -> Tensor:
        """Images in the memory layout in which a CPU's convolutions are fastest; what follows keeps it."""
        known = all(step.not_reusable is None for step in self.plan.program.steps)
        return x.contiguous(memory_format=torch.channels_last) if known and x.dim() == 4 and not x.is_cuda else x

    def takes(self, chain: Chain, loss: Loss, x: Tensor, labels: Tensor) -> bool:
        """Whether a backend's inner loop takes the chain, x [T, N, ...], labels [T, N] and the loss."""
        return not self.second_order and loss is F.cross_entropy and not chain.refusals(x, labels)

    def update(self, state: dict[str, Tensor], part: Part, value: Tensor) -> None:
        """One gradient step on the part's updated parameters."""
        weights = [state[n] for n in part.updated]
        gradients: tuple[Tensor | None, ...] = (None,)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, weights, create_graph=self.second_order, allow_unused=True)
        if all(g is None for g in gradients):
            raise ValueError(
                f"pattern {str(self.pattern)!r}: the support loss has no gradient with respect to the parameters "
                f"that it updates ({', '.join(part.updated)}): choose layers that the loss depends on"
            )
        used = [(n, w, g) for n, w, g in zip(part.updated, weights, gradients) if g is not None]
        if self.second_order:
            state.update((n, w - self.lr * g) for n, w, g in used)
            self.tie(state)
        else:
            with torch.no_grad():
                torch._foreach_add_([w for _, w, _ in used], [g for _, _, g in used], alpha=-self.lr)

    def each_task(self, state: dict[str, Tensor], function: Callable[..., Any], *values: Any) -> Any:
        """function(state, values of one task) for every task of a batch at once."""

        def one(own: tuple[Tensor, ...], *values: Any) -> Any:
            return function(self.tie({**state, **dict(zip(self.updated, own))}), *values)

        return torch.func.vmap(one, randomness="error")(tuple(state[n] for n in self.updated), *values)

    def verdict(self, losses: list[Tensor], state: dict[str, Tensor]) -> Tensor:
        """[steps + 1, T], float64: each task's support losses, and below them a number that is finite if all parameters
        are; empty without steps. `losses` are those of one step each, and what `descend` gave for several."""
        if not losses:
            return torch.empty(0)
        with torch.no_grad():
            if len(losses) == 1 and losses[0].dim() == 2:
                return losses[0].double()
            values = torch.cat([v[:-1].double() if v.dim() == 2 else v.reshape(1, -1).double() for v in losses])
            after = torch.stack([state[n].sum().double() for n in self.updated]).sum()
            return torch.cat([values, after.expand(1, values.shape[1])])

    def check_finite(self, rows: list[list[float]], xs: Tensor) -> None:
        """FloatingPointError where a `verdict` holds an infinite number or NaN."""
        if all(math.isfinite(value) for row in rows for value in row):
            return
        *losses, _ = rows
        wrong = [(k, value) for k, row in enumerate(losses) for value in row if not math.isfinite(value)]
        step, value = wrong[0] if wrong else (len(losses) - 1, losses[-1][0])
        images = int((~torch.isfinite(xs)).sum())
        why = (
            f"the support images hold {images} NaN or infinite values"
            if images
            else "lower lr or look at the images' scale"
        )
        raise FloatingPointError(
            f"adaptation under {self.pattern} with lr={self.lr} diverged in step {step + 1} of {len(losses)}, "
            f"support loss {value}: {why}"
        )


def _scalar(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss must be a tensor of one number, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(
            f"the loss must be one number a task, got {list(value.shape)}: take the mean over the support set"
        )
    return value
