"""lambda_maml.data: image sets, and what load says of unknown names and missing files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lambda_maml import data
from lambda_maml.data.division import divided
from lambda_maml.data.imageset import chosen, statistics, with_rotations

RNG = np.random.default_rng(0)


def test_rgb_is_normalised_and_grey_is_not():
    rgb = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    dataset = data.ImageSet("x", "train", rgb, (6,), ("a",), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    want = (torch.from_numpy(rgb[[4, 1]]).double() / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
        [0.1, 0.2, 0.3]
    )
    got = dataset.tensors(np.array([4, 1]))
    assert got.is_contiguous() and got.shape == (2, 3, 5, 4) == (2, *dataset.image_shape)
    torch.testing.assert_close(got, want.permute(0, 3, 1, 2).float())
    grey = data.ImageSet("x", "train", rgb[..., :1], (6,), ("a",)).tensors(np.arange(6))
    torch.testing.assert_close(grey[:, 0], torch.from_numpy(rgb[..., 0]) / 255)


def test_rotations_are_further_classes():
    images = RNG.integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    turned = with_rotations(data.ImageSet("x", "train", images, (2, 1), ("a", "b")))
    assert turned.counts == (2, 1) * 4 and turned.class_names[2:4] == ("a@90", "b@90")
    for k in range(4):
        assert np.array_equal(turned.images[3 * k + 2, ..., 0], np.rot90(images[2, ..., 0], k))
    with pytest.raises(ValueError, match="square"):
        with_rotations(data.ImageSet("x", "train", images[:, :2], (2, 1), ("a", "b")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 1), np.float32)}, "float32"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"\[2, 4, 4\]"),
        ({"counts": (3,)}, "add up to 3, but there are 2"),
        ({"counts": (2, 0), "class_names": ("a", "b")}, "at least one image"),
        ({"class_names": ("a", "b")}, "2 class names"),
        ({"std": (0.0,)}, "std above 0"),
    ],
)
def test_image_sets_that_do_not_fit_together(change, message):
    parts = {"images": np.zeros((2, 4, 4, 1), np.uint8), "counts": (2,), "class_names": ("a",)}
    with pytest.raises(ValueError, match=message):
        data.ImageSet("x", "train", **{**parts, **change})


def test_unknown_names_and_splits_list_the_choices(tmp_path):
    names = "glyphs, omniglot, cifar_fs, fc100, mini_imagenet, tiered_imagenet, folder"
    with pytest.raises(ValueError, match=f"'imagenet': choose from {names}"):
        data.load("imagenet", tmp_path)
    with pytest.raises(ValueError, match="'valid': choose from train, val, test"):
        data.load("fc100", tmp_path, "valid")


@pytest.mark.parametrize("name", ["omniglot", "cifar-fs", "fc100", "mini-imagenet", "tiered-imagenet", "folder"])
def test_a_missing_root_names_the_layout(name, tmp_path):
    file = {"omniglot": r"images_background/<Alphabet>/characterNN", "cifar-fs": r"CIFAR_FS_\{train,val,test\}.pickle"}
    file |= {
        "fc100": r"FC100_\{train,val,test\}.pickle",
        "mini-imagenet": r"mini-imagenet-cache-\{train,val,test\}.pkl or miniImageNet_category_split_",
        "folder": "one sub-folder of pictures per class, or folders train/, val/ and test/",
        "tiered-imagenet": r"\{train,val,test\}_images_png.pkl or .* with \{train,val,test\}_labels.pkl",
    }
    with pytest.raises(ValueError, match=f"root is not given.*{file[name]}"):
        data.load(name)
    with pytest.raises(FileNotFoundError, match=f"(?=.*{file[name]}).*nowhere does not exist"):
        data.load(name, tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises((FileNotFoundError, ValueError), match=f"(?=.*{file[name]}).* holds holiday.jpg"):
        data.load(name, tmp_path)


def test_some_classes_of_a_set_in_another_order():
    images = RNG.integers(0, 256, (4, 4, 4, 1), dtype=np.uint8)
    dataset = chosen(data.ImageSet("x", "val", images, (2, 1, 1), ("a", "b", "c")), [2, 0])
    assert dataset.class_names == ("c", "a") and dataset.counts == (1, 2) and dataset.split == "val"
    assert np.array_equal(dataset.images, images[[3, 0, 1]])


@pytest.mark.parametrize("folder", ["cifar-fs", "CIFAR_FS", "CIFAR-FS", "cifarfs", "CIFAR FS"])
def test_a_sets_folder_is_known_whatever_its_case_and_dashes(tmp_path, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "holiday.jpg").write_text("")
    (tmp_path / folder / ".DS_Store").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds holiday.jpg$"):
        data.load("cifar_fs", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_set_is_a_torch_dataset(workers):
    pixels = RNG.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    images = data.ImageSet("x", "val", pixels, (2, 3), ("a", "b"), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert isinstance(images, torch.utils.data.Dataset) and images.targets.tolist() == [0, 0, 1, 1, 1]
    (x, y), *rest = torch.utils.data.DataLoader(images, batch_size=5, num_workers=workers)
    assert not rest and torch.equal(x, images.tensors(np.arange(5))) and y.tolist() == images.targets.tolist()
    assert torch.equal(images[-1][0], x[4]) and images[-1][1] == 1
    for number in (5, -6):
        with pytest.raises(IndexError, match=f"x val has 5 images, asked for number {number}"):
            images[number]


def test_statistics_are_those_of_all_pixels():
    pixels = RNG.integers(0, 256, (300, 4, 5, 3), dtype=np.uint8)
    mean, std = statistics(pixels)
    assert mean == pytest.approx((pixels / 255).mean((0, 1, 2)), abs=1e-4)  # they are rounded to four decimals
    assert std == pytest.approx((pixels / 255).std((0, 1, 2)), abs=1e-4)  # so are they
    assert statistics(pixels[..., :1]) == ((0.0,), (1.0,))
    assert statistics(np.full((2, 3, 3, 3), 255, np.uint8)) == ((1.0,) * 3, (0.0039,) * 3)


def test_classes_are_divided_by_name_and_seed():
    names = [f"bird {k}" for k in range(50)]
    parts = divided(names)
    assert [len(part) for part in parts.values()] == [32, 8, 10]
    assert sorted(sum(parts.values(), [])) == sorted(names)
    assert divided(names, seed=1)["test"] != parts["test"] == divided(names)["test"]
    assert {s: sorted(part) for s, part in divided(names[::-1]).items()} == {s: sorted(p) for s, p in parts.items()}
    more = divided([*names, "bird 50"])
    moved = [name for split, part in parts.items() for name in part if name not in more[split]]
    assert len(moved) <= 2
    assert divided(["e\u0301"] + names)["train"][1:] == divided(["\xe9"] + names)["train"][1:]  # macOS's accents
    wrong: Any = ((0.5, 0.5), (0.6, 0.6, -0.2), (0.5, 0.3, 0.3))
    for shares in wrong:
        with pytest.raises(ValueError, match="add up to 1"):
            divided(names, 0, shares)


def test_a_set_is_divided_into_three():
    images = RNG.integers(0, 256, (20, 4, 4, 1), dtype=np.uint8)
    whole = data.ImageSet("x", "train", images, (2,) * 10, tuple("abcdefghij"))
    parts = data.divide(whole, seed=3, shares=(0.5, 0.3, 0.2))
    assert [(p.split, p.num_classes) for p in parts] == [("train", 5), ("val", 3), ("test", 2)]
    assert sorted(sum((p.class_names for p in parts), ())) == list("abcdefghij")
    for part in parts:
        place = whole.class_names.index(part.class_names[0])
        assert np.array_equal(part.images[:2], images[2 * place : 2 * place + 2])
    with pytest.raises(ValueError, match="10 classes in shares of .* leave none for val"):
        data.divide(whole, shares=(0.99, 0.0, 0.01))
