"""What `adapt` computes and keeps, that it leaves the model as it was, and what its learner is."""

from __future__ import annotations

import copy
import gc
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, NETWORKS, all_close, close, own_conv4, plain_loop
from torch import Tensor, nn

import lambda_kernels as lk
import lambda_kernels.backends
from lambda_maml import Pattern, adapt

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = [str(p) for p in Pattern.all(5)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often the backend computes what."""
    backend = lambda_kernels.backends._BACKENDS["reference"]
    counter: Counter[str] = Counter()
    for name in (
        "conv2d",
        "conv2d_input_grad",
        "conv2d_weight_grad",
        "linear",
        "norm_relu_pool",
        "norm_relu_pool_grad",
    ):
        own = getattr(backend, name)

        def counted(*args: Any, _name: str = name, _own: Any = own) -> Any:
            counter[_name] += 1
            return _own(*args)

        monkeypatch.setattr(backend, name, counted)
    with lk.use_backend("reference"):
        yield counter


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_what_the_pattern_needs_is_computed(
    pattern: str, norm: str, second_order: bool, calls: Counter[str]
) -> None:
    model, steps = own_conv4(CONV4.network), 3
    xs, ys, _, _ = CONV4.task()
    adapt(model, xs, ys, pattern=pattern, steps=1)  # the first call of a structure is checked against the network
    calls.clear()
    adapt(model, xs, ys, pattern=pattern, steps=steps, lr=0.01, norm=norm, second_order=second_order)
    first = pattern.index("1")
    convs = range(4)
    assert calls["conv2d"] == min(first, 4) + steps * (4 - min(first, 4))
    assert calls["norm_relu_pool"] == calls["conv2d"]
    assert calls["conv2d_weight_grad"] == steps * sum(pattern[i] == "1" for i in convs)
    assert calls["conv2d_input_grad"] == steps * sum(i > first for i in convs)
    assert calls["norm_relu_pool_grad"] == steps * sum(i >= first for i in convs)
    # The head: forward, its weight's gradient, its input's gradient.
    assert calls["linear"] == steps * (1 + (pattern[4] == "1") + (first < 4))


def test_the_query_pass_of_second_order_reaches_frozen_weights(calls: Counter[str]) -> None:
    model = own_conv4(CONV4.network)
    xs, ys, xq, yq = CONV4.task()
    learner = adapt(model, xs, ys, pattern="00011", steps=2, second_order=True)
    calls.clear()
    F.cross_entropy(learner(xq), yq).backward()
    assert calls["conv2d_weight_grad"] >= 2 * 2 + 2  # the two frozen layers: support and query pass


@pytest.mark.parametrize("pattern", ["10111", "10010", "00001", "00011"])
def test_the_input_of_a_frozen_layer_is_not_saved(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = lambda_kernels.backends._BACKENDS["reference"]
    inputs: list[Tensor] = []
    own = backend.conv2d

    def noted(x: Tensor, *args: Any) -> Tensor:
        inputs.append(x)
        return own(x, *args)

    monkeypatch.setattr(backend, "conv2d", noted)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    xs, ys, _, _ = CONV4.task()
    with lk.use_backend("reference"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapt(own_conv4(CONV4.network), xs, ys, pattern=pattern, steps=1)
    assert len(inputs) == 4 and saved
    kept = {t.untyped_storage().data_ptr() for t in saved}
    assert [x.untyped_storage().data_ptr() in kept for x in inputs] == [bit == "1" for bit in pattern[:4]]


# The model stays as it was.


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [
        (n, id(t), t.detach().clone(), t.requires_grad, t._version)
        for n, t in (*model.named_parameters(), *model.named_buffers())
    ]
    grads = [(n, p.grad) for n, p in model.named_parameters()]
    modes = [(n, m.training, type(m), id(m), sorted(m.__dict__)) for n, m in model.named_modules()]
    return [tensors, grads, modes]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", ["residual", "scaled", "tied", "untraceable", "group-norm", "in-place-view"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    case = NETWORKS[name]()
    model = case.network
    next(model.parameters()).requires_grad_(False)
    next(model.children()).eval()
    xs, ys, xq, yq = case.task()
    before = snapshot(model)
    images = xs.clone()
    for pattern in ("1" * len(case.groups), "0" * (len(case.groups) - 1) + "1"):
        for second_order in (False, True):
            learner = adapt(model, xs, ys, pattern=pattern, steps=2, second_order=second_order)
            learner(xq)
            learner.to_module()
            with pytest.raises(FloatingPointError):
                adapt(model, torch.full_like(xs, float("nan")), ys, pattern=pattern, steps=2, second_order=second_order)
            with pytest.raises(ZeroDivisionError):
                broken = lambda x, y: x / (1 // 0)  # noqa: E731
                adapt(model, xs, ys, pattern=pattern, steps=2, second_order=second_order, loss=broken)
    assert same(before, snapshot(model))
    assert torch.equal(images, xs)


def test_parameters_without_requires_grad_are_updated_too() -> None:
    xs, ys, xq, yq = CONV4.task()
    model = own_conv4(CONV4.network).requires_grad_(False)
    for second_order in (False, True):
        want = plain_loop(CONV4.network, CONV4.groups, "01011", xs, ys, xq, yq, steps=3, lr=0.1)
        learner = adapt(model, xs, ys, pattern="01011", steps=3, lr=0.1, second_order=second_order)
        close(learner(xq), want.logits, "logits")
        all_close(learner.parameters_dict(), want.parameters, "adapted")


def test_without_gradients_outside() -> None:
    xs, ys, xq, yq = CONV4.task()
    want = plain_loop(CONV4.network, CONV4.groups, "00111", xs, ys, xq, yq, steps=3, lr=0.1)
    model = own_conv4(CONV4.network)
    for second_order in (False, True):
        with torch.no_grad():
            learner = adapt(model, xs, ys, pattern="00111", steps=3, lr=0.1, second_order=second_order)
            logits = learner(xq)
        assert not logits.requires_grad and not any(t.requires_grad for t in learner.parameters_dict().values())
        close(logits, want.logits, "logits")


# The learner.


def test_to_module_is_a_network_of_its_own() -> None:
    case = loops.residual(track=True)
    case.network.register_buffer("extra", torch.ones(2), persistent=False)
    xs, ys, xq, _ = case.task()
    learner = adapt(case.network, xs, ys, pattern="001101", steps=2, lr=0.1)
    twin = learner.to_module()
    assert type(twin) is type(case.network) and list(twin.state_dict()) == list(case.network.state_dict())
    assert all(p.is_leaf and p.requires_grad for p in twin.parameters())
    own = {t.data_ptr() for t in (*case.network.parameters(), *learner.parameters_dict().values())}
    assert not any(p.data_ptr() in own for p in twin.parameters())
    all_close({n: p.detach() for n, p in twin.named_parameters()}, learner.parameters_dict(), "parameter")
    close(twin(xq), learner(xq), "logits")


def test_to_module_keeps_tied_weights() -> None:
    case = loops.tied()
    xs, ys, xq, _ = case.task()
    learner = adapt(case.network, xs, ys, pattern="1011", steps=2, lr=0.1)
    twin = learner.to_module()
    assert twin.get_parameter("a.weight") is twin.get_parameter("b.weight")
    close(twin(xq), learner(xq), "logits")


def test_the_learner_has_the_models_names_and_the_adapted_parameters() -> None:
    xs, ys, _, _ = CONV4.task()
    learner = adapt(CONV4.network, xs, ys, pattern="00001", steps=1)
    assert isinstance(learner, nn.Module)
    names = [n for n, _ in CONV4.network.named_parameters()]
    assert list(learner.parameters_dict()) == [n for n, _ in learner.named_parameters()] == names
    assert all(t is learner.parameters_dict()[n] for n, t in learner.named_parameters())


# Threads, memory.


@pytest.mark.parametrize("name", ["conv4", "group-norm", "untraceable", "conv1d"])
def test_threads_that_adapt_one_model_at_once(name: str) -> None:
    case = CONV4 if name == "conv4" else NETWORKS[name]()
    model = lk.convert(copy.deepcopy(case.network))
    tasks = [case.task(seed=seed) for seed in range(4)]
    pattern = "1" * len(case.groups)

    def work(task: tuple[Tensor, ...]) -> Tensor:
        xs, ys, xq, _ = task
        return adapt(model, xs, ys, pattern=pattern, steps=5, lr=0.1)(xq).detach()

    want = [work(task) for task in tasks]
    got: dict[int, list[Tensor]] = {}

    def worker(i: int) -> None:
        got[i] = [work(tasks[i]) for _ in range(15)]

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0, 1, 2, 3]
    for i, expected in enumerate(want):
        for result in got[i]:
            close(result, expected, f"logits of task {i}")


def test_a_model_is_freed_after_adapting() -> None:
    import weakref

    case = loops.residual()
    xs, ys, xq, _ = case.task()
    model = case.network
    gone = weakref.ref(model)
    adapt(model, xs, ys, pattern="000011", steps=1)(xq)
    del model, case
    gc.collect()
    assert gone() is None
