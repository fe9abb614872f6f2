"""Adaptation as one recorded graph: on the CPU by a tape that keeps a CUDA graph's rules, on a device by itself."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import NETWORKS, Case, all_close, close, gradients_of
from tape import Rehearsed, rehearse
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels import cuda_graph
from lambda_maml import adapt, adapt_tasks, models, say
from lambda_maml.inner import recorded

STEPS, LR = 3, 0.1
PATTERNS = ["11111", "00011", "00001", "01000", "10101", "11111,00001", "11111,01010"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a test runs; on the CPU the graphs are tapes."""
    if request.param == "cpu":
        rehearse(monkeypatch)
    recorded.RECORDINGS.clear()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(2)
    recorded.RECORDINGS.clear()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function with nothing recorded or replayed."""

    def call(function: Any, *args: Any, **given: Any) -> Any:
        with monkeypatch.context() as without:
            without.setattr(recorded.RECORDINGS, "get", lambda *_: None)
            return function(*args, **given)

    return call


def known() -> list[cuda_graph.Recording]:
    return [made for of in recorded.RECORDINGS._made.values() for made in map(of.get, of) if made is not None]


def refused() -> list[str]:
    """Why keys are not recorded."""
    others = recorded.RECORDINGS._others
    return [why for why in map(others.get, others) if isinstance(why, str)]


def conv4(device: str) -> models.Conv4:
    model = models.conv4(2, 1, 3, 16).double()
    model.load_state_dict(loops.torch_conv4().state_dict())
    return model.to(device)


CONV4 = Case(nn.Identity(), loops.conv4_groups(), (1, 16, 16))


def task(case: Case, seed: int, device: str) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in case.task(seed=seed))


def tasks(case: Case, seeds: range, device: str) -> tuple[Tensor, ...]:
    return tuple(torch.stack(t) for t in zip(*(task(case, seed, device) for seed in seeds)))


@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["auto", "reference"])  # as a chain, and through autograd
def test_replayed_adaptation_equals_the_eager_one(
    device: str, eager: Any, backend: str, pattern: str, norm: str
) -> None:
    model = conv4(device)
    given: dict[str, Any] = {"pattern": pattern, "steps": STEPS, "lr": LR, "norm": norm}
    with lk.use_backend(backend):
        for seed in range(4):
            xs, ys, xq, _ = task(CONV4, seed, device)
            want = eager(adapt, model, xs, ys, **given)
            got = adapt(model, xs, ys, **given)
            all_close(got.parameters_dict(), want.parameters_dict(), f"task {seed}")
            close(got(xq), want(xq), "logits")
            with torch.no_grad():  # as an optimiser's step between two tasks
                for parameter in model.parameters():
                    parameter.mul_(1.01)
    assert len(known()) == 1
    assert device == "cuda" or (Rehearsed.made, Rehearsed.replays) == (1, 3)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_replayed_tasks_equal_eager_ones(device: str, eager: Any, backend: str, pattern: str, gradients: bool) -> None:
    model = conv4(device)
    twin = copy.deepcopy(model)
    given: dict[str, Any] = {"pattern": pattern, "steps": STEPS, "lr": LR}
    with lk.use_backend(backend), torch.set_grad_enabled(gradients):
        for turn in range(3):
            xs, ys, xq, yq = tasks(CONV4, range(3 * turn, 3 * turn + 3), device)
            want = eager(adapt_tasks, twin, xs, ys, xq, **given)
            got = adapt_tasks(model, xs, ys, xq, **given)
            close(got, want, f"turn {turn}")
            if gradients:
                for network, logits in ((twin, want), (model, got)):
                    network.zero_grad()
                    F.cross_entropy(logits.flatten(0, 1), yq.flatten()).backward()
                all_close(gradients_of(model), gradients_of(twin), "gradient of")
    assert len(known()) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(device: str, eager: Any, name: str) -> None:
    case = NETWORKS[name]()
    model = case.network.to(device)
    pattern = "1" * len(case.groups)
    for seed in range(3):
        xs, ys, _, _ = task(case, seed, device)
        want = eager(adapt, model, xs, ys, pattern=pattern, steps=STEPS, lr=LR)
        got = adapt(model, xs, ys, pattern=pattern, steps=STEPS, lr=LR)
        all_close(got.parameters_dict(), want.parameters_dict(), name)
    assert not refused()


def test_the_residual_network_is_recorded(device: str) -> None:
    case = loops.residual()
    model = case.network.to(device)
    for seed in range(2):
        adapt(model, *task(case, seed, device)[:2], pattern="001111", steps=2, lr=LR)
    assert len(known()) == 1


def test_learners_keep_their_own_parameters(device: str) -> None:
    model = conv4(device)
    learners = [adapt(model, *task(CONV4, seed, device)[:2], pattern="11111", steps=2, lr=LR) for seed in range(4)]
    before = [{n: t.detach().clone() for n, t in learner.parameters_dict().items()} for learner in learners]
    adapt(model, *task(CONV4, 9, device)[:2], pattern="11111", steps=2, lr=LR)
    for learner, values in zip(learners, before):
        assert all(torch.equal(t, values[n]) for n, t in learner.parameters_dict().items())


def test_what_a_recording_depends_on(device: str, eager: Any) -> None:
    model = conv4(device)
    xs, ys, _, _ = task(CONV4, 0, device)

    def run(**given: Any) -> None:
        given = {"pattern": "00011", "steps": 2, "lr": LR, **given}
        for _ in range(2):
            got, want = adapt(model, xs, ys, **given), eager(adapt, model, xs, ys, **given)
            all_close(got.parameters_dict(), want.parameters_dict(), str(given))

    run()
    count = 1
    assert len(known()) == count
    for other in ({"pattern": "00001"}, {"steps": 3}, {"lr": 0.2}, {"norm": "never"}, {"loss": F.multi_margin_loss}):
        run(**other)
        count += 1
        assert len(known()) == count, other
    run()
    assert len(known()) == count  # the first one again
    with torch.no_grad():
        conv, norm = model.get_submodule("block1.conv"), model.get_submodule("block2.norm")
        conv.weight = nn.Parameter(conv.weight * 2)  # type: ignore[arg-type, operator]  # another place
    run()
    norm.eps = 0.1  # type: ignore[assignment]  # another program
    run()
    xs, ys = torch.cat([xs, xs]), torch.cat([ys, ys])
    run()
    assert len(known()) == count + 3


def test_recordings_are_bounded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded.RECORDINGS, "size", 2)
    recorded.RECORDINGS._made.clear()
    model = conv4(device)
    xs, ys, _, _ = task(CONV4, 0, device)
    for steps in (1, 2, 3, 4):
        for _ in range(2):
            adapt(model, xs, ys, pattern="00001", steps=steps, lr=LR)
    assert len(known()) == 2


def test_bad_support_sets_are_named_as_without_a_graph(device: str, eager: Any) -> None:
    model = conv4(device)
    xs, ys, xq, _ = tasks(CONV4, range(2), device)
    given: dict[str, Any] = {"pattern": "11111", "steps": 2, "lr": LR}
    with torch.no_grad():
        for _ in range(2):
            adapt(model, xs[0], ys[0], **given)
            adapt_tasks(model, xs, ys, xq, **given)
    assert len(known()) == 2
    spoilt = xs.clone()
    spoilt[1, 0, 0, 3, 3] = torch.nan
    too_high, too_low = ys.clone(), ys.clone()
    too_high[1, 0], too_low[1, 0] = 2, -1
    for x, y, error in ((spoilt, ys, FloatingPointError), (xs, too_low, ValueError), (xs, too_high, ValueError)):
        with torch.no_grad():
            for function, arguments in ((adapt, (x[1], y[1])), (adapt_tasks, (x, y, xq))):
                with pytest.raises(error) as expected:
                    eager(function, model, *arguments, **given)
                with pytest.raises(error) as got:
                    function(model, *arguments, **given)
                assert str(got.value) == str(expected.value)
    close(adapt_tasks(model, xs, ys, xq, **given), eager(adapt_tasks, model, xs, ys, xq, **given), "afterwards")


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.fc = nn.Conv2d(1, 3, 3), nn.Dropout(0.5), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.conv(x)).mean((2, 3)))


class Marked(Tensor):
    """A tensor that may have operators of its own."""


def marked() -> Case:
    case = loops.residual()
    layer = next(m for m in case.network.modules() if isinstance(m, nn.Conv2d))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Marked))
    return case


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "random": (lambda: Case(Drops().double(), [([], []), ([], [])], (1, 5, 5)), {}, "random numbers"),
    "running": (lambda: loops.residual(track=True), {}, "running statistics"),
    "code": (loops.untraceable, {}, "ata-dependent branching"),
    "second": (loops.residual, {"second_order": True}, "second order"),
    "loss": (loops.residual, {"loss": own_loss}, "none of torch.nn.functional"),
    "subclass": (marked, {}, "Marked, a tensor of another kind"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_says_so(device: str, caplog: pytest.LogCaptureFixture, name: str) -> None:
    make, given, words = REFUSED[name]
    case = make()
    xs, ys, _, _ = task(case, 0, device)
    say._said.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            adapt(case.network.to(device), xs, ys, pattern="1" * len(case.groups), steps=2, lr=LR, **given)
    said = [r.message for r in caplog.records if "without a CUDA graph" in r.message]
    assert len(said) == 1 and words in said[0], said
    assert known() == []


def test_tensors_of_another_kind_are_not_recorded(device: str) -> None:
    model = conv4(device)
    given: dict[str, Any] = {"pattern": "00011", "steps": 2, "lr": LR}
    xs, ys, xq, _ = tasks(CONV4, range(2), device)
    with torch.no_grad():
        for _ in range(3):
            adapt(model, xs[0].as_subclass(Marked), ys[0], **given)
            adapt_tasks(model, xs, ys, xq.as_subclass(Marked), **given)
    assert known() == []


def test_nothing_is_recorded_on_a_cpu_or_where_it_may_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "on cpu" in str(cuda_graph.refusal(torch.device("cpu")))
    monkeypatch.setenv("LAMBDA_KERNELS_GRAPHS", "0")
    assert cuda_graph.refusal(torch.device("cuda")) == "LAMBDA_KERNELS_GRAPHS=0"
