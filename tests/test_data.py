"""lambda_maml.data: image sets, and what load says of unknown names and missing files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lambda_maml import data
from lambda_maml.data.imageset import chosen, with_rotations

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
    names = "glyphs, omniglot, cifar_fs, fc100, mini_imagenet, tiered_imagenet"
    with pytest.raises(ValueError, match=f"'imagenet': choose from {names}"):
        data.load("imagenet", tmp_path)
    with pytest.raises(ValueError, match="'valid': choose from train, val, test"):
        data.load("fc100", tmp_path, "valid")


@pytest.mark.parametrize("name", ["omniglot", "cifar-fs", "fc100", "mini-imagenet", "tiered-imagenet"])
def test_a_missing_root_names_the_layout(name, tmp_path):
    file = {"omniglot": r"images_background/<Alphabet>/characterNN", "cifar-fs": r"CIFAR_FS_\{train,val,test\}.pickle"}
    file |= {
        "fc100": r"FC100_\{train,val,test\}.pickle",
        "mini-imagenet": r"mini-imagenet-cache-\{train,val,test\}.pkl or miniImageNet_category_split_",
        "tiered-imagenet": r"\{train,val,test\}_images_png.pkl or .* with \{train,val,test\}_labels.pkl",
    }
    with pytest.raises(ValueError, match=f"root is not given.*{file[name]}"):
        data.load(name)
    with pytest.raises(FileNotFoundError, match=f"{file[name]}.*nowhere does not exist"):
        data.load(name, tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(FileNotFoundError, match=f"{file[name]}.* holds holiday.jpg"):
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
