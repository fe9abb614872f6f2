"""Adaptation on a GPU by every backend that can run there; without one, on the CPU by Triton's interpreter."""

from __future__ import annotations

import copy
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import all_close, close, gradients_of, plain_loop
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels import agreement, backends
from lambda_maml import LambdaMAML, adapt, adapt_tasks, models
from lambda_maml.inner import recorded

pytestmark = pytest.mark.usefixtures("float32_has_its_digits")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKENDS = ["auto", "cuda", "triton", "reference"] if ON_GPU else ["triton"]
STEPS, LR = 2, 0.1
GROUPS = loops.conv4_groups()
# In units of how far the adaptation goes, above the table: two steps go a short way, of which the digits of bfloat16
# are a large part.
NEAR = {torch.float32: 2e-3, torch.bfloat16: 0.2}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """The backend that computes; one that cannot run here is skipped with its reason."""
    if request.param != "auto" and (why := backends.reasons(request.param)):
        pytest.skip("; ".join(why))
    recorded.RECORDINGS.clear()
    with lk.use_backend(request.param):
        yield request.param


def network(width: int = 3) -> tuple[nn.Module, nn.Module]:
    """conv4 of this package and of stock layers, the same weights, in float64."""
    stock = loops.torch_conv4(width=width)
    model = models.conv4(2, 1, width, 16).double()
    model.load_state_dict(stock.state_dict())
    return model.to(DEVICE), stock.to(DEVICE)


def task(seed: int = 1) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE) for t in loops.Case(nn.Identity(), GROUPS, (1, 16, 16)).task(seed=seed))


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("pattern", ["11111", "00011", "10101"])
def test_adapt_equals_the_plain_loop(pattern: str, second_order: bool) -> None:
    model, stock = network()
    xs, ys, xq, yq = task()
    want = plain_loop(stock, GROUPS, pattern, xs, ys, xq, yq, steps=STEPS, lr=LR, second_order=second_order)
    for _ in range(3 if ON_GPU and not second_order else 1):  # eager, recorded, replayed
        model.zero_grad()
        learner = adapt(model, xs, ys, pattern=pattern, steps=STEPS, lr=LR, second_order=second_order)
        all_close(learner.parameters_dict(), want.parameters, pattern)
        logits = learner(xq)
        close(logits, want.logits, "logits")
        F.cross_entropy(logits, yq).backward()
        all_close(gradients_of(model), want.gradients, "gradient of")


@pytest.mark.parametrize("pattern", ["11111", "00011"])
def test_tasks_equal_the_plain_loop(pattern: str) -> None:
    model, stock = network()
    xs, ys, xq, yq = (torch.stack(t) for t in zip(*(task(seed) for seed in range(3))))
    want = [
        plain_loop(stock, GROUPS, pattern, *(t[i] for t in (xs, ys, xq, yq)), steps=STEPS, lr=LR).logits
        for i in range(3)
    ]
    with torch.no_grad():
        for _ in range(3 if ON_GPU else 1):
            close(adapt_tasks(model, xs, ys, xq, pattern=pattern, steps=STEPS, lr=LR), torch.stack(want), "logits")


def test_maml_reaches_frozen_weights() -> None:
    model, stock = network()
    xs, ys, xq, yq = task()
    want = plain_loop(stock, GROUPS, "00011", xs, ys, xq, yq, steps=1, lr=LR, second_order=True)
    learner = LambdaMAML(model, lr=LR, pattern="00011", first_order=False).clone()
    learner.adapt(F.cross_entropy(learner(xs), ys))
    F.cross_entropy(learner(xq), yq).backward()
    all_close(gradients_of(model), want.gradients, "gradient of")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_stays_near(dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter has no bfloat16 arithmetic of a device's kind")
    model, stock = network(width=8)
    xs, ys, xq, yq = task()
    start = {n: p.detach().clone() for n, p in stock.named_parameters()}
    truth = plain_loop(stock, GROUPS, "11111", xs, ys, xq, yq, steps=STEPS, lr=LR).parameters
    plain = plain_loop(
        copy.deepcopy(stock).to(dtype), GROUPS, "11111", xs.to(dtype), ys, xq.to(dtype), yq, steps=STEPS, lr=LR
    ).parameters
    ours = adapt(model.to(dtype), xs.to(dtype), ys, pattern="11111", steps=STEPS, lr=LR).parameters_dict()

    got, own, began, exact = ([named[n] for n in truth] for named in (ours, plain, start, truth))
    found = agreement.errors(got, own, exact, agreement.distance(began, exact))
    assert found.mine <= agreement.FACTOR * found.stock + NEAR[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["11111", "00011"])
def test_a_replayed_adaptation_is_one_graph_launch(pattern: str, backend: str) -> None:
    model, _ = network()
    xs, ys, _, _ = task()
    given: dict[str, Any] = {"pattern": pattern, "steps": 5, "lr": LR}
    for _ in range(3):
        adapt(model, xs, ys, **given)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        adapt(model, xs, ys, **given)
        torch.cuda.synchronize()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls.get("cudaGraphLaunch") == 1, calls
    assert sum(count for key, count in calls.items() if key.startswith("cudaLaunchKernel")) <= 8, calls


@pytest.mark.gpu
def test_compiled_functions_run_on_the_device(backend: str) -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(3, 2, 6, 7, device=DEVICE), torch.randn(4, 2, 3, 3, device=DEVICE)
    gamma, beta = torch.rand(4, device=DEVICE), torch.randn(4, device=DEVICE)
    operands = [t.requires_grad_() for t in (x, weight, gamma, beta)]

    def function(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return lk.functional.conv_block(x, weight, None, gamma, beta).pow(2).sum()

    results = [f(*operands) for f in (torch.compile(function, fullgraph=True), function)]
    pair = agreement.TOLERANCES[torch.float32].pair
    torch.testing.assert_close(results[0], results[1], rtol=pair, atol=pair)
    for got, want in zip(*(torch.autograd.grad(y, operands) for y in results)):
        assert agreement.apart(got, want) is None
