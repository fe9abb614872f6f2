"""lambda_maml.data.omniglot: the layouts and split files that users have, and the real set."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lambda_maml import data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLITS = ("train", "val", "test")
RNG = np.random.default_rng(0)


def character(folder, n, size=105):
    folder.mkdir(parents=True)
    for i in range(n):
        image = np.where(RNG.random((size, size)) > 0.9, 0, 255).astype(np.uint8)
        Image.fromarray(image).convert("1").save(folder / f"0001_{i + 1:02}.png")


@pytest.fixture
def omniglot_folder(tmp_path):
    home = tmp_path / "omniglot-py"
    for k in range(1, 15):
        character(home / "images_background" / f"Script{k % 3}" / f"character{k:02}", 2 + k % 2)
    for k in range(1, 4):
        character(home / "images_evaluation" / "Other" / f"character{k:02}", 2)
    (home / "images_background" / ".DS_Store").write_text("")
    (home / "images_evaluation" / "Other" / "character01" / "Thumbs.db").write_text("")
    return tmp_path


def test_omniglot_without_split_files(omniglot_folder):
    sets = {split: data.load("omniglot", omniglot_folder, split, rotations=False) for split in SPLITS}
    assert {s: d.num_classes for s, d in sets.items()} == {"train": 12, "val": 2, "test": 3}
    names = {split: set(dataset.class_names) for split, dataset in sets.items()}
    assert not names["train"] & names["val"] and all(n.startswith("images_evaluation/Other/") for n in names["test"])
    assert set(sets["train"].counts) == {2, 3}
    direct = data.load("omniglot", omniglot_folder / "omniglot-py", "val")
    assert direct.class_names == sets["val"].class_names and np.array_equal(direct.images, sets["val"].images)


def test_omniglot_with_split_files_and_rotations(omniglot_folder):
    splits = omniglot_folder / "omniglot-py" / "splits" / "vinyals"
    splits.mkdir(parents=True)
    for split, name in (
        ("train", "images_evaluation/Other/character02"),
        ("val", "images_background/Script0/character03"),
    ):
        (splits / f"{split}.txt").write_text(name + "\n\n")
    train = data.load("omniglot", omniglot_folder)
    assert train.class_names[0] == "images_evaluation/Other/character02" and train.num_classes == 4
    assert np.array_equal(train.images[2, ..., 0], np.rot90(train.images[0, ..., 0]))
    assert data.load("omniglot", omniglot_folder, "val").num_classes == 1
    assert data.load("omniglot", omniglot_folder, "val", rotations=True).num_classes == 4
    (splits / "test.txt").write_text("images_evaluation/Other/character02\nimages_evaluation/Lost/character01\n")
    with pytest.raises(FileNotFoundError, match=r"lists 2 classes, of which 1 have no folder.*Lost"):
        data.load("omniglot", omniglot_folder, "test")


def test_omniglot_names_an_unreadable_image(omniglot_folder):
    path = omniglot_folder / "omniglot-py" / "images_evaluation" / "Other" / "character02" / "0001_02.png"
    whole = path.read_bytes()
    for broken in (b"", b"not a picture", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"unreadable image .*character02.0001_02\.png: not a readable image"):
            data.load("omniglot", omniglot_folder, "test")


def test_omniglot_names_a_class_without_images_and_a_missing_part(omniglot_folder):
    home = omniglot_folder / "omniglot-py"
    (home / "images_evaluation" / "Other" / "character09").mkdir()
    with pytest.raises(ValueError, match="no PNG in .*character09"):
        data.load("omniglot", omniglot_folder, "test")
    shutil.rmtree(home / "images_evaluation")
    with pytest.raises(FileNotFoundError, match="no images_evaluation for split 'test'.* holds images_background/"):
        data.load("omniglot", omniglot_folder, "test")


def test_real_omniglot_equals_the_packed_images(tmp_path):
    archive, packed = SHARED / "omniglot" / "images_background_small1.zip", SHARED / "omniglot.npz"
    if not (archive.is_file() and packed.is_file()):
        pytest.skip("the real Omniglot files (../shared/data/omniglot) are not here")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    (tmp_path / "images_background_small1").rename(tmp_path / "images_background")
    with np.load(packed) as file:
        table = {
            key: file[key] for key in ("images", "class_background", "class_alphabet", "class_character", "alphabets")
        }
    index = {
        f"images_background/{table['alphabets'][a]}/{c}": k
        for k, (b, a, c) in enumerate(zip(table["class_background"], table["class_alphabet"], table["class_character"]))
        if b
    }
    classes = 0
    for split in ("train", "val"):
        dataset = data.load("omniglot", tmp_path, split, rotations=False)
        assert set(dataset.counts) == {20}
        for k, name in enumerate(dataset.class_names):
            want = table["images"][20 * index[name] : 20 * index[name] + 20]
            assert np.array_equal(dataset.images[20 * k : 20 * k + 20, ..., 0], want), name
        classes += dataset.num_classes
    assert classes == 136


def listed(home, lines, split="train", encoding="utf-8"):
    """A split file of these lines; `rot` in them stands for the four rotations."""
    (home / "splits" / "vinyals").mkdir(parents=True, exist_ok=True)
    lines = [line.replace("rot", f"rot{r:03}") for line in lines for r in ((0, 90, 180, 270) if "rot" in line else [0])]
    (home / "splits" / "vinyals" / f"{split}.txt").write_bytes("\n".join(lines).encode(encoding))


OTHER = [f"Other/character{k:02}" for k in (2, 1)]
LINE_FORMS = {
    "with the part": [f"images_evaluation/{c}" for c in OTHER],
    "without the part": OTHER,
    "backslashes": [f"images_evaluation\\{c}".replace("/", "\\") for c in OTHER],
    "Windows line ends": ["\r\n".join(OTHER) + "\r\n"],
    "old Mac line ends": ["\r".join(OTHER)],
    "quotes, spaces, slashes": [f' "./{c}/" ' for c in OTHER],
    "columns by comma": [c.replace("/", ", ") for c in OTHER],
    "columns by semicolon": [c.replace("/", ";") for c in OTHER],
    "columns by tab": [c.replace("/", "\t") for c in OTHER],
    "blank lines and a class twice": ["", OTHER[0], "  ", *OTHER, ""],
    "rotations": [f"{c}/rot" for c in OTHER],
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("lines", LINE_FORMS.values(), ids=LINE_FORMS)
def test_split_files_of_any_form_give_the_same_classes(omniglot_folder, lines, encoding):
    home = omniglot_folder / "omniglot-py"
    listed(home, lines, encoding=encoding)
    dataset = data.load("omniglot", omniglot_folder)
    assert dataset.class_names[:2] == tuple(f"images_evaluation/{c}" for c in OTHER) and dataset.num_classes == 8
    upright = data.load("omniglot", omniglot_folder, rotations=False)
    assert upright.num_classes == 2 and np.array_equal(upright.images, dataset.images[:4])
    assert np.array_equal(dataset.images[4:8], np.rot90(upright.images, 1, axes=(1, 2)))


def test_listed_rotations_hold_for_every_split(omniglot_folder):
    home = omniglot_folder / "omniglot-py"
    listed(home, [f"{c}/rot" for c in OTHER], "test")
    assert data.load("omniglot", omniglot_folder, "test").num_classes == 8
    assert data.load("omniglot", omniglot_folder, "test", rotations=False).num_classes == 2
    (home / "splits/vinyals/val.txt").write_text("Other/character01/rot090\nOther/character02\n")
    some = data.load("omniglot", omniglot_folder, "val")
    assert some.class_names == ("images_evaluation/Other/character02", "images_evaluation/Other/character01@90")
    assert data.load("omniglot", omniglot_folder, "val", rotations=True).num_classes == 8


def test_the_layout_of_prototypical_networks(omniglot_folder):
    home = omniglot_folder / "omniglot-py"
    usual = [f"Script{k % 3}/character{k:02}" for k in (1, 2, 5)]
    listed(home, usual)
    want = data.load("omniglot", omniglot_folder).images
    (home / "images_background").rename(home / "data")
    shutil.move(home / "images_evaluation" / "Other", home / "data")
    (home / "images_evaluation").rmdir()
    listed(home, [f"{c}/rot" for c in usual])
    dataset = data.load("omniglot", omniglot_folder)
    assert dataset.class_names[0] == f"data/{usual[0]}" and np.array_equal(dataset.images, want)
    with pytest.raises(FileNotFoundError, match=r"holds all alphabets together, so split 'val' needs the list splits"):
        data.load("omniglot", omniglot_folder, "val")


@pytest.mark.parametrize("line", ["character01", "Other/character01/rot045", "rot090", "Other/rot090"])
def test_a_line_that_is_no_class_is_named(omniglot_folder, line):
    (omniglot_folder / "omniglot-py" / "splits" / "vinyals").mkdir(parents=True)
    (omniglot_folder / "omniglot-py" / "splits" / "vinyals" / "val.txt").write_text(f"{OTHER[0]}\n{line}\n")
    with pytest.raises(ValueError, match=rf"val.txt has the line '{line}', expected <Alphabet>/characterNN"):
        data.load("omniglot", omniglot_folder, "val")


LEFT = [
    "images_evaluation/._Other/character01/0001_01.png",
    "images_evaluation/__MACOSX/Other/0001_01.png",
    "images_evaluation/Other/.ipynb_checkpoints/0001_01-checkpoint.png",
    "images_evaluation/Other/@eaDir/0001_01.png",
    "images_evaluation/Other/character01/._0001_01.png",
    "images_evaluation/Other/character01/.DS_Store",
    "images_evaluation/Other/character01/desktop.ini",
    "images_evaluation/Other/Thumbs.db",
]


@pytest.mark.parametrize("path", LEFT)
def test_leftovers_of_systems_are_neither_class_nor_image(omniglot_folder, path):
    want = data.load("omniglot", omniglot_folder, "test")
    file = omniglot_folder / "omniglot-py" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    got = data.load("omniglot", omniglot_folder, "test")
    assert got.class_names == want.class_names and np.array_equal(got.images, want.images)


def test_a_picture_that_is_a_git_lfs_pointer_is_named(omniglot_folder):
    path = omniglot_folder / "omniglot-py" / "images_evaluation" / "Other" / "character02" / "0001_02.png"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match=r"0001_02\.png: not a readable image: it is a pointer of git-lfs"):
        data.load("omniglot", omniglot_folder, "test")
