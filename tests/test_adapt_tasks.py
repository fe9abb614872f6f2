"""`adapt_tasks` against `adapt`, one task after another, in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, NETWORKS, all_close, close, gradients_of
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_maml import adapt, adapt_tasks, explain, models, plan
from lambda_maml.cost import operations_of
from lambda_maml.inner import batch as batch_module

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = 3


def batch(case: loops.Case, tasks: int = TASKS) -> tuple[Tensor, ...]:
    return tuple(torch.stack(t) for t in zip(*(case.task(seed=10 + i) for i in range(tasks))))


def compare(case: loops.Case, model: nn.Module, pattern: str, tasks: int = TASKS, **given: Any) -> None:
    """Logits and, of the sum of the query losses, the gradient by every parameter."""
    xs, ys, xq, yq = batch(case, tasks)
    given = {"steps": 3, "lr": 0.1, **given}
    twin = copy.deepcopy(model)
    want = torch.stack([adapt(twin, x, y, pattern=pattern, **given)(q) for x, y, q in zip(xs, ys, xq)])
    got = adapt_tasks(model, xs, ys, xq, pattern=pattern, **given)
    assert got.shape == want.shape
    close(got, want, "logits")
    for network, logits in ((twin, want), (model, got)):
        network.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), yq.flatten()).backward()
    all_close(gradients_of(model), gradients_of(twin), "gradient of")


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize(
    "pattern", ["11111", "00001", "00011", "01000", "10101", "11110", "11111,00001", "00011,11111"]
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_tasks_together_equal_tasks_one_by_one(backend: str, pattern: str, norm: str, second_order: bool) -> None:
    model = models.conv4(2, 1, 3, 16).double()
    model.load_state_dict(CONV4.network.state_dict())
    with lk.use_backend(backend):
        compare(CONV4, model, pattern, norm=norm, second_order=second_order)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name: str, second_order: bool) -> None:
    case = NETWORKS[name]()
    n = len(case.groups)
    for pattern in {"1" * n, "0" * (n - 1) + "1", "1" + "0" * (n - 1)}:
        if name == "no-grad-inside" and "1" not in pattern[1:]:
            continue
        compare(case, copy.deepcopy(case.network), pattern, second_order=second_order)


@pytest.mark.parametrize("pixels", [1, 4 * 256, 2 * 4 * 256, 5 * 4 * 256])
def test_several_batches_of_tasks(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "_values_at_once", lambda device: pixels)
    for second_order in (False, True):
        compare(CONV4, copy.deepcopy(CONV4.network), "00111", tasks=5, second_order=second_order)


@pytest.mark.parametrize("steps", [0, 1])
def test_one_task_and_few_steps(steps: int) -> None:
    for second_order in (False, True):
        compare(CONV4, copy.deepcopy(CONV4.network), "10011", tasks=1, steps=steps, second_order=second_order)


def test_other_losses_and_targets() -> None:
    compare(CONV4, copy.deepcopy(CONV4.network), "00111", loss=lambda x, y: F.mse_loss(x, F.one_hot(y, 2).to(x.dtype)))
    case = loops.batch_norm_mlp()
    xs, _, xq, _ = batch(case)
    targets = torch.randn(TASKS, xs.shape[1], 2, dtype=torch.float64)
    got = adapt_tasks(case.network, xs, targets, xq, pattern="011", steps=3, lr=0.1, loss=F.mse_loss)
    for t in range(TASKS):
        want = adapt(case.network, xs[t], targets[t], pattern="011", steps=3, lr=0.1, loss=F.mse_loss)(xq[t])
        close(got[t], want, f"predictions of task {t}")


def test_without_gradients_outside_and_without_requires_grad() -> None:
    xs, ys, xq, _ = batch(CONV4)
    want = adapt_tasks(CONV4.network, xs, ys, xq, pattern="01011", steps=2, lr=0.1)
    with torch.no_grad():
        got = adapt_tasks(CONV4.network, xs, ys, xq, pattern="01011", steps=2, lr=0.1, second_order=True)
    assert not got.requires_grad
    close(got, want, "logits")
    frozen = copy.deepcopy(CONV4.network).requires_grad_(False)
    for second_order in (False, True):
        close(
            adapt_tasks(frozen, xs, ys, xq, pattern="01011", steps=2, lr=0.1, second_order=second_order), want, "logits"
        )


@pytest.mark.parametrize("track", [False, True])
def test_the_model_is_left_as_it_was(track: bool) -> None:
    case = loops.residual(track=track)
    before = {n: t.clone() for n, t in case.network.state_dict().items()}
    xs, ys, xq, _ = batch(case)
    for second_order in (False, True):
        adapt_tasks(case.network, xs, ys, xq, pattern="100011", steps=2, second_order=second_order)
        with pytest.raises(FloatingPointError):
            adapt_tasks(case.network, xs * float("nan"), ys, xq, pattern="100011", steps=2, second_order=second_order)
    assert all(torch.equal(t, before[n]) for n, t in case.network.state_dict().items())
    assert all(p.grad is None for p in case.network.parameters())


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
def test_networks_of_many_operations_go_task_by_task_on_the_cpu(
    second_order: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case, vmap, mapped = loops.residual(), torch.func.vmap, []

    def counted(*args: Any, **how: Any) -> Any:
        mapped.append(args)
        return vmap(*args, **how)

    monkeypatch.setattr(torch.func, "vmap", counted)
    xs, ys = (part[0] for part in batch(case)[:2])
    cost = sum(step.forward for step in operations_of(case.network, xs).steps)
    for limit in (cost + 1, cost):  # as it is counted for these shapes
        mapped.clear()
        monkeypatch.setattr(plan, "MAPPED_ON_CPU", limit)
        compare(case, copy.deepcopy(case.network), "000110", second_order=second_order)
        assert bool(mapped) == (limit > cost)
        told = explain(case.network, xs, ys, pattern="000110", second_order=second_order)
        assert ("adapt_tasks runs the tasks as batches" in told) == (limit > cost)
    mapped.clear()
    monkeypatch.setattr(plan, "MAPPED_ON_CPU", 0)
    adapt_tasks(CONV4.network, *batch(CONV4)[:3], pattern="00111", second_order=second_order)
    one = [part[0] for part in batch(CONV4)[:2]]
    assert "adapt_tasks runs the tasks as batches" in explain(CONV4.network, *one, pattern="00111")
    smoothed = functools.partial(F.cross_entropy, label_smoothing=0.1)  # is not the loss of a chain's kernels
    mapped.clear()
    adapt_tasks(CONV4.network, *batch(CONV4)[:3], pattern="00111", second_order=second_order, loss=smoothed)
    assert not mapped and "goes task by task" in explain(CONV4.network, *one, pattern="00111", loss=smoothed)
    assert not [r for r in caplog.records if "one task at a time" in r.getMessage()]  # it is no slow way


def test_tasks_that_cannot_be_batched() -> None:
    case = loops.residual(track=True)
    compare(case, copy.deepcopy(case.network), "000110")
    case.network.eval()
    compare(case, copy.deepcopy(case.network), "000110", second_order=True)
    random = loops.sequential([(0, None), (2, None)], (5,), nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    xs, ys, xq, _ = batch(random)
    torch.manual_seed(1)
    want = torch.stack([adapt(random.network, x, y, pattern="01", steps=3)(q) for x, y, q in zip(xs, ys, xq)])
    torch.manual_seed(1)
    close(adapt_tasks(random.network, xs, ys, xq, pattern="01", steps=3), want, "logits")


class Written(nn.Module):
    """Writes in place into what may be its own memory or a copy, as that lies."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head, self.view = nn.Conv2d(8, 8, 1), nn.Linear(24, 2), view

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        h = torch.add(h, self.second(h))
        self.view(h).mul_(0.5)
        return self.head(h.flatten(1))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda h: h.contiguous(),
    "reshape": lambda h: h.reshape(h.shape[0], -1),
    "flatten": lambda h: h.flatten(2),
    "channels-last": lambda h: h.contiguous(memory_format=torch.channels_last),
    "view": lambda h: h.unsqueeze(0),
}


@pytest.mark.parametrize("pattern", ["101", "001", "111"])
@pytest.mark.parametrize("name", VIEWS)
def test_a_write_into_a_view_or_a_copy_is_what_it_is_for_one_task(name: str, pattern: str) -> None:
    torch.manual_seed(0)
    model, ys = Written(VIEWS[name]).double().eval(), torch.tensor([0, 1] * 3)
    xs, xq = torch.randn(2, 6, 1, 3, 1).double(), torch.randn(2, 1, 1, 3, 1).double()
    given: dict[str, Any] = dict(pattern=pattern, steps=2, lr=0.1, second_order=True)
    want = []
    for x, q in zip(xs, xq):
        fast: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(2):
            loss = F.cross_entropy(torch.func.functional_call(model, fast, (x,)), ys)
            moving = [n for n in fast if pattern[["conv", "seco", "head"].index(n[:4].replace("norm", "conv"))] == "1"]
            slopes = torch.autograd.grad(loss, [fast[n] for n in moving], create_graph=True)
            fast |= {n: fast[n] - 0.1 * g for n, g in zip(moving, slopes)}
        want.append(torch.func.functional_call(model, fast, (q,)))
    close(adapt_tasks(model, xs, ys.expand(2, -1), xq, **given), torch.stack(want), "logits")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")],
)
def test_too_little_memory_is_no_fault_of_vmap(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    xs, ys, xq, _ = batch(CONV4)
    model = copy.deepcopy(CONV4.network)
    given: dict[str, Any] = dict(pattern="00011", steps=1)

    def fails(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(batch_module, "adapt_and_classify", fails)
        with pytest.raises(type(error), match="memory"):
            adapt_tasks(model, xs, ys, xq, **given)
    ways: list[int] = []
    monkeypatch.setattr(batch_module, "adapt_and_classify", lambda *_: ways.append(1))
    adapt_tasks(model, xs, ys, xq, **given)
    assert ways == [1]


def test_wrong_tasks() -> None:
    xs, ys, xq, _ = batch(CONV4)

    def wrong(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        given: dict[str, Any] = {"xs": xs, "ys": ys, "xq": xq, "pattern": "00011", "steps": 2, "lr": 0.1, **changes}
        with pytest.raises(error, match=match):
            adapt_tasks(CONV4.network, given.pop("xs"), given.pop("ys"), given.pop("xq"), **given)

    wrong(r"must agree on T, got xs \[2, 4, 1, 16, 16\], ys \[3, 4\], xq \[3, 3, 1, 16, 16\]", xs=xs[:2])
    wrong("must agree on T", xq=xq[:1])
    wrong("must agree on T", ys=ys[0])
    wrong("no tasks", xs=xs[:0], ys=ys[:0], xq=xq[:0])
    wrong("N of at least 1 expected", xs=xs[:, :0], ys=ys[:, :0])
    wrong("labels run from 0 to 7", ys=ys * 7)
    wrong("labels run from -1 to 0", ys=-ys)
    wrong("xs is torch.float32, the network torch.float64", TypeError, xs=xs.float())
    wrong("xq is torch.float32 on cpu, xs torch.float64 on cpu", TypeError, xq=xq.float())
    wrong("pattern '01' has 2 bits", pattern="01")
    wrong("lr must be a positive number", lr=0.0)
    wrong("steps must be a whole number", steps=-1)
    wrong("norm must be", norm="none")
    wrong("xq must be a tensor, or hold tensors, got NoneType", TypeError, xq=None)
    bad = xs.clone()
    bad[1, 0, 0, 0, 0] = float("nan")
    wrong(r"under 00011 with sgd\(lr=0.1\) diverged in step 1 of 2.*1 NaN or infinite", FloatingPointError, xs=bad)
    wrong(r"lr=1e\+300\) diverged in step", FloatingPointError, pattern="11111", lr=1e300, steps=4)
    wrong("channels", xs=xs.expand(-1, -1, 2, -1, -1))
