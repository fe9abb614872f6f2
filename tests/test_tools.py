"""torch's tools around converted networks: torch.compile, torch.export, ONNX, the flop counter, opcheck."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT, GRADIENT
from test_norms import by_a_loop, by_transforms
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lambda_kernels as lk
from lambda_kernels.agreement import within
from lambda_maml import adapt, models

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's own, about what it does not look into


class Written(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(images) * scale


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.LeakyReLU(), nn.Flatten(),
        nn.Linear(64, 3),
    ).double()  # fmt: skip


NETWORKS: dict[str, tuple[Any, str]] = {"layers": (layers, "input"), "forward": (lambda: Written(layers()), "images")}


def both(name: str) -> tuple[nn.Module, nn.Module]:
    stock = NETWORKS[name][0]()
    return stock, lk.convert(copy.deepcopy(stock))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_network_of_any_batch_size(name: str, x: Tensor) -> None:
    stock, ours = both(name)
    compiled = torch.compile(ours, dynamic=True, backend="aot_eager", fullgraph=True)
    for images in (x, x[:4], torch.cat([x, x])):
        torch.testing.assert_close(compiled(images), stock(images), **EXACT)
    F.cross_entropy(compiled(x), torch.arange(3).repeat(2)).backward()
    F.cross_entropy(stock(x), torch.arange(3).repeat(2)).backward()
    for mine, theirs in zip(ours.parameters(), stock.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, **GRADIENT)


@pytest.mark.parametrize("name", NETWORKS)
def test_transforms_inside_a_compiled_function(name: str, x: Tensor) -> None:
    stock, ours = both(name)
    both_tasks = torch.stack([x, 2 * x])
    mapped = torch.compile(lambda xs: torch.func.vmap(lambda q: ours(q))(xs), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(mapped(both_tasks), torch.stack([stock(x), stock(2 * x)]), **EXACT)
    gradients = torch.compile(
        lambda xs: torch.func.vmap(torch.func.grad(lambda q: ours(q).square().sum()))(xs), backend="aot_eager"
    )
    want = [
        torch.autograd.grad(stock(q).square().sum(), q)[0]
        for q in (x.clone().requires_grad_(), (2 * x).requires_grad_())
    ]
    torch.testing.assert_close(gradients(both_tasks), torch.stack(want), **GRADIENT)


@pytest.mark.parametrize("name", NETWORKS)
def test_nested_transforms_inside_a_compiled_function(name: str) -> None:
    """torch.compile of torch's own layers gives the wrong second derivatives of torch's own norms."""
    stock, ours = both(name)
    xs, xq = (torch.randn(2, n, 3, 8, 8, dtype=torch.float64) for n in (6, 4))
    compiled = torch.compile(lambda a, b: by_transforms(ours, a, b), backend="aot_eager", fullgraph=True)
    got, want = compiled(xs, xq), by_a_loop(stock, xs, xq)
    for key in want:
        torch.testing.assert_close(got[key], want[key], **GRADIENT, msg=functools.partial("{}: {}".format, key))


def test_a_compiled_function_that_adapts(x: Tensor) -> None:
    _, ours = both("layers")
    ys = torch.arange(3).repeat(2)

    def episode(x: Tensor) -> Tensor:
        result: Tensor = adapt(ours, x, ys, pattern="011", steps=2, lr=0.1)(x)
        return result

    torch.testing.assert_close(torch.compile(episode, backend="eager")(x), episode(x), **EXACT)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_of_any_batch_size_by_the_arguments_name(name: str, strict: bool, x: Tensor) -> None:
    stock, ours = both(name)
    batch = {NETWORKS[name][1]: {0: torch.export.Dim("batch", min=2)}}
    if name == "forward":
        batch["scale"] = None  # type: ignore[assignment]
        exported = torch.export.export(ours, (x, 1.0), dynamic_shapes=batch, strict=strict)
        torch.testing.assert_close(exported.module()(x[:3], 1.0), stock(x[:3]), **EXACT)
    else:
        exported = torch.export.export(ours, (x,), dynamic_shapes=batch, strict=strict)
        torch.testing.assert_close(exported.module()(x[:3]), stock(x[:3]), **EXACT)
    assert set(exported.state_dict) == set(stock.state_dict())
    torch.testing.assert_close(ours(x), stock(x), **EXACT)  # none the worse


@pytest.mark.parametrize("name", NETWORKS)
def test_the_flop_counter_counts_as_for_torchs_layers(name: str, x: Tensor) -> None:
    counted = []
    for network in both(name):
        for graph in (True, False):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(graph):
                y = network(x)
                if graph:
                    y.sum().backward()
            counted.append(counter.get_total_flops())
    assert counted[:2] == counted[2:] and min(counted) > 0


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("what", ["converted", "conv4", "learner"])
def test_an_onnx_file_gives_what_the_network_gives(what: str, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 5)
    )
    network: nn.Module = lk.convert(plain) if what == "converted" else models.conv4(5, 1, 4, 16)
    if what == "learner":
        xs, ys = torch.randn(5, 1, 16, 16), torch.arange(5)
        network = adapt(network, xs, ys, pattern="00011", steps=2, lr=0.1)
    x, file = torch.randn(4, 1, 16, 16), tmp_path / "network.onnx"
    with torch.no_grad():
        want = network.eval()(x)
    torch.onnx.export(network, (x,), file, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, **within(torch.float32, "gradient"))
