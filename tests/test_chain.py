"""The native inner loop gives what the general path gives, and is taken where it applies and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GRADIENT, STEPS
from machine import fresh, needs_native, on_threads
from programs import program_of
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.agreement import errors
from lambda_kernels.chain import Chain
from lambda_maml import Pattern, adapt, adapt_tasks, models
from lambda_maml.plan import plan_of

WAYS = 3


def general(logits: Tensor, ys: Tensor) -> Tensor:
    """Cross-entropy under another name, which the native operator does not know."""
    return F.cross_entropy(logits, ys)


def tasks(count: int, channels: int, size: int, dtype: torch.dtype, images: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(count, images, channels, size, size, generator=generator, dtype=torch.float64).to(dtype)
    ys = torch.arange(images).remainder(WAYS).expand(count, images).contiguous()
    return xs, ys, torch.randn(count, 4, channels, size, size, generator=generator, dtype=torch.float64).to(dtype)


class Viewed(nn.Module):
    """Plain torch layers: functional pooling, view, no bias in front of a norm, groups, dilation, odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6, affine=False, track_running_stats=False, eps=1e-3)
        self.conv2 = nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2)
        self.norm2 = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4 * 6 * 3, WAYS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.view(x.size(0), -1))


def viewed() -> nn.Module:
    return Viewed()


def conv4() -> nn.Module:
    return models.conv4(WAYS, 2, 5, 17)


def large() -> nn.Module:
    """Its first block takes the library's convolution, the others Winograd's."""
    return models.conv4(WAYS, 4, 32, 41)


def wide() -> nn.Module:
    """Its last blocks see so few pixels that, where they are the first to be updated, all steps run on those."""
    return models.conv4(WAYS, 2, 32, 21)


NETWORKS: list[tuple[Callable[[], nn.Module], int, int]] = [
    (conv4, 2, 17),
    (viewed, 2, 13),
    (large, 4, 41),
    (wide, 2, 21),
]


@needs_native
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize(("build", "channels", "size"), NETWORKS, ids=["conv4", "viewed", "large", "wide"])
def test_every_pattern_equals_the_general_path(
    build: Callable[[], nn.Module], channels: int, size: int, norm: str
) -> None:
    torch.manual_seed(0)
    model = build().double()
    xs, ys, xq = tasks(3, channels, size, torch.float64)
    plan = plan_of(model, program_of(model, xs[0]))
    for pattern in Pattern.all(len(plan.layers)):
        assert plan.part(plan.updated(str(pattern), norm)).chain is not None, pattern
        given: dict[str, Any] = dict(pattern=pattern, steps=3, lr=0.2, norm=norm)
        want = adapt(model, xs[0], ys[0], loss=general, **given)
        have = adapt(model, xs[0], ys[0], **given)
        for name, tensor in want.parameters_dict().items():
            torch.testing.assert_close(have.parameters_dict()[name], tensor, **STEPS, msg=f"{pattern} {name}")
        together = adapt_tasks(model, xs, ys, xq, loss=general, **given)
        torch.testing.assert_close(adapt_tasks(model, xs, ys, xq, **given), together, **STEPS)
        with torch.no_grad():
            torch.testing.assert_close(adapt_tasks(model, xs, ys, xq, **given), together, **STEPS)


@needs_native
@pytest.mark.parametrize("pattern", ["11111,00011,00001", "11111,01010", "00100,11000,00001"])
def test_schedules_and_first_order_gradients_are_the_same(pattern: str) -> None:
    torch.manual_seed(0)
    model = conv4().double()
    xs, ys, xq = tasks(2, 2, 17, torch.float64)

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        logits = adapt_tasks(model, xs, ys, xq, pattern=pattern, steps=4, lr=0.1, loss=loss)
        return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))

    for have, want in zip(gradients(F.cross_entropy), gradients(general)):
        torch.testing.assert_close(have, want, **GRADIENT)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_one_operator_runs_all_steps(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    inner_loop = Chain.inner_loop

    def counted(self: Chain, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        found = inner_loop(self, *args, **kwargs)
        calls.append((found[0].shape[0] - 1, found[0].shape[1]))
        return found

    monkeypatch.setattr(Chain, "inner_loop", counted)
    with on_threads(threads):
        model = conv4()
        xs, ys, xq = tasks(3, 2, 17, torch.float32)
        adapt(model, xs[0], ys[0], pattern="00011", steps=7, lr=0.1)
        adapt_tasks(model, xs, ys, xq, pattern="11111,00001", steps=5, lr=0.1)
        assert calls == [(7, 1), (1, 3), (4, 3)]
        calls.clear()
        adapt(model, xs[0], ys[0], pattern="00011", steps=2, lr=0.1, second_order=True)
        adapt(model, xs[0], ys[0], pattern="00011", steps=2, lr=0.1, loss=general)
        with lk.use_backend("reference"):
            adapt(model, xs[0], ys[0], pattern="00011", steps=2, lr=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            adapt(model, xs[0], ys[0], pattern="00001", steps=2, lr=0.1)
        assert calls == []


@needs_native
def test_float32_is_as_near_to_the_truth_as_the_general_path() -> None:
    torch.manual_seed(0)
    model = models.conv4(WAYS, 2, 16, 33)
    xs, ys, _ = tasks(1, 2, 33, torch.float64)
    wide = adapt(conv_double(model), xs[0], ys[0], pattern="11111", steps=3, lr=0.1, loss=general).parameters_dict()

    def adapted(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        own = adapt(model, xs[0].float(), ys[0], pattern="11111", steps=3, lr=0.1, loss=loss).parameters_dict()
        return [own[n] for n in wide]

    found = errors(adapted(F.cross_entropy), adapted(general), list(wide.values()))
    assert found.agree and found.mine < 1e-5, found  # the task is an easy one


def conv_double(model: nn.Module) -> nn.Module:
    twin = models.build(models.config_of(model))
    twin.load_state_dict(model.state_dict())
    return twin.double()


@needs_native
def test_divergence_and_nan_are_errors_with_the_step() -> None:
    model = conv4()
    xs, ys, _ = tasks(1, 2, 17, torch.float32)
    with pytest.raises(FloatingPointError, match=r"step \d of 3"):
        adapt(model, xs[0], ys[0], pattern="11111", steps=3, lr=1e38)
    xs[0, 1, 0, 3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="hold 1 NaN"):
        adapt(model, xs[0], ys[0], pattern="00011", steps=3, lr=0.1)


@needs_native
def test_the_operator_names_what_does_not_fit() -> None:
    x, labels = torch.randn(2, 4, 6), torch.zeros(2, 4, dtype=torch.long)
    weight, bias = torch.randn(2, 3, 6), torch.randn(1, 3)
    run = torch.ops.lambda_kernels.inner_loop
    constants: dict[str, Any] = dict(updated=[1, 0], geometry=[], eps=[], steps=3, rates=[0.1], query=None)
    good = dict(x=x, labels=labels, parameters=[weight, bias], **constants)
    rows, new, logits = run(**good)
    assert rows.shape == (4, 2) and [t.shape for t in new] == [weight.shape] and logits.shape == (0,)
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(parameters=[weight], updated=[1]), "need 2 parameters"),
        (dict(labels=labels[:1]), r"labels must be \[2, 4\] .* got \[1, 4\]"),
        (dict(labels=labels.int()), "labels must be .* in Long .* in Int"),
        (dict(parameters=[weight, torch.randn(3, 3)]), r"the bias of layer 0 must be \[1 or 2, 3\]"),
        (dict(parameters=[weight, bias.double()]), "the bias of layer 0 .* Float .* Double"),
        (dict(labels=labels + 3), "label 3"),
        (dict(x=x[..., :5]), r"the weight of layer 0 must be \[1 or 2, at least 1, 5\] .* got \[2, 3, 6\]"),
        (dict(parameters=[weight, bias[:, :2]]), r"the bias of layer 0 .* got \[1, 2\]"),
        (dict(rates=[0.1] * 4), "3 steps of 1 updated parameters need 1 rate or 3, got 4"),
        (dict(rates=[]), "need 1 rate or 3, got 0"),
    ]
    for change, text in wrong:
        with pytest.raises(RuntimeError, match=text):
            run(**{**good, **change})


def residual() -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)
            self.norm = nn.BatchNorm2d(2, track_running_stats=False)
            self.head = nn.Linear(2 * 5 * 5, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + torch.relu(self.norm(self.conv(x)))).flatten(1))

    return Residual()


def tracking() -> nn.Module:
    block = lk.ConvBlock(2, 4, track_running_stats=True)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 2 * 2, WAYS))


def shared_block() -> nn.Module:
    block = lk.ConvBlock(2, 2, pool=1)
    return nn.Sequential(block, block, nn.Flatten(), nn.Linear(2 * 5 * 5, WAYS))


class Sized(nn.Module):
    """A convolution, a norm, some function, and a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], flatten: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2, track_running_stats=False)
        self.head = nn.Linear(2 * 5 * 5 if flatten else 5, WAYS)
        self.function, self.flatten = function, flatten

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.norm(self.conv(x)))
        return self.head(x.flatten(1) if self.flatten else x)


NO_CHAIN: dict[str, tuple[nn.Module, str]] = {
    "residual": (residual(), "the step add stands behind block 1: a chain is fused blocks, a flattening and a linear"),
    "tracking": (tracking(), r"block 1 \(0.conv\) updates running statistics"),
    "twice": (shared_block(), r"two layers share a parameter \(0.conv.weight is 1.conv.weight too\)"),
    "sigmoid": (Sized(torch.sigmoid), r"block 1 \(conv\) is not fused: no ReLU alone follows its norm"),
    "not-flattened": (Sized(torch.relu, flatten=False), "nothing flattens the images between the last block and the"),
    "head": (nn.Sequential(lk.ConvBlock(2, 2), nn.Flatten()), "the network ends with 1, not with a linear layer"),
    "two-heads": (
        nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.Linear(4, WAYS)),
        "layer 0 stands ahead of any block: a chain is fused blocks",
    ),
}


@pytest.mark.parametrize("name", NO_CHAIN)
def test_why_a_network_is_no_chain(name: str) -> None:
    model, words = NO_CHAIN[name]
    program = program_of(model, torch.randn(4, 2, 5, 5))
    assert Chain.find(program, program.steps) is None
    assert re.search(words, Chain.why_not(program, program.steps)), Chain.why_not(program, program.steps)


def test_why_a_shared_parameter_and_an_untraceable_network_are_no_chain() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    program = program_of(nn.Sequential(first, second), torch.randn(2, 4))
    assert Chain.why_not(program, program.steps).startswith("two layers share a parameter (")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    program = program_of(Odd(), torch.randn(2, 4))
    assert Chain.why_not(program, program.steps).startswith("the network is not looked into: Data-dependent branching")
    program = program_of(conv4(), torch.randn(4, 2, 17, 17))
    assert Chain.why_not(program, program.steps) == "" and Chain.find(program, program.steps) is not None
    assert Chain.why_not(program, ()) == "no layer depends on an updated parameter"


@needs_native
def test_why_a_backend_takes_no_call() -> None:
    program = program_of(conv4(), torch.randn(4, 2, 17, 17))
    chain = Chain.find(program, program.steps)
    assert chain is not None
    xs, ys, _ = tasks(2, 2, 17, torch.float32)
    assert chain.refusals(xs, ys) == [] and chain.backend(xs, ys).name == "native"
    wrong: list[tuple[Tensor, Tensor, str]] = [
        (xs, ys.float(), "the labels are float32, not class numbers (int64)"),
        (xs, ys[0], "the labels are [6], not one class number per image"),
        (xs[:, :, :1], ys, "block 1 (block1.conv) takes 2 channels, it gets 1"),
        (xs[..., :9, :9], ys, "block 4 (block4.conv) pools by 2, its convolution gives 1x1 pixels"),
        (torch.cat([xs, xs], 4), ys, "the linear layer"),
        (xs[0], ys, "the layers take images [C, H, W], the inputs are [17, 17]"),
        (xs.bfloat16(), ys, "backend reference does not run the inner loop: "),
    ]
    for x, y, words in wrong:
        (why,) = chain.refusals(x, y)
        assert why.startswith(words), why
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chain.refusals(xs, ys) == ["autocast is on"]
    with lk.use_backend("reference"):
        (why,) = chain.refusals(xs, ys)
    assert "the reference adapts through autograd" in why

    def mapped(x: Tensor) -> Tensor:
        assert chain.refusals(x, ys) == ["a transform of torch.func is active"]
        return x

    torch.func.vmap(mapped)(xs.unsqueeze(0))


@needs_native
def test_an_inner_loop_by_names() -> None:
    program = program_of(conv4(), torch.randn(4, 2, 17, 17))
    chain = Chain.find(program, program.steps)
    assert chain is not None
    model = conv4()
    state = {n: p.detach() for n, p in model.named_parameters()}
    updated = {n for n in state if n.startswith(("head", "block4"))} & set(chain.names)
    xs, ys, xq = tasks(2, 2, 17, torch.float32)
    rows, new, logits = chain.inner_loop(state, updated, xs, ys, steps=2, rates=[0.1], query=xq)
    assert rows.shape == (3, 2) and list(new) == chain.order(updated) and logits is not None
    assert logits.shape == (2, 4, WAYS) and all(p.shape == (2, *state[n].shape) for n, p in new.items())
    frozen = [0.0 if n.startswith("block") else 0.1 for n in chain.order(updated)] * 2
    _, some, _ = chain.inner_loop(state, updated, xs, ys, steps=2, rates=frozen)
    assert all(torch.equal(some[n], state[n].expand_as(some[n])) == n.startswith("block") for n in some)
    run = chain.prepare(state, updated, xs[:1], ys[:1])
    assert run is not None
    alone = run(xs[0], ys[0], 2, [0.1])
    _, one, _ = chain.inner_loop(state, updated, xs[:1], ys[:1], steps=2, rates=[0.1])
    assert alone is not None and all(map(torch.equal, alone, one.values()))
    assert chain.prepare(state, updated, xs[:1], ys[:1].float()) is None


@pytest.mark.parametrize("build", [residual, tracking, shared_block])
def test_what_is_no_chain_takes_the_general_path(build: Callable[[], nn.Module]) -> None:
    model = build()
    xs, ys, _ = tasks(1, 2, 5, torch.float32)
    plan = plan_of(model, program_of(model, xs[0]))
    bits = "1" * len(plan.layers)
    assert plan.part(plan.updated(bits, "follow")).chain is None
    adapt(model, xs[0], ys[0], pattern=bits, steps=2, lr=0.01)


FRESH = """
import torch
from lambda_maml import adapt, adapt_tasks, models
torch.set_num_threads(2)
model = models.conv4(3, 1, 4, 28)
xs, ys = torch.randn(4, 6, 1, 28, 28), torch.arange(6).remainder(3).expand(4, 6).contiguous()
for _ in range(3):
    adapt(model, xs[0], ys[0], pattern="11111", steps=2, lr=0.1)
    adapt_tasks(model, xs, ys, xs, pattern="11111", steps=2, lr=0.1)
print(torch.get_num_threads())
"""


@needs_native
def test_tasks_spread_over_threads_come_back() -> None:
    """oneDNN's primitives for two threads must not be run by one: in a fresh process, whose workers are new."""
    assert fresh(FRESH).strip() == "2"
