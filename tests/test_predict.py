"""`lambda-maml adapt --out`, `predict` and `export`: from a folder of pictures to a network that classifies alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lambda_maml import checkpoint, cli, models
from lambda_maml.adapt import adapt
from lambda_maml.images import class_folders, query_files, read_images
from lambda_maml.learner import learner_of
from lambda_maml.statistics import norms_of_batches

pytestmark = pytest.mark.usefixtures("one_thread")

DATASET: dict[str, Any] = {"name": "glyphs", "mean": [0.2], "std": [0.3]}
SETTINGS = {"ways": 3, "shots": 2, "query": 2, "steps": 3, "test_steps": None, "lr": 0.1, "norm": "follow",
            "learn_lr": None}  # fmt: skip


class Dropping(nn.Module):
    """A network of one's own: norms with running statistics, and dropout."""

    def __init__(self, ways: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, ways)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.relu(self.norm(self.conv(x))), 0.3, self.training)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Together(Dropping):
    """Norms by a function, which nothing can give the support set's statistics."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.batch_norm(self.conv(x), None, None, training=True)
        y: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return y


def call(*args: Any) -> int:
    return cli.run([str(arg) for arg in args])


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint as training writes it, here without any."""
    model = models.build({"network": "conv4", "ways": 3, "in_channels": 1, "width": 8, "image_size": 20})
    checkpoint.save(tmp_path / "best.safetensors", model, {"dataset": DATASET, "settings": SETTINGS})
    return tmp_path / "best.safetensors"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures of each class, of many sizes: ink at the class's place on white paper."""
    for k, name in enumerate(["alpha", "beta", "gamma"]):
        (tmp_path / "support" / name).mkdir(parents=True)
        for size in (30, 45):
            image = Image.new("L", (size, size), 250 - k)
            image.paste(k, (k * size // 3, 0, (k + 1) * size // 3, size - 5))
            image.save(tmp_path / "support" / name / f"{size}.png")
    return tmp_path / "support"


def adapted_by(trained: Path, pictures: Path, *more: Any) -> Path:
    out = trained.with_name("adapted.safetensors")
    assert call("adapt", trained, "--support", pictures, "--out", out, *more) == 0
    return out


def of(capsys: pytest.CaptureFixture[str], *args: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert call(*args, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_an_adapted_checkpoint_classifies_as_the_learner_did(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained.with_name("adapted.safetensors")
    by_adapt = of(capsys, "adapt", trained, "--support", pictures, "--query", pictures, "--out", out)
    by_predict = of(capsys, "predict", out, pictures)
    assert by_predict["classes"] == ["alpha", "beta", "gamma"]
    assert by_predict["predictions"] == by_adapt["predictions"]
    # The same bits as the library's learner, each image by itself.
    model, meta = checkpoint.load(trained)
    files = [path for paths in class_folders(pictures).values() for path in paths]
    xs = read_images(files, (1, 20, 20), DATASET, invert=True)
    learner = adapt(model, xs, torch.arange(3).repeat_interleave(2), pattern="11111", steps=3, lr=0.1)
    with torch.no_grad():
        want = learner.freeze_statistics()(xs)
        loaded = learner_of(checkpoint.load(out)[0])
        assert torch.equal(loaded(xs), want) and torch.equal(loaded(xs[3:4]), want[3:4])
    chances = {str(path): row for path, row in zip(files, want.softmax(-1).tolist())}
    for path in query_files(pictures):
        (row,) = of(capsys, "predict", out, path)["predictions"]
        assert [row["probabilities"][name] for name in by_predict["classes"]] == chances[str(path)]
        assert row["probability"] == max(chances[str(path)]) == row["probabilities"][row["class"]]


def test_predictions_for_people(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = adapted_by(trained, pictures)
    capsys.readouterr()
    assert call("predict", out, pictures / "beta", pictures / "alpha" / "30.png", "--top", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(pictures / name) for name in ("beta/30.png", "beta/45.png", "alpha/30.png")
    ]
    assert all(line.count("%") == 2 for line in lines)


def test_a_network_of_ones_own_is_kept_with_its_statistics(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = {"network": "test_predict:Dropping", "ways": 3, "in_channels": 1, "image_size": 20}
    trained = tmp_path / "best.safetensors"
    checkpoint.save(trained, models.build(config), {"dataset": DATASET, "settings": SETTINGS})
    out = tmp_path / "adapted.safetensors"
    by_adapt = of(capsys, "adapt", trained, "--support", pictures, "--query", pictures, "--out", out)
    assert of(capsys, "predict", out, pictures)["predictions"] == by_adapt["predictions"]
    model, _ = checkpoint.load(out)
    assert not model.training and not norms_of_batches(model)
    assert not torch.equal(model.norm.running_mean, torch.zeros(6))  # type: ignore[union-attr,arg-type]


def test_a_network_that_cannot_classify_one_image_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    trained = tmp_path / "best.safetensors"
    config = {"network": "test_predict:Together", "ways": 3, "in_channels": 1, "image_size": 28}
    checkpoint.save(
        trained, models.build(config), {"dataset": {**DATASET, "mean": [0], "std": [1]}, "settings": SETTINGS}
    )
    assert call("adapt", trained, "--support", pictures) == 2
    assert "--statistics batch classifies query images together" in capsys.readouterr().err
    assert call("adapt", trained, "--support", pictures, "--query", pictures, "--statistics", "batch") == 0
    found = of(capsys, "eval", trained, "--tasks", 3)["statistics"]
    assert 0 <= found["batch"]["accuracy"] <= 1 and found["support"]["accuracy"] is None
    assert "depends on the images beside it" in found["support"]["refused"]
    assert call("eval", trained, "--tasks", 3) == 0
    assert "no figure, each image by itself (statistics of the support): the result" in capsys.readouterr().out


@pytest.mark.parametrize("normalise", [[], ["--normalise"]], ids=["normalised", "pixels"])
def test_an_exported_file_classifies_as_the_checkpoint_does(
    normalise: list[str], trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    out = adapted_by(trained, pictures)
    file = out.with_suffix(".onnx")
    told = of(capsys, "export", out, "--out", file, *normalise)
    assert told == {"file": str(file), "classes": ["alpha", "beta", "gamma"], "images": [1, 20, 20]}
    want, found = (of(capsys, "predict", path, pictures)["predictions"] for path in (out, file))
    assert [row["class"] for row in found] == [row["class"] for row in want]
    for got, row in zip(found, want):
        # float32 through another library's convolutions
        assert got["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    assert call("predict", file, pictures, "--device", "cuda") == 2
    assert "cuda" in capsys.readouterr().err.lower()


def test_a_pt2_is_exported_and_not_unpickled(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = adapted_by(trained, pictures)
    file = out.with_suffix(".pt2")
    assert call("export", out, "--out", file) == 0
    files = query_files(pictures)
    xs = read_images(files, (1, 20, 20), DATASET, invert=True)
    with torch.no_grad():
        chances = torch.export.load(file).module()(xs).softmax(-1)
    rows = of(capsys, "predict", out, pictures)["predictions"]
    # float32 through other convolutions
    torch.testing.assert_close(chances.amax(-1), torch.tensor([row["probability"] for row in rows]), rtol=0, atol=1e-5)
    assert call("predict", file, pictures) == 2
    assert "torch.export.load unpickles what is in such a file" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained.with_name("adapted.safetensors")
    said = []
    for args in (
        ["predict", trained, pictures],
        ["export", trained, "--out", trained.with_name("m.pt2")],
        ["export", trained, "--out", trained.with_name("m.pt")],
        ["adapt", trained, "--support", pictures, "--out", out, "--statistics", "batch"],
        ["predict", out, pictures],
    ):
        assert call(*args) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert f"best.safetensors: is not adapted to classes yet: lambda-maml adapt {trained} --support FOLDER" in said[0]
    assert "m.pt: the name ends in .pt2 (torch.export) or .onnx" in said[2]
    assert "leave out --statistics batch, or --out" in said[3] and "adapted.safetensors: no such" in said[4]
    adapted_by(trained, pictures)
    capsys.readouterr()
    for args in (["adapt", out, "--support", pictures], ["eval", out, "--tasks", 2]):
        assert call(*args) == 2
        assert "is adapted to alpha, beta, gamma already: predict and export take it" in capsys.readouterr().err
    assert call("predict", out, pictures / "delta.png") == 2
    assert "delta.png" in capsys.readouterr().err


def test_an_onnx_file_of_others_is_refused(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    torch.manual_seed(0)
    model = models.conv4(3, 1, 4, 16)
    xs = torch.randn(6, 1, 16, 16)
    adapt(model, xs, torch.arange(3).repeat(2), pattern="00001", steps=1, lr=0.1).export(tmp_path / "m.onnx")
    assert call("predict", tmp_path / "m.onnx", pictures) == 2
    assert "m.onnx: says nothing of classes, mean, std" in capsys.readouterr().err
    (tmp_path / "m.onnx").write_bytes(b"no model")
    assert call("predict", tmp_path / "m.onnx", pictures) == 2
    assert "m.onnx: ONNX Runtime cannot take it" in capsys.readouterr().err
    assert call("predict", tmp_path / "other.onnx", pictures) == 2
    assert "other.onnx: no such file" in capsys.readouterr().err
