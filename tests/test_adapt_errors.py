"""What `adapt` refuses, in words that name the fault and its place."""

from __future__ import annotations

from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import CONV4, own_conv4
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_maml import adapt

pytestmark = pytest.mark.usefixtures("one_thread")


def wrong(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
    xs, ys, _, _ = CONV4.task()
    given: dict[str, Any] = {
        "model": CONV4.network,
        "xs": xs,
        "ys": ys,
        "pattern": "00011",
        "steps": 2,
        "lr": 0.1,
        **changes,
    }
    with pytest.raises(error, match=match):
        adapt(given.pop("model"), given.pop("xs"), given.pop("ys"), **given)


@pytest.mark.parametrize("lr", [0, -0.1, float("nan"), float("inf"), "0.1", None])
def test_wrong_learning_rates(lr: Any) -> None:
    wrong("lr must be a positive number", lr=lr)


@pytest.mark.parametrize("steps", [-1, 1.5, "3", None])
def test_wrong_numbers_of_steps(steps: Any) -> None:
    wrong("steps must be a whole number", steps=steps)


def test_wrong_settings() -> None:
    wrong("norm must be 'follow' or 'never', got 'folow'", norm="folow")
    wrong(r"pattern '0011' has 4 bits, Sequential has 5 layers \(block1.conv, .*head\)", pattern="0011")
    wrong("pattern '000000' updates no layer|pattern '00000' updates no layer", pattern="00000")
    with torch.inference_mode():
        wrong("inference_mode", RuntimeError)


def test_wrong_support_sets() -> None:
    xs, ys, _, _ = CONV4.task()
    for shape in ([3, 1, 1, 16, 16], [1, 3, 1, 16, 16]):  # the layers would take the first axis for tasks
        wrong(r"expected images \[N, C, H, W\]: adapt_tasks", xs=xs[:1].expand(shape))
    wrong(r"N of at least 1 expected, got \[0, 1, 16, 16\]", xs=xs[:0], ys=ys[:0])
    wrong("batch_size|shape|match", Exception, xs=xs[:3])
    wrong("labels run from 0 to 2, the network's outputs from 0 to 1", ys=torch.tensor([0, 1, 2, 0]))
    wrong("labels run from -1 to 1", ys=torch.tensor([0, 1, -1, 0]))
    wrong("labels run from 0 to 2", ys=torch.tensor([0, 1, -100, 2]))
    wrong("xs is torch.float32, the network torch.float64", TypeError, xs=xs.float())
    wrong("x must be a floating-point tensor, got torch.uint8", TypeError, xs=xs.to(torch.uint8))
    wrong("ys is torch.bool.*long", TypeError, ys=ys.bool())
    wrong("2 channels|channels per group, expected 2", xs=xs.expand(-1, 2, -1, -1))
    wrong("features", xs=torch.randn(4, 1, 32, 32, dtype=torch.float64))
    wrong("xs must be a tensor, or hold tensors, got list", TypeError, xs=[1.0])
    wrong("ys must be a tensor, or hold tensors, got list", TypeError, ys=[0, 1, 0, 1])


def test_labels_beyond_what_the_network_tells_of_itself() -> None:
    case = loops.scaled()
    xs, _, _, _ = case.task()
    wrong("0 to 1|out of bounds", Exception, model=case.network, xs=xs, ys=torch.tensor([0, 1, 2, 0]), pattern="01")


def test_nan_images_and_diverging_rates() -> None:
    xs, _, _, _ = CONV4.task()
    bad = xs.clone()
    bad[2, 0, 3, 5] = float("nan")
    bad[1, 0, 0, 0] = float("inf")
    for backend in ("native", "reference"):
        with lk.use_backend(backend):
            for second_order in (False, True):
                wrong(
                    r"under 00011 with sgd\(lr=0.1\) diverged in step 1 of 2.*2 NaN or infinite",
                    FloatingPointError,
                    xs=bad,
                    second_order=second_order,
                )
                wrong(
                    r"lr=1e\+300\) diverged in step \d of 4",
                    FloatingPointError,
                    pattern="11111",
                    lr=1e300,
                    steps=4,
                    second_order=second_order,
                )


def test_a_loss_that_is_not_a_number() -> None:
    wrong(r"one number per task, got \[4\]", loss=lambda x, y: F.cross_entropy(x, y, reduction="none"))


def test_networks_that_cannot_be_adapted() -> None:
    xs, ys, _, _ = CONV4.task()
    wrong("Sequential has no parameters", model=nn.Sequential(nn.Flatten(), nn.ReLU()))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(256, 2).double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) + y

    wrong("Two.*2 inputs", model=Two(), pattern="1")


def test_an_auxiliary_head_behind_the_logits_says_nothing_of_the_labels() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.other = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.head(x)
            return logits + 0.0 * self.other(x).sum() if x is None else (logits, self.other(x))[0]

    adapt(Auxiliary(), torch.randn(3, 4), torch.arange(3), pattern="10", steps=1)


def test_a_pattern_that_is_no_text_is_named() -> None:
    xs, ys, _, _ = CONV4.task()
    with pytest.raises(ValueError, match=r"a pattern is a text like '00011', got \['1'\]"):
        adapt(own_conv4(CONV4.network), xs, ys, pattern=["1"])  # type: ignore[arg-type]
