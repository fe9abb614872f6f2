"""LambdaMAML's verbs against the plain loop and against `adapt`, in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, NETWORKS, all_close, close, gradients_of, plain_loop
from torch import Tensor, nn

import lambda_kernels as lk
import lambda_kernels.backends
from lambda_maml import LambdaMAML, Pattern, adapt
from lambda_maml.maml import TaskLearner

pytestmark = pytest.mark.usefixtures("one_thread")
Loss = Callable[[Tensor, Tensor], Tensor]


def drive(maml: LambdaMAML, xs: Tensor, ys: Tensor, steps: int, loss: Loss = F.cross_entropy) -> TaskLearner:
    task = maml.clone()
    for _ in range(steps):
        task.adapt(loss(task(xs), ys))
    return task


def compare(
    case: loops.Case, model: nn.Module, pattern: str, *, first_order: bool, norm: str = "follow", steps: int = 3
) -> None:
    xs, ys, xq, yq = case.task()
    want = plain_loop(case.network, case.groups, pattern, xs, ys, xq, yq, steps=steps, lr=0.1, norm=norm,
                      second_order=not first_order)  # fmt: skip
    model.zero_grad()
    task = drive(LambdaMAML(model, 0.1, pattern=pattern, first_order=first_order, norm=norm), xs, ys, steps)
    logits = task(xq)
    close(logits, want.logits, "logits")
    all_close(task.parameters_dict(), want.parameters, "adapted")
    F.cross_entropy(logits, yq).backward()
    all_close(gradients_of(model), want.gradients, "gradient of")


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize(
    "pattern", ["11111", "00001", "00011", "01000", "10101", "11110", "11111,00001", "00011,11111,00100"]
)
def test_the_verbs_equal_the_plain_loop(pattern: str, norm: str, first_order: bool) -> None:
    compare(CONV4, copy.deepcopy(CONV4.network), pattern, first_order=first_order, norm=norm, steps=4)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name: str, first_order: bool) -> None:
    case = NETWORKS[name]()
    for pattern in Pattern.all(len(case.groups)):
        text = str(pattern)
        if text.count("1") in (1, len(text)) and not (name == "no-grad-inside" and text == "100"):
            compare(case, copy.deepcopy(case.network), text, first_order=first_order)
            compare(case, lk.convert(copy.deepcopy(case.network)), text, first_order=first_order, steps=2)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_the_verbs_equal_adapt(first_order: bool) -> None:
    xs, ys, xq, _ = CONV4.task()
    for pattern in map(str, Pattern.all(5)):
        task = drive(LambdaMAML(CONV4.network, 0.1, pattern=pattern, first_order=first_order), xs, ys, 2)
        learner = adapt(CONV4.network, xs, ys, pattern=pattern, steps=2, lr=0.1, second_order=not first_order)
        close(task(xq), learner(xq), f"logits under {pattern}")
        all_close(task.parameters_dict(), learner.parameters_dict(), "adapted")


def test_no_pattern_is_maml_on_all_layers() -> None:
    assert str(LambdaMAML(CONV4.network, 0.1).pattern) == "11111"
    xs, *_ = CONV4.task()
    maml = LambdaMAML(CONV4.network, 0.1)
    assert torch.equal(maml(xs), CONV4.network(xs))
    assert [n for n, _ in maml.named_parameters()] == [f"module.{n}" for n, _ in CONV4.network.named_parameters()]


def test_running_statistics_follow_the_task() -> None:
    case = loops.residual(track=True)
    before = {n: b.clone() for n, b in case.network.named_buffers()}
    xs, ys, xq, yq = case.task()
    for pattern in ("000001", "010000"):
        want = plain_loop(case.network, case.groups, pattern, xs, ys, xq, yq, steps=3, lr=0.1)
        task = drive(LambdaMAML(case.network, 0.1, pattern=pattern, first_order=True), xs, ys, 3)
        task(xq)
        for name, buffer in want.buffers.items():
            close(dict(task.named_buffers())[name], buffer, name)
    assert all(torch.equal(b, before[n]) for n, b in case.network.named_buffers())


# The frozen prefix.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many convolutions were computed."""
    backend = lambda_kernels.backends._BACKENDS["reference"]
    counter: Counter[str] = Counter()
    own = backend.conv2d

    def counted(*args: Any) -> Tensor:
        counter["conv2d"] += 1
        return own(*args)

    monkeypatch.setattr(backend, "conv2d", counted)
    with lk.use_backend("reference"):
        yield counter


def count(calls: Counter[str], work: Callable[[], Any]) -> int:
    calls.clear()
    work()
    return calls["conv2d"]


def test_the_prefix_is_run_once_for_the_same_images(calls: Counter[str]) -> None:
    xs, ys, xq, _ = CONV4.task()
    task = LambdaMAML(CONV4.network, 0.1, pattern="00011").clone()

    def step() -> None:
        task.adapt(F.cross_entropy(task(xs), ys))

    first, rest = 4, 1  # a run of the network; of what the pattern updates: the last convolution
    assert count(calls, lambda: task(xs)) == first
    assert count(calls, lambda: task(xs)) == rest
    task = LambdaMAML(CONV4.network, 0.1, pattern="00011", first_order=True).clone()
    assert count(calls, step) == first
    assert count(calls, step) == rest
    assert count(calls, lambda: task(xq)) == first
    assert count(calls, lambda: task(xs)) == first  # the last images only are held
    assert count(calls, lambda: task(xs)) == rest
    xs.mul_(1.5)
    assert count(calls, lambda: task(xs)) == first
    assert count(calls, lambda: task(xs)) == rest
    assert count(calls, lambda: task(xs.clone())) == first
    task(xs)
    with torch.no_grad():
        assert count(calls, lambda: task(xs)) == first
        assert count(calls, lambda: task(xs)) == rest


def test_the_prefix_is_run_again_in_another_stage_of_a_schedule(calls: Counter[str]) -> None:
    xs, ys, _, _ = CONV4.task()
    task = LambdaMAML(CONV4.network, 0.1, pattern="00001,00011,01000", first_order=True).clone()
    seen = [count(calls, lambda: task.adapt(F.cross_entropy(task(xs), ys))) for _ in range(4)]
    assert seen == [4, 4, 4, 3]


def test_the_prefix_sees_images_changed_in_place() -> None:
    xs, _, _, _ = CONV4.task()
    task = LambdaMAML(CONV4.network, 0.1, pattern="00001").clone()
    close(task(xs), CONV4.network(xs), "logits")
    xs.neg_()
    close(task(xs), CONV4.network(xs), "logits")


def test_a_prefix_whose_graph_was_freed_is_run_again() -> None:
    xs, ys, _, _ = CONV4.task()
    model = copy.deepcopy(CONV4.network)
    task = drive(LambdaMAML(model, 0.1, pattern="00011", first_order=True), xs, ys, 2)
    F.cross_entropy(task(xs), ys).backward()
    once = {n: g.clone() for n, g in gradients_of(model).items()}
    model.zero_grad()
    F.cross_entropy(task(xs), ys).backward()
    all_close(gradients_of(model), once, "gradient of")


# Independence.


def test_an_optimisers_step_does_not_change_a_clone() -> None:
    xs, ys, xq, _ = CONV4.task()
    model = copy.deepcopy(CONV4.network)
    maml = LambdaMAML(model, 0.1, pattern="00011")
    task = drive(maml, xs, ys, 1)
    before = task(xq).detach().clone()
    fresh = maml.clone()
    untouched = fresh(xq).detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    close(task(xq.clone()), before, "logits")
    close(fresh(xq.clone()), untouched, "logits")
    assert not torch.allclose(maml.clone()(xq), untouched)


@pytest.mark.parametrize("track", [False, True])
def test_a_clone_of_a_clone_goes_its_own_way(track: bool) -> None:
    case = loops.residual(track=track)
    xs, ys, xq, yq = case.task()
    maml = LambdaMAML(case.network, 0.1, pattern="000011,100000")
    task = drive(maml, xs, ys, 1)
    state = {n: t.detach().clone() for n, t in task.state_dict().items()}
    twin = task.clone()
    for _ in range(2):
        twin.adapt(F.cross_entropy(twin(xs), ys))
    assert all(torch.equal(t.detach(), state[n]) for n, t in task.state_dict().items())
    want = plain_loop(case.network, case.groups, "000011,100000", xs, ys, xq, yq, steps=3, lr=0.1, second_order=True)
    close(twin(xq), want.logits, "logits")
    F.cross_entropy(twin(xq), yq).backward()
    assert all(p.grad is not None for p in case.network.parameters())


def test_several_tasks_add_up_their_meta_gradients() -> None:
    model = copy.deepcopy(CONV4.network)
    maml = LambdaMAML(model, 0.1, pattern="00111")
    want: dict[str, Tensor] = {}
    for seed in (1, 2, 3):
        xs, ys, xq, yq = CONV4.task(seed=seed)
        F.cross_entropy(drive(maml, xs, ys, 2)(xq), yq).backward()
        alone = plain_loop(CONV4.network, CONV4.groups, "00111", xs, ys, xq, yq, steps=2, lr=0.1, second_order=True)
        want = {n: g + want.get(n, 0.0) for n, g in alone.gradients.items()}
    all_close(gradients_of(model), want, "gradient of")


def test_parameters_without_requires_grad_are_adapted_too() -> None:
    xs, ys, xq, yq = CONV4.task()
    want = plain_loop(CONV4.network, CONV4.groups, "01010", xs, ys, xq, yq, steps=2, lr=0.1)
    model = copy.deepcopy(CONV4.network).requires_grad_(False)
    for first_order in (False, True):
        task = drive(LambdaMAML(model, 0.1, pattern="01010", first_order=first_order), xs, ys, 2)
        close(task(xq), want.logits, "logits")
    assert not any(p.requires_grad for p in model.parameters())


def test_a_clone_is_freed() -> None:
    xs, ys, xq, yq = CONV4.task()
    task = drive(LambdaMAML(CONV4.network, 0.1, pattern="00011"), xs, ys, 2)
    task(xq)
    gone = weakref.ref(task)
    del task
    gc.collect()
    assert gone() is None


# Errors.


def test_a_loss_that_does_not_depend_on_what_is_updated() -> None:
    xs, ys, _, _ = CONV4.task()
    maml = LambdaMAML(CONV4.network, 0.1, pattern="00011")
    task, other = maml.clone(), maml.clone()
    losses = {
        "of another clone": F.cross_entropy(other(xs), ys),
        "of the model itself": F.cross_entropy(maml(xs), ys),
        "without a graph": F.cross_entropy(task(xs).detach(), ys),
    }
    for loss in losses.values():
        with pytest.raises(
            ValueError, match="pattern '00011': the loss does not depend on the parameters that it updates"
        ):
            task.adapt(loss)
    with torch.no_grad(), pytest.raises(ValueError, match="does not depend"):
        task.adapt(F.cross_entropy(task(xs), ys))


def test_a_loss_that_is_not_finite() -> None:
    xs, ys, _, _ = CONV4.task()
    task = LambdaMAML(CONV4.network, 0.1, pattern="00011").clone()
    with pytest.raises(FloatingPointError, match="step 1 of the inner loop: the loss is nan; lower the rate of sgd"):
        task.adapt(F.cross_entropy(task(xs * float("nan")), ys))


def test_wrong_settings() -> None:
    for lr in (0, -1.0, float("nan"), float("inf"), "1", None):
        with pytest.raises(ValueError, match="lr must be a positive number"):
            LambdaMAML(CONV4.network, lr)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm must be 'follow' or 'never', got 'always'"):
        LambdaMAML(CONV4.network, 0.1, norm="always")
    with pytest.raises(ValueError, match="pattern '011' has 3 bits, Sequential has 5 layers"):
        LambdaMAML(CONV4.network, 0.1, pattern="011")
    with pytest.raises(ValueError, match="Sequential has no parameters"):
        LambdaMAML(nn.Sequential(nn.ReLU()), 0.1)
