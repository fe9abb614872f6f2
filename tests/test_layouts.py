"""Memory layouts: what the user gave contiguous behaves as contiguous, wherever a network's own code looks.

Truth is the plain loop on contiguous images. What could end the process runs in one of its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from machine import fresh
from plain import Plain, far, plain
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.program import program_for
from lambda_maml import LambdaMAML, Pattern, adapt, adapt_tasks

pytestmark = pytest.mark.usefixtures("one_thread")
D = torch.float64


def cut(h: Tensor) -> Tensor:
    h.flatten(1)[:, :20] = 0.5
    return h


def through_view(h: Tensor) -> Tensor:
    h.view(h.size(0), -1)[:, ::3].mul_(0.1)
    return h


def through_contiguous(h: Tensor) -> Tensor:
    h.contiguous().mul_(0.5)
    return h


# What gives or writes something else on channels-last memory.
SEES_LAYOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten-written": cut,
    "view-written": through_view,
    "contiguous-written": through_contiguous,
    "reshape-written": lambda h: (h.reshape(len(h), -1)[:, 1::2].neg_(), h)[1],
    "as-strided": lambda h: h + torch.as_strided(h, (len(h), 1, 1, 1), (1, 1, 1, 1)),
    "stride": lambda h: h * h.stride(1) / 10,
    "view-as": lambda h: h + h.view(len(h), 2, -1).cumsum(1).reshape(h.shape),
    "ravel": lambda h: (h.ravel().mul_(2), h)[1],
}


class Plainly(nn.Module):
    """A convolution, alone or as a block, and what looks at its result."""

    def __init__(self, step: Callable[[Tensor], Tensor], fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False) if fused else None
        self.head = nn.Linear(4, 3)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.norm is not None:
            h = F.max_pool2d(F.relu(self.norm(h)), 2)
        return self.head(self.step(h).mean((2, 3)))


def task(dtype: torch.dtype = D) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(6, 3, 5, 7, generator=generator, dtype=D).to(dtype),
        torch.arange(3).repeat(2),
        torch.randn(4, 3, 5, 7, generator=generator, dtype=D).to(dtype),
    )


SEEN = [
    *(
        pytest.param(*of, D, id="-".join(map(str, of)))
        for of in itertools.product(SEES_LAYOUT, (False, True), ("01", "11"))
    ),
    *(pytest.param(step, False, "11", torch.float32, id=f"{step}-float32") for step in SEES_LAYOUT),
]


@pytest.mark.parametrize(("step", "fused", "pattern", "dtype"), SEEN)
def test_code_that_sees_the_layout_sees_the_users(step: str, fused: bool, pattern: str, dtype: torch.dtype) -> None:
    xs, ys, xq = task(dtype)
    network = Plainly(SEES_LAYOUT[step], fused).to(dtype)
    near, nearer = (1e-10, 1e-12) if dtype == D else (1e-5, 1e-5)
    names = [n for n in dict(network.named_parameters()) if pattern == "11" or n.startswith("head")]
    truth: Plain = plain(network, lambda net: F.cross_entropy(net(xs), ys), names=names)
    want = truth(xq)
    assert far(lk.convert(Plainly(SEES_LAYOUT[step], fused).to(dtype))(xs), network(xs)) < nearer
    for model in (network, lk.convert(Plainly(SEES_LAYOUT[step], fused).to(dtype))):
        for second_order in (False, True):
            learner = adapt(model, xs, ys, pattern=pattern, steps=3, lr=0.1, second_order=second_order)
            assert far(learner(xq), want) < near
            batch = (torch.stack([t, t.flip(0)]) for t in (xs, ys, xq))
            logits = adapt_tasks(model, *batch, pattern=pattern, steps=3, lr=0.1, second_order=second_order)
            assert far(logits[0], want) < near
        clone = LambdaMAML(model, 0.1, pattern=pattern).clone()
        for _ in range(3):
            clone.adapt(F.cross_entropy(clone(xs), ys))
        assert far(clone(xq), want) < near


def test_random_masks_behind_a_block_are_those_of_torchs_layers() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        block = [nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*block, nn.Flatten(), nn.Linear(140, 3)).to(D)

    xs, ys, xq = task()
    stock, converted = network(), lk.convert(network())
    results = []
    for net in (stock, converted):
        torch.manual_seed(1)
        results.append(net(xs))
    assert far(*results) < 1e-12
    torch.manual_seed(1)
    want = plain(stock, lambda net: F.cross_entropy(net(xs), ys))
    torch.manual_seed(1)
    learner = adapt(converted, xs, ys, pattern="11", steps=3, lr=0.1)
    assert far(learner(xq), want(xq)) > 1e-3  # the next masks are others
    got = learner.parameters_dict()
    assert all(far(got[n], want.fast[n]) < 1e-10 for n in got)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 4, 5, 6)], ids=["images", "tasks"])
def test_a_blocks_result_is_contiguous_where_its_images_are(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    block = lk.ConvBlock(shape[-3], 8)
    given = (block.conv.weight, None, block.norm.weight, block.norm.bias)
    with torch.no_grad():
        assert block(x).is_contiguous() and lk.functional.conv_block(x, *given).is_contiguous()
    assert block(x).is_contiguous() and lk.functional.conv_block(x, *given).is_contiguous()


def test_blocks_hand_on_their_own_layout_to_blocks_alone() -> None:
    model = nn.Sequential(lk.ConvBlock(3, 4), lk.ConvBlock(4, 4), nn.Identity(), lk.ConvBlock(4, 4, pool=1))
    x = torch.randn(2, 3, 16, 16)
    program = program_for(model, (x,), {})
    blocks = [getattr(step.call, "between", None) for step in program.steps if step.kind == "block"]
    assert blocks == [True, False, False]
    assert program(model, x).is_contiguous()


NETWORKS = {
    "group-norm-first": "nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 1), nn.ReLU()",
    "group-norm-behind-a-frozen-conv": "nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)",
    "group-norm-behind-a-frozen-block": "lk.ConvBlock(3, 4, pool=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)",
}
ADAPTS = """
import torch
from torch import nn
import lambda_kernels as lk
from lambda_maml import adapt
from lambda_maml.network import layers_of
torch.manual_seed(0)
xs, ys = torch.randn(6, 3, 5, 7), torch.arange(3).repeat(2)
for convert in (False, True):
    net = nn.Sequential({network}, nn.Flatten(), nn.Linear(140, 3))
    net = lk.convert(net) if convert else net
    n = len(layers_of(net))
    bits = {{format(i, f"0{{n}}b") for i in range(1, 2**n)}}
    for pattern in bits:
        for second_order in (False, True):
            print(adapt(net, xs, ys, pattern=pattern, second_order=second_order)(xs).isfinite().all())
"""


@pytest.mark.parametrize("network", NETWORKS)
def test_group_norm_on_what_needs_no_gradient_does_not_end_the_process(network: str) -> None:
    """ATen's GroupNorm backward on channels-last memory dereferences null where its input needs no gradient."""
    assert "False" not in fresh(ADAPTS.format(network=NETWORKS[network]))


CONVOLVES = """
import torch
from torch import nn
import lambda_kernels as lk
torch.manual_seed(0)
last = torch.channels_last
for height, side, stride, padding in ((5, 1, 2, 1), (7, 3, 3, 2), (2, 2, 3, 2)):
    x = torch.randn(3, 4, height, 1).contiguous(memory_format=last).requires_grad_()
    conv = lk.Conv2d(4, 8, (side, 1), stride, padding, dilation=2)
    want = nn.functional.conv2d(x.detach().contiguous().double(), conv.weight.double(), conv.bias.double(), stride,
                                padding, 2)
    y = conv(x)
    y.square().sum().backward()
    assert (y - want).abs().max() < 1e-5
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    block = lk.convert(nn.Sequential(nn.Conv2d(4, 8, (side, 1), stride, padding, dilation=2), norm, nn.ReLU()))
    block(x.detach()), block(x).sum().backward()
print("ok")
"""


def test_a_dilated_kernel_side_of_one_does_not_end_the_process() -> None:
    """oneDNN faults there in channels-last memory; the dilation of one pixel changes nothing, so none is asked for."""
    assert "ok" in fresh(CONVOLVES)


class Residual(nn.Module):
    """Two convolutions and a norm around a sum, which is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(32, track_running_stats=False), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x))
        return self.head(F.adaptive_avg_pool2d(F.leaky_relu(h + self.norm(self.second(h))), 1).view(len(x), -1))


def test_a_network_that_is_no_chain_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    laid: list[torch.Size] = []
    images, contiguous = lk.functional._laid, []

    def noted(x: Tensor, backend: Any) -> Tensor:
        laid.append(x.shape)
        contiguous.append(x.is_contiguous())
        return images(x, backend)

    monkeypatch.setattr(lk.functional, "_laid", noted)
    torch.manual_seed(0)
    network = Residual()
    xs, ys, xq = (t.float() if t.is_floating_point() else t for t in task())
    learner = adapt(network, xs, ys, pattern="111", steps=2, lr=0.1)
    assert set(laid) == {(1, *xs.shape)} and all(contiguous)  # the images alone, never what lies between the layers
    truth = plain(network.double(), lambda net: F.cross_entropy(net(xs.double()), ys), steps=2)
    assert far(learner(xq).double(), truth(xq.double())) < 1e-5


@pytest.mark.filterwarnings("error")  # torch's of an operator that cannot be mapped over channels-last images
def test_tasks_that_are_mapped_keep_the_layout_that_they_came_in() -> None:
    torch.manual_seed(0)
    network = Residual()
    xs, ys, xq = (t.float() if t.is_floating_point() else t for t in task())
    batch = [torch.stack([t, t.flip(0)]) for t in (xs, ys, xq)]
    for second_order in (False, True):
        logits = adapt_tasks(network, *batch, pattern="111", steps=2, lr=0.1, second_order=second_order)
        alone = adapt(network, xs, ys, pattern="111", steps=2, lr=0.1, second_order=second_order)(xq)
        assert far(logits[0], alone) < 1e-5


def test_images_that_are_given_channels_last_adapt_as_contiguous_ones() -> None:
    xs, ys, xq = task()
    last = [t.contiguous(memory_format=torch.channels_last) for t in (xs, xq)]
    for fused in (False, True):
        network = lk.convert(Plainly(lambda h: h * 2, fused).to(D))
        for bits in map(str, Pattern.all(2)):
            want = adapt(network, xs, ys, pattern=bits, steps=3, lr=0.1)(xq)
            assert far(adapt(network, last[0], ys, pattern=bits, steps=3, lr=0.1)(last[1]), want) < 1e-12


class LaidByItself(nn.Module):
    """A norm whose result the network itself lays channels-last, in front of a convolution or a block."""

    def __init__(self, norm: nn.Module, fused: bool, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.conv = nn.Conv2d(2, 4, 3, padding=1), norm, nn.Conv2d(4, 3, 3, padding=1)
        self.behind = nn.BatchNorm2d(3, track_running_stats=False) if fused else None
        self.layout = torch.channels_last if last else torch.contiguous_format

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.norm(self.first(x)).contiguous(memory_format=self.layout))
        return h if self.behind is None else torch.relu(self.behind(h))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("fused", [False, True], ids=["conv", "block"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True)], ids=["batch", "instance"])
def test_a_norm_in_front_of_images_that_a_network_lays_out_has_its_gradient(
    norm: nn.Module, fused: bool, images: int
) -> None:
    """ATen's backward of a norm is wrong for one channels-last image of certain strides. Truth is taken contiguous."""
    x = torch.randn(images, 2, 5, 4, dtype=D)
    stock = LaidByItself(copy.deepcopy(norm), fused, last=False).to(D)
    ours = lk.convert(LaidByItself(copy.deepcopy(norm), fused, last=True).to(D))
    for net in (stock, ours):
        y = net(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=D).view(y.shape)).sum().backward()
    for a, b in zip(stock.parameters(), ours.parameters()):
        assert a.grad is not None and b.grad is not None and far(a.grad, b.grad) < 1e-11


def named_channels_last(t: Tensor) -> Tensor:
    """The same memory of one channel, by the strides of channels-last."""
    return t.as_strided(t.shape, (t.stride(0), 1, *t.stride()[2:]))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["images", "weight", "both", "neither"])
@pytest.mark.parametrize("width, kernel, padding, step", [(1, 4, 2, 2), (5, 5, 1, 3), (3, 3, 0, 2)])
def test_one_channel_in_steps_to_a_single_column(
    width: int, kernel: int, padding: int, step: int, name: str, backend: str
) -> None:
    x, weight = torch.randn(15, 1, 4, width), torch.randn(4, 1, 2, kernel)
    given: dict[str, Any] = dict(stride=(1, step), padding=(1, padding))
    want = F.conv2d(x.double(), weight.double(), **given)
    assert want.shape[3] == 1
    x = named_channels_last(x) if name in ("images", "both") else x
    weight = named_channels_last(weight) if name in ("weight", "both") else weight
    with lk.use_backend(backend):
        got = lk.functional.conv2d(x, weight, None, **given)
        block = lk.functional.conv_block(x, weight, None, None, None, pool=1, **given)
    assert far(got.double(), want) < 1e-5  # float32
    assert (
        far(block.double(), F.relu(F.batch_norm(want, None, None, training=True))) < 1e-4
    )  # and a norm over few pixels


def test_steps_of_one_channel_to_a_single_column_on_a_chain() -> None:
    """Patches of 49 numbers: torch's library takes the first block."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 4, (7, 7), stride=2, padding=(3, 1))
    model = nn.Sequential(conv, nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    for weight in (conv.weight.data, named_channels_last(conv.weight.data)):
        conv.weight.data = weight
        xs, ys = torch.randn(15, 1, 8, 6), torch.arange(15) % 2
        got = adapt(model, xs, ys, pattern="11", steps=2, lr=0.1).parameters_dict()
        twin = copy.deepcopy(model).double()
        want = adapt(twin, xs.double(), ys, pattern="11", steps=2, lr=0.1).parameters_dict()
        assert all(far(got[n].double(), want[n]) < 1e-4 for n in want)  # float32, two steps
