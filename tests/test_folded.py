"""A folded network: one operation wherever it is a chain, the network's own numbers, and a module like any other."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EXACT
from machine import needs_native
from test_statistics import YS, images, layers, made
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import lambda_kernels as lk
from lambda_kernels.agreement import within
from lambda_maml import adapt

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_native]

CHAINS = ("conv4", "converted")
CHAIN, PREPARE = "lambda_kernels::affine_chain", "lambda_kernels::affine_chain_prepare"


def folded(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """A folded network, the same in torch's layers, and query images."""
    model, xs, xq = made(name, dtype)
    learner = adapt(model, xs, YS, pattern="1" * layers(model), steps=1, lr=0.1, statistics="support")
    network = learner.to_module(fold=True)
    return network, lk.to_torch(network).eval(), xq


def operators(call: Callable[[], Any]) -> list[str]:
    """The operators that a call runs from Python, in their order; a mode would make it another call."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    events = [e for e in seen.events() if e.cpu_parent is None and "::" in e.name]
    return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]


@pytest.mark.parametrize("name", CHAINS)
def test_a_call_is_one_operator(name: str) -> None:
    network, torchs, xq = folded(name)
    with torch.no_grad():
        want = torchs(xq)
        torch.testing.assert_close(network(xq), want, **EXACT)
        assert operators(lambda: network(xq)) == operators(lambda: network(xq[:1]))[-1:] == [CHAIN]
        one = torch.cat([network(x[None]) for x in xq])
        assert torch.equal(one, network(xq))
    with torch.inference_mode():
        assert operators(lambda: network(xq)) == [CHAIN]
        assert torch.equal(network(xq.clone()), one) and network(xq).is_inference()
    for p in network.parameters():
        p.requires_grad_(False)
    assert operators(lambda: network(xq)) == [CHAIN]


def test_a_learner_is_one_operator_in_inference_mode_too() -> None:
    model, xs, xq = made("conv4")
    learner = adapt(model, xs, YS, pattern="00001", steps=1, lr=0.1, statistics="support")
    with torch.no_grad():
        want = learner(xq)
    with torch.inference_mode():
        assert torch.equal(learner(xq), want)
        assert operators(lambda: learner(xq)) == [CHAIN]


@pytest.mark.parametrize("name", CHAINS)
def test_what_was_made_of_the_weights_is_made_anew_after_a_change(name: str) -> None:
    network, _, xq = folded(name)
    given = dict(network.state_dict())

    def changed(change: Callable[[], Any], again: bool = True) -> None:
        change()
        run = operators(lambda: network(xq.to(next(network.parameters()).dtype)))
        assert run.count(PREPARE) == again and run[-1] == CHAIN, run
        got = network(xq.to(next(network.parameters()).dtype)).double()
        want = lk.to_torch(network)(xq.to(next(network.parameters()).dtype)).double()
        torch.testing.assert_close(got, want, **within(next(network.parameters()).dtype, "steps"))

    weight = next(network.parameters())
    with torch.no_grad():
        network(xq)
        changed(lambda: None, again=False)
        changed(lambda: weight.mul_(1.5))
        changed(lambda: network.load_state_dict({n: t + 0.1 for n, t in given.items()}))
        changed(lambda: setattr(weight, "data", weight.data * 2))
        changed(lambda: network.float())
        changed(lambda: network.double())
        changed(lambda: network.to(torch.bfloat16).double())  # the same parameters at new places, rounded
        changed(lambda: network.load_state_dict(given, assign=True))
        network.train()
        assert operators(lambda: network(xq))[-1] == CHAIN  # a chain in either mode
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(xq).square().sum().backward()
    with torch.no_grad():
        changed(optimizer.step)


def test_what_the_operation_does_not_take_is_what_it_was() -> None:
    network, torchs, xq = folded("conv4")

    def plain(call: Callable[[], Any] = lambda: network(xq), **close: Any) -> None:
        assert CHAIN not in operators(call)
        torch.testing.assert_close(call(), torchs(xq), **close or EXACT)

    plain()  # gradients are on, and the parameters have them
    x = xq.clone().requires_grad_()
    for got, want in zip(*(torch.autograd.grad(n(x).square().sum(), [x, *n.parameters()]) for n in (network, torchs))):
        torch.testing.assert_close(got, want, **EXACT)
    with torch.no_grad():
        with lk.use_backend("reference"):
            plain()
        network(xq)
        plain(lambda: torch.func.vmap(network)(xq[None])[0])
        others = {n: p + 1 for n, p in network.named_parameters()}
        call: Any = torch.func.functional_call
        torch.testing.assert_close(call(network, others, (xq,)), call(torchs, others, (xq,)), **EXACT)
        assert not torch.equal(call(network, others, (xq,)), network(xq))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert network(mode.from_tensor(xq)).shape == (7, 3)
        single, _, x = folded("conv4", torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert CHAIN not in operators(lambda: single(x)) and single(x).dtype == torch.bfloat16
        seen: list[int] = []
        hook = network.get_submodule("block2.conv").register_forward_hook(lambda *_: seen.append(1))
        plain()
        hook.remove()
        assert seen and operators(lambda: network(xq))[-1] == CHAIN
        network.get_submodule("block2").relu = nn.Tanh()
        assert CHAIN not in operators(lambda: network(xq))
        with pytest.raises(TypeError, match=r"weight is torch.float64, x is torch.float32: convert one"):
            network(xq.float())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("name", CHAINS)
def test_it_is_a_module_like_any_other(name: str) -> None:
    network, torchs, xq = folded(name)
    assert list(network.state_dict()) == list(torchs.state_dict()) and "forward" not in vars(network)
    assert type(network).__name__ == type(torchs).__name__ and isinstance(network, type(torchs))
    data = io.BytesIO()
    torch.save(network, data)
    data.seek(0)
    twins = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(data, weights_only=False)]
    exported = torch.export.export(network, (xq,)).module()
    with torch.no_grad():
        want = network(xq)
        for twin in twins:
            assert torch.equal(twin(xq), want) and operators(lambda: twin(xq)) == [CHAIN]  # noqa: B023
        scripted, traced = torch.jit.script(network), torch.jit.trace(network, (xq,))
        for other in (exported, scripted, traced):
            torch.testing.assert_close(other(xq), torchs(xq), **EXACT)
            assert CHAIN not in operators(lambda: other(xq))  # noqa: B023


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own tracing
def test_torch_compile_sees_the_layers() -> None:
    network, torchs, xq = folded("conv4")
    with torch.no_grad():
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(xq), torchs(xq), **EXACT)
        assert CHAIN not in operators(lambda: compiled(xq))


def test_a_learner_that_a_fake_mode_looked_at_first_is_as_before() -> None:
    model, xs, xq = made("conv4")
    learner = adapt(model, xs, YS, pattern="00001", steps=1, lr=0.1, statistics="support")
    learner.requires_grad_(False)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            learner(mode.from_tensor(xq))
        got = learner(xq)
        assert type(got) is Tensor
        torch.testing.assert_close(got, lk.to_torch(learner.to_module())(xq), **EXACT)


def test_a_network_that_is_no_chain_stays_of_its_class() -> None:
    network, torchs, xq = folded("mlp")
    assert type(network) is nn.Sequential
    with torch.no_grad():
        torch.testing.assert_close(network(images(7, (2, 6, 6), seed=1)), torchs(xq), **EXACT)
