"""models.resnet12: that of the papers, what patterns of stages run, and its way through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT, STEPS
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lambda_kernels as lk
from lambda_maml import Pattern, adapt, checkpoint, cli, explain, models
from lambda_maml.choice import candidates_of
from lambda_maml.train import BEST

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = [4, 4, 6, 8]
LAYERS = ("conv1", "conv2", "conv3", "shortcut.conv")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.resnet12(ways=3, in_channels=1, image_size=16, widths=WIDTHS).double()


XS, YS = torch.randn(6, 1, 16, 16, dtype=torch.float64), torch.arange(3).repeat(2)


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network in torch's functions alone."""

    def normed(x: Tensor, conv: str, norm: str) -> Tensor:
        weight = state[f"{conv}.weight"]
        y = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return F.batch_norm(y, None, None, state[f"{norm}.weight"], state[f"{norm}.bias"], training=True)

    for i in range(1, 5):
        s, y = f"stage{i}", x
        for j in (1, 2):
            y = F.leaky_relu(normed(y, f"{s}.conv{j}", f"{s}.norm{j}"), 0.1)
        y = normed(y, f"{s}.conv3", f"{s}.norm3") + normed(x, f"{s}.shortcut.conv", f"{s}.shortcut.norm")
        x = F.max_pool2d(F.leaky_relu(y, 0.1), 2)
    return F.linear(x.mean((2, 3)), state["head.weight"], state["head.bias"])


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_network_of_the_papers(model: nn.Module, training: bool) -> None:
    model.train(training)
    torch.testing.assert_close(model(XS), by_hand(model.state_dict(), XS), **EXACT)


@pytest.mark.parametrize(("widths", "millions"), [((64, 160, 320, 640), 12.42), ((64, 128, 256, 512), 8.00)])
def test_it_has_the_papers_number_of_weights(widths: tuple[int, ...], millions: float) -> None:
    with torch.device("meta"):
        network = models.resnet12(ways=5, in_channels=3, image_size=84, widths=widths)
    of_head = 5 * (widths[-1] + 1)
    assert round((sum(p.numel() for p in network.parameters()) - of_head) / 1e6, 2) == millions


def test_a_pattern_of_stages_updates_their_layers(model: nn.Module) -> None:
    names = [f"stage{i}.{layer}" for i in range(1, 5) for layer in LAYERS]
    assert models.layer_names(model) == [*names, "head"]
    assert str(Pattern.of(model, "stages:00011")) == "0" * 12 + "1" * 5
    assert str(Pattern.of(model, {"stage2": 1})) == "0" * 4 + "1" * 4 + "0" * 9
    with pytest.raises(ValueError, match=r"has 4 bits, ResNet12 has 5 parts .*stage4, head"):
        Pattern.of(model, "stages:0011")
    assert "not fused: no ReLU alone follows its norm" in lk.report(model, XS)


class Convolutions(TorchDispatchMode):
    """Counts ATen's convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_frozen_stages_run_once_and_the_result_is_the_plain_loops(model: nn.Module) -> None:
    model.train()
    told = explain(model, XS, YS, pattern="stages:00011")
    assert "39 of 55 operations run once, 16 in every step" in told and "stage4.conv1) is not fused" in told
    steps, lr = 3, 0.05
    with lk.use_backend("reference"), Convolutions() as convolutions:
        learner = adapt(model, XS, YS, pattern="stages:00011", steps=steps, lr=lr)
    assert convolutions.count == 12 + 4 * steps
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    moving = [k for k in state if k.startswith(("stage4", "head"))]
    for _ in range(steps):
        for k in moving:
            state[k].requires_grad_()
        grads = torch.autograd.grad(F.cross_entropy(by_hand(state, XS), YS), [state[k] for k in moving])
        state.update({k: (state[k] - lr * g).detach() for k, g in zip(moving, grads)})
    for name, value in learner.state_dict().items():
        torch.testing.assert_close(value, state[name], **STEPS)


def test_the_candidates_of_a_deep_network_are_by_stage(model: nn.Module) -> None:
    found = candidates_of(model, None)
    assert len(found) == 31 and found[0] == Pattern("0" * 16 + "1") and found[1] == Pattern("0" * 12 + "11110")
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    assert [str(p) for p in candidates_of(deep, None)] == ["0" * (9 - k) + "1" * k for k in range(1, 10)]


def test_settings_and_back(tmp_path: Path) -> None:
    settings = {"network": "resnet12", "ways": 3, "in_channels": 1, "image_size": [16, 32], "widths": WIDTHS}
    model = models.build(settings)
    assert models.config_of(model) == settings and models.image_shape(settings) == (1, 16, 32)
    assert models.config_of(models.build({**settings, "image_size": (16, 32)})) == settings
    checkpoint.save(tmp_path / "a.safetensors", model, {})
    again, meta = checkpoint.load(tmp_path / "a.safetensors")
    assert meta["network"] == settings and torch.equal(again(XS.float()), model(XS.float()))
    conv4 = models.conv4(ways=3, in_channels=1, width=4, image_size=16)
    with pytest.raises(ValueError, match="holds the network resnet12, not conv4: load it without a model"):
        checkpoint.load(tmp_path / "a.safetensors", conv4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"widths": [4, 4]}, "resnet12: widths must be 4 numbers, one per stage, got .4, 4."),
        ({"widths": [4, 0, 4, 4]}, r"resnet12: widths\[1\] must be a whole number of at least 1, got 0"),
        ({"image_size": 15}, "4 poolings need images of 16 pixels per side or more, got 15"),
        ({"image_size": [16, 8]}, "16 pixels per side or more, got 8"),
        ({"image_size": [16, 16, 16]}, "image_size must be a whole number of at least 1, got"),
        ({"ways": True}, "ways must be a whole number"),
        ({"width": 3}, "settings of resnet12: got an unexpected keyword argument 'width'"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"ways": 3, "in_channels": 1, "image_size": 16, **wrong}
    with pytest.raises(ValueError, match=words):
        models.create("resnet12", **settings)


def call(*args: Any) -> int:
    return cli.run([str(arg) for arg in args])


def test_the_command_line_trains_and_uses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--steps", 1, "--lr", 0.1, "--ways", 3, "--query", 2, "--val-tasks", 2, "--iterations", 1, "--first-order"]
    own = ["--network", "resnet12", "--network-args", f"widths={json.dumps(WIDTHS)}", "--pattern", "stages:00011"]
    assert call("train", "--out", tmp_path, *own, *short) == 0
    best = tmp_path / BEST
    assert call("eval", best, "--tasks", 2, "--pattern", "stages:00011") == 0
    assert "00000000000011111 on 2 test tasks" in capsys.readouterr().out
    for name in "abc":
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.new("L", (28, 20), 40 * ord(name) % 255).save(tmp_path / "support" / name / "1.png")
    folder = tmp_path / "support"
    capsys.readouterr()
    assert call("adapt", best, "--support", folder, "--query", folder, "--pattern", "ANIL") == 0
    assert capsys.readouterr().out.count("\n") == 4
    assert call("train", "--out", tmp_path / "x", "--network", "resnet12", "--width", 8) == 2
    assert "give --network-args widths=[64,128,256,512] to resnet12" in capsys.readouterr().err
