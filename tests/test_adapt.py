"""`adapt` against the plain loop of loops.py, in float64 unless a test says otherwise."""

from __future__ import annotations

import copy

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, NETWORKS, close, compare, conv4_groups, own_conv4, plain_loop, torch_conv4
from torch import Tensor

import lambda_kernels as lk
from lambda_maml import Pattern, adapt, models

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = [str(p) for p in Pattern.all(5)]
SCHEDULES = ["11111,00001", "00001,11111", "00011,11111,00100"]


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_equals_the_plain_loop(pattern: str, norm: str, second_order: bool) -> None:
    compare(
        own_conv4(CONV4.network), CONV4, pattern, norm=norm, second_order=second_order, steps=2 if second_order else 3
    )


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("pattern", SCHEDULES)
def test_schedules_equal_the_plain_loop(pattern: str, second_order: bool) -> None:
    compare(own_conv4(CONV4.network), CONV4, pattern, second_order=second_order, steps=4)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("steps", [0, 1])
def test_no_step_and_one_step(steps: int, second_order: bool) -> None:
    for pattern in ("11111", "00011", "00001,11111"):
        compare(own_conv4(CONV4.network), CONV4, pattern, steps=steps, second_order=second_order)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_a_stock_network_converted_or_not(converted: bool, backend: str) -> None:
    for pattern in ("11111", "00011", "01010"):
        model = copy.deepcopy(CONV4.network)
        with lk.use_backend(backend):
            compare(lk.convert(model) if converted else model, CONV4, pattern, second_order=True)


def test_float32_is_as_near_to_the_truth_as_the_plain_loop() -> None:
    single = CONV4._replace(network=copy.deepcopy(CONV4.network).float())
    model = own_conv4(CONV4.network).float()
    for pattern in ("11111", "00100"):
        # second-order gradients of five layers in float32: rounding grows from layer to layer
        compare(model, single, pattern, second_order=True, rtol=2e-3, scale=2e-4)


@pytest.mark.parametrize("second_order", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("norm", ["follow", "never"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name: str, norm: str, second_order: bool) -> None:
    case = NETWORKS[name]()
    for pattern in Pattern.all(len(case.groups)):
        text = str(pattern)
        if text.count("1") in (1, len(text)) or text[:2] == "01" or text[:3] == "101":
            if name == "no-grad-inside" and "1" not in text[1:]:
                continue  # the plain loop has no gradient there; see test_a_pattern_without_gradient
            compare(copy.deepcopy(case.network), case, text, norm=norm, second_order=second_order)
            compare(lk.convert(copy.deepcopy(case.network)), case, text, norm=norm, second_order=second_order, steps=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_schedules_on_networks_of_all_kinds(name: str) -> None:
    case = NETWORKS[name]()
    n = len(case.groups)
    compare(case.network, case, f"{'1' * n},{'0' * (n - 1)}1,{'1' * n}", second_order=True)


def test_a_pattern_without_gradient() -> None:
    case = loops.three(loops.NoGrad)
    xs, ys, _, _ = case.task()
    with pytest.raises(ValueError, match="100.*no gradient"):
        adapt(case.network, xs, ys, pattern="100")


def test_a_loss_of_the_users_own() -> None:
    model = own_conv4(CONV4.network)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(logits, F.one_hot(y, 2).to(logits.dtype))

    compare(model, CONV4, "00111", loss=loss, second_order=True)


def test_float_targets() -> None:
    case = loops.batch_norm_mlp()
    xs, _, xq, _ = case.task()
    targets, query = torch.randn(len(xs), 2, dtype=torch.float64), torch.randn(len(xq), 2, dtype=torch.float64)
    want = plain_loop(case.network, case.groups, "011", xs, targets, xq, query, steps=3, lr=0.1, loss=F.mse_loss)
    learner = adapt(case.network, xs, targets, pattern="011", steps=3, lr=0.1, loss=F.mse_loss)
    close(learner(xq), want.logits, "predictions")


@pytest.mark.parametrize("layout", ["channels-last", "sliced", "expanded"])
def test_layouts_of_the_support_images(layout: str) -> None:
    network = torch_conv4(in_channels=2)
    model = models.conv4(ways=2, in_channels=2, width=3, image_size=16).double()
    model.load_state_dict(network.state_dict())
    xs = torch.randn(4, 2, 16, 16, dtype=torch.float64)
    if layout == "channels-last":
        xs = xs.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        xs = torch.randn(8, 4, 16, 40, dtype=torch.float64)[::2, 1:3, :, 3:35:2]
    else:
        xs = xs[:, :1].expand(-1, 2, -1, -1)
    ys = torch.tensor([0, 1, 0, 1])
    want = plain_loop(network, conv4_groups(), "10011", xs, ys, xs, ys, steps=2, lr=0.1)
    close(adapt(model, xs, ys, pattern="10011", steps=2, lr=0.1)(xs), want.logits, "logits")
