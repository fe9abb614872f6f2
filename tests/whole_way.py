"""The whole way, from pictures in a folder to a network on a device, by the packages that are installed.

`make wheel` runs it in an empty folder, in the environment of the wheel and, where the machine lets it, without a
network: python whole_way.py [FOLDER OF THE EXAMPLES]
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = Path(sys.argv[1]) if __name__ == "__main__" and len(sys.argv) > 1 else None
NEEDS = {"backbones.py": "timm", "lightning_module.py": "lightning"}
PICTURES = 6  # of each class that is trained on
FEW = "--ways 3 --query 3 --steps 1 --lr 0.4 --meta-lr 0.005 --meta-batch 2 --val-tasks 4 --val-every 4"
TRAINED, ADAPTED = "runs/mine/best.safetensors", "runs/mine/adapted.safetensors"

MINE = """
from torch import nn

def small(ways, in_channels, image_size, depth=1):
    layers, channels = [], in_channels
    for _ in range(depth):
        layers += [nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)]
        channels = 8
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, ways))
"""

# On the device: neither package is there. Each prints the class and its probability for every picture.
READ = """
import json, sys
import numpy
from PIL import Image
sys.modules["lambda_kernels"] = sys.modules["lambda_maml"] = None

def pixels(path, channels, height, width):
    image = Image.open(path).convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.LANCZOS)
    return numpy.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)[None]

def tell(note, logits):
    chances = numpy.exp(logits - logits.max())[0]
    chances /= chances.sum()
    print(json.dumps([note["classes"][chances.argmax()], float(chances.max())]))
"""
BY_TORCH = """
import torch
kept = {"lambda_maml.json": ""}
network = torch.export.load(sys.argv[1], extra_files=kept).module()
note = json.loads(kept["lambda_maml.json"])
mean, std = (numpy.float32(note[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
for path in sys.argv[2:]:
    x = pixels(path, *note["inputs"][0]["shape"][1:])
    x = ((255 - x if note["invert"] else x) / numpy.float32(255) - mean) / std
    with torch.no_grad():
        tell(note, network(torch.from_numpy(x)).numpy())
"""
BY_ONNX_RUNTIME = """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
note = json.loads(session.get_modelmeta().custom_metadata_map["lambda_maml.json"])
for path in sys.argv[2:]:
    tell(note, session.run(None, {"images": pixels(path, *note["inputs"][0]["shape"][1:])})[0])
"""


def draw(folder: Path, each: int = PICTURES, ways: int = 3) -> None:
    """Dark ink on white paper: pictures/ of 30 characters to train on, new/ of so many others, two of each, and
    unknown/ with two more of each, all of various sizes; and what is no picture."""
    from PIL import Image

    from lambda_maml import data

    glyphs = data.load("glyphs")
    for label, start in enumerate(glyphs.starts[: 30 + ways]):
        places = ["pictures"] * each if label < 30 else ["new", "new", "unknown", "unknown"]
        for at, place in enumerate(places):
            name = f"{label}-{at}.png" if place == "unknown" else f"{label}/{at}.png"
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(255 - glyphs.images[start + at, ..., 0])
            picture.resize((40 + label, 36)).save(folder / place / name)
    (folder / "pictures" / "0" / ".hidden.png").write_bytes(b"no picture")
    (folder / "pictures" / ".cache").mkdir()


def lambda_maml(line: str, *, fails: bool = False) -> str:
    """What the installed command prints: its stdout, or where it is to fail its one line of stderr."""
    command = Path(sysconfig.get_path("scripts")) / "lambda-maml"
    done = subprocess.run([command, *line.split()], capture_output=True, text=True)
    assert (done.returncode == 2) is fails and (fails or done.returncode == 0), f"lambda-maml {line}\n{done.stderr}"
    return done.stderr if fails else done.stdout


def told(line: str) -> Any:
    return json.loads(lambda_maml(f"{line} --json"))


def on_a_device(code: str, file: str) -> list[tuple[str, float]]:
    """The class and its probability of every unknown picture, by a file and a process without the packages."""
    pictures = sorted(map(str, Path("unknown").iterdir()))
    done = subprocess.run([sys.executable, "-c", READ + code, file, *pictures], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(name, chance) for name, chance in map(json.loads, done.stdout.splitlines())]


def predicted(file: str) -> list[tuple[str, float]]:
    return [(row["class"], row["probability"]) for row in told(f"predict {file} unknown")["predictions"]]


def alike(found: list[tuple[str, float]], want: list[tuple[str, float]]) -> None:
    """float32, through another library's convolutions."""
    assert [name for name, _ in found] == [name for name, _ in want], (found, want)
    assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(found, want)), (found, want)


def packages_are_the_installed_ones() -> str:
    import lambda_kernels
    import lambda_maml as adapter

    site = Path(sysconfig.get_path("platlib")).resolve()
    for package in (lambda_kernels, adapter):
        where = Path(str(package.__file__)).resolve()
        assert where.is_relative_to(site), f"{package.__name__} comes from {where}, not from {site}"
    names = {path.name for path in Path(str(lambda_kernels.__file__)).parent.glob("*.so")}
    assert "liblambda_kernels.so" in names and any(name.startswith("_C.") for name in names), names
    assert not list(Path.cwd().iterdir()), f"{Path.cwd()} is not empty"
    return "no network" if {name for _, name in socket.if_nameindex()} == {"lo"} else "the network is on"


def pictures_in_a_folder() -> str:
    from lambda_maml import data

    draw(Path.cwd())
    folder = data.from_folder("pictures", image_size=28)
    assert folder.train.image_shape == (1, 28, 28) and set(folder.train.counts) == {PICTURES}
    names = [set(part.class_names) for part in (folder.train, folder.val, folder.test)]
    assert sum(map(len, names)) == len(set.union(*names)) == 30
    return repr(folder)


def other_data() -> str:
    """torch's own `Dataset`, tasks of other packages, and plain tuples."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from lambda_maml import data, models
    from lambda_maml.evaluate import evaluate

    class Mine(Dataset):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
            return torch.full((3, 8, 8), place / 12), place % 3

    images = data.from_dataset(Mine())
    assert images.counts == (4, 4, 4) and isinstance(images, Dataset) and len(next(iter(DataLoader(images)))) == 2
    (task,) = data.sample_tasks(images, 1, ways=3, shots=1, query=2)
    together = torch.cat([task.xs, task.xq]), torch.cat([task.ys, task.yq])
    batch = OrderedDict(train=(task.xs[None], task.ys[None]), test=(task.xq[None], task.yq[None]))
    foreign = data.from_learn2learn([together], 1, ways=3, shots=1) + data.from_torchmeta([batch])
    foreign += data.from_easyfsl([(*task, [0, 1, 2])])
    model = models.conv4(ways=3, in_channels=3, width=4, image_size=16)
    small = [tuple(part.repeat(1, 1, 2, 2) if part.dim() == 4 else part for part in t) for t in foreign]
    found = evaluate(model, small, pattern="ANIL", steps=1, lr=0.1)  # type: ignore[arg-type]
    assert len(set(found.scores.tolist())) == 1
    return f"{images!r}; {found!r}"


def trained() -> str:
    found = told(f"train --dataset folder --root pictures --out runs/mine --width 8 --iterations 8 {FEW}")
    assert found["iteration"] == 8 and found["checkpoint"] == TRAINED
    assert "holds an earlier run" in lambda_maml(f"train --out runs/mine --iterations 8 {FEW}", fails=True)
    return f"{found['best']['accuracy']:.0%} in validation"


def selected() -> str:
    found = told(f"select {TRAINED} --root pictures --tasks 4 --seconds 0.2 --patterns ANIL;00011")
    assert found == json.loads(Path("runs/mine/pattern.json").read_text())
    assert Path("runs/mine/report.png").stat().st_size > 0
    assert 0 <= found["test"]["support"]["chosen_accuracy"] <= 1 and 0 <= found["test"]["chosen_accuracy"] <= 1
    return f"{found['chosen']['pattern']} in {found['chosen']['time_ms']:.2f} ms"


def evaluated_with_both_statistics() -> str:
    lines = lambda_maml(f"eval {TRAINED} --root pictures --pattern runs/mine/pattern.json --tasks 10").splitlines()
    assert "query images together (statistics of the batch)" in lines[1], lines
    assert "each image by itself (statistics of the support), costs" in lines[2], lines
    return "; ".join(line.strip() for line in lines[1:])


def adapted_and_predicted() -> str:
    asked = f"adapt {TRAINED} --support new --pattern runs/mine/pattern.json --out {ADAPTED} --query unknown"
    found = told(asked)["predictions"]
    assert told(f"predict {ADAPTED} unknown")["predictions"] == found
    lines = lambda_maml(f"predict {ADAPTED} unknown --top 2").splitlines()
    assert len(lines) == 6 and all(line.count("%") == 2 for line in lines)
    return lines[0]


def exported_and_used_on_a_device() -> str:
    want = predicted(ADAPTED)
    lambda_maml(f"export {ADAPTED} --out adapted.pt2")
    alike(on_a_device(BY_TORCH, "adapted.pt2"), want)
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        return "adapted.pt2; onnx is not installed"
    lambda_maml(f"export {ADAPTED} --out adapted.onnx --normalise")
    alike(on_a_device(BY_ONNX_RUNTIME, "adapted.onnx"), want)
    alike(predicted("adapted.onnx"), want)
    return "adapted.pt2, adapted.onnx"


def alone_and_folded() -> str:
    """Support statistics: each image by itself to the same bits, and norms that are no more."""
    import torch
    from torch import nn

    from lambda_maml import adapt, checkpoint, data

    model, _ = checkpoint.load(TRAINED)
    xs, ys, xq, _ = data.sample_tasks(data.from_folder("pictures", image_size=28).test, 1, ways=3, shots=1, query=5)[0]
    learner = adapt(model, xs, ys, pattern="00011", steps=3, lr=0.4, statistics="support")
    with torch.no_grad():
        want = learner(xq)
        assert torch.equal(want, torch.cat([learner(x[None]) for x in xq]))
        assert torch.equal(want.flip(0), learner(xq.flip(0)))
        folded = learner.to_module(fold=True).eval()
        torch.testing.assert_close(folded(xq), want, rtol=1e-3, atol=1e-4)  # float32, other weights
    assert not [part for part in folded.modules() if isinstance(part, nn.BatchNorm2d)]
    return repr(learner)


def a_network_of_ones_own() -> str:
    Path("mine.py").write_text(MINE, encoding="utf-8")
    run = "--dataset folder --root pictures --out runs/own --network mine:small --network-args depth=2 --iterations 4"
    told(f"train {run} {FEW}")
    lambda_maml("adapt runs/own/best.safetensors --support new --out runs/own/adapted.safetensors")
    lambda_maml("export runs/own/adapted.safetensors --out own.pt2")
    alike(on_a_device(BY_TORCH, "own.pt2"), predicted("runs/own/adapted.safetensors"))
    return lambda_maml("info runs/own/best.safetensors").splitlines()[-1].strip()


def resnet12() -> str:
    widths = "--network resnet12 --network-args widths=[4,4,4,4]"
    told(f"train --dataset folder --root pictures --out runs/resnet {widths} --iterations 2 {FEW}")
    lambda_maml("adapt runs/resnet/best.safetensors --support new --out runs/resnet/adapted.safetensors")
    return lambda_maml("predict runs/resnet/adapted.safetensors unknown").splitlines()[0]


def adapted_by_cpp() -> str:
    """The example in C++ against the wheel's library: no Python in it, the bits of Python's result."""
    import torch

    import lambda_kernels
    from lambda_maml import adapt_tasks, models

    if EXAMPLES is None or shutil.which("cmake") is None:
        return "not tried: there is no cmake, or the examples' folder was not given"
    library = Path(str(lambda_kernels.__file__)).with_name("liblambda_kernels.so")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", str(EXAMPLES / "cpp"), "-B", "cpp", prefix, "-Wno-dev"], ["--build", "cpp"]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    model = models.conv4(ways=3, in_channels=1, width=8, image_size=28)
    xs, ys, xq = torch.randn(6, 1, 28, 28), torch.arange(3).repeat(2), torch.randn(4, 1, 28, 28)
    torch.save({**model.state_dict(), "support": xs, "labels": ys, "query": xq}, "task.pt")
    done = subprocess.run(["cpp/adapt", str(library), "task.pt", "00011", "5", "0.1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.tensor([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    with torch.no_grad():
        want = adapt_tasks(model, xs[None], ys[None], xq[None], pattern="00011", steps=5, lr=0.1)[0]
    assert torch.equal(logits, want)
    return f"logits {list(logits.shape)}, the bits of Python's"


def examples() -> str:
    """Each runs as written; what it prints is for the tests of the checkout."""
    left_out = []
    for file in sorted(EXAMPLES.glob("*.py") if EXAMPLES else ()):
        if (needed := NEEDS.get(file.name)) and importlib.util.find_spec(needed) is None:
            left_out.append(f"{file.name} without {needed}")
            continue
        done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, f"{file}\n{done.stderr}"
    return f"not {', '.join(left_out)}" if left_out else "all"


POINTS: tuple[Callable[[], str], ...] = (
    packages_are_the_installed_ones, pictures_in_a_folder, other_data, trained, selected,
    evaluated_with_both_statistics, adapted_and_predicted, exported_and_used_on_a_device, alone_and_folded,
    a_network_of_ones_own, resnet12, adapted_by_cpp, examples,
)  # fmt: skip


def main() -> None:
    for point in POINTS:
        start = time.perf_counter()
        found = point()
        print(f"{point.__name__.replace('_', ' ')} ({time.perf_counter() - start:.0f} s): {found}", flush=True)


if __name__ == "__main__":
    main()
