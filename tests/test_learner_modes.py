"""A learner that is first called inside a mode, a transform or a tracer of torch is none the worse afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import far, plain
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lambda_kernels as lk
from lambda_maml import LambdaMAML, adapt

D = torch.float64
XS, YS, XQ = torch.randn(6, 2, 6, 6, dtype=D), torch.arange(3).repeat(2), torch.randn(4, 2, 6, 6, dtype=D)


def body(track: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    block = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=track), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(36, 3)).double()


class Scaled(nn.Module):
    """A forward of a user's, with an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.body(x) * scale


def by_adapt(model: nn.Module, second_order: bool = False) -> Any:
    return adapt(model, XS, YS, pattern="01", steps=2, lr=0.1, second_order=second_order)


def by_verbs(model: nn.Module) -> Any:
    task = LambdaMAML(model, 0.1, pattern="01").clone()
    for _ in range(2):
        task.adapt(F.cross_entropy(task(XS), YS))
    return task


LEARNERS: dict[str, Callable[[], Any]] = {
    "adapt": lambda: by_adapt(body()),
    "adapt, converted": lambda: by_adapt(lk.convert(body())),
    "adapt, second order": lambda: by_adapt(lk.convert(body()), second_order=True),
    "adapt, a user's forward": lambda: by_adapt(Scaled()),
    "verbs": lambda: by_verbs(lk.convert(body())),
    "verbs, a user's forward": lambda: by_verbs(Scaled()),
}
either = pytest.mark.parametrize("name", LEARNERS)


def same(learner: Any, twin: Any) -> None:
    """The learner is what its twin is, which no mode has seen: results, parameters, gradients, memory."""
    assert far(learner(XQ), twin(XQ)) < 1e-14
    for (name, p), (_, q) in zip(learner.named_parameters(), twin.named_parameters(), strict=True):
        assert type(p) in (Tensor, nn.Parameter) and torch.equal(p, q), name
    for (name, b), (_, c) in zip(learner.named_buffers(), twin.named_buffers(), strict=True):
        assert type(b) is Tensor and torch.equal(b, c), name
    for one in (learner, twin):
        grads = torch.autograd.grad(one(XQ).square().sum(), list(one.parameters()), retain_graph=True)
        one.gradients_found = sum(float(g.abs().sum()) for g in grads)
    assert learner.gradients_found == pytest.approx(twin.gradients_found, rel=1e-12)
    before = dict(learner.parameters_dict())
    assert all(p is before[n] for n, p in learner.named_parameters())


def under_fake_tensors(learner: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(learner(mode.from_tensor(XQ)), FakeTensor)
        list(learner.parameters())


def under_a_counter(learner: Any) -> None:
    with FlopCounterMode(display=False) as counter:
        learner(XQ)
    assert counter.get_total_flops() > 0


def under_a_device(learner: Any) -> None:
    with torch.device("cpu"):
        learner(XQ)


def under_grad(learner: Any) -> None:
    got = torch.func.grad(lambda x: learner(x).square().sum())(XQ)
    x = XQ.clone().requires_grad_()
    (want,) = torch.autograd.grad(learner(x).square().sum(), x)
    assert far(got, want) < 1e-12


def under_vmap(learner: Any) -> None:
    many = torch.stack([XQ, XQ.flip(0)])
    got = torch.func.vmap(learner)(many)
    assert far(got, torch.stack([learner(x) for x in many])) < 1e-12


def under_compile(learner: Any) -> None:
    got = torch.compile(learner, backend="aot_eager", fullgraph=True)(XQ)
    assert far(got, learner(XQ)) < 1e-12


def under_compile_as_a_part(learner: Any) -> None:
    got = torch.compile(lambda x: learner(x) + 1.0, backend="aot_eager", fullgraph=True)(XQ)
    assert far(got, learner(XQ) + 1.0) < 1e-12


def under_no_grad(learner: Any) -> None:
    with torch.no_grad():
        learner(XQ)


def under_inference_mode(learner: Any) -> None:
    with torch.inference_mode():
        learner(XQ)


MODES = [
    under_fake_tensors,
    under_a_counter,
    under_a_device,
    under_grad,
    under_vmap,
    under_compile,
    under_compile_as_a_part,
    under_no_grad,
    under_inference_mode,
]


@pytest.mark.filterwarnings("ignore")
@either
@pytest.mark.parametrize("mode", MODES)
def test_a_learner_whose_first_call_is_there(mode: Callable[[Any], None], name: str) -> None:
    torch._dynamo.reset()
    learner, twin = LEARNERS[name](), LEARNERS[name]()
    mode(learner)
    same(learner, twin)


@pytest.mark.filterwarnings("ignore")
@either
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_takes_a_learner_with_its_parameters(name: str, strict: bool) -> None:
    torch._dynamo.reset()
    learner, twin = LEARNERS[name](), LEARNERS[name]()
    shapes = (({0: torch.export.Dim("images", min=2)},),)
    program = torch.export.export(learner, (XQ,), dynamic_shapes=shapes, strict=strict)
    assert sorted(program.graph_signature.parameters) == sorted(n for n, _ in twin.named_parameters())
    assert not program.constants
    module = program.module()
    for images in (XQ, XS):
        assert far(module(images), twin(images)) < 1e-12
    same(learner, twin)
    other = by_verbs(learner) if "verbs" in name else by_adapt(learner)  # it is adapted and exported again
    again = torch.export.export(other, (XQ,), strict=strict).module()
    assert far(again(XQ), other(XQ)) < 1e-12 and far(other(XQ), learner(XQ)) > 1e-6
    same(learner, twin)


@pytest.mark.filterwarnings("ignore")
def test_export_follows_what_a_learner_has_become() -> None:
    learner = by_adapt(Scaled())
    for strict in (False, True):
        learner.requires_grad_(False).load_state_dict({n: t + 1.0 for n, t in learner.state_dict().items()})
        torch._dynamo.reset()
        program = torch.export.export(learner.eval(), (XQ,), strict=strict)
        assert far(program.module()(XQ), learner(XQ)) < 1e-12
        twin = copy.deepcopy(learner)
        torch._dynamo.reset()
        assert far(torch.export.export(twin, (XQ,), strict=strict).module()(XQ), learner(XQ)) < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_clone_goes_on_with_the_steps_of_its_loop() -> None:
    torch._dynamo.reset()
    model = lk.convert(body())
    task = LambdaMAML(model, 0.1).clone()
    compiled = torch.compile(task, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        task.adapt(F.cross_entropy(compiled(XS), YS))
    want = plain(body(), lambda c: F.cross_entropy(c(XS), YS), 3)
    assert far(compiled(XQ), want(XQ)) < 1e-12 and far(task(XQ), want(XQ)) < 1e-12


def test_the_prefix_of_a_clone_is_not_kept_from_inside_a_transform() -> None:
    for first in (
        lambda task: torch.func.grad(lambda s: (task(XS) * s).sum())(torch.ones((), dtype=D)),
        lambda task: torch.func.vmap(lambda s: task(XS) * s)(torch.ones(2, dtype=D)),
    ):
        task = LambdaMAML(lk.convert(body()), 0.1, pattern="01").clone()
        want = task(XS.clone())
        first(task)
        for _ in range(2):
            assert far(task(XS), want) < 1e-14
        first(task)


def test_adapting_inside_a_transform_is_refused_with_the_way_out() -> None:
    model = body()
    for way in (by_adapt, by_verbs):
        with pytest.raises(RuntimeError, match="no transform of torch.func can see through: adapt outside"):
            torch.func.grad(lambda s, way=way: (way(model)(XQ) * s).sum())(torch.ones((), dtype=D))
