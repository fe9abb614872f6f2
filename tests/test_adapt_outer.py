"""Second order on a chain goes through one operation with its own way back: same numbers, no graph of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, compare, own_conv4
from machine import needs_native
from plain import far, plain
from torch import Tensor, nn

from lambda_kernels import use_backend
from lambda_kernels.agreement import within
from lambda_kernels.backends import Native
from lambda_maml import LambdaMAML, adapt, adapt_tasks
from lambda_maml.inner import batch

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_native]


def nodes(tensor: Tensor) -> set[str]:
    """The names of all nodes of a tensor's graph."""
    todo, seen, found = [tensor.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(node.name())
            todo += [before for before, _ in node.next_functions]
    return found


def saved_bytes(steps: int, pattern: str) -> int:
    """What autograd keeps of the steps of one adaptation, in bytes, and not of the query pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    xs, ys, _, _ = CONV4.task()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        learner = adapt(own_conv4(CONV4.network), xs, ys, pattern=pattern, steps=steps, second_order=True)
        assert learner.parameters_dict()["head.weight"].requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize("pattern", ["11111", "00001", "01010", "11111,00011", "00011,10000"])
def test_patterns_and_schedules_have_the_gradients_of_a_plain_loop(pattern: str, norm: str) -> None:
    # second derivatives of norms over a few pixels, through three steps
    compare(own_conv4(CONV4.network), CONV4, pattern, norm=norm, second_order=True, rtol=1e-8)


@pytest.mark.parametrize("pattern", ["11111", "00011"])
def test_the_steps_are_one_node_for_one_task_and_for_many(pattern: str) -> None:
    model = own_conv4(CONV4.network)
    xs, ys, xq, _ = CONV4.task()
    learner = adapt(model, xs, ys, pattern=pattern, steps=3, second_order=True)
    assert "_StepsBackward" in nodes(learner(xq))
    assert "_StepsBackward" not in nodes(adapt(model, xs, ys, pattern=pattern, steps=3)(xq))
    many = adapt_tasks(
        model, xs.expand(2, *xs.shape), ys.expand(2, -1), xq.expand(2, *xq.shape), pattern=pattern, steps=3,
        second_order=True,
    )  # fmt: skip
    assert "_StepsBackward" in nodes(many)
    torch.testing.assert_close(many[1], learner(xq), **within(torch.float64, "steps"))


@pytest.mark.parametrize("pattern", ["11111", "00011"])
def test_tasks_that_do_not_fit_the_cache_together_are_one_call_all_the_same(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inside it each thread takes whole tasks, and goes through one after another.
    tasks: list[int] = []
    steps, passes = Native.steps, Native.logits

    def noted_steps(self: Native, x: Tensor, *args: Any) -> Any:
        tasks.append(len(x))
        return steps(self, x, *args)

    def noted_passes(self: Native, x: Tensor, *args: Any) -> Any:
        tasks.append(len(x))
        return passes(self, x, *args)

    monkeypatch.setattr(batch, "_values_at_once", lambda device: 1)
    monkeypatch.setattr(Native, "steps", noted_steps)
    monkeypatch.setattr(Native, "logits", noted_passes)
    xs, ys, xq, _ = CONV4.task()
    many = [t.expand(3, *t.shape) for t in (xs, ys, xq)]
    adapt_tasks(own_conv4(CONV4.network), *many, pattern=pattern, steps=2, second_order=True)
    assert tasks == [3] * (2 if pattern == "11111" else 3)  # with a frozen prefix it is a pass of its own


@pytest.mark.parametrize("pattern", ["11111", "00011"])
def test_a_further_step_keeps_its_parameters_and_rates_and_no_activation(pattern: str) -> None:
    model = own_conv4(CONV4.network)
    places = [i for i, bit in enumerate(pattern) if bit == "1"]
    names = [f"block{i + 1}.{n}" for i in places if i < 4 for n in ("conv.weight", "norm.weight", "norm.bias")]
    own = dict(model.named_parameters())
    names += ["head.weight", "head.bias"]
    values = sum(own[n].numel() for n in names) + len(names)  # and a rate of each
    assert saved_bytes(7, pattern) - saved_bytes(3, pattern) == 4 * 8 * values


RATES = {"one": (), "per layer": (5,), "per step": (3, 1), "per step and layer": (3, 5)}


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("pattern", ["11111", "00011", "11111,01001"])
@pytest.mark.parametrize("shape", RATES.values(), ids=RATES)
def test_learned_rates_have_the_gradients_that_autograd_gives(
    shape: tuple[int, ...], pattern: str, second_order: bool
) -> None:
    xs, ys, xq, yq = CONV4.task()
    model = own_conv4(CONV4.network)
    generator = torch.Generator().manual_seed(4)
    rates = (0.05 + 0.1 * torch.rand(shape, generator=generator).double()).requires_grad_()
    found = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            logits = adapt(model, xs, ys, pattern=pattern, steps=3, lr=rates, second_order=second_order)(xq)
        assert ("_StepsBackward" in nodes(logits)) == (backend == "native")
        own = [rates, *model.parameters()]
        found.append(torch.autograd.grad(F.cross_entropy(logits, yq), own, allow_unused=True, materialize_grads=True))
    assert found[1][0].abs().max() > 0.01
    assert max(far(a, b) for a, b in zip(*found)) < 1e-10 * max(1.0, *(float(g.abs().max()) for g in found[1]))


def test_a_rate_of_each_value_of_a_parameter_is_multiplied_by_autograd() -> None:
    xs, ys, xq, yq = CONV4.task()
    model = own_conv4(CONV4.network)
    rates = {n: torch.full_like(p, 0.1).requires_grad_() for n, p in model.named_parameters()}
    found = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            logits = adapt(model, xs, ys, pattern="11111", steps=2, lr=rates, second_order=True)(xq)
        assert "MulBackward0" in nodes(logits) and ("_SlopesBackward" in nodes(logits)) == (backend == "native")
        own = [*rates.values(), *model.parameters()]
        found.append(torch.autograd.grad(F.cross_entropy(logits, yq), own, allow_unused=True, materialize_grads=True))
    assert max(far(a, b) for a, b in zip(*found)) < 1e-10 * max(1.0, *(float(g.abs().max()) for g in found[1]))


def test_a_gradient_of_the_outer_gradient_is_that_of_a_plain_loop() -> None:
    xs, ys, xq, yq = CONV4.task()
    model = own_conv4(CONV4.network)
    twin = plain(model, lambda net: F.cross_entropy(net(xs), ys), steps=2, lr=0.1)
    third = []
    for logits in (adapt(model, xs, ys, pattern="11111", steps=2, lr=0.1, second_order=True)(xq), twin(xq)):
        own = [p for n, p in model.named_parameters() if "conv.bias" not in n]
        first = torch.autograd.grad(F.cross_entropy(logits, yq), own, create_graph=True)
        third.append(torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), own))
    scale = max(float(g.abs().max()) for g in third[1])
    assert max(far(a, b) for a, b in zip(*third)) < 1e-8 * max(1.0, scale)


def test_what_the_operation_does_not_take_goes_through_autograd() -> None:
    model = own_conv4(CONV4.network)
    xs, ys, xq, _ = CONV4.task()
    with use_backend("reference"):
        assert "_StepsBackward" not in nodes(adapt(model, xs, ys, pattern="11111", second_order=True)(xq))
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    assert "_StepsBackward" not in nodes(adapt(model, xs, ys, pattern="11111", second_order=True, loss=loss)(xq))


LOSSES: dict[str, Callable[[Tensor, Tensor, nn.Module], Any]] = {
    "plain": lambda logits, ys, task: F.cross_entropy(logits, ys),
    "in two parts": lambda logits, ys, task: F.nll_loss(F.log_softmax(logits, 1), ys),
    "penalty": lambda logits, ys, task: F.cross_entropy(logits, ys) + sum(p.square().sum() for p in task.parameters()),
    "sum": lambda logits, ys, task: F.cross_entropy(logits, ys, reduction="sum") / len(ys),
    "weighted": lambda logits, ys, task: F.cross_entropy(logits, ys, torch.tensor([0.5, 2.0]).double()),
    "smoothed": lambda logits, ys, task: F.cross_entropy(logits, ys, label_smoothing=0.1),
    "ignored": lambda logits, ys, task: F.cross_entropy(logits, ys.where(torch.arange(len(ys)) > 0, -100)),
    "soft": lambda logits, ys, task: F.cross_entropy(logits, F.one_hot(ys, 2).double()),
    "scaled": lambda logits, ys, task: F.cross_entropy(2 * logits, ys),
    "axes": lambda logits, ys, task: F.cross_entropy(logits.unsqueeze(2), ys.unsqueeze(1)),
}


@pytest.mark.parametrize("pattern", ["11111", "00011", "11111,00011"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_clones_second_order_steps_are_those_of_a_plain_loop(name: str, pattern: str) -> None:
    xs, ys, xq, yq = CONV4.task()
    found = []
    for backend in ("native", "reference"):
        model = own_conv4(CONV4.network)
        with use_backend(backend):
            task = LambdaMAML(model, 0.1, pattern=pattern, first_order=False).clone()
            for _ in range(3):
                task.adapt(LOSSES[name](task(xs), ys, task))
            logits = task(xq)
            if pattern == "11111":
                recognised = backend == "native" and name in ("plain", "in two parts")
                assert ("_StepsBackward" in nodes(logits)) == recognised
            found.append(torch.autograd.grad(F.cross_entropy(logits, yq), list(model.parameters())))
    # second derivatives of norms over a few pixels, through three steps
    assert max(far(a, b) for a, b in zip(*found)) < 1e-9 * max(1.0, *(float(g.abs().max()) for g in found[1]))


def test_a_clones_step_on_an_earlier_pass_or_on_other_parameters_goes_through_autograd() -> None:
    xs, ys, xq, _ = CONV4.task()
    for how in ("an earlier pass", "another clone's"):
        task = LambdaMAML(own_conv4(CONV4.network), 0.1, pattern="11111", first_order=False).clone()
        loss = F.cross_entropy(task(xs), ys)
        if how == "an earlier pass":
            task(xq)
            task.adapt(loss)
        else:
            twin = task.clone()
            twin(xs)
            twin.adapt(loss)
            task = twin
        assert "_StepsBackward" not in nodes(task(xq)), how


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_a_clones_learned_rates_have_their_gradients(second_order: bool) -> None:
    xs, ys, xq, yq = CONV4.task()
    model, found = own_conv4(CONV4.network), []
    for way in ("verbs", "adapt"):
        rates = torch.full((3, 5), 0.1).double().requires_grad_()
        if way == "adapt":
            learner: Any = adapt(model, xs, ys, pattern="11111", steps=3, lr=rates, second_order=second_order)
        else:
            learner = LambdaMAML(model, rates, pattern="11111", first_order=not second_order).clone()
            for _ in range(3):
                learner.adapt(F.cross_entropy(learner(xs), ys))
        found.append(torch.autograd.grad(F.cross_entropy(learner(xq), yq), [rates, *model.parameters()]))
    assert max(far(a, b) for a, b in zip(*found)) < 1e-10


def test_a_query_behind_a_frozen_prefix_is_one_operation_and_a_second_support_set_shares_its_own() -> None:
    xs, ys, xq, _ = CONV4.task()
    task = LambdaMAML(own_conv4(CONV4.network), 0.1, pattern="00011").clone()
    kinds = []
    for x in (xs, xs, xq, xq, xq):
        logits = task(x)
        kinds.append("_LogitsBackward" in nodes(logits))
        if x is xs:
            task.adapt(F.cross_entropy(logits, ys))
    assert kinds == [False, False, True, False, False]
