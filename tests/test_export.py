"""Exported files: what the learner gives, by torch.export in a process without this package and by ONNX Runtime."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import PATIENCE
from test_statistics import NETWORKS, YS, images, layers, made
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.agreement import within
from lambda_maml import Learner, adapt
from lambda_maml.export import FORMAT, NOTE
from lambda_maml.models import conv4
from lambda_maml.statistics import norms_of_batches

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS: dict[str, Any] = {"mean": [0.4, 0.5], "std": [0.2, 0.3]}  # of two channels
CLOSE = within(torch.float32, "steps")  # another library's convolutions, through a whole network


def adapted(name: str, dtype: torch.dtype, **more: Any) -> tuple[Learner, Tensor]:
    """A learner of one of the networks and a query set; its convolutions and norms are trained a step."""
    model, xs, xq = made(name, dtype)
    return adapt(model, xs, YS, pattern="1" * layers(model), steps=1, lr=0.1, **more), xq


def pictures(like: Tensor) -> Tensor:
    return torch.randint(0, 256, like.shape, generator=torch.Generator().manual_seed(2)).to(torch.uint8)


def normalised(pixels: Tensor, invert: bool) -> Tensor:
    mean, std = (torch.tensor(COLOURS[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return ((255 - pixels if invert else pixels) / 255.0 - mean) / std


# Runs one file on the images of another, all together and each by itself, without this package.
ALONE = """
import sys, torch
sys.modules["lambda_kernels"] = sys.modules["lambda_maml"] = None
network = torch.export.load(sys.argv[1]).module()
images = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save([network(images), torch.cat([network(x[None]) for x in images])], sys.argv[3])
"""


def in_a_fresh_process(file: Path, xs: Tensor, folder: Path) -> list[Tensor]:
    given, found = folder / "images.pt", folder / "logits.pt"
    torch.save(xs, given)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(file), str(given), str(found)], capture_output=True, text=True,
        timeout=PATIENCE, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logits: list[Tensor] = torch.load(found)
    return logits


def loaded(file: Path) -> tuple[Any, dict[str, Any]]:
    """The network of a .pt2, and its note."""
    extra = {NOTE: ""}
    program = torch.export.load(file, extra_files=extra)
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)} == {"aten"}
    return program.module(), json.loads(extra[NOTE])


def by_onnx(file: Path, xs: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map[NOTE])["format"] == FORMAT
    (found,) = session.run(["logits"], {"images": xs.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in NETWORKS), ("residual", torch.bfloat16)], ids=str
)
def test_a_file_gives_what_the_learner_gives(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    learner, xq = adapted(name, dtype)
    learner.export(tmp_path / "m.pt2")
    assert norms_of_batches(learner.module)  # it stays as it was
    learner.freeze_statistics()
    network, note = loaded(tmp_path / "m.pt2")
    assert note["inputs"] == [{"dtype": str(dtype)[6:], "shape": ["images", *xq.shape[1:]]}]
    assert note["feed"] == "as the network was trained" and note["classes"] is None
    with torch.no_grad():
        for x in (xq, xq[:1]):
            torch.testing.assert_close(network(x), learner(x), **within(dtype, "steps"))
        assert network(x).dtype == dtype


def test_a_file_needs_nothing_of_this_package(tmp_path: Path) -> None:
    learner, xq = adapted("conv4", torch.float32, statistics="support")
    learner.export(tmp_path / "m.pt2")
    with torch.no_grad():
        for logits in in_a_fresh_process(tmp_path / "m.pt2", xq, tmp_path):
            torch.testing.assert_close(logits, learner(xq), **CLOSE)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:  # nor the support set, which the example is not
        sample = next(n for n in archive.namelist() if "sample_inputs" in n)
        assert learner._support_set(None)[0].numpy().tobytes() not in archive.read(sample)


def test_a_file_normalises_pixels_where_it_is_asked_to(tmp_path: Path) -> None:
    learner, xq = adapted("conv4", torch.float32)
    learner.export(tmp_path / "m.pt2", classes=["a", "b", "c"], **COLOURS, invert=True, normalise=True)
    network, note = loaded(tmp_path / "m.pt2")
    assert note["inputs"][0]["dtype"] == "uint8" and note["feed"] == "pixels" and note["classes"] == ["a", "b", "c"]
    pixels = pictures(xq)
    with torch.no_grad():
        want = learner.freeze_statistics()(normalised(pixels, True))
        torch.testing.assert_close(network(pixels), want, **CLOSE)
    for invert, value in ((True, "(255 - pixel)"), (False, "pixel")):
        learner.export(tmp_path / "m.pt2", **COLOURS, invert=invert)
        assert loaded(tmp_path / "m.pt2")[1]["feed"] == f"({value} / 255 - mean) / std of each channel"


@pytest.mark.parametrize(
    ("name", "dtype", "normalise"), [("conv4", torch.float32, True), ("residual", torch.float64, False)]
)
def test_an_onnx_file_gives_what_the_learner_gives(
    name: str, dtype: torch.dtype, normalise: bool, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    learner, xq = adapted(name, dtype, statistics="support")
    learner.export(tmp_path / "m.onnx", **COLOURS, normalise=normalise)
    given = pictures(xq) if normalise else xq.float()
    x = (normalised(given, False) if normalise else given).to(dtype)
    with torch.no_grad():
        want = learner(x).float()
    torch.testing.assert_close(by_onnx(tmp_path / "m.onnx", given), want, **CLOSE)
    torch.testing.assert_close(by_onnx(tmp_path / "m.onnx", given[:1]), want[:1], **CLOSE)


def test_what_is_part_of_a_graph_and_what_is_copied_is_exported(tmp_path: Path) -> None:
    learner, xq = adapted("converted", torch.float64, second_order=True, statistics="support")
    assert next(learner.parameters()).grad_fn is not None
    twin = copy.deepcopy(learner)
    with pytest.raises(ValueError, match="support set of this learner is not known"):
        twin.export(tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
    twin.export(tmp_path / "twin.pt2", example=xq[:1])
    learner.export(tmp_path / "m.pt2")
    assert (tmp_path / "m.pt2").read_bytes() == (tmp_path / "twin.pt2").read_bytes()
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "m.pt2")[0](xq), loaded(tmp_path / "twin.pt2")[0](xq))


class Counting(nn.Module):
    """Its forward knows how many images there are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.flatten(1))
        return y if len(x) > 2 else 2 * y


class Choosing(Counting):
    """Its forward follows the values of the images."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.flatten(1))
        return y if bool(x.sum() > 0) else 2 * y


@pytest.mark.parametrize("kind", [Counting, Choosing])
def test_a_network_that_no_program_holds_is_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    model = lk.convert(kind()).double()
    learner = adapt(model, images(9, (2, 6, 6)), YS, pattern="1", steps=1, lr=0.1)
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be exported: ."):
        learner.export(tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": "m.pt"}, r"m\.pt: the name ends in \.pt2 \(torch\.export\) or \.onnx"),
        ({"classes": ["a", "b"]}, "2 classes are named, the network has 3"),
        ({"normalise": True, "mean": [0.5, 0.5]}, "normalise=True needs mean and std, one number a channel each: std"),
        ({"mean": [0.5]}, r"mean has 1 numbers, the network takes \[9, 2, 16, 16\]: one number a channel"),
        ({"mean": [0.5, 0.5], "std": [1.0, 0.0]}, r"std must be positive, got \[1\.0, 0\.0\]"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    learner, _ = adapted("conv4", torch.float32)
    path = tmp_path / given.pop("path", "m.pt2")
    with pytest.raises(ValueError, match=words):
        learner.export(path, **given)
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_names_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    learner, _ = adapted("mlp", torch.float32)
    words = r"m\.onnx needs onnxscript, which is not installed: pip install 'lambda-kernels\[export\]'"
    with pytest.raises(ModuleNotFoundError, match=words):
        learner.export(tmp_path / "m.onnx")


def test_an_earlier_file_stays_where_writing_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learner, _ = adapted("mlp", torch.float32)
    (tmp_path / "m.pt2").write_text("earlier")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="m.pt2: cannot be written"):
        learner.export(tmp_path / "m.pt2")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.pt2", "earlier")]


def test_classes_of_a_wide_network_are_in_order(tmp_path: Path) -> None:
    """The names are those of the logits, in their order."""
    xs, ys = images(4, (1, 16, 16), torch.float32), torch.arange(4)
    learner = adapt(conv4(4, 1, 4, 16), xs, ys, pattern="00001", steps=20, lr=0.5)
    names = ["d", "a", "c", "b"]
    learner.export(tmp_path / "m.pt2", classes=names)
    network, note = loaded(tmp_path / "m.pt2")
    with torch.no_grad():
        assert [note["classes"][k] for k in network(xs).argmax(-1)] == names


def test_the_page_on_export_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "export.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    assert names["logits"].shape == (3, 5) and json.loads(names["note"][NOTE])["classes"] == list("abcde")
