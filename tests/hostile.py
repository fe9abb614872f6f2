"""Bad files by the hundred: headers changed field by field and sealed again, flipped bits, cut ends, hostile pickles,
pictures, folders. `python tests/hostile.py CASES SEED` tries so many and prints what came of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hostile_values import OTHER, WRONG, WRONG_CHOICE, WRONG_STATE, WRONG_TIMES, fields, spoiled
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from small_runs import run
from test_unpickle import BOMBS

from lambda_kernels.backends.table import Choice, Table
from lambda_maml import checkpoint, cli, data
from lambda_maml.data.pictures import read_picture
from lambda_maml.metrics import METRICS, Metrics
from lambda_maml.pattern_json import read_selection
from lambda_maml.timing import read_timings
from lambda_maml.train import BEST, LAST

SECONDS = 2.0  # of the processor: more counts as a hang


class Case(NamedTuple):
    """A bad file or folder: `read` refuses it by an exception, or gives what it took, which `fine` judges."""

    kind: str
    read: Callable[[], Any]
    fine: Callable[[Any], bool] = lambda value: False


class Place:
    """Sound files of every kind, to be spoiled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        run(folder / "run", 3)
        checkpoint_of = (folder / "run" / BEST).read_bytes()
        self.best, self.last = checkpoint_of, (folder / "run" / LAST).read_bytes()
        self.meta = checkpoint.read_tensors(folder / "run" / BEST)[1]
        rows = [
            {"pattern": p, "accuracy": 0.5, "ci95": 0.1, "time_ms": t, "drop": 0.0, "drop_bound": 0.01}
            for p, t in (("00001", 1.0), ("11111", 2.0))
        ]
        tested = {"full_accuracy": 0.5, "chosen_accuracy": 0.5, "drop": 0.0, "drop_ci95": 0.1}
        self.choice = {
            "schema": 1, "network": "conv4", "ways": 3, "shots": 1, "steps": 2, "lr": 0.1, "norm": "follow",
            "max_drop": 0.1, "rule": "bound", "chosen": rows[0], "full": rows[1],
            "stock_full": {"pattern": "11111", "time_ms": 3.0}, "test": {"tasks": 2, **tested}, "candidates": rows,
            "environment": {},
        }  # fmt: skip
        about = {"kind": "adapt", "pattern": "00001", "network": {"network": "conv4"}, "shots": 1, "steps": 2,
                 "norm": "follow", "dtype": "float32", "device": "cpu", "environment": {}}  # fmt: skip
        stats = {"median": 1e-3, "q1": 1e-3, "q3": 1e-3}
        self.times = {"benchmarks": [{"name": "a", "extra_info": about, "stats": stats}]}
        pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        self.pickled = pickle.dumps({"data": pixels, "labels": [0, 0, 1, 1, 2, 2]}, 2)
        self.pictures = {ending: self._picture(ending) for ending in ("png", "jpg", "gif", "bmp", "tif", "webp")}

    def _picture(self, ending: str) -> bytes:
        path = self.folder / f"sound.{ending}"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)).save(path)
        return path.read_bytes()

    def new(self, name: str, content: bytes | None = None) -> Path:
        """A path in a folder of its own."""
        self.count += 1
        path = self.folder / f"case{self.count}" / name
        path.parent.mkdir()
        if content is not None:
            path.write_bytes(content)
        return path


def changed(value: Any, field: str, new: Any) -> Any:
    """A copy with another value at a field such as a.0.b."""
    copy = json.loads(json.dumps(value))
    *front, last = field.split(".")
    inner = copy
    for name in front:
        inner = inner[int(name)] if isinstance(inner, list) else inner[name]
    inner[last] = new
    return copy


def sealed(path: Path, raw: bytes, change: Callable[[dict[str, Any]], Any], is_old: bool) -> Path:
    """The checkpoint with another header and the checksum of that; of an earlier version, which had none, as it is."""
    path.write_bytes(raw)
    tensors, meta = checkpoint.read_tensors(path)
    checkpoint.write_tensors(path, tensors, change(meta))
    if is_old:
        with safe_open(path, framework="pt") as file:
            header = {key: value for key, value in file.metadata().items() if key != "sha256"}
        path.write_bytes(save(tensors, header))
    return path


def same(path: Path, raw: bytes) -> Callable[[Any], bool]:
    """Whether what was taken is what the sound file holds."""
    path.write_bytes(raw)
    tensors, meta = checkpoint.read_tensors(path)
    return lambda got: got[1] == meta and all(torch.equal(tensors[key], value) for key, value in got[0].items())


def cases(place: Place, draw: random.Random) -> Iterator[Case]:
    """Every kind in turn, without an end."""
    while True:
        yield from (make(place, draw) for make in KINDS)


def header(place: Place, draw: random.Random) -> Case:
    field, value = draw.choice(fields(WRONG))
    path = place.new(BEST)
    sealed(path, place.best, lambda meta: changed(meta, field, value), is_old=draw.random() < 0.3)
    return Case(f"header {field} {value!r:.20}", lambda: command("info", path))


def other_header(place: Place, draw: random.Random) -> Case:
    """Any field, any value: refused, or a network all the same."""
    path, value = place.new(BEST), draw.choice(OTHER)
    part = draw.choice(list(place.meta))
    field = draw.choice([f"{part}.{name}" for name in place.meta[part]])
    sealed(path, place.best, lambda meta: changed(meta, field, value), is_old=draw.random() < 0.3)
    return Case(f"other header {field} {value!r:.20}", lambda: command("info", path), lambda status: status == 0)


def whole_header(place: Place, draw: random.Random) -> Case:
    path, value = place.new(BEST), draw.choice([v for v in OTHER if not isinstance(v, dict)])
    sealed(path, place.best, lambda meta: value, is_old=draw.random() < 0.3)
    return Case(f"whole header {value!r:.20}", lambda: command("info", path))


def weights(place: Place, draw: random.Random) -> Case:
    """Other shapes, kinds of numbers, names, NaN; sealed."""
    path = place.new(BEST, place.best)
    tensors, meta = checkpoint.read_tensors(path)
    key = draw.choice([k for k, v in tensors.items() if v.is_floating_point()])
    tensor = tensors.pop(key)
    how = draw.randrange(5)
    if how < 4:
        tensors[key] = [tensor.long(), tensor[..., None], tensor * float("nan"), tensor.bool()][how]
    checkpoint.write_tensors(path, tensors, meta)
    return Case(f"weights {how}", lambda: command("info", path))


def checkpoint_bytes(place: Place, draw: random.Random) -> Case:
    path = place.new(BEST)
    fine = same(path, place.best)
    path.write_bytes(spoiled(place.best, draw))
    return Case("checkpoint bytes", lambda: checkpoint.read_tensors(path), fine)


def state(place: Place, draw: random.Random) -> Case:
    field, value = draw.choice(fields(WRONG_STATE))
    path = place.new(LAST)
    sealed(path, place.last, lambda meta: changed(meta, field, value), is_old=draw.random() < 0.3)
    return Case(f"state {field} {value!r:.20}", lambda: run(path.parent, 3, resume=True))


def state_tensors(place: Place, draw: random.Random) -> Case:
    path = place.new(LAST, place.last)
    tensors, meta = checkpoint.read_tensors(path)
    key = draw.choice([k for k in tensors if not k.endswith("num_batches_tracked")])
    tensor, how = tensors.pop(key), draw.randrange(3)
    if how:
        tensors[key] = tensor.reshape(-1)[:0] if how == 1 else tensor.float() * float("nan")
    checkpoint.write_tensors(path, tensors, meta)
    return Case(f"state tensor {key} {how}", lambda: run(path.parent, 3, resume=True))


def state_bytes(place: Place, draw: random.Random) -> Case:
    path = place.new(LAST)
    fine = same(path, place.last)
    path.write_bytes(spoiled(place.last, draw))
    return Case("state bytes", lambda: checkpoint.read_tensors(path), fine)


def choice(place: Place, draw: random.Random) -> Case:
    field, value = draw.choice(fields(WRONG_CHOICE))
    path = place.new("pattern.json", json.dumps(changed(place.choice, field, value)).encode())
    return Case(f"pattern.json {field} {value!r:.20}", lambda: command("report", path))


def choice_bytes(place: Place, draw: random.Random) -> Case:
    path = place.new("pattern.json", spoiled(json.dumps(place.choice).encode(), draw))
    return Case("pattern.json bytes", lambda: read_selection(path), lambda got: got.keys() == place.choice.keys())


def choice_text(place: Place, draw: random.Random) -> Case:
    text = draw.choice(
        ["[" * 10**6, "{" * 10**5, '{"a":' * 10**5, "1e999", "NaN", "9" * 5000, "\xff", "", "null", '"x"']
    )
    path = place.new("pattern.json", text.encode("latin1"))
    return Case(f"pattern.json {text[:5]}", lambda: command("report", path))


def times(place: Place, draw: random.Random) -> Case:
    field, value = draw.choice(fields(WRONG_TIMES))
    path = place.new("times.json", json.dumps(changed(place.times, field, value)).encode())
    return Case(f"times {field} {value!r:.20}", lambda: timings(path))


def times_bytes(place: Place, draw: random.Random) -> Case:
    path = place.new("times.json", spoiled(json.dumps(place.times).encode(), draw))
    return Case("times bytes", lambda: timings(path), lambda got: got[0]["00001"].median > 0)


def timings(path: Path) -> Any:
    return read_timings(
        path, patterns=["00001"], network={"network": "conv4"}, shots=1, steps=2, norm="follow", dtype="float32"
    )


def table(place: Place, draw: random.Random) -> Case:
    """A choice table that cannot be read is done without."""
    raw = b'{"choices": {"a": {"chosen": "b", "milliseconds": {"b": 1.0}, "excluded": {}}}}'
    text = draw.choice([spoiled(raw, draw), raw.replace(b"1.0", b"-1.0"), b"[" * 10**6, raw.replace(b'"b"', b"1")])
    path = place.new("choices.json", text)

    def sound(got: dict[str, Choice]) -> bool:
        return all(isinstance(c.chosen, str) and all(t > 0 for t in c.milliseconds.values()) for c in got.values())

    return Case("choice table", lambda: Table(path).choices, sound)


def metrics(place: Place, draw: random.Random) -> Case:
    raw = b'{"kind": "train", "iteration": 2, "loss": 1.0}\n{"kind": "validation", "iteration": 3, "accuracy": 0.5}\n'
    text = draw.choice(
        [spoiled(raw, draw), b"[1]\n", b'{"kind": "x"}\n', b'{"kind": "train", "iteration": "3"}\n', b"[" * 10**5]
    )
    path = place.new(METRICS, text)
    return Case("metrics", lambda: Metrics(path.parent, 3, 3), lambda got: True)


def pickled(place: Place, draw: random.Random) -> Case:
    path = place.new("CIFAR_FS_train.pickle", spoiled(place.pickled, draw))
    return Case("pickle bytes", lambda: data.load("cifar_fs", path.parent), of_pixels)


def of_pixels(images: Any) -> bool:
    return images.images.shape[1:] == (32, 32, 3) and images.images.dtype == np.uint8


def bomb(place: Place, draw: random.Random) -> Case:
    name, (stream, _) = draw.choice(list(BOMBS.items()))
    path = place.new("CIFAR_FS_train.pickle", stream)
    return Case(f"pickle {name}", lambda: data.load("cifar_fs", path.parent))


def code(place: Place, draw: random.Random) -> Case:
    marker = place.new("owned")
    module, name = draw.choice([("os", "system"), ("subprocess", "run"), ("builtins", "eval"), ("posix", "system")])
    stream = f"c{module}\n{name}\n(X{chr(9)}\0\0\0touch {marker}tR.".encode()
    path = place.new("CIFAR_FS_train.pickle", stream)
    return Case(f"pickle calls {module}.{name}", lambda: data.load("cifar_fs", path.parent))


def picture(place: Place, draw: random.Random) -> Case:
    ending = draw.choice(list(place.pictures))
    path = place.new(f"x.{ending}", spoiled(place.pictures[ending], draw))
    return Case(f"{ending} bytes", lambda: read_picture(path, "L"), lambda got: got.dtype == np.uint8 and got.ndim == 2)


def other_picture(place: Place, draw: random.Random) -> Case:
    """Another format under an ending."""
    path = place.new(f"x.{draw.choice(['png', 'jpg', 'gif', 'webp'])}")
    what = draw.choice(["eps", "pdf", "pipe", "folder", "loop", "ppm", "tif", "empty", "null"])
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what in ("loop", "null"):
        path.symlink_to(path if what == "loop" else "/dev/null")
    else:
        contents = {"eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "pdf": b"%PDF-1.7\n",
                    "ppm": b"P6 2 2 255 " + bytes(12), "tif": place.pictures["tif"], "empty": b""}  # fmt: skip
        path.write_bytes(contents[what])
    return Case(f"picture that is a {what}", lambda: read_picture(path, "RGB"))


def folder(place: Place, draw: random.Random) -> Case:
    """A support set that is none."""
    root = place.new("support")
    what = draw.choice(["nothing", "a file", "empty classes", "a pipe", "two classes", "broken pictures", "markup"])
    names = ["a", "b", "c"] if what != "two classes" else ["a", "b"]
    if what == "a file":
        root.write_bytes(b"x")
    elif what == "a pipe":
        os.mkfifo(root)
    elif what != "nothing":
        for name in ["[/red]", "\udcff", "a\nb"] if what == "markup" else names:
            (root / name).mkdir(parents=True)
            if what != "empty classes":
                (root / name / "1.png").write_bytes(place.pictures["png"][: 40 if what != "two classes" else None])
    best = place.folder / "run" / BEST
    return Case(f"support folder: {what}", lambda: command("adapt", best, "--support", root))


def options(place: Place, draw: random.Random) -> Case:
    best = place.folder / "run" / BEST
    asked = [
        ("eval", best, "--pattern", ""), ("eval", best, "--lr", "1e30"), ("eval", best, "--lr", "nan"),
        ("eval", best, "--tasks", "-3"), ("eval", best, "--steps", "0"), ("eval", "", "--tasks", "1"),
        ("select", best, "--seconds", "nan"), ("select", best, "--out", place.folder / "run" / BEST),
        ("select", best, "--out", place.folder / "run" / "best.json"), ("select", best, "--max-drop", "nan"),
        ("train", "--out", place.folder / "new", "--minutes", "nan"), ("train", "--out", ""),
        ("train", "--out", place.folder / "new", "--iterations", "-5"), ("train", "--out", "$NO_SUCH_VARIABLE/x"),
        ("train", "--out", place.folder / "new", "--lr", "1e30"),
        ("train", "--out", place.folder / "new", "--pattern", ""),
        ("train", "--out", place.folder / "run"), ("demo", "--out", place.folder / "run"),
        ("adapt", best, "--support", place.folder, "--out", best), ("report", best), ("info", place.folder),
    ]  # fmt: skip
    args = draw.choice(asked)
    return Case(f"options {' '.join(str(a)[-20:] for a in args)}", lambda: command(*args))


KINDS: tuple[Callable[[Place, random.Random], Case], ...] = (
    header, other_header, whole_header, weights, checkpoint_bytes, state, state_tensors, state_bytes, choice,
    choice_bytes, choice_text, times, times_bytes, table, metrics, pickled, bomb, code, picture, other_picture, folder,
    options,
)  # fmt: skip


class Refused(Exception):
    """What a command said in its one line."""


def command(*args: object) -> int:
    """A command's status; Refused where it ends as it should for a bad file."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run([str(arg) for arg in args])
    said = err.getvalue()
    if status == 2 and said.startswith("lambda-maml: error: ") and said.count("\n") == 1 and "unforeseen" not in said:
        raise Refused(said)
    assert status == 0, f"status {status}, {said!r}"
    return status


def tried(case: Case) -> str | None:
    """What is wrong with how a case was taken; None where it was refused in words, or is sound all the same."""
    begun = time.process_time()
    try:
        value = case.read()
    except (ValueError, OSError, Refused) as error:
        wrong = None if str(error) and len(str(error)) < 2000 else f"says {str(error)[:200]!r}"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    else:
        wrong = None if case.fine(value) else f"taken: {value!r:.200}"
    seconds = time.process_time() - begun
    return wrong or (f"took {seconds:.1f} s" if seconds > SECONDS else None)


def tried_all(folder: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How many cases of each kind were tried, and what was wrong with any of them."""
    torch.set_num_threads(1)
    place, draw = Place(folder), random.Random(seed)
    seen: Counter[str] = Counter()
    faults: list[str] = []
    for _, case in zip(range(count), cases(place, draw)):
        seen[case.kind.split(" ")[0]] += 1
        before = set(folder.parent.rglob("owned"))
        if (wrong := tried(case)) is not None:
            faults.append(f"{case.kind}: {wrong}")
        if set(folder.parent.rglob("owned")) != before:
            faults.append(f"{case.kind}: it ran a program")
    return seen, faults


if __name__ == "__main__":
    home = Path(tempfile.mkdtemp())
    try:
        counts, found = tried_all(home / "files", int(sys.argv[1]), int(sys.argv[2]))
        print(f"{sum(counts.values())} bad files: {dict(counts)}; {len(found)} faults", *sorted(set(found)), sep="\n")
    finally:
        shutil.rmtree(home)
    sys.exit(1 if found else 0)
