"""Tasks that differ in numbers of images, ways and queries: lists for `adapt_tasks`, against the plain loop of each."""

from __future__ import annotations

import copy
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, NETWORKS, all_close, close, gradients_of, plain_loop
from torch import Tensor, nn
from users import seeded

from lambda_maml import adapt, adapt_tasks, data, models
from lambda_maml.evaluate import evaluate
from lambda_maml.inner import batch as batch_module
from lambda_maml.train import Settings, meta_gradient

pytestmark = pytest.mark.usefixtures("one_thread")
D = torch.float64
SIZES = [(2, 3), (5, 1), (2, 3), (3, 7), (5, 1), (2, 3)]  # support and query images of each task


def ragged(case: loops.Case, sizes: list[tuple[int, int]] | None = None) -> list[data.Task]:
    generator = torch.Generator().manual_seed(3)
    tasks = []
    for n, q in SIZES if sizes is None else sizes:
        xs, xq = (torch.randn(k, *case.input_shape, generator=generator, dtype=D) for k in (n, q))
        tasks.append(data.Task(xs, torch.arange(n) % case.ways, xq, torch.arange(q) % case.ways))
    return tasks


def lists(tasks: list[data.Task]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [t.xs for t in tasks], [t.ys for t in tasks], [t.xq for t in tasks]


def query_loss(results: list[Tensor], tasks: list[data.Task]) -> Tensor:
    return torch.stack([F.cross_entropy(z, t.yq) for z, t in zip(results, tasks, strict=True)]).mean()


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("pattern", ["11111", "00001", "01010", "11111,00001"])
def test_a_list_of_tasks_equals_the_plain_loop_of_each(pattern: str, second_order: bool) -> None:
    """Logits, and of the mean query loss the gradient by every parameter, frozen ones too."""
    tasks, model = ragged(CONV4), copy.deepcopy(CONV4.network)
    want = [
        plain_loop(CONV4.network, CONV4.groups, pattern, *task, steps=3, lr=0.1, second_order=second_order)
        for task in tasks
    ]
    got = adapt_tasks(model, *lists(tasks), pattern=pattern, steps=3, lr=0.1, second_order=second_order)
    assert isinstance(got, list)
    for logits, plain in zip(got, want, strict=True):
        close(logits, plain.logits, "logits")
    query_loss(got, tasks).backward()
    mean = {n: torch.stack([p.gradients[n] for p in want]).mean(0) for n in want[0].gradients}
    all_close(gradients_of(model), mean, "gradient of")


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds_also_such_as_go_task_by_task(name: str) -> None:
    case = NETWORKS[name]()
    tasks, pattern = ragged(case, [(3, 2), (4, 3), (3, 2)]), "1" * len(case.groups)
    model, twin = copy.deepcopy(case.network), copy.deepcopy(case.network)
    given: dict[str, Any] = {"pattern": pattern, "steps": 2, "lr": 0.1, "second_order": True}
    got = adapt_tasks(model, tasks, **given)
    want = [adapt(twin, t.xs, t.ys, **given)(t.xq) for t in tasks]
    for a, b in zip(got, want, strict=True):
        close(a, b, "logits")
    query_loss(got, tasks).backward()
    query_loss(want, tasks).backward()
    all_close(gradients_of(model), gradients_of(twin), "gradient of")


@pytest.mark.parametrize("grad", [False, True])
def test_tasks_of_equal_shapes_run_as_one_batch_and_come_back_in_their_order(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    own = batch_module.adapt_and_classify

    def counted(a: Any, xs: Tensor, *rest: Any) -> Any:
        counts.append(list(xs.shape[:2]))
        return own(a, xs, *rest)

    monkeypatch.setattr(batch_module, "adapt_and_classify", counted)
    tasks = ragged(CONV4)
    with torch.set_grad_enabled(grad):
        got = adapt_tasks(CONV4.network, tasks, pattern="00111", steps=2, lr=0.1)
    assert counts == [[3, 2], [2, 5]]  # the task of 3 images is one by itself
    for logits, t in zip(got, tasks, strict=True):
        close(logits, adapt(CONV4.network, t.xs, t.ys, pattern="00111", steps=2, lr=0.1)(t.xq), "logits")


def test_stacked_tasks_and_the_same_as_a_list_give_the_same_bits() -> None:
    tasks = ragged(CONV4, [(4, 3)] * 3)
    xs, ys, xq, _ = (torch.stack(part) for part in zip(*tasks))
    stacked = adapt_tasks(CONV4.network, xs, ys, xq, pattern="00111", steps=3, lr=0.1)
    listed = adapt_tasks(CONV4.network, tasks, pattern="00111", steps=3, lr=0.1)
    assert isinstance(stacked, Tensor) and torch.equal(stacked, torch.stack(listed))


def test_sizes_at_the_edge() -> None:
    tasks = ragged(CONV4, [(1, 1), (9, 0), (1, 2)])
    got = adapt_tasks(CONV4.network, tasks, pattern="00001", steps=2, lr=0.1)
    assert [list(z.shape) for z in got] == [[1, 2], [0, 2], [2, 2]]
    one = adapt_tasks(CONV4.network, tasks[:1], pattern="00001", steps=2, lr=0.1)
    assert isinstance(one, list) and torch.equal(one[0], got[0])


class Named(nn.Module):
    """A network with an input and a result of a structure each; how many rows it has in all is known to it only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: dict[str, Any]) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.body(torch.cat([x["left"], *x["right"]]))) * x["scale"])}


def test_lists_of_structures_are_grouped_by_structure_too() -> None:
    model = seeded(Named())

    def given(n: int, parts: int = 1, scale: float = 1.0) -> dict[str, Any]:
        torch.manual_seed(n)
        return {"left": torch.randn(n, 4, dtype=D), "right": (torch.ones(1, 4, dtype=D),) * parts, "scale": scale}

    xs = [given(2), given(2, 2), given(2), given(2, scale=0.5), given(3)]
    ys = [torch.arange(3) % 3, torch.arange(4) % 3, torch.arange(3) % 3, torch.arange(3) % 3, torch.arange(4) % 3]
    xq = [given(4), given(1), given(4), given(4), given(1)]
    options: dict[str, Any] = {
        "pattern": "11",
        "steps": 2,
        "lr": 0.1,
        "loss": lambda r, y: F.cross_entropy(r["logits"], y),
    }
    got = adapt_tasks(model, xs, ys, xq, **options)
    for result, x, y, q in zip(got, xs, ys, xq, strict=True):
        close(result["logits"], adapt(model, x, y, **options)(q)["logits"], "logits")


def test_lists_without_targets() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    xs, xq = [torch.randn(n, 4, dtype=D) for n in (2, 5, 2)], [torch.randn(n, 4, dtype=D) for n in (1, 1, 3)]
    given: dict[str, Any] = {"pattern": "01", "steps": 2, "lr": 0.1, "loss": lambda z, _: z.square().mean()}
    for z, x, q in zip(adapt_tasks(model, xs, None, xq, **given), xs, xq, strict=True):
        close(z, adapt(model, x, None, **given)(q), "result")


def test_random_numbers_are_drawn_in_the_order_of_the_tasks() -> None:
    case = loops.sequential([(0, None), (2, None)], (5,), nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    tasks = ragged(case, [(2, 1), (3, 1), (2, 1)])
    torch.manual_seed(1)
    want = [adapt(case.network, t.xs, t.ys, pattern="01", steps=3)(t.xq) for t in tasks]
    torch.manual_seed(1)
    for a, b in zip(adapt_tasks(case.network, tasks, pattern="01", steps=3), want, strict=True):
        close(a, b, "logits")


X, Y = torch.randn(4, 1, 16, 16, dtype=D), torch.arange(4) % 2
WRONG: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "unequal lists": (([X, X, X], [Y, Y], [X]), ValueError, "got 3 in xs, 2 in ys, 1 in xq: make them equally long"),
    "unequal without targets": (([X, X], None, [X]), ValueError, "got 2 in xs, 2 in ys, 1 in xq"),
    "no tasks": (([], [], []), ValueError, "there are no tasks"),
    "an empty list of Task": (([],), ValueError, "there are no tasks"),
    "a list of other things": (([(X, Y, X)],), TypeError, "task 0 is a tuple of 3 .*expected Task"),
    "a stacked part": (([X, X], torch.stack([Y, Y]), [X, X]), ValueError, "must agree on T"),
    "one task's labels": (([X, X[:3], X], [Y, Y[:3] * 9, Y], [X] * 3), ValueError, "from 0 to 9.*task 1 of"),
    "one of several": (([X, X], [Y, Y - 5], [X, X]), ValueError, "from -5.*one of the tasks 0, 1 of the list"),
    "one task's dtype": (([X, X.float()], [Y, Y], [X, X.float()]), TypeError, r"xs is torch.float32.*task 1 of"),
    "one task's query": (([X, X], [Y, Y], [X, X.float()]), TypeError, r"xq is torch.float32.*task 1 of"),
    "one task's NaN": (([X, X[:3] * torch.nan], [Y, Y[:3]], [X, X]), FloatingPointError, "diverged.*task 1 of"),
    "a task without images": (([X, X[:0]], [Y, Y[:0]], [X, X]), ValueError, "N of at least 1.*task 1 of"),
    "no query": (([X, X], [Y, Y], [X, None]), TypeError, "xq must be.* got NoneType.*task 1 of"),
    "no tensor": (([X, 3], [Y, Y], [X, X]), TypeError, "xs must be a tensor, or hold tensors, got int.*task 1 of"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lists_are_told_with_their_numbers(name: str) -> None:
    given, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        adapt_tasks(CONV4.network, *given, pattern="00111", steps=2, lr=0.1)


def test_evaluation_and_meta_training_take_tasks_of_all_sizes() -> None:
    torch.manual_seed(0)
    model = models.conv4(2, 1, 3, 16).double()
    tasks = ragged(CONV4)
    given: dict[str, Any] = {"pattern": "00011", "steps": 2, "lr": 0.1}
    results = [adapt(model, t.xs, t.ys, **given)(t.xq) for t in tasks]
    hits = [float((z.argmax(-1) == t.yq).double().mean()) for z, t in zip(results, tasks, strict=True)]
    done: list[int] = []
    found = evaluate(model, tasks, batch=4, progress=lambda *told: done.append(told[0]), **given)
    assert found.accuracies.tolist() == hits and done == [4, 6]
    settings = Settings(ways=2, steps=2, lr=0.1, pattern="00011", second_order=False)
    query_loss(results, tasks).backward()
    want = gradients_of(model)
    for batched in (True, False):
        model.zero_grad()
        loss = meta_gradient(model, tasks, settings, batched=batched)
        assert loss == pytest.approx(float(query_loss(results, tasks).detach()), rel=1e-12)
        all_close(gradients_of(model), want, "gradient of")
