"""`adapt` against the plain loop of loops.py, in float64 unless a test says otherwise."""

from __future__ import annotations

import copy
import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import NETWORKS, all_close, close, conv4_groups, gradients_of, plain_loop, torch_conv4
from torch import Tensor, nn

import lambda_kernels as lk
import lambda_kernels.backends
from lambda_maml import Pattern, adapt, models

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = [str(p) for p in Pattern.all(5)]
SCHEDULES = ["11111,00001", "00001,11111", "00011,11111,00100"]
CONV4 = loops.Case(torch_conv4(), conv4_groups(), (1, 16, 16))


def own_conv4(network: nn.Module, image_size: int = 16) -> nn.Module:
    model = models.conv4(ways=2, in_channels=1, width=3, image_size=image_size).double()
    model.load_state_dict(network.state_dict())
    return model


def compare(
    model: nn.Module,
    case: loops.Case,
    pattern: str,
    *,
    steps: int = 3,
    lr: float = 0.1,
    norm: str = "follow",
    second_order: bool = False,
    rtol: float = 1e-9,
    scale: float = 1e-12,
    **options: Any,
) -> None:
    """Adapted parameters, query logits, and the query loss's gradient by every parameter, against the plain loop."""
    dtype = next(model.parameters()).dtype
    xs, ys, xq, yq = case.task(dtype=dtype)
    want = plain_loop(
        case.network,
        case.groups,
        pattern,
        xs.clone(),
        ys,
        xq.clone(),
        yq,
        steps=steps,
        lr=lr,
        norm=norm,
        second_order=second_order,
        **options,
    )
    learner = adapt(
        model, xs.clone(), ys, pattern=pattern, steps=steps, lr=lr, norm=norm, second_order=second_order, **options
    )
    tolerance = {"rtol": rtol, "scale": scale}
    all_close(learner.parameters_dict(), want.parameters, "adapted", **tolerance)
    logits = learner(xq.clone())
    close(logits, want.logits, "logits", **tolerance)
    model.zero_grad()
    options.get("loss", F.cross_entropy)(logits, yq).backward()
    all_close(gradients_of(model), want.gradients, "gradient of", **tolerance)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_equals_the_plain_loop(pattern: str, norm: str, second_order: bool) -> None:
    compare(
        own_conv4(CONV4.network), CONV4, pattern, norm=norm, second_order=second_order, steps=2 if second_order else 3
    )


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("pattern", SCHEDULES)
def test_schedules_equal_the_plain_loop(pattern: str, second_order: bool) -> None:
    compare(own_conv4(CONV4.network), CONV4, pattern, second_order=second_order, steps=4)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("steps", [0, 1])
def test_no_step_and_one_step(steps: int, second_order: bool) -> None:
    for pattern in ("11111", "00011", "00001,11111"):
        compare(own_conv4(CONV4.network), CONV4, pattern, steps=steps, second_order=second_order)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_a_stock_network_converted_or_not(converted: bool, backend: str) -> None:
    for pattern in ("11111", "00011", "01010"):
        model = copy.deepcopy(CONV4.network)
        with lk.use_backend(backend):
            compare(lk.convert(model) if converted else model, CONV4, pattern, second_order=True)


def test_float32_is_as_near_to_the_truth_as_the_plain_loop() -> None:
    single = CONV4._replace(network=copy.deepcopy(CONV4.network).float())
    model = own_conv4(CONV4.network).float()
    for pattern in ("11111", "00100"):
        # second-order gradients of five layers in float32: rounding grows from layer to layer
        compare(model, single, pattern, second_order=True, rtol=2e-3, scale=2e-4)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name: str, norm: str, second_order: bool) -> None:
    case = NETWORKS[name]()
    for pattern in Pattern.all(len(case.groups)):
        text = str(pattern)
        if text.count("1") in (1, len(text)) or text[:2] == "01" or text[:3] == "101":
            if name == "no-grad-inside" and "1" not in text[1:]:
                continue  # the plain loop has no gradient there; see test_a_pattern_without_gradient
            compare(copy.deepcopy(case.network), case, text, norm=norm, second_order=second_order)
            compare(lk.convert(copy.deepcopy(case.network)), case, text, norm=norm, second_order=second_order, steps=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_schedules_on_networks_of_all_kinds(name: str) -> None:
    case = NETWORKS[name]()
    n = len(case.groups)
    compare(case.network, case, f"{'1' * n},{'0' * (n - 1)}1,{'1' * n}", second_order=True)


def test_a_pattern_without_gradient() -> None:
    case = loops.three(loops.NoGrad)
    xs, ys, _, _ = case.task()
    with pytest.raises(ValueError, match="100.*no gradient"):
        adapt(case.network, xs, ys, pattern="100")


def test_a_loss_of_the_users_own() -> None:
    model = own_conv4(CONV4.network)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(logits, F.one_hot(y, 2).to(logits.dtype))

    compare(model, CONV4, "00111", loss=loss, second_order=True)


def test_float_targets() -> None:
    case = loops.batch_norm_mlp()
    xs, _, xq, _ = case.task()
    targets, query = torch.randn(len(xs), 2, dtype=torch.float64), torch.randn(len(xq), 2, dtype=torch.float64)
    want = plain_loop(case.network, case.groups, "011", xs, targets, xq, query, steps=3, lr=0.1, loss=F.mse_loss)
    learner = adapt(case.network, xs, targets, pattern="011", steps=3, lr=0.1, loss=F.mse_loss)
    close(learner(xq), want.logits, "predictions")


@pytest.mark.parametrize("layout", ["channels-last", "sliced", "expanded"])
def test_layouts_of_the_support_images(layout: str) -> None:
    network = torch_conv4(in_channels=2)
    model = models.conv4(ways=2, in_channels=2, width=3, image_size=16).double()
    model.load_state_dict(network.state_dict())
    xs = torch.randn(4, 2, 16, 16, dtype=torch.float64)
    if layout == "channels-last":
        xs = xs.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        xs = torch.randn(8, 4, 16, 40, dtype=torch.float64)[::2, 1:3, :, 3:35:2]
    else:
        xs = xs[:, :1].expand(-1, 2, -1, -1)
    ys = torch.tensor([0, 1, 0, 1])
    want = plain_loop(network, conv4_groups(), "10011", xs, ys, xs, ys, steps=2, lr=0.1)
    close(adapt(model, xs, ys, pattern="10011", steps=2, lr=0.1)(xs), want.logits, "logits")


# Randomness, running statistics, hooks.


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_in_training_draws_anew_in_every_step(inplace: bool) -> None:
    case = loops.sequential(
        [(0, None), (3, None), (6, None)],
        (5,),
        nn.Linear(5, 6),
        nn.Dropout(0.4, inplace=inplace),
        nn.ReLU(),
        nn.Linear(6, 6),
        nn.Dropout(0.4),
        nn.ReLU(),
        nn.Linear(6, 2),
    )
    xs, ys, xq, yq = case.task()
    for pattern in ("001", "011", "100"):
        for second_order in (False, True):
            torch.manual_seed(3)
            want = plain_loop(
                case.network, case.groups, pattern, xs, ys, xq, yq, steps=4, lr=0.2, second_order=second_order
            )
            torch.manual_seed(3)
            learner = adapt(case.network, xs, ys, pattern=pattern, steps=4, lr=0.2, second_order=second_order)
            close(learner(xq), want.logits, f"logits under {pattern}")
    case.network.eval()
    compare(case.network, case, "001")


class Noisy(nn.Module):
    """Random numbers drawn in other ways than by dropout layers."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw
        self.conv, self.fc = nn.Conv2d(1, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.draw(self.conv(x)).mean((2, 3)))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand_like": lambda h: h * torch.rand_like(h),
    "dropout": lambda h: F.dropout(h, 0.5, True),
    "uniform_": lambda h: h + torch.empty_like(h).uniform_(),
    "exponential_": lambda h: h + torch.empty_like(h).exponential_(),
    "geometric_": lambda h: h + torch.empty_like(h).geometric_(0.5),
    "cauchy_": lambda h: h + torch.empty_like(h).cauchy_(0.0, 0.1),
    "bernoulli": lambda h: h * torch.bernoulli(torch.sigmoid(h)).detach(),
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h, None, 0.5),
    "attention-keyword": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_functions_that_draw_random_numbers_are_run_in_every_step(name: str) -> None:
    case = loops.Case(Noisy(DRAWS[name]).double(), [(loops.pair("conv"), []), (loops.pair("fc"), [])], (1, 5, 5))
    xs, ys, xq, yq = case.task()
    torch.manual_seed(5)
    want = plain_loop(case.network, case.groups, "01", xs, ys, xq, yq, steps=3, lr=0.2)
    torch.manual_seed(5)
    close(adapt(case.network, xs, ys, pattern="01", steps=3, lr=0.2)(xq), want.logits, "logits")


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_running_statistics_are_updated_in_every_step(converted: bool, momentum: float | None) -> None:
    case = loops.residual(track=True, momentum=momentum)
    xs, ys, xq, yq = case.task()
    for pattern in ("000001", "000110", "010000", "111111,000001,001000"):
        model = copy.deepcopy(case.network)
        model = lk.convert(model) if converted else model
        before = {n: b.clone() for n, b in model.named_buffers()}
        want = plain_loop(case.network, case.groups, pattern, xs, ys, xq, yq, steps=5, lr=0.05)
        learner = adapt(model, xs, ys, pattern=pattern, steps=5, lr=0.05)
        close(learner(xq), want.logits, "logits")
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
        got = dict(learner.to_module().named_buffers())
        assert got and list(got) == list(want.buffers)
        for name in got:
            close(got[name], want.buffers[name], f"{name} under {pattern}")


def test_running_statistics_in_evaluation_mode() -> None:
    case = loops.residual(track=True)
    with torch.no_grad():
        for _ in range(3):
            case.network(torch.randn(8, 2, 6, 6, dtype=torch.float64))
    case.network.eval()
    for pattern in ("000001", "010010", "111111"):
        compare(copy.deepcopy(case.network), case, pattern, second_order=True)
        compare(lk.convert(copy.deepcopy(case.network)), case, pattern)


def test_one_image_through_batch_norm_in_training_is_torchs_own_error() -> None:
    case = loops.sequential([(0, 1), (2, None)], (5,), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    xs, ys, xq, _ = case.task()
    learner = adapt(case.network, xs, ys, pattern="01")
    with pytest.raises(ValueError, match="more than 1 value"):
        learner(xq[:1])


def test_buffers_that_a_forward_writes() -> None:
    case = loops.three(loops.Counts)
    compare(case.network, case, "001")
    assert case.network.calls == 0
    compare(lk.convert(copy.deepcopy(case.network)), case, "011", second_order=True)


def test_a_forward_that_writes_into_its_input() -> None:
    case = loops.three(loops.WritesInput)
    compare(case.network, case, "001")
    compare(lk.convert(copy.deepcopy(case.network)), case, "011")


def test_an_object_that_the_forward_depends_on_is_looked_at_again() -> None:
    network = loops.Configured().double()
    case = loops.Case(network, [(loops.pair("conv"), []), (loops.pair("fc"), [])], (1, 5, 5))
    compare(network, case, "01")
    network.settings.square = True
    compare(network, case, "01")


@pytest.mark.parametrize("where", ["", "block2", "block2.conv", "block3.norm", "block3.relu", "head"])
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_are_run_in_every_step(where: str, kind: str) -> None:
    calls: Counter[str] = Counter()

    def hooked(network: nn.Module) -> nn.Module:
        def after(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            assert isinstance(out, Tensor)
            calls["run"] += 1
            return out * 0.9

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            assert isinstance(args[0], Tensor)
            calls["run"] += 1
            return (args[0] * 1.1,)

        module = network.get_submodule(where)
        module.register_forward_hook(after) if kind == "forward" else module.register_forward_pre_hook(before)
        return network

    case = CONV4._replace(network=hooked(copy.deepcopy(CONV4.network)))
    for pattern in ("11111", "00001", "00110"):
        for model in (copy.deepcopy(case.network), lk.convert(copy.deepcopy(case.network))):
            compare(model, case, pattern)
            xs, ys, _, _ = case.task()
            calls.clear()
            adapt(model, xs, ys, pattern=pattern, steps=4)
            assert calls["run"] == 4


def test_what_cannot_be_traced_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(loops.Untraceable):
        pass

    case = loops.Case(Odd().double(), loops.untraceable().groups, (1, 5, 5))
    with caplog.at_level(logging.WARNING, "lambda_maml"):
        compare(case.network, case, "01")
        compare(copy.deepcopy(case.network), case, "10")
        case.network.eval()
        compare(case.network, case, "11")
    assert len([r for r in caplog.records if "Odd" in r.getMessage() and "without prefix reuse" in r.getMessage()]) == 1


# What is computed, how often.


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


# Errors.


def wrong(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
    xs, ys, _, _ = CONV4.task()
    given: dict[str, Any] = {
        "model": CONV4.network,
        "xs": xs,
        "ys": ys,
        "pattern": "00011",
        "steps": 2,
        "lr": 0.1,
        **changes,
    }
    with pytest.raises(error, match=match):
        adapt(given.pop("model"), given.pop("xs"), given.pop("ys"), **given)


@pytest.mark.parametrize("lr", [0, -0.1, float("nan"), float("inf"), "0.1", None])
def test_wrong_learning_rates(lr: Any) -> None:
    wrong("lr must be a positive number", lr=lr)


@pytest.mark.parametrize("steps", [-1, 1.5, "3", None])
def test_wrong_numbers_of_steps(steps: Any) -> None:
    wrong("steps must be a whole number", steps=steps)


def test_wrong_settings() -> None:
    wrong("norm must be 'follow' or 'never', got 'folow'", norm="folow")
    wrong(r"pattern '0011' has 4 bits, Sequential has 5 layers \(block1.conv, .*head\)", pattern="0011")
    wrong("pattern '000000' updates no layer|pattern '00000' updates no layer", pattern="00000")
    with torch.inference_mode():
        wrong("inference_mode", RuntimeError)


def test_wrong_support_sets() -> None:
    xs, ys, _, _ = CONV4.task()
    wrong(r"N of at least 1 expected, got \[0, 1, 16, 16\]", xs=xs[:0], ys=ys[:0])
    wrong("batch_size|shape|match", Exception, xs=xs[:3])
    wrong("labels run from 0 to 2, the network's outputs from 0 to 1", ys=torch.tensor([0, 1, 2, 0]))
    wrong("labels run from -1 to 1", ys=torch.tensor([0, 1, -1, 0]))
    wrong("labels run from 0 to 2", ys=torch.tensor([0, 1, -100, 2]))
    wrong("xs is torch.float32, the network torch.float64", TypeError, xs=xs.float())
    wrong("x must be a floating-point tensor, got torch.uint8", TypeError, xs=xs.to(torch.uint8))
    wrong("ys is torch.bool.*long", TypeError, ys=ys.bool())
    wrong("2 channels|channels per group, expected 2", xs=xs.expand(-1, 2, -1, -1))
    wrong("features", xs=torch.randn(4, 1, 32, 32, dtype=torch.float64))
    wrong("xs must be a tensor, or hold tensors, got list", TypeError, xs=[1.0])
    wrong("ys must be a tensor, or hold tensors, got list", TypeError, ys=[0, 1, 0, 1])


def test_labels_beyond_what_the_network_tells_of_itself() -> None:
    case = loops.scaled()
    xs, _, _, _ = case.task()
    wrong("0 to 1|out of bounds", Exception, model=case.network, xs=xs, ys=torch.tensor([0, 1, 2, 0]), pattern="01")


def test_nan_images_and_diverging_rates() -> None:
    xs, _, _, _ = CONV4.task()
    bad = xs.clone()
    bad[2, 0, 3, 5] = float("nan")
    bad[1, 0, 0, 0] = float("inf")
    for backend in ("native", "reference"):
        with lk.use_backend(backend):
            for second_order in (False, True):
                wrong(
                    r"under 00011 with sgd\(lr=0.1\) diverged in step 1 of 2.*2 NaN or infinite",
                    FloatingPointError,
                    xs=bad,
                    second_order=second_order,
                )
                wrong(
                    r"lr=1e\+300\) diverged in step \d of 4",
                    FloatingPointError,
                    pattern="11111",
                    lr=1e300,
                    steps=4,
                    second_order=second_order,
                )


def test_a_loss_that_is_not_a_number() -> None:
    wrong(r"one number per task, got \[4\]", loss=lambda x, y: F.cross_entropy(x, y, reduction="none"))


def test_networks_that_cannot_be_adapted() -> None:
    xs, ys, _, _ = CONV4.task()
    wrong("Sequential has no parameters", model=nn.Sequential(nn.Flatten(), nn.ReLU()))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(256, 2).double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) + y

    wrong("Two.*2 inputs", model=Two(), pattern="1")


def test_an_auxiliary_head_behind_the_logits_says_nothing_of_the_labels() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.other = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.head(x)
            return logits + 0.0 * self.other(x).sum() if x is None else (logits, self.other(x))[0]

    adapt(Auxiliary(), torch.randn(3, 4), torch.arange(3), pattern="10", steps=1)


def test_a_pattern_that_is_no_text_is_named() -> None:
    xs, ys, _, _ = CONV4.task()
    with pytest.raises(ValueError, match=r"a pattern is a text like '00011', got \['1'\]"):
        adapt(own_conv4(CONV4.network), xs, ys, pattern=["1"])  # type: ignore[arg-type]
