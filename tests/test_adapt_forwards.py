"""`adapt` on forwards that draw random numbers, write, count or have hooks: each runs as in the plain loop."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, close, compare, plain_loop
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_maml import adapt

pytestmark = pytest.mark.usefixtures("one_thread")


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
    for model in (copy.deepcopy(case.network), lk.convert(copy.deepcopy(case.network))):
        for pattern in ("11111", "00001", "00110"):
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
