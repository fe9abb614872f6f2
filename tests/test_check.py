"""A program is compared with its network once for each form of call: what differs is dropped, nothing is changed."""

from __future__ import annotations

import copy
import logging
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from programs import program_of
from torch import Tensor, nn

from lambda_kernels import _say
from lambda_kernels.program import calls, check, lookup
from lambda_kernels.program.check import Incomparable, difference
from lambda_maml import adapt, say

D = torch.float64
Y = torch.arange(3).repeat(2)
Draw = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A user's forward: linear layers around a norm that keeps statistics, and a step that may draw."""

    def __init__(self, draw: Draw = torch.tanh) -> None:
        super().__init__()
        self.body, self.norm, self.head, self.draw = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.draw(self.norm(self.body(x))))


def walked() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def captured() -> nn.Module:
    return Net().double()


def forget() -> None:
    """All programs, and what was said of them."""
    lookup._FAMILIES.clear()
    lookup._KNOWN.clear()
    lookup._REFUSED.clear()
    _say._said.clear()
    say._said.clear()


@pytest.fixture(autouse=True)
def programs_of_its_own() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4, dtype=D, generator=torch.Generator().manual_seed(1))


LINEAR: Any = calls.LinearCall.__call__


def linear(change: Callable[[Tensor, Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Linear steps that give something else than linear layers."""

    def spoil(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(calls.LinearCall, "__call__", lambda self, *args: change(LINEAR(self, *args), self))

    return spoil


def fails(y: Tensor, step: Any) -> Tensor:
    raise ZeroDivisionError("division by zero")


# How a program is spoilt, and what is said of it.
WRONG: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "twice the value": (linear(lambda y, step: 2 * y), "its program's results differ from the network's by "),
    "almost the value": (linear(lambda y, step: y * (1 + 1e-6)), "its program's results differ from the network's by "),
    "no number": (linear(lambda y, step: y * float("nan")), "its program's results differ from the network's by nan"),
    "another dtype": (
        linear(lambda y, step: y.float() if step.outputs == 3 else y),
        "its program's results are [6, 3] torch.float32, the network's [6, 3]",
    ),
    "another shape": (
        linear(lambda y, step: y[:2] if step.outputs == 3 else y),
        "its program's results are [2, 3] torch.float64, the network's [6, 3]",
    ),
    "an exception": (linear(fails), "its program fails where the network does not (ZeroDivisionError: division by "),
    "statistics that stay": (
        lambda patch: patch.setattr(calls, "_do", lambda update, effects: None),
        "its program's buffers ",
    ),
}


@pytest.mark.parametrize("make", [walked, captured])
@pytest.mark.parametrize("name", WRONG)
def test_a_program_that_differs_is_dropped_and_the_reason_is_said(
    name: str,
    make: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    x: Tensor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil, why = WRONG[name]
    model = make()
    want = adapt(copy.deepcopy(model), x, Y, pattern="01", steps=2, lr=0.1)(x).detach()
    forget()
    spoil(monkeypatch)
    program = program_of(model, x)
    assert str(program.untraceable).startswith(why) and program_of(model, x) is program
    with caplog.at_level(logging.WARNING):
        got = adapt(model, x, Y, pattern="01", steps=2, lr=0.1)(x)
        adapt(model, x, Y, pattern="10", steps=1, lr=0.1)
    torch.testing.assert_close(got, want, **EXACT)
    said = [record.getMessage() for record in caplog.records if why in record.getMessage()]
    assert said == [f"{type(model).__name__} is adapted without prefix reuse: {program.untraceable}"]


@pytest.mark.parametrize("make", [walked, captured])
def test_the_right_program_is_kept(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = make()
    program = program_of(model, x)
    assert program.untraceable is None and program_of(copy.deepcopy(model), x) is program
    assert difference(program, model, (x,), {}, True) is None


@pytest.mark.parametrize("make", [walked, captured])
def test_a_program_that_was_dropped_is_not_found_under_a_transform(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    linear(lambda y, step: 2 * y)(monkeypatch)
    model, found = make(), []

    def seen(s: Tensor) -> Tensor:
        found.append(program_of(model, x))
        return s

    plain = program_of(model, x)
    torch.func.grad(seen)(torch.ones(()))
    assert plain.untraceable is not None and found == [plain]


def test_a_program_is_dropped_for_the_forms_in_which_it_differs(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    linear(lambda y, step: 2 * y if len(y) == 5 else y)(monkeypatch)
    model = walked()
    good = program_of(model, x)
    assert good.untraceable is None and program_of(model, x[:5]).untraceable is not None
    assert program_of(model, x[:4]) is good and program_of(model, x) is good


@pytest.mark.parametrize("make", [walked, captured])
def test_one_check_for_each_form(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    checked: list[int] = []

    def counted(program: Any, root: nn.Module, args: Any, *more: Any) -> str | None:
        checked.append(len(args[0]))
        return difference(program, root, args, *more)

    monkeypatch.setattr(lookup, "difference", counted)
    model = make()
    for given in (x, x + 1, x[:5], x, x[:5], x[1:]):
        program_of(model, given)
        program_of(copy.deepcopy(model), given)
    assert checked == [6, 5]
    program_of(model.eval(), x)
    assert checked == [6, 5, 6]


def fractional(h: Tensor) -> Tensor:
    return F.fractional_max_pool2d(h.view(6, 1, 3, 2).repeat(1, 1, 2, 2), 2, (3, 2)).view(6, 6)


DRAWS: dict[str, Draw] = {
    "dropout": nn.Dropout(0.5),
    "dropout in place": lambda h: F.dropout(h * 1.0, 0.5, True, True),
    "dropout of channels": lambda h: F.dropout1d(h[:, :, None], 0.5, True)[:, :, 0],
    "alpha dropout": nn.AlphaDropout(0.5),
    "rrelu": nn.RReLU(),
    "fractional max-pool": fractional,
    "attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], dropout_p=0.5)[0],
    "gumbel softmax": lambda h: F.gumbel_softmax(h),
    "rand_like": lambda h: h * torch.rand_like(h),
    "normal_": lambda h: h + torch.empty_like(h).normal_(),
    "randperm": lambda h: h[:, torch.randperm(6)],
    "multinomial": lambda h: h * torch.multinomial(torch.softmax(h, 1), 6, True),
    "bernoulli": lambda h: h * torch.bernoulli(torch.sigmoid(h)),
}


def generators() -> list[Any]:
    return [torch.random.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


@pytest.mark.parametrize("name", DRAWS)
def test_random_networks_are_checked_and_draw_nothing_meanwhile(
    name: str, monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    model, given = Net(DRAWS[name]).double(), torch.randn(6, 4, dtype=D)
    before = generators()
    program = program_of(model, given)
    assert generators() == before
    assert program.untraceable is None, program.untraceable
    assert any(step.not_reusable for step in program.steps)
    assert difference(program, model, (given,), {}, True) is None and generators() == before
    linear(lambda y, step: 1.01 * y)(monkeypatch)
    assert "its program's results differ" in str(difference(program, model, (given,), {}, True))
    assert generators() == before


@pytest.mark.parametrize("make", [walked, captured, lambda: Net(nn.Dropout(0.5)).double()])
def test_a_check_leaves_the_network_as_it_is(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = make()
    tensors = {n: (t, t.detach().clone(), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    held = {path: dict(module.__dict__) for path, module in model.named_modules()}
    given = x.clone().requires_grad_()
    program_of(model, given)
    now = model.state_dict(keep_vars=True)
    for name, (tensor, value, version) in tensors.items():
        assert now[name] is tensor and torch.equal(tensor, value) and tensor._version == version, name
        assert tensor.grad is None and given.grad is None
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == held
    assert torch.equal(given, x)


def test_shared_buffers_are_shared_in_a_check(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    model[3].running_mean = model[1].running_mean
    program = program_of(model, x)
    assert program.untraceable is None and difference(program, model, (x,), {}, True) is None
    assert not model[1].running_mean.any()  # type: ignore[operator]


@pytest.mark.parametrize("make", [walked, captured])
def test_what_the_network_itself_refuses_is_its_callers_to_see(make: Callable[[], nn.Module], x: Tensor) -> None:
    model, one = make(), x[:1]  # a batch norm in training mode wants more than one
    program = program_of(model, x)
    with pytest.raises(Incomparable):
        difference(program, model, (one,), {}, True)
    refused = program_of(model, one)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        refused(model, one)
    assert program_of(model, x) is program
    assert program_of(model.eval(), one).untraceable is None


def test_what_is_refused_for_its_values_is_checked_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x))

    linear(lambda y, step: 2 * y)(monkeypatch)
    model = Words()
    with pytest.raises(IndexError):
        program_of(model, torch.tensor([1, 9]))(model, torch.tensor([1, 9]))
    assert "its program's results differ" in str(program_of(model, torch.tensor([1, 2])).untraceable)


def test_without_values_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    def never(*args: Any) -> str:
        raise AssertionError("checked")

    monkeypatch.setattr(lookup, "difference", never)
    meta = walked().to("meta")
    assert program_of(meta, x.to("meta")).untraceable is None
    model = walked()
    torch.func.vmap(lambda row: program_of(model, row[None].expand(6, 4)) and row)(x)


@pytest.mark.parametrize("slope", [False, True], ids=["forward", "goes-back"])
def test_a_comparison_keeps_no_activations_unless_the_network_goes_back_itself(slope: bool, x: Tensor) -> None:
    layer, made = nn.Linear(4, 3).double(), list[weakref.ref[Tensor]]()

    def run() -> Tensor:
        h = layer(x)
        made.append(weakref.ref(h))
        y: Tensor = h.sin()
        return torch.autograd.grad(y.sum(), h)[0] if slope else y

    got = check.with_little_memory(run)
    assert torch.equal(got, layer(x).cos() if slope else layer(x).sin())
    assert len(made) == 1 + slope and made[0]() is None and got.requires_grad is not slope
