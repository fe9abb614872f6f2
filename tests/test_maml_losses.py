"""LambdaMAML's second-order steps on losses and gradients that are not plain cross-entropy's, its memory, and
checkpointing, against the plain loop in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, all_close, close, gradients_of, plain_loop
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lambda_kernels.program import flatten
from lambda_maml import LambdaMAML
from lambda_maml.inner import outer
from lambda_maml.maml import TaskLearner

pytestmark = pytest.mark.usefixtures("one_thread")
Loss = Callable[[Tensor, Tensor], Tensor]


def hooked(place: str, hook: Callable[[Tensor], Tensor | None]) -> Loss:
    """Cross-entropy with a hook on the gradient of its logits, of their log-softmax, or of the loss."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        scores = F.log_softmax(logits, 1)
        value = F.nll_loss(scores, y)
        at = {"logits": logits, "scores": scores, "loss": value}[place]
        if at.requires_grad:
            at.register_hook(hook)
        return value

    return loss


def smooth(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, label_smoothing=0.1)


LOSSES: dict[str, Loss] = {
    "plain": F.cross_entropy,
    "ignores a class": lambda o, y: F.cross_entropy(o, y, ignore_index=0),
    "ignores a class, as a module": nn.CrossEntropyLoss(ignore_index=2),
    "softmax over the images": lambda o, y: F.nll_loss(F.log_softmax(o, 0), y),
    "smooth": smooth,
    "weighs classes": lambda o, y: F.cross_entropy(o, y, weight=torch.arange(1.0, 1.0 + o.shape[1]).to(o)),
    "sum": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "half of the images": lambda o, y: F.cross_entropy(o[::2], y[::2]),
    "twice the logits": lambda o, y: F.cross_entropy(2 * o, y),
    **{f"hook on the {place}": hooked(place, lambda g: 3 * g) for place in ("logits", "scores", "loss")},
}


def adapted(maml: LambdaMAML, xs: Tensor, ys: Tensor, loss: Loss, steps: int = 2) -> TaskLearner:
    task = maml.clone()
    for _ in range(steps):
        task.adapt(loss(task(xs), ys))
    return task


@pytest.mark.parametrize("pattern", ["11111", "00111"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_is_differentiated_as_it_is(name: str, pattern: str) -> None:
    """With a module of its own each time: none has met another loss before."""
    xs, ys, xq, yq = CONV4.task()
    loss = LOSSES[name]
    want = plain_loop(CONV4.network, CONV4.groups, pattern, xs, ys, xq, yq, steps=2, lr=0.1, second_order=True,
                      loss=loss)  # fmt: skip
    model = copy.deepcopy(CONV4.network)
    task = adapted(LambdaMAML(model, 0.1, pattern=pattern), xs, ys, loss)
    logits = task(xq)
    close(logits, want.logits, "logits")
    loss(logits, yq).backward()
    all_close(gradients_of(model), want.gradients, "gradient of")


def test_a_hook_on_a_parameter_of_the_clone_acts() -> None:
    xs, ys, xq, _ = CONV4.task()
    results = []
    for lr, factor in ((0.1, 3.0), (0.3, 1.0)):
        task = LambdaMAML(copy.deepcopy(CONV4.network), lr).clone()
        for parameter in task.parameters():
            parameter.register_hook(lambda g, factor=factor: factor * g)
        task.adapt(F.cross_entropy(task(xs), ys))
        results.append(task(xq))
    close(results[0], results[1], "logits")


def test_a_hook_that_only_looks_does_not_make_the_step_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[int] = []
    plain: Any = vars(outer)["adapted"]

    def counted(*operands: Any, **more: Any) -> Any:
        whole.append(1)
        return plain(*operands, **more)

    monkeypatch.setattr(outer, "adapted", counted)
    xs, ys, _, _ = CONV4.task()
    seen: list[Tensor] = []
    adapted(LambdaMAML(CONV4.network, 0.1), xs, ys, hooked("logits", lambda g: seen.append(g)))
    assert len(whole) == 2 and len(seen) == 2
    adapted(LambdaMAML(CONV4.network, 0.1), xs, ys, hooked("logits", lambda g: 2 * g))
    assert len(whole) == 2


@pytest.mark.parametrize("loss", [F.cross_entropy, smooth], ids=["plain", "smooth"])
def test_checkpointing_computes_the_same_anew(loss: Loss) -> None:
    xs, ys, xq, yq = CONV4.task()
    model = copy.deepcopy(CONV4.network)
    maml = LambdaMAML(model, 0.1)
    want = plain_loop(CONV4.network, CONV4.groups, "11111", xs, ys, xq, yq, steps=2, lr=0.1, second_order=True,
                      loss=loss)  # fmt: skip
    for _ in range(2):
        model.zero_grad()
        one = torch.ones((), dtype=xs.dtype, requires_grad=True)
        value = checkpoint(lambda one: one * loss(adapted(maml, xs, ys, loss)(xq), yq), one, use_reentrant=False)
        value.backward()
        all_close(gradients_of(model), want.gradients, "gradient of")


def test_a_clone_does_what_it_does_whatever_other_modules_met() -> None:
    """Bit for bit, so that a resumed run goes on as one without a break."""
    xs, ys, xq, _ = CONV4.task()
    first = adapted(LambdaMAML(CONV4.network, 0.1), xs, ys, F.cross_entropy)(xq)
    for loss, pattern in ((smooth, "11111"), (F.cross_entropy, "00011")):
        other = adapted(LambdaMAML(CONV4.network, 0.1, pattern=pattern), xs, ys, loss)
        loss(other(xq), ys[: len(xq)] if len(xq) <= len(ys) else ys.repeat(len(xq))[: len(xq)])
    assert torch.equal(adapted(LambdaMAML(CONV4.network, 0.1), xs, ys, F.cross_entropy)(xq), first)


@pytest.mark.parametrize("backward", [True, False])
def test_a_clones_frozen_prefix_goes_with_it(backward: bool) -> None:
    xs, ys, xq, yq = CONV4.task()
    model = copy.deepcopy(CONV4.network)
    task = adapted(LambdaMAML(model, 0.1, pattern="00011"), xs, ys, F.cross_entropy, steps=1)
    loss = F.cross_entropy(task(xs), ys)
    held = [weakref.ref(t) for t in flatten(task._prefix.frozen.boundary)[0]]
    assert held and all(t() is not None for t in held)
    if backward:
        loss.backward()
    del task, loss
    gc.collect()
    assert [t() for t in held] == [None] * len(held)
