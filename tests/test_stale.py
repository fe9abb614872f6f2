"""What is kept between calls is not used once what it was made of is another, also where torch does not count it."""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import far, plain
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_maml import LambdaMAML, adapt, models

pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = os.environ
# Roundings of float32 through two ways of a network; what is stale is off by 1e-3 and more.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def network(track: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=track), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


def task() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 1, 8, 8), torch.arange(6) % 3, torch.randn(9, 1, 8, 8)


# Values.


def fused_step(tensors: list[Tensor]) -> None:
    """What torch.optim.SGD(fused=True) does, to tensors that are no leaves too."""
    with torch.no_grad():
        torch._fused_sgd_(
            tensors, [-torch.ones_like(t) for t in tensors], [], weight_decay=0.0, momentum=0.0, lr=0.3, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip


def through_data(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.data.add_(0.3)


def through_numpy(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.detach().numpy()[...] += 0.3


@pytest.mark.parametrize("write", [fused_step, through_data, through_numpy])
def test_a_folded_network_has_its_parameters_of_now(write: Callable[[list[Tensor]], None]) -> None:
    xs, ys, xq = task()
    folded = adapt(network(), xs, ys, pattern="11", steps=2, lr=0.1, statistics="support").to_module(fold=True)
    with torch.no_grad():
        before = folded(xq)
    write([p.detach() for p in folded.parameters()])
    with torch.no_grad():
        got = folded(xq)
    want = folded(xq.clone().requires_grad_())  # by its layers
    torch.testing.assert_close(got, want.detach(), **CLOSE)
    assert far(got, before) > 1e-2


def test_statistics_that_a_norm_moved_by_itself_are_those_of_now() -> None:
    xs, ys, xq = task()
    learner = adapt(network(track=True), xs, ys, pattern="11", steps=2, lr=0.1).eval()
    with torch.no_grad():
        before = learner(xq)
        learner.module.train()(5 * xs + 3)
        learner.eval()
        got = learner(xq)
        torch.testing.assert_close(got, learner.module(xq), **CLOSE)
    assert far(got, before) > 1e-2


@pytest.mark.parametrize("write", [fused_step, through_data, through_numpy])
def test_a_clones_frozen_prefix_has_its_parameters_of_now(write: Callable[[list[Tensor]], None]) -> None:
    xs, _, _ = task()
    clone = LambdaMAML(network(), 0.1, pattern="01").clone()
    parameters = [p.detach() for p in clone.parameters() if p.dim() == 4]
    with torch.no_grad():
        before = clone(xs)
        write(parameters)
        got = clone(xs)
        torch.testing.assert_close(got, clone.module(xs), **CLOSE)
    assert far(got, before) > 1e-3


def test_a_clones_frozen_prefix_has_the_gradient_of_its_input_once_it_is_asked_for() -> None:
    xs, ys, _ = task()
    grads = []
    for asked_late in (True, False):
        clone = LambdaMAML(network().double(), 0.1, pattern="01").clone()
        x = xs.double()
        clone.adapt(F.cross_entropy(clone(x), ys))
        x = (x if asked_late else x.clone()).requires_grad_()
        F.cross_entropy(clone(x), ys).backward()
        assert x.grad is not None
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1])


# Structure.


def widened(model: nn.Sequential) -> None:
    model[0] = nn.Conv2d(1, 6, 3, padding=2, dilation=2)


def headed(model: nn.Sequential) -> None:
    model[5] = nn.Sequential(nn.Dropout(0.0), nn.Linear(96, 3))


def without_bias(model: nn.Sequential) -> None:
    model[5].bias = None  # type: ignore[assignment]


def with_eps(model: nn.Sequential) -> None:
    model[1].eps = 1.0  # type: ignore[assignment]


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "layer inserted": lambda model: model.insert(3, nn.Tanh()), "first layer": widened, "head": headed,
    "no bias": without_bias, "eps": with_eps,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_is_built_otherwise_by_now_is_named(name: str) -> None:
    xs, ys, xq = task()
    model = network()
    closed, opened = (adapt(model, xs, ys, pattern="11", steps=2, lr=0.1) for _ in range(2))
    with torch.no_grad():
        want = opened.module(xq)
        closed(xq)
    CHANGES[name](model)
    with torch.no_grad():
        torch.testing.assert_close(opened(xq), want, **CLOSE)
    for use in (lambda: closed(xq), lambda: closed.module, lambda: list(closed.parameters())):
        with pytest.raises(RuntimeError, match=r"Sequential was changed after the adaptation: .*adapt anew"):
            use()


def test_what_is_no_part_of_the_structure_may_change() -> None:
    xs, ys, xq = task()
    model = network(track=True)
    learner = adapt(model, xs, ys, pattern="11", steps=2, lr=0.1)
    with torch.no_grad():
        want = learner(xq)
    model.eval()
    model.train()
    model[1].eps = float("1e-5")  # type: ignore[assignment]
    model.load_state_dict(network(track=True, seed=3).state_dict(), assign=True)
    model[0].register_forward_hook(lambda *_: None).remove()
    model(xs)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(learner(xq), want)


# Networks and what a forward reads.


class Alike(nn.Sequential):
    """Of equal networks one is as good as another, to Python."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    def __hash__(self) -> int:
        return 7


def test_networks_that_are_equal_to_python_are_two() -> None:
    xs, ys, xq = task()
    twins: list[Any] = [Alike(*network(seed=seed)) for seed in (0, 5)]
    found = [adapt(twin, xs, ys, pattern="01", steps=2, lr=0.1) for twin in twins]
    for twin, learner in zip(twins, found, strict=True):
        want = adapt(nn.Sequential(*twin), xs, ys, pattern="01", steps=2, lr=0.1)
        with torch.no_grad():
            torch.testing.assert_close(learner(xq), want(xq), **CLOSE)
        assert learner.parameters_dict()["0.weight"].data_ptr() == twin[0].weight.data_ptr()


class ReadsEnvironment(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + float(ENVIRONMENT.get("LAMBDA_TEST_SHIFT", "0")) * x.square())


class ReadsChain(ReadsEnvironment):
    def __init__(self) -> None:
        super().__init__()
        self.settings = ChainMap({}, {"shift": 0.0})

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x + self.settings["shift"] * x.square())


@pytest.mark.parametrize("kind", [ReadsEnvironment, ReadsChain])
def test_a_forward_that_finds_by_an_exception_what_is_missing_is_run_as_it_is(
    kind: type[ReadsEnvironment], monkeypatch: pytest.MonkeyPatch
) -> None:
    xs, ys, xq = task()
    model: Any = kind()
    converted: Any = lk.convert(kind())
    for shift in ("0", "3"):
        if shift == "3":
            monkeypatch.setenv("LAMBDA_TEST_SHIFT", shift)
            for own in (model, converted):
                getattr(own, "settings", {})["shift"] = 3.0
        learner = adapt(model, xs, ys, pattern="01", steps=2, lr=0.1)
        names = [name for name, _ in model.named_parameters() if ".5." in name]
        stock = plain(model, lambda m: F.cross_entropy(m(xs), ys), steps=2, names=names)
        with torch.no_grad():
            assert far(learner(xq), stock(xq)) < 1e-4
            again: Any = lk.to_torch(converted)
            torch.testing.assert_close(converted(xq), again(xq), **CLOSE)


def test_parameters_can_be_swapped_after_an_adaptation_and_the_next_one_reads_them() -> None:
    xs, ys, xq = task()
    model = models.conv4(3, 1, 4, 16)
    other = models.conv4(3, 1, 4, 16)
    xs, xq = (F.interpolate(t, 16) for t in (xs, xq))
    for _ in range(3):  # the second call is remembered
        adapt(model, xs, ys, pattern="00011", steps=2, lr=0.1)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(other.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    got, want = (adapt(m, xs, ys, pattern="00011", steps=2, lr=0.1) for m in (model, other))
    with torch.no_grad():
        assert torch.equal(got(xq), want(xq))
