"""Networks of a user's own, named as MODULE:FUNCTION: built, trained, saved, and used again from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine import fresh
from PIL import Image
from small_runs import TRAIN, VAL, assert_same_bits, small
from torch import nn

from lambda_maml import checkpoint, cli, models
from lambda_maml.train import BEST, train

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
from torch import nn

class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()

def residual(ways, in_channels, image_size, width=4, act="relu"):
    assert act == "relu"
    stem = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
    return nn.Sequential(stem, Residual(width), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, ways))

def fails(ways, in_channels, image_size):
    raise TypeError("a fault of its own")

def nothing(ways, in_channels, image_size):
    return ways

def dropping(ways, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, ways))

def of_any_size(ways, in_channels):
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), mean, nn.Linear(4, ways))

class Nested:
    make = staticmethod(residual)
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "own_networks.py").write_text(SOURCE)
    (folder / "broken_networks.py").write_text("import not_there_at_all")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


SHAPE = {"ways": 3, "in_channels": 1, "image_size": 16}


def test_a_network_is_built_anew_from_its_settings() -> None:
    config = {"network": "own_networks:residual", **SHAPE, "args": {"width": 6}}
    model = models.build(config)
    assert models.config_of(model) == config and models.layer_names(model) == ["0", "1.conv", "4"]
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    twin = models.build(models.config_of(model))
    twin.load_state_dict(model.state_dict())
    assert models.build({"network": "own_networks:Nested.make", **SHAPE})[0].out_channels == 4  # type: ignore[index]


def test_a_function_without_image_size_is_called_without_it(tmp_path: Path) -> None:
    config = {"network": "own_networks:of_any_size", **SHAPE}
    model = models.build(config)
    checkpoint.save(tmp_path / "a.safetensors", model, {})
    again, meta = checkpoint.load(tmp_path / "a.safetensors")
    assert models.config_of(again) == meta["network"] == config and models.image_shape(config) == (1, 16, 16)
    with pytest.raises(ValueError, match="own_networks:of_any_size have no image_size, so that images cannot be read"):
        models.image_shape({"network": "own_networks:of_any_size", "ways": 3, "in_channels": 1})


def test_images_need_not_be_square(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = [replace(images, images=np.ascontiguousarray(images.images[:, :, :12])) for images in (TRAIN, VAL)]
    model = models.build({"network": "own_networks:of_any_size", "ways": 3, "in_channels": 1, "image_size": [16, 12]})
    train(model, *wide, out=tmp_path, settings=small(second_order=False), iterations=1)
    for name in "abc":
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.new("L", (40, 20), 40 * ord(name) % 255).save(tmp_path / "support" / name / "1.png")
    best, support = tmp_path / BEST, tmp_path / "support"
    assert call("adapt", best, "--support", support, "--query", support) == 0
    assert capsys.readouterr().out.count(".png: ") == 3
    assert call("info", best) == 0 and "under 11" in capsys.readouterr().out
    assert call("eval", best, "--dataset", "glyphs") == 2
    assert "glyphs has images [1, 28, 28], the checkpoint's network takes [1, 16, 12]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("own_networks:resnet", {}, "module 'own_networks' has no attribute 'resnet'"),
        ("nowhere_at_all:make", {}, "nowhere_at_all cannot be imported .*: its folder must be the current one or in"),
        ("broken_networks:make", {}, "No module named 'not_there_at_all'"),
        ("own_networks:residual", {"depth": 3}, r"cannot be called with ways=3, .* depth=3 \(.*unexpected keyword"),
        ("own_networks:nothing", {}, "it gave a int, expected a torch.nn.Module"),
    ],
)
def test_what_is_no_network_is_refused(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.build({"network": name, **SHAPE, "args": args})


def test_a_fault_of_the_function_itself_comes_through() -> None:
    with pytest.raises(TypeError, match="a fault of its own"):
        models.build({"network": "own_networks:fails", **SHAPE})
    with pytest.raises(ValueError, match="the settings of Linear are not known.*MODULE:FUNCTION"):
        models.config_of(nn.Linear(2, 3))


def test_training_keeps_how_the_network_is_built(tmp_path: Path) -> None:
    model = models.build({"network": "own_networks:residual", **SHAPE, "args": {"width": 5}})
    settings = small(second_order=False, pattern="head")
    result = train(model, TRAIN, VAL, out=tmp_path, settings=settings, iterations=3)
    again, meta = checkpoint.load(tmp_path / BEST)
    assert meta["network"] == models.config_of(model) == models.config_of(again) and result.iteration == 3
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values()))
    other = models.build({"network": "own_networks:residual", **SHAPE, "args": {"width": 4}})
    with pytest.raises(ValueError, match=r"network args\.width 5, this one 4"):
        train(other, TRAIN, VAL, out=tmp_path, settings=settings, iterations=4, resume=True)
    with pytest.raises(ValueError, match="is of another network: 0.weight is .5, 1, 3, 3. in the file"):
        checkpoint.load(tmp_path / BEST, other)
    conv4 = models.conv4(ways=3, in_channels=1, width=5, image_size=16)
    with pytest.raises(ValueError, match="network network own_networks:residual, this one conv4"):
        train(conv4, TRAIN, VAL, out=tmp_path, settings=settings, iterations=4, resume=True)


def test_a_network_that_draws_random_numbers_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def go(folder: str, iterations: int, resume: bool = False) -> None:
        torch.manual_seed(0)
        model = models.build({"network": "own_networks:dropping", **SHAPE})
        settings = small(val_every=1)
        train(model, TRAIN, VAL, out=tmp_path / folder, settings=settings, iterations=iterations, resume=resume)

    go("whole", 4)
    go("parts", 2)
    torch.rand(7)
    go("parts", 4, resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def call(*args: Any) -> int:
    return cli.run([str(arg) for arg in args])


def test_the_command_line_trains_and_uses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--steps", 2, "--lr", 0.1, "--query", 3, "--val-tasks", 3, "--val-every", 2, "--iterations", 2]
    own = ["--network", "own_networks:residual", "--network-args", "width=6", "--network-args", "act=relu"]
    assert call("train", "--out", tmp_path, *own, *short) == 0
    best = tmp_path / BEST
    saved = json.loads((tmp_path / "best.json").read_text())["network"]
    assert saved == {"network": "own_networks:residual", "args": {"width": 6, "act": "relu"}, "ways": 5,
                     "in_channels": 1, "image_size": 28}  # fmt: skip
    capsys.readouterr()
    assert call("eval", best, "--tasks", 2, "--pattern", "head") == 0
    assert capsys.readouterr().out.startswith("001 on 2 test tasks")
    assert call("select", best, "--tasks", 3, "--seconds", 0, "--max-drop", 1, "--patterns", "ANIL; 101") == 0
    found = json.loads((tmp_path / "pattern.json").read_text())
    assert found["network"] == "own_networks:residual"
    assert {row["pattern"] for row in found["candidates"]} == {"001", "101", "111"}
    for name in "abcde":
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.new("L", (28, 28), 40 * ord(name) % 255).save(tmp_path / "support" / name / "1.png")
    assert call("adapt", best, "--support", tmp_path / "support", "--out", tmp_path / "adapted.safetensors") == 0
    assert call("train", "--out", tmp_path, "--resume", *short) == 2
    assert "this one conv4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--network", "resnet"],
            "there is no network 'resnet': choose conv4 or resnet12, or name your function as MODULE:FUNCTION",
        ),
        (["--network", "own_networks:residual", "--width", "3"], "--width 3 is of conv4: give --network-args width=3"),
        (["--network-args", "width=3"], "conv4 has --width alone"),
        (["--network", "own_networks:residual", "--network-args", "width"], "expected KEY=VALUE, such as depth=12"),
    ],
)
def test_wrong_options_are_refused(args: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    assert call("train", "--out", tmp_path / "out", *args) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_the_command_finds_modules_in_the_current_folder(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(module)
    code = "import sys; sys.path = [p for p in sys.path if p]; sys.argv = ['lambda-maml', '--version']\n"
    code += "from lambda_maml import cli, models\ntry:\n    cli.main()\nexcept SystemExit:\n    pass\n"
    code += f"print(type(models.build({{'network': 'own_networks:residual', **{SHAPE}}})).__name__)"
    assert "Sequential" in fresh(code)
