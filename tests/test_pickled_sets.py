"""lambda_maml.data.pickled_sets: CIFAR-FS, FC100, mini-ImageNet and tieredImageNet as users keep them."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from lambda_maml import data

RNG = np.random.default_rng(0)


def pixels(n, size=32):
    return RNG.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("below", ["", "cifar-fs"])
def test_cifar_fs_reads_unsorted_unbalanced_labels(tmp_path, protocol, below):
    x, labels = pixels(7), [9, 4, 9, 9, 61, 4, 9]
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (folder / "CIFAR_FS_val.pickle").write_bytes(pickle.dumps({"data": x, "labels": labels}, protocol))
    dataset = data.load("cifar-fs", str(tmp_path), "val")
    assert dataset.class_names == ("4", "9", "61") and dataset.counts == (2, 4, 1)
    assert np.array_equal(dataset.images, x[[1, 5, 0, 2, 3, 6, 4]])
    mean, std = torch.tensor([0.5071, 0.4865, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])
    want = (torch.from_numpy(x[1]).float() / 255 - mean) / std
    torch.testing.assert_close(dataset.tensors(np.array([0]))[0], want.permute(2, 0, 1))


def test_fc100_with_byte_keys_and_array_labels(tmp_path):
    x = pixels(4)
    content = OrderedDict({b"data": np.asfortranarray(x), b"labels": np.array([2, 2, 1, 1])})
    (tmp_path / "FC100_test.pickle").write_bytes(pickle.dumps(content, 2))
    assert np.array_equal(data.load("fc100", tmp_path, "test").images, x[[2, 3, 0, 1]])


@pytest.mark.parametrize("kind", ["uint8", "float255", "float1"])
@pytest.mark.parametrize("file", ["mini-imagenet-cache-val.pkl", "mini-imagenet-cache-validation.pkl"])
def test_mini_imagenet_class_dict(tmp_path, kind, file):
    x = pixels(5, 84)
    stored = {"uint8": x, "float255": x.astype(np.float32), "float1": x.astype(np.float64) / 255}[kind]
    classes = {"n02": [4, 0], b"n01": np.array([1, 2, 3])}
    (tmp_path / "mini-imagenet").mkdir()
    (tmp_path / "mini-imagenet" / file).write_bytes(pickle.dumps({"image_data": stored, "class_dict": classes}))
    dataset = data.load("mini_imagenet", tmp_path, "val")
    assert dataset.class_names == ("n02", "n01") and dataset.counts == (2, 3)
    assert np.array_equal(dataset.images, x[[4, 0, 1, 2, 3]])


def test_mini_imagenet_with_data_and_labels(tmp_path):
    x = pixels(3, 84)
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps({"data": x, "labels": ["b", "a", "b"]}))
    assert np.array_equal(data.load("mini-imagenet", tmp_path).images, x[[1, 0, 2]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a dict"),
        ({"images": 1}, r"keys \['images'\], expected data and labels"),
        (
            {"data": np.zeros((2, 84, 84, 3), np.uint8), "labels": [0, 1]},
            r"uint8 \[2, 84, 84, 3\], expected .* 32, 32, 3",
        ),
        ({"data": [1, 2], "labels": [0, 1]}, "images are list"),
        ({"data": [*pixels(1), *pixels(1, 31)], "labels": [0, 1]}, r"shapes \[\[31, 31, 3\], \[32, 32, 3\]\]"),
        ({"data": pixels(2).reshape(2, 1024, 3), "labels": [0, 1]}, r"uint8 \[2, 1024, 3\], expected"),
        ({"data": pixels(2), "labels": [[0], [0, 1]]}, "labels or indices are not one list"),
        ({"data": pixels(2), "labels": np.eye(2)}, r"labels are .*\[2, 2\], expected 2 whole numbers or names, one"),
        ({"image_data": pixels(2), "class_dict": {"a": range(10**15)}}, "1000000000000000 indices, but there are 2"),
        ({"image_data": pixels(2), "class_dict": {"a": [0.5, 1]}}, "class a has float64"),
        ({"image_data": pixels(2), "class_dict": {"a": [0], b"a": [1]}}, "class a is listed twice"),
        ({"data": np.zeros((2, 32, 32, 3), np.uint8), "labels": [0]}, r"\[1\], expected 2 whole numbers or names"),
        ({"data": np.zeros((2, 32, 32, 3), np.uint8), "labels": [0.5, 1]}, "labels are float64"),
        ({"data": np.full((2, 32, 32, 3), np.nan), "labels": [0, 1]}, "range from nan"),
        ({"data": np.full((2, 32, 32, 3), -1), "labels": [0, 1]}, "range from -1"),
        ({"data": np.zeros((0, 32, 32, 3), np.uint8), "labels": []}, "no image|labels are"),
        ({"image_data": pixels(2), "class_dict": {"a": [0, 2]}}, r"class a has indices 0..2, but there are 2"),
        ({"image_data": pixels(2), "class_dict": {"a": [0, 1], "b": [1]}}, r"image 1 is listed 2 times"),
        ({"image_data": pixels(2), "class_dict": {"a": []}}, "class a has"),
        ({"image_data": pixels(2), "class_dict": [0]}, "class_dict is a list"),
    ],
)
def test_wrong_content_is_named(tmp_path, content, message):
    path = tmp_path / "CIFAR_FS_train.pickle"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        data.load("cifar_fs", tmp_path)
    assert str(path) in str(error.value)


def saved(folder, file, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(pickle.dumps(content, 2))
    return folder


LABELS = [3, 1, 1, 3]
LABEL_FORMS = {
    "list": LABELS,
    "float64": np.array(LABELS, float),
    "[N, 1]": np.array(LABELS)[:, None],
    "[1, N]": np.array(LABELS)[None],
    "float32 [N, 1]": np.array(LABELS, np.float32)[:, None],
    "list of lists": [[k] for k in LABELS],
    "list of scalars": [np.int32(k) for k in LABELS],
    "list of arrays": [np.array([k]) for k in LABELS],
}


@pytest.mark.parametrize("labels", LABEL_FORMS.values(), ids=LABEL_FORMS)
@pytest.mark.parametrize("key", ["labels", "label", "fine_labels"])
def test_labels_of_any_form(tmp_path, labels, key):
    x = pixels(4)
    dataset = data.load("fc100", saved(tmp_path, "FC100_train.pickle", {"data": x, key: labels}))
    assert dataset.class_names == ("1", "3") and np.array_equal(dataset.images, x[[1, 2, 0, 3]])


CLASS_FORMS = {
    "ranges": {"b": range(2, 4), "a": range(2)},
    "defaultdict": defaultdict(list, b=[2, 3], a=[0, 1]),
    "float array": {"b": np.array([2.0, 3.0]), "a": np.array([[0], [1]])},
    "sets": {"b": {3, 2}, "a": {0, 1}},
    "tuples": {b"b": (2, 3), b"a": (0, 1)},
}


@pytest.mark.parametrize("classes", CLASS_FORMS.values(), ids=CLASS_FORMS)
@pytest.mark.parametrize("key", ["image_data", "data"])
def test_class_dict_of_any_form(tmp_path, classes, key):
    x = pixels(4, 84)
    saved(tmp_path, "mini-imagenet-cache-train.pkl", {key: x, "class_dict": classes})
    dataset = data.load("mini_imagenet", tmp_path)
    assert dataset.class_names == ("b", "a") and np.array_equal(dataset.images, x[[2, 3, 0, 1]])


IMAGE_FORMS = {
    "list of arrays": list,
    "tuple of arrays": tuple,
    "channels first": lambda x: x.transpose(0, 3, 1, 2),
    "list of channels first": lambda x: list(x.transpose(0, 3, 1, 2)),
    "CIFAR-100's rows": lambda x: np.stack([np.concatenate([image[..., c].ravel() for c in range(3)]) for image in x]),
    "int64": lambda x: x.astype(np.int64),
    "floats in 0..1": lambda x: (x / 255).astype(np.float32),
}


@pytest.mark.parametrize("form", IMAGE_FORMS.values(), ids=IMAGE_FORMS)
def test_images_of_any_form(tmp_path, form):
    x = pixels(4)
    saved(tmp_path, "CIFAR_FS_train.pickle", {b"data": form(x), b"fine_labels": [0] * 4, b"coarse_labels": [7] * 4})
    assert np.array_equal(data.load("cifar_fs", tmp_path).images, x)


def test_rows_of_larger_images_have_no_known_order(tmp_path):
    saved(tmp_path, "mini-imagenet-cache-train.pkl", {"data": pixels(1, 84).reshape(1, -1), "labels": [0]})
    with pytest.raises(ValueError, match=r"images are uint8 \[1, 21168\], expected .*84, 84, 3"):
        data.load("mini_imagenet", tmp_path)


@pytest.mark.parametrize("folder", ["mini-imagenet", "miniImageNet", "MINI_IMAGENET", "Mini ImageNet", "."])
def test_mini_imagenet_under_metaoptnets_names(tmp_path, folder):
    x = pixels(6, 84)
    for split, file in (("train", "train_phase_train"), ("val", "val"), ("test", "test")):
        rows = x[:2] if split == "train" else x[2:4] if split == "val" else x[4:]
        saved(tmp_path / folder, f"miniImageNet_category_split_{file}.pickle", {"data": rows, "labels": [5, 5]})
        saved(tmp_path / folder, "miniImageNet_category_split_train_phase_val.pickle", {})
        assert np.array_equal(data.load("mini_imagenet", tmp_path, split).images, rows)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


TIERED_FORMS = {
    "OpenCV's column arrays": lambda x: [np.frombuffer(png(image), np.uint8)[:, None] for image in x],
    "flat arrays": lambda x: [np.frombuffer(png(image), np.uint8) for image in x],
    "bytes": lambda x: [png(image) for image in x],
}
TIERED_LABELS = {
    "Ren et al.": (
        {"label_specific": np.array([1, 0, 1], np.int32), "label_specific_str": ["crane", "bird"]},
        ("crane", "bird"),
    ),
    "names twice": ({"label_specific": [1, 0, 1], "label_specific_str": ["crane"] * 2}, ("crane (0)", "crane (1)")),
    "MetaOptNet": ({"labels": [352, 351, 352]}, ("351", "352")),
}


@pytest.mark.parametrize(("labels", "names"), TIERED_LABELS.values(), ids=TIERED_LABELS)
@pytest.mark.parametrize("form", TIERED_FORMS.values(), ids=TIERED_FORMS)
def test_tiered_imagenet_of_pngs(tmp_path, form, labels, names):
    x = pixels(3, 84)
    folder = saved(tmp_path / "tiered-imagenet", "val_images_png.pkl", form(x))
    dataset = data.load("tiered-imagenet", saved(folder, "val_labels.pkl", labels), "val")
    assert dataset.class_names == names and dataset.counts == (1, 2)
    assert np.array_equal(dataset.images, x[[1, 0, 2]]) and dataset.mean == (0.485, 0.456, 0.406)


def test_tiered_imagenet_of_an_array_has_blue_first(tmp_path):
    x = pixels(3, 84)
    np.savez(tmp_path / "train_images.npz", images=x[..., ::-1])
    saved(tmp_path, "train_labels.pkl", {"labels": [1, 0, 1]})
    assert np.array_equal(data.load("tiered_imagenet", tmp_path).images, x[[1, 0, 2]])


def test_wrong_content_of_tiered_imagenet_is_named(tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=message):
            data.load("tiered_imagenet", tmp_path)

    saved(tmp_path, "train_images_png.pkl", [png(pixels(1, 84)[0]), png(pixels(1, 80)[0])])
    refused(FileNotFoundError, r"no train_labels.pkl beside .*train_images_png.pkl.* holds train_images_png.pkl")
    saved(tmp_path, "train_labels.pkl", {"label_general": [0, 0]})
    refused(ValueError, r"train_labels.pkl: has the keys \['label_general'\], expected label_specific or labels")
    saved(tmp_path, "train_labels.pkl", {"labels": [0]})
    refused(ValueError, r"train_labels.pkl: labels are .*\[1\], expected 2 whole numbers")
    saved(tmp_path, "train_labels.pkl", {"labels": [0, 0]})
    refused(ValueError, r"train_images_png.pkl: image 1 is 80x80, expected 84x84")
    for stored, message in (([b"x", b"y"], "image 0: not a readable image"), ([1, 2], "image 0 is a int, expected")):
        saved(tmp_path, "train_images_png.pkl", stored)
        refused(ValueError, f"train_images_png.pkl: {message}")
    (tmp_path / "train_images_png.pkl").unlink()
    np.savez(tmp_path / "train_images.npz", images=pixels(2, 80))
    refused(ValueError, r"train_images.npz: images are uint8 \[2, 80, 80, 3\], expected uint8 \[N, 84, 84, 3\]")
    np.savez(tmp_path / "train_images.npz", other=pixels(2, 84))
    refused(ValueError, r"train_images.npz: not a NumPy archive with `images`")
    (tmp_path / "train_images.npz").write_bytes(b"<html>")
    refused(ValueError, r"train_images.npz: not a NumPy archive with `images`: it is a web page")
