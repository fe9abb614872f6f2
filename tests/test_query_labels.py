"""The outer loss and the accuracy of tasks whose query labels are not a class number per image, or do not all count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT
from torch import Tensor, nn

from lambda_maml import adapt, adapt_tasks, models
from lambda_maml.data import Task
from lambda_maml.evaluate import evaluate
from lambda_maml.train import Parts, Settings, meta_gradient

pytestmark = pytest.mark.usefixtures("one_thread")
WAYS, T = 3, 3
SETTINGS = Settings(ways=WAYS, steps=2, lr=0.1, meta_batch=T)


def tasks(labels: Callable[[int, int], Tensor], size: int = 16) -> list[Task]:
    """Three tasks; labels(count, number) gives those of a task's set."""
    torch.manual_seed(0)
    shapes = ((6, 1, size, size), (9, 1, size, size))
    images = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(T)]
    return [Task(xs, labels(6, i), xq, labels(9, i)) for i, (xs, xq) in enumerate(images)]


def some_left_out(count: int, number: int) -> Tensor:
    """Of the query set (9) the first 0, 3 or 6; of the support set none."""
    labels = torch.arange(count) % WAYS
    return labels.masked_fill(torch.arange(count) < 3 * number, -100) if count == 9 else labels


def soft(count: int, number: int) -> Tensor:
    return F.one_hot(torch.arange(count) % WAYS, WAYS).double() * 0.7 + 0.1


def per_pixel(count: int, number: int) -> Tensor:
    return torch.randint(WAYS, (count, 8, 8), generator=torch.Generator().manual_seed(count + number))


KINDS: dict[str, tuple[Callable[[int, int], Tensor], int]] = {
    "some left out": (some_left_out, 16), "soft": (soft, 16), "per pixel": (per_pixel, 8),
}  # fmt: skip


def network(size: int) -> nn.Module:
    torch.manual_seed(1)
    if size == 8:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, WAYS, 1)).double()
    return models.conv4(ways=WAYS, in_channels=1, width=4, image_size=16).double()


@pytest.mark.parametrize("way", ["batched", "one by one", "parts", "parts, one by one"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_task_counts_as_much_as_any_other(kind: str, way: str) -> None:
    labels, size = KINDS[kind]
    model, given = network(size), tasks(labels, size)
    plain = copy.deepcopy(model)
    losses = []
    for t in given:
        learner = adapt(plain, t.xs, t.ys, pattern=None, steps=2, lr=0.1, second_order=True)
        losses.append(F.cross_entropy(learner(t.xq), t.yq))
    want = torch.stack(losses).mean()
    want.backward()
    batched = "one by one" not in way
    if way.startswith("parts"):
        parts = Parts().of_run(None, SETTINGS, 1)
        got = parts.gradient(model, given, list(range(T)), SETTINGS, 0, batched=batched)
    else:
        got = meta_gradient(model, given, SETTINGS, batched=batched)
    assert got == pytest.approx(want.item(), rel=1e-9)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **GRADIENT)


def test_accuracy_is_over_what_is_labelled() -> None:
    model = network(16)
    whole = tasks(lambda count, number: torch.arange(count) % WAYS)
    partly = [t._replace(yq=t.yq.masked_fill(torch.arange(9) < 3 * i, -100)) for i, t in enumerate(whole)]
    given: dict[str, Any] = {"pattern": None, "steps": 2, "lr": 0.1}
    right = [adapt(model, t.xs, t.ys, **given)(t.xq).argmax(1) == t.yq for t in whole]
    want = [float(found[3 * i :].double().mean()) for i, found in enumerate(right)]
    assert evaluate(model, partly, **given).accuracies.tolist() == pytest.approx(want)
    with pytest.raises(ValueError, match="no label that counts"):
        evaluate(model, [whole[0]._replace(yq=torch.full((9,), -100))], **given)


def test_accuracy_is_over_pixels_too_and_says_what_it_cannot_compare() -> None:
    model, given = network(8), tasks(per_pixel, 8)
    options: dict[str, Any] = {"pattern": None, "steps": 2, "lr": 0.1}
    want = [float((adapt(model, t.xs, t.ys, **options)(t.xq).argmax(1) == t.yq).double().mean()) for t in given]
    assert evaluate(model, given, **options).accuracies.tolist() == pytest.approx(want)
    with pytest.raises(ValueError, match=r"accuracy compares logits .* class numbers .* give a metric of your own"):
        evaluate(network(16), [t._replace(yq=per_pixel(9, 0)) for t in tasks(some_left_out)], **options)


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_learned_rates_of_layers_that_stay_leave_the_first_order_gradient(form: str) -> None:
    learned = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    lr: Any = [0.1, 0.1, 0.1, 0.1, learned] if form == "list" else {"block4.conv": 0.1, "head": learned}
    (t, *_) = tasks(lambda count, number: torch.arange(count) % WAYS)
    results = []
    for rate in (lr, 0.1):
        for many in (False, True):
            model = network(16)
            given: dict[str, Any] = {"pattern": "00010", "steps": 2, "lr": rate}
            if many:
                logits = adapt_tasks(model, t.xs[None], t.ys[None], t.xq[None], **given)[0]
            else:
                logits = adapt(model, t.xs, t.ys, **given)(t.xq)
            F.cross_entropy(logits, t.yq).backward()
            results.append([p.grad for p in model.parameters()])
    for found in results:
        assert all(g is not None for g in found)
        for mine, theirs in zip(found, results[-1], strict=True):
            torch.testing.assert_close(mine, theirs, **GRADIENT)
