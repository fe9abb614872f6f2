"""Data sets and tasks of other packages: data.from_dataset, from_learn2learn, from_torchmeta, from_easyfsl.

The packages are not here. What they give was looked at once (torchvision 0.28, datasets 5.2, learn2learn 0.2, torchmeta
1.8, easyfsl 1.5) and is made anew: the same containers, types and shapes. `test_foreign_packages` takes it from them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lambda_maml import data

LANCZOS = Image.Resampling.LANCZOS
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
LABELS = [7, 2, 7, 5, 5, 2, 7, 2, 5, 7, 2, 5]
ORDER = [k for label in (2, 5, 7) for k in range(12) if LABELS[k] == label]


class Pairs:
    """As torchvision's sets: (image, label) by number, `targets` and `classes` where they are given."""

    def __init__(self, images: list[Any], own: list[Any] | None = None, **more: Any) -> None:
        self.images, self.own, self.reads = images, own, 0
        self.__dict__.update(more)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Any:
        self.reads += 1
        return self.images[place] if self.own is None else (self.images[place], self.own[place])


class Rows:
    """As Hugging Face's `Dataset`: rows as dicts, columns by name, which are sliced."""

    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features: dict[str, Any] = {name: type("Value", (), {"names": names})() for name in columns}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: c[key] for name, c in self.columns.items()}


def pictures() -> list[Any]:
    return [Image.fromarray(p) for p in PIXELS]


KINDS = {
    "pictures of Pillow's": pictures,
    "arrays": lambda: list(PIXELS),
    "tensors of bytes": lambda: [torch.from_numpy(p).permute(2, 0, 1) for p in PIXELS],
    "tensors in 0..1, as ToTensor makes them": lambda: [torch.from_numpy(p).permute(2, 0, 1) / 255 for p in PIXELS],
    "arrays in 0..1": lambda: [p.transpose(2, 0, 1) / 255 for p in PIXELS],
    "larger whole numbers": lambda: [p.astype(np.int64) for p in PIXELS],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", [True, False])
def test_images_of_any_kind_come_class_by_class(kind: str, beside: bool) -> None:
    given = Pairs(KINDS[kind](), LABELS, **({"targets": LABELS} if beside else {}))
    found = data.from_dataset(given)
    assert np.array_equal(found.images, PIXELS[ORDER]) and found.counts == (4, 4, 4)
    assert found.class_names == ("2", "5", "7") and (found.name, found.split) == ("Pairs", "train")
    assert found.mean == pytest.approx((PIXELS / 255).mean((0, 1, 2)), abs=1e-4)  # rounded to four decimals
    assert given.reads <= 12 + 2  # each once, but the first


GREY = {
    "[H, W] arrays": (lambda: list(PIXELS[..., 0]), PIXELS[..., 0]),
    "[1, H, W] tensors": (lambda: [torch.from_numpy(p[None, ..., 0]) for p in PIXELS], PIXELS[..., 0]),
    "[H, W, 1] arrays": (lambda: list(PIXELS[..., :1]), PIXELS[..., 0]),
    "[H, W] of bools": (lambda: list(PIXELS[..., 0] > 99), 255 * (PIXELS[..., 0] > 99)),
    "16-bit pictures": (lambda: [Image.fromarray(p[..., 0].astype(np.uint16) * 257) for p in PIXELS], PIXELS[..., 0]),
}


@pytest.mark.parametrize("kind", GREY)
def test_grey_images_have_one_channel(kind: str) -> None:
    make, want = GREY[kind]
    found = data.from_dataset(Pairs(make(), LABELS), invert=True, name="mine", split="val")
    assert np.array_equal(found.images[..., 0], 255 - want[ORDER]) and (found.name, found.split) == ("mine", "val")
    assert found.mean == (0.0,) and data.from_dataset(Pairs(make(), LABELS), channels=3).image_shape == (3, 8, 8)


def test_an_array_has_its_channels_last_and_a_tensor_first_where_both_might_be() -> None:
    cut = PIXELS[0, :3]  # 3x8x3
    for image, want in ((cut, cut), (torch.from_numpy(cut), cut.transpose(1, 2, 0))):
        found = data.from_dataset([(image, 0)], image_size=4)
        small = Image.fromarray(np.ascontiguousarray(want)).resize((4, 4), LANCZOS)
        assert np.array_equal(found.images[0], np.asarray(small))


def test_labels_come_from_where_they_are() -> None:
    names = [f"name {k}" for k in range(9)]
    wanted = ("name 2", "name 5", "name 7")
    assert data.from_dataset(Pairs(pictures(), LABELS, classes=names)).class_names == wanted
    assert data.from_dataset(Pairs(pictures(), LABELS, labels=torch.tensor(LABELS))).class_names == ("2", "5", "7")
    assert data.from_dataset(Pairs(pictures()), labels=[f"{k}!" for k in LABELS]).class_names == ("2!", "5!", "7!")
    assert data.from_dataset(Pairs(pictures(), [torch.tensor(k) for k in LABELS])).counts == (4, 4, 4)
    # A target transform changes what `targets` says.
    changed = Pairs(pictures(), [0] * 12, targets=LABELS, target_transform=abs)
    assert data.from_dataset(changed).class_names == ("0",)
    for columns in ({"image": pictures(), "label": LABELS}, {"img": pictures(), "fine_label": LABELS, "x": LABELS}):
        assert data.from_dataset(Rows(columns, names)).class_names == wanted
        assert data.from_dataset(Rows(columns, None)).class_names == ("2", "5", "7")
    rows = [{"image": p, "label": k} for p, k in zip(PIXELS, LABELS)]
    assert np.array_equal(data.from_dataset(rows).images, PIXELS[ORDER])
    assert data.from_dataset([{"image": p} for p in PIXELS], labels=LABELS).counts == (4, 4, 4)


def test_sizes_are_asked_for_where_they_differ() -> None:
    mixed = [Image.fromarray(p[: 8 - k]) for k, p in enumerate(PIXELS[:6])]
    found = data.from_dataset(Pairs(mixed, LABELS[:6]), image_size=5)
    want = mixed[1].resize((5, 5), LANCZOS)
    assert found.image_shape == (3, 5, 5) and np.array_equal(found.images[0], np.asarray(want))
    with pytest.raises(ValueError, match="image 1 is 7x8, the first one 8x8: give image_size"):
        data.from_dataset(Pairs(mixed, LABELS[:6]))
    with pytest.raises(ValueError, match="the first image is 7x8, not a square: give image_size"):
        data.from_dataset(Pairs(mixed[1:], LABELS[1:6]))
    with pytest.raises(ValueError, match="image 1 has colour, the first one has none: give channels"):
        data.from_dataset(Pairs([PIXELS[0, ..., 0], PIXELS[1]], [0, 1]))


NORMALISED = [torch.from_numpy(p / 100 - 1).permute(2, 0, 1) for p in PIXELS]
WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "a stream": (iter(PIXELS), {}, TypeError, "not map-style"),
    "nothing": ([], {}, ValueError, "list is empty"),
    "normalised": (Pairs(NORMALISED, LABELS), {}, ValueError, r"image 0 has values from -1 to 1.*without its normal"),
    "large numbers": ([(PIXELS[0].astype(np.int64) + 99, 0)], {}, ValueError, "expected 0..255"),
    "complex numbers": ([(PIXELS[0] * 1j, 0)], {}, ValueError, "complex128"),
    "no image": ([("x.png", 0)], {}, TypeError, "image 0 is a str, expected a picture"),
    "five channels": ([(np.zeros((9, 5, 9), np.uint8), 0)], {}, ValueError, r"shape \[9, 5, 9\]"),
    "no label": (Pairs(pictures()), {}, TypeError, r"item 0 is a Image, expected \(image, label\)"),
    "other columns": ([{"x": 1, "y": 2}], {}, ValueError, "items have x, y, expected image and label"),
    "few labels": (Pairs(pictures()), {"labels": [1, 2]}, ValueError, "expected 12 whole numbers or names"),
    "channels": (Pairs(pictures(), LABELS), {"channels": 2}, ValueError, "channels is 2"),
    "mean alone": (Pairs(pictures(), LABELS), {"mean": (1, 1, 1)}, ValueError, "give both"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    given, more, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        data.from_dataset(given, **more)


def numbered(*labels: int) -> Tensor:
    """Images whose pixels are their place."""
    return torch.arange(float(len(labels))).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_learn2learns_tasks_are_divided_by_class() -> None:
    # NWays, KShots(3), LoadData, RemapLabels; a list of the collated images and labels.
    labels = [1, 1, 1, 2, 2, 2, 0, 0, 0]
    taskset = [[numbered(*labels) + 100 * k, torch.tensor(labels)] for k in range(3)]
    tasks = data.from_learn2learn(taskset, 2, ways=3, shots=1)
    assert len(tasks) == 2 and all(isinstance(task, data.Task) for task in tasks)
    xs, ys, xq, yq = tasks[1]
    assert xs[:, 0, 0, 0].tolist() == [106, 100, 103] and ys.tolist() == [0, 1, 2]
    assert xq[:, 0, 0, 0].tolist() == [107, 108, 101, 102, 104, 105] and yq.tolist() == [0, 0, 1, 1, 2, 2]
    # Without RemapLabels the labels are the data set's.
    other = data.from_learn2learn([[numbered(*labels), torch.tensor(labels) * 7]], 1, ways=3, shots=2)[0]
    assert other.ys.tolist() == [0, 0, 1, 1, 2, 2] and other.yq.tolist() == [0, 1, 2]
    for given, message in (
        ((taskset, 4, 3, 1), "has 3 tasks, asked for 4"), ((taskset, 1, 5, 1), "task 0 has 3 classes, expected 5"),
        ((taskset, 1, 3, 3), "3 images of a class, of which 3 would be the support set"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            data.from_learn2learn(*given)
    with pytest.raises(TypeError, match="task 0 is Tensor, expected a pair"):
        data.from_learn2learn([taskset[0][0]], 1, 3, 1)


def batch(keys: tuple[str, str] = ("train", "test"), tasks: int = 4) -> dict[str, list[Tensor]]:
    """As BatchMetaDataLoader gives it."""
    sizes = zip(keys, (5, 15))
    return OrderedDict((k, [torch.rand(tasks, n, 1, 2, 2), torch.randint(5, (tasks, n))]) for k, n in sizes)


def test_torchmetas_batches_are_taken_apart() -> None:
    batches = [batch(), batch(("support", "query"))]
    tasks = data.from_torchmeta(batches)
    assert len(tasks) == 8 and len(data.from_torchmeta(iter(batches), 6)) == 6
    for k, (part, names) in enumerate(zip(batches, (("train", "test"), ("support", "query")))):
        for t in range(4):
            want = (part[names[0]][0][t], part[names[0]][1][t], part[names[1]][0][t], part[names[1]][1][t])
            assert all(torch.equal(a, b) for a, b in zip(tasks[4 * k + t], want, strict=True))
    endless = (one for one in [batch(), AssertionError("one batch too many is drawn")])
    assert len(data.from_torchmeta(endless, 4)) == 4 and isinstance(next(endless), AssertionError)
    with pytest.raises(ValueError, match="the loader has 8 tasks, asked for 9"):
        data.from_torchmeta(batches, 9)
    with pytest.raises(TypeError, match="batch 0 is a list, expected a dict of train and test"):
        data.from_torchmeta([[1]])
    with pytest.raises(TypeError, match="batch 0 is of train, val"):
        data.from_torchmeta([{"train": 1, "val": 2}])
    with pytest.raises(ValueError, match=r"shapes \[4, 5, 1, 2, 2\], \[4, 5\], \[3, 15, 1, 2, 2\]"):
        data.from_torchmeta([{"train": batch()["train"], "test": batch(tasks=3)["test"]}])


def test_easyfsls_batches_are_tasks() -> None:
    batches = [(torch.rand(5, 1, 2, 2), torch.randperm(5), torch.rand(15, 1, 2, 2), torch.randint(5, (15,)), [7, 9])
               for _ in range(3)]  # fmt: skip
    tasks = data.from_easyfsl(batches)
    assert len(tasks) == 3 and len(data.from_easyfsl(batches, 2)) == 2
    for task, given in zip(tasks, batches):
        assert all(a is b for a, b in zip(task, given[:4], strict=True))
    with pytest.raises(ValueError, match="the loader has 3 tasks, asked for 4"):
        data.from_easyfsl(batches, 4)
    with pytest.raises(TypeError, match="batch 0 is Tensor, Tensor, expected support images.*episodic_collate_fn"):
        data.from_easyfsl([list(batches[0][:2])])
