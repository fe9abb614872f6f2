"""Conv2d, Linear and ConvBlock beside torch's layers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from cases import EXACT
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.agreement import within

PAIRS: dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = {
    "conv2d": (nn.Conv2d, lk.Conv2d, (4, 6, 3), {"padding": 1, "groups": 2}),
    "conv2d-no-bias": (nn.Conv2d, lk.Conv2d, (4, 6, (3, 2)), {"stride": 2, "bias": False}),
    "linear": (nn.Linear, lk.Linear, (7, 3), {}),
    "linear-no-bias": (nn.Linear, lk.Linear, (7, 3), {"bias": False}),
}


def twins(name: str, **more: Any) -> tuple[nn.Module, nn.Module]:
    """torch's layer and ours, made from the same seed."""
    stock, mine, args, kwargs = PAIRS[name]
    made = []
    for cls in (stock, mine):
        torch.manual_seed(5)
        made.append(cls(*args, **kwargs, **more))
    return made[0], made[1]


def example(layer: nn.Module, *lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*lead, *((5, 4, 8, 9) if isinstance(layer, nn.Conv2d) else (5, 7)), dtype=dtype)


@pytest.mark.parametrize("name", PAIRS)
def test_constructor_and_state_dict_are_torchs(name: str) -> None:
    stock, mine = twins(name)
    assert inspect.signature(type(mine)) == inspect.signature(type(stock)) and repr(mine) == repr(stock)
    assert list(mine.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), stock.state_dict().values()))
    for source, target in ((stock, mine), (mine, stock)):
        with torch.no_grad():
            for p in source.parameters():
                p.mul_(2)
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        x = example(stock)
        torch.testing.assert_close(mine(x), stock(x))


@pytest.mark.parametrize("name", PAIRS)
def test_training_step_is_torchs(name: str) -> None:
    stock, mine = twins(name, dtype=torch.float64)
    x = example(stock, dtype=torch.float64)
    for layer in (stock, mine):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(mine.state_dict(), stock.state_dict(), **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1, 2), "same", "valid"], ids=str)
def test_padding_modes(mode: Any, padding: Any) -> None:
    made = []
    for cls in (nn.Conv2d, lk.Conv2d):
        torch.manual_seed(0)
        made.append(cls(3, 4, (4, 3), padding=padding, padding_mode=mode, dilation=(1, 2)))
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(made[1](x), made[0](x))
    torch.testing.assert_close(made[1](x[0]), made[0](x[0]))
    tasks = torch.randn(3, 2, 3, 9, 8)
    torch.testing.assert_close(made[1](tasks), torch.stack([made[0](t) for t in tasks]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", PAIRS)
def test_autocast_is_torchs(name: str, dtype: torch.dtype) -> None:
    stock, mine = twins(name, dtype=dtype)
    x = example(stock, dtype=dtype)
    results = []
    for layer in (stock, mine):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().mean().backward()
        results.append((y, layer.weight.grad))
    assert results[1][0].dtype == results[0][0].dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    # a gradient of a mean: values far below 1
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=1e-3)


def test_autocast_of_a_block_is_torchs() -> None:
    block = lk.ConvBlock(3, 5)
    x = torch.randn(4, 3, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = block(x), lk.to_torch(block)(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), **within(got.dtype))


def test_autocast_still_checks() -> None:
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="weight is torch.float64, x is torch.bfloat16"),
    ):
        lk.functional.linear(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.float64))


def plain_block(pool: int = 2, **norm: Any) -> nn.Module:
    """A ConvBlock's layers in plain PyTorch, under the same names."""
    torch.manual_seed(5)
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(3, 5, 3, padding=1, dtype=torch.float64))
    block.add_module("norm", nn.BatchNorm2d(5, **norm, dtype=torch.float64))
    block.add_module("relu", nn.ReLU())
    block.add_module("pool", nn.MaxPool2d(pool) if pool > 1 else nn.Identity())
    return block


@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize(
    "norm",
    [
        {"track_running_stats": False},
        {"track_running_stats": True},
        {"track_running_stats": True, "momentum": None},
        {"track_running_stats": True, "momentum": 0.3, "eps": 1e-2, "affine": False},
    ],
    ids=["batch", "running", "cumulative", "no-affine"],
)
def test_block_trains_and_evaluates_as_torchs(norm: dict[str, Any], pool: int) -> None:
    stock = plain_block(pool, **norm)
    torch.manual_seed(5)
    mine = lk.ConvBlock(3, 5, pool=pool, dtype=torch.float64, **norm)
    assert list(mine.state_dict()) == list(stock.state_dict())
    mine.load_state_dict(stock.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (stock, mine)]
    for _ in range(4):
        x = torch.randn(4, 3, 9, 7, dtype=torch.float64)
        for layer, optimizer in zip((stock, mine), optimizers):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(mine.state_dict()), dict(stock.state_dict()), **EXACT)
    stock.eval(), mine.eval()
    torch.testing.assert_close(mine(x), stock(x), **EXACT)
    before = copy.deepcopy(mine.state_dict())
    mine(x)
    torch.testing.assert_close(mine.state_dict(), before, rtol=0, atol=0)
    mine.train()
    stock.load_state_dict(mine.state_dict())


def replaced(part: str, layer: nn.Module) -> lk.ConvBlock:
    block = lk.ConvBlock(3, 5, dtype=torch.float64)
    setattr(block, part, layer)
    return block


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("pool", nn.AvgPool2d(2)),
        ("pool", nn.MaxPool2d(3, 2)),
        ("pool", nn.MaxPool2d(2, ceil_mode=True)),
        ("pool", nn.MaxPool2d(2, padding=1)),
        ("relu", nn.LeakyReLU(0.5)),
        ("norm", nn.InstanceNorm2d(5, affine=True).double()),
        ("conv", nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect").double()),
        ("conv", nn.Conv2d(3, 5, 3, padding="same").double()),
        ("conv", nn.Sequential(nn.Conv2d(3, 5, 1)).double()),
    ],
    ids=["avg-pool", "overlapping", "ceil", "padded", "leaky", "instance-norm", "reflect", "same", "sequential"],
)
def test_a_replaced_part_is_the_one_that_runs(part: str, layer: nn.Module) -> None:
    block, x = replaced(part, layer), torch.randn(4, 3, 9, 7, dtype=torch.float64)
    want = block.pool(block.relu(block.norm(block.conv(x))))
    torch.testing.assert_close(block(x), want, **EXACT)
    torch.testing.assert_close(lk.convert(nn.Sequential(block))(x), want, **EXACT)


@pytest.mark.parametrize("part", ["conv", "norm", "relu", "pool"])
def test_hooks_of_a_blocks_parts_are_called(part: str) -> None:
    block, x, seen = lk.ConvBlock(3, 5), torch.randn(4, 3, 9, 7), []
    fused = block(x)
    getattr(block, part).register_forward_hook(lambda m, i, o: seen.append(o.shape))
    torch.testing.assert_close(block(x), fused)
    assert len(seen) == 1


def test_block_with_tasks() -> None:
    block, x = lk.ConvBlock(3, 5), torch.randn(2, 4, 3, 9, 7)
    torch.testing.assert_close(block(x), torch.stack([block(t) for t in x]))
    tracking = lk.ConvBlock(3, 5, track_running_stats=True)
    with pytest.raises(ValueError, match=r"running statistics are of one network, x \[2, 4, 3, 9, 7\]"):
        tracking(x)
    assert tracking.norm.num_batches_tracked is not None and not tracking.norm.num_batches_tracked.any()


@pytest.mark.parametrize("statistics", ["the batch's", "running", "lost"])
def test_a_block_of_no_images_is_torchs(statistics: str) -> None:
    mine: Any = lk.ConvBlock(2, 3, pool=2, track_running_stats=statistics != "the batch's").double()
    if statistics == "lost":  # as after norm.running_mean = norm.running_var = None
        mine.norm.running_mean = mine.norm.running_var = None
    stock = lk.to_torch(mine)
    for block in (mine, stock):
        block(torch.ones(2, 2, 6, 6, dtype=torch.float64) * torch.arange(6.0))
        y = block(torch.empty(0, 2, 7, 6, dtype=torch.float64))
        assert y.shape == (0, 3, 3, 3)
        y.sum().backward()
    for (name, a), (_, b) in zip(mine.named_buffers(), stock.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert all(not p.grad.any() for p in mine.norm.parameters())
