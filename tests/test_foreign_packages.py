"""The packages themselves, where they are installed: what `test_foreign_sets` makes by hand comes from them here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import lambda_kernels as lk
from lambda_maml import data
from lambda_maml.evaluate import evaluate

LABELS = [k % 3 for k in range(12)]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
BY_CLASS = PIXELS[[k for label in range(3) for k in range(12) if LABELS[k] == label]]
IMAGES = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255


def package(name: str) -> Any:
    """The module; a skip where it is not installed or does not run beside this torch."""
    try:
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ModuleNotFoundError)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{name} does not run here: {error}")


def can_be_used(tasks: list[data.Task], ways: int, shots: int, query: int) -> None:
    """The tasks are of that form, and a network is judged by them."""
    for xs, ys, xq, yq in tasks:
        assert xs.shape[0] == ways * shots and xq.shape[0] == ways * query
        assert ys.bincount().tolist() == [shots] * ways and yq.bincount().tolist() == [query] * ways
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    layers = [nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, ways)]
    model = lk.convert(nn.Sequential(*layers))
    assert 0 <= evaluate(model, tasks, pattern="ANIL", steps=1, lr=0.1).mean <= 1


def of_one_class(images: Tensor) -> list[int]:
    """Whose class each image is, by its pixels."""
    return [LABELS[int((IMAGES - image).abs().amax((1, 2, 3)).argmin())] for image in images]


def test_torchvisions_sets(tmp_path: Path) -> None:
    vision = package("torchvision")
    for k, (picture, label) in enumerate(zip(PIXELS, LABELS)):
        (tmp_path / f"class {label}").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"class {label}" / f"{k:02d}.png")
    for transform in (None, vision.transforms.ToTensor()):
        found = data.from_dataset(vision.datasets.ImageFolder(tmp_path, transform))
        assert np.array_equal(found.images, BY_CLASS) and found.class_names == ("class 0", "class 1", "class 2")
    made = vision.datasets.FakeData(12, (3, 8, 8), 3, vision.transforms.ToTensor())
    assert sum(data.from_dataset(made).counts) == 12
    can_be_used(data.sample_tasks(found, 2, ways=3, shots=1, query=2), 3, 1, 2)


def test_hugging_faces_sets() -> None:
    hub = package("datasets")
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["oak", "beech", "ash"])})
    pictures = [Image.fromarray(p) for p in PIXELS]
    rows = hub.Dataset.from_dict({"image": pictures, "label": LABELS}, features=features)
    found = data.from_dataset(rows)
    assert np.array_equal(found.images, BY_CLASS) and found.class_names == ("oak", "beech", "ash")
    can_be_used(data.sample_tasks(found, 2, ways=3, shots=2, query=1), 3, 2, 1)


def test_learn2learns_tasksets() -> None:
    l2l = package("learn2learn")
    meta = l2l.data.MetaDataset(TensorDataset(IMAGES, torch.tensor(LABELS)))
    steps = [l2l.data.transforms.NWays(meta, 2), l2l.data.transforms.KShots(meta, 3)]
    steps += [l2l.data.transforms.LoadData(meta), l2l.data.transforms.RemapLabels(meta)]
    taskset = getattr(l2l.data, "Taskset", l2l.data.TaskDataset)(meta, task_transforms=steps, num_tasks=4)
    tasks = data.from_learn2learn(taskset, 4, ways=2, shots=1)
    can_be_used(tasks, 2, 1, 2)
    for xs, _, xq, yq in tasks:  # a label stands for one class in both sets
        support = of_one_class(xs)
        assert of_one_class(xq) == [support[k] for k in yq.tolist()]


def test_torchmetas_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = package("torchvision.datasets.utils")
    for name in ("_get_confirm_token", "_save_response_content"):  # of older torchvisions, which torchmeta 1.8 imports
        monkeypatch.setattr(downloads, name, None, raising=False)
    data_of: Any = package("torchmeta.utils.data")
    transforms = package("torchmeta.transforms")
    subset = package("torchmeta.utils.data.task").SubsetTask  # torch 2 refuses a Subset without this
    monkeypatch.setattr(subset, "__getitems__", lambda self, places: [self[k] for k in places], raising=False)

    class Class(data_of.Dataset):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.places = [k for k in range(12) if LABELS[k] == index]

        def __len__(self) -> int:
            return len(self.places)

        def __getitem__(self, place: int) -> tuple[Tensor, Any]:
            return IMAGES[self.places[place]], self.transform_target(self.index)

        def transform_target(self, target: Any) -> Any:
            return target if self.target_transform is None else self.target_transform(target)

    class Classes(data_of.ClassDataset):
        num_classes = 3

        def __getitem__(self, index: int) -> Any:
            return Class(index)

    made = data_of.CombinationMetaDataset(Classes(meta_train=True), 2, target_transform=transforms.Categorical(2))
    split = transforms.ClassSplitter(made, num_train_per_class=1, num_test_per_class=2)
    tasks = data.from_torchmeta(data_of.BatchMetaDataLoader(split, batch_size=2), 3)
    assert len(tasks) == 3
    can_be_used(tasks, 2, 1, 2)


def test_easyfsls_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    samplers = package("easyfsl.samplers")
    # easyfsl 1.5 calls it as older torches had it.
    monkeypatch.setattr(Sampler, "__init__", lambda self, data_source=None: None, raising=False)

    class Labelled(TensorDataset):
        def get_labels(self) -> list[int]:
            return LABELS

        def __getitem__(self, place: Any) -> Any:
            image, label = super().__getitem__(place)
            return image, int(label)

    images = Labelled(IMAGES, torch.tensor(LABELS))
    sampler = samplers.TaskSampler(images, n_way=2, n_shot=1, n_query=2, n_tasks=3)
    loader = DataLoader(images, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    tasks = data.from_easyfsl(loader)
    assert len(tasks) == 3
    can_be_used(tasks, 2, 1, 2)
    for xs, ys, xq, yq in tasks:
        classes = dict(zip(ys.tolist(), of_one_class(xs)))
        assert of_one_class(xq) == [classes[k] for k in yq.tolist()]
