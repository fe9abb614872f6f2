"""Pictures of one's own in class folders: lambda_maml.data.from_folder, and the commands with --dataset folder."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lambda_maml import checkpoint, cli, data, images, select
from lambda_maml.data import room
from lambda_maml.data.imageset import statistics
from lambda_maml.data.pictures import read_picture
from lambda_maml.images import inverted, read_images

RNG = np.random.default_rng(0)
NAMES = [f"bird {k:02d}" for k in range(12)]


def saved(path: Path, shape: tuple[int, ...] = (20, 26), **how: Any) -> Path:
    """A picture of noise; two sizes and the channels, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(path, **how)
    return path


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """Twelve classes of grey pictures, of which each is of another size."""
    root = tmp_path / "grey"
    for k, name in enumerate(NAMES):
        for i in range(4):
            saved(root / name / f"{i}.png", (20 + k, 26 + i))
    return root


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    root = tmp_path / "coloured"
    for name in NAMES:
        for i in range(4):
            saved(root / name / f"{i}.{'jpg' if i else 'png'}", (22, 18, 3))
    return root


def want(files: list[Path], mode: Any, size: int) -> np.ndarray[Any, Any]:
    return np.stack([read_picture(path, mode, (size, size)) for path in files]).reshape(len(files), size, size, -1)


def test_grey_pictures_become_dark_ink_on_zero(grey: Path) -> None:
    folder = data.from_folder(grey, image_size=16)
    parts = (folder.train, folder.val, folder.test)
    assert [part.num_classes for part in parts] == [8, 2, 2] and folder.read("val") is folder.val
    assert sorted(sum((part.class_names for part in parts), ())) == NAMES
    for part in parts:
        files = [grey / name / f"{i}.png" for name in part.class_names for i in range(4)]
        assert np.array_equal(part.images, 255 - want(files, "L", 16))
        assert part.counts == (4,) * part.num_classes and (part.mean, part.std) == ((0.0,), (1.0,))
    assert data.load("folder", grey, "test", image_size=16).class_names == folder.test.class_names
    assert data.from_folder(grey, image_size=(6, 9)).val.image_shape == (1, 6, 9)
    other = data.load("folder", grey, "test", image_size=16, seed=5)
    assert other.class_names != folder.test.class_names


def test_coloured_pictures_have_the_training_sets_mean_and_std(coloured: Path) -> None:
    folder = data.from_folder(coloured, image_size=12)
    val = folder.val  # before train was asked for
    train = folder.train
    assert train.image_shape == (3, 12, 12) and (val.mean, val.std) == (train.mean, train.std)
    assert (train.mean, train.std) == statistics(train.images)
    files = [coloured / name / f"{i}.{'jpg' if i else 'png'}" for name in train.class_names for i in range(4)]
    assert np.array_equal(train.images, want(files, "RGB", 12))
    given = data.from_folder(coloured, image_size=12, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert (given.val.mean, given.val.std) == ((0.1, 0.2, 0.3), (1, 2, 3)) and list(given._read) == ["val"]


def test_one_picture_with_colour_makes_the_set_coloured(grey: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(grey / NAMES[0] / "palette.gif", (9, 9))
    Image.fromarray(np.zeros((7, 5), np.uint16)).save(grey / NAMES[1] / "deep.png")
    Image.new("LA", (9, 9)).save(grey / NAMES[2] / "clear.png")
    assert data.from_folder(grey).channels == 1 and data.from_folder(grey).image_size == (28, 28)
    Image.new("P", (5, 5)).save(grey / NAMES[3] / "palette.png")
    assert data.from_folder(grey).channels == 1
    tinted = Image.new("P", (5, 5))
    tinted.putpalette([1, 2, 3] * 4)
    tinted.save(grey / NAMES[3] / "palette.png")
    with caplog.at_level(logging.INFO):
        folder = data.from_folder(grey)
        assert (folder.channels, folder.image_size, folder.invert) == (3, (84, 84), False)
        assert "no image size is given, so it is 84" in caplog.text
        folder.read("val")
        assert "val: reading 8 images of 84x84x3, 0.2 MiB" in caplog.text
    assert data.from_folder(grey, channels=1).train.image_shape == (1, 28, 28)


def test_awkward_pictures_are_as_a_viewer_shows_them(grey: Path) -> None:
    root = grey / NAMES[0]
    for path in root.iterdir():
        path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(root / "a.jpg", (10, 20), exif=exif)
    (root / ".b.png").write_bytes(b"hidden")
    (root / "Thumbs.db").write_bytes(b"left behind")
    (grey / ".git").mkdir()
    Image.fromarray(np.full((6, 6), 65535, np.uint16)).save(root / "c.png")
    Image.new("RGBA", (5, 5), (0, 0, 0, 0)).save(root / "d.png")
    folder = data.from_folder(grey, image_size=10, channels=1, shares=(1, 0, 0), invert=False)
    images = folder.train.images[:3, ..., 0]
    assert folder.train.class_names == tuple(NAMES) and folder.train.counts == (3, *(4,) * 11)
    assert np.array_equal(images[0], read_picture(turned, "L", (10, 10)))
    with Image.open(turned) as stored:
        upright = stored.transpose(Image.Transpose.ROTATE_270).resize((10, 10), Image.Resampling.LANCZOS)
    assert np.array_equal(images[0], np.asarray(upright))
    assert (images[1:] == 255).all()  # white, and transparent, which is as white paper


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "validation", "TEST")])
def test_folders_of_that_name_are_the_splits(grey: Path, names: tuple[str, ...]) -> None:
    for split, part in zip(names, (NAMES[:6], NAMES[6:9], NAMES[9:])):
        for name in part:
            (grey / split).mkdir(exist_ok=True)
            (grey / name).rename(grey / split / name)
    folder = data.from_folder(grey, image_size=8, seed=3)
    assert folder.val.class_names == tuple(NAMES[6:9]) and folder.test.class_names == tuple(NAMES[9:])
    with pytest.raises(ValueError, match="split val has 3 classes, but a task takes 5"):
        folder.check(("val",), ways=5)
    saved(grey / names[1] / NAMES[0] / "0.png")
    with pytest.warns(UserWarning, match=f"1 classes of val/ are in train/ too, {NAMES[0]}"):
        data.from_folder(grey, image_size=8)
    (grey / names[2]).rename(grey / "elsewhere")
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="no folder test/ beside train, val"):
        data.from_folder(grey, image_size=8).test  # noqa: B018
    (grey / "elsewhere").rename(grey / "valid")
    with pytest.raises(ValueError, match="are both split val"):
        data.from_folder(grey)


def test_a_class_may_be_called_train(grey: Path) -> None:
    (grey / NAMES[0]).rename(grey / "train")
    saved(grey / "train" / "raw" / "0.png")
    assert "train" in data.from_folder(grey, image_size=8, shares=(1, 0, 0)).train.class_names


def test_bad_folders_are_told_in_one_sentence(grey: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"channels": 2}, "channels is 2, expected 1"), ({"image_size": 0}, "image_size is 0"),
        ({"image_size": (8, 9, 1)}, "height and width"),
        ({"mean": (0.5,)}, "give both"), ({"shares": (1, 1, 1)}, "add up to 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            data.from_folder(grey, **wrong)
    with pytest.raises(ValueError, match="unknown split 'all': choose from train, val, test"):
        data.from_folder(grey).read("all")
    (tmp_path / "flat").mkdir()
    saved(tmp_path / "flat" / "0.png")
    with pytest.raises(ValueError, match=r"holds 0.png, but no class folder; expected one sub-folder"):
        data.from_folder(tmp_path / "flat")
    (grey / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no image in this class folder, but nothing"):
        data.from_folder(grey)


def test_memory_is_asked_for_before_it_is_taken(grey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:  9000 kB\nMemAvailable:    1024 kB\n")
    monkeypatch.setattr(room, "_MEMORY", memory)
    assert len(data.from_folder(grey, image_size=180).val.images) == 8  # 0.25 MiB
    with pytest.raises(RuntimeError, match="val: 8 images of 400x400x1, 1.2 MiB, but 0.0 GiB of memory are free"):
        data.from_folder(grey, image_size=400).val  # noqa: B018
    monkeypatch.setattr(room, "_MEMORY", tmp_path / "none")
    assert room.size_text(10**6, (84, 84), 3) == "1,000,000 images of 84x84x3, 19.7 GiB"
    room.check_room("much", 10**12, (84, 84), 3)


def call(*args: Any) -> int:
    return cli.run([str(arg) for arg in args])


SHARES = ("--shares", 0.5, 0.25, 0.25)
SMALL = ("--ways", 3, "--query", 2, "--steps", 1, "--width", 4, "--iterations", 2, "--val-tasks", 2)


def test_the_commands_read_a_folder_as_in_training(
    coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    base = ("train", "--dataset", "folder", "--root", coloured, "--out", out, *SMALL)
    assert call(*base, *SHARES, "--split-seed", 3, "--image-size", 16, "--invert") == 0
    model, meta = checkpoint.load(out / "best.safetensors")
    folder = data.from_folder(coloured, 16, 3, 3, shares=(0.5, 0.25, 0.25), invert=True)
    assert meta["network"]["in_channels"] == 3 and meta["network"]["image_size"] == 16
    assert meta["dataset"] == {
        "name": "folder", "mean": list(folder.train.mean), "std": list(folder.train.std), "invert": True,
        "split_seed": 3, "shares": [0.5, 0.25, 0.25], "classes": list(folder.train.class_names),
    }  # fmt: skip
    assert meta["images"] == {"of training": folder.train.fingerprint(), "of validation": folder.val.fingerprint()}
    assert call(*base, *SHARES, "--split-seed", 3, "--image-size", 16, "--invert", "--resume") == 0
    capsys.readouterr()

    seen: dict[str, data.ImageSet] = {}
    sampled = data.sample_tasks
    run = out / "best.safetensors"

    def enough(*_: Any, **more: Any) -> None:
        raise ValueError("the patterns are not measured here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "sample_tasks", lambda s, *a, **k: (seen.update({s.split: s}), sampled(s, *a, **k))[1])
        patch.setattr(select, "select_pattern", enough)
        assert call("select", run, "--root", coloured, "--tasks", 2) == 2
        assert call("eval", run, "--root", coloured, "--split", "train", "--tasks", 2, "--json") == 0
    for split, found in seen.items():
        assert found.fingerprint() == folder.read(split).fingerprint(), split
        assert (found.mean, found.std) == (folder.train.mean, folder.train.std)
    assert seen.keys() == {"train", "val", "test"} and "trained on" not in capsys.readouterr().err

    files, shape = [coloured / folder.train.class_names[0] / "0.png"], folder.train.image_shape
    turned = inverted(shape, meta["dataset"])
    assert torch.equal(read_images(files, shape, meta["dataset"], invert=turned)[0], folder.train[0][0])
    for name in NAMES[:3]:
        shutil.copytree(coloured / name, tmp_path / "support" / name)
    turns: list[bool] = []

    def noted(*given: Any, invert: bool) -> torch.Tensor:
        turns.append(invert)
        return read_images(*given, invert=invert)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "read_images", noted)
        for flags in ((), ("--no-invert",)):
            assert call("adapt", run, "--support", tmp_path / "support", *flags) == 0
    assert turns == [True, False]
    assert call("eval", run, "--root", coloured, "--image-size", 8) == 2
    assert "folder has images [3, 8, 8], the checkpoint's network takes [3, 16, 16]" in capsys.readouterr().err


def test_classes_that_were_trained_on_are_warned_of(
    grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert call("train", "--dataset", "folder", "--root", grey, "--out", out, *SMALL, *SHARES) == 0
    first = json.loads((out / "best.json").read_text())["dataset"]["classes"][0]
    shutil.copytree(grey, tmp_path / "other" / "test")
    assert call("eval", out / "best.safetensors", "--root", tmp_path / "other", "--tasks", 1) == 0
    told = f"warning: 6 classes of split test bear names of classes that the network was trained on, {first} among them"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("--root is missing", "one sub-folder of pictures per class")),
        (("--root", "NOWHERE"), ("nowhere does not exist",)),
        (("--root", "GREY", "--shares", 0.8, 0.1, 0.1), ("12 class folders are divided into 10 for train, 1 for val",)),
        (("--root", "GREY", *SHARES, "--query", 4), ("this class has 4 pictures, but a task takes 5 of each class",)),
        (("--root", "GREY", "--channels", 2), ("channels is 2, expected 1 (grey) or 3 (RGB)",)),
        (("--dataset", "glyphs", "--image-size", 8), ("--image-size is for --dataset folder: glyphs has images",)),
        (("--dataset", "glyphs", "--no-invert"), ("--invert is for --dataset folder",)),
    ],
)
def test_one_line_says_what_is_wrong(
    args: tuple[Any, ...], words: tuple[str, ...], grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"NOWHERE": tmp_path / "nowhere", "GREY": grey}
    given = [places.get(str(arg), arg) for arg in args]
    assert call("train", "--dataset", "folder", "--out", tmp_path / "run", *SMALL, *given) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    for word in words:
        assert word in captured.err


def test_an_unreadable_picture_is_named(grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = grey / NAMES[1] / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert call("train", "--dataset", "folder", "--root", grey, "--out", tmp_path / "run", *SMALL, *SHARES) == 2
    assert f"{broken}: not a readable image" in capsys.readouterr().err
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="2.png: not a readable image: it is empty"):
        data.from_folder(grey)
