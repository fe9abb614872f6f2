"""torch's readers of networks: torch.jit and torch.fx see torch's own operations, or it is said what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import EXACT
from converted import Residual
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_maml import adapt

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
NETWORKS = {
    "layers": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    ),
    "forward": Residual,
    "blocks": lambda: nn.Sequential(lk.ConvBlock(3, 4), nn.Flatten(), nn.Linear(64, 5)),
    "no block": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)),
}


def both(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    stock = NETWORKS[name]().double().eval()
    return lk.to_torch(stock), lk.convert(stock)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_traced_network_is_right_on_another_batch_size(name: str, x: Tensor) -> None:
    stock, ours = both(name)
    ours(x)
    with torch.no_grad():
        traced = torch.jit.trace(ours, (x,), check_trace=False)
        for images in (x, x[:2], torch.cat([x, x])):
            torch.testing.assert_close(traced(images), stock(images), **EXACT)
    assert "lambda_kernels::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_of_torch_fx_is_of_torchs_operations(name: str, x: Tensor) -> None:
    stock, ours = both(name)
    graph = torch.fx.symbolic_trace(ours)
    torch.testing.assert_close(graph(x[:2]), stock(x[:2]), **EXACT)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_scripted_network_is_of_torchs_layers_and_the_network_stays_converted(name: str, x: Tensor) -> None:
    stock, ours = both(name)
    kinds = [type(module) for module in ours.modules()]
    torch.testing.assert_close(torch.jit.script(ours)(x), stock(x), **EXACT)
    assert name == "no block" or [type(module) for module in ours.modules()] == kinds


def test_a_part_that_torch_jit_holds_runs_and_cannot_be_adapted(x: Tensor) -> None:
    stock, other = both("layers")[0], lk.to_torch(both("layers")[1])
    parts: Any = other
    whole = nn.Sequential(torch.jit.script(parts[:4]), parts[4], parts[5])
    torch.testing.assert_close(lk.convert(whole)(x), stock(x), **EXACT)
    for network in (whole, torch.jit.script(stock), torch.jit.trace(stock, (x,))):
        with pytest.raises(TypeError, match="is a module of torch.jit"):
            adapt(network, x, torch.arange(6) % 5, pattern=None, steps=1)
