"""The episode sampler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .augment import Augment
from .imageset import ImageSet


class Task(NamedTuple):
    """One task (episode): a support set to adapt on and a query set to judge by. Both are class-major."""

    xs: torch.Tensor  # [ways * shots, C, H, W] float32
    ys: torch.Tensor  # [ways * shots] int64, 0..ways-1
    xq: torch.Tensor  # [ways * query, C, H, W] float32
    yq: torch.Tensor  # [ways * query] int64

    def __repr__(self) -> str:
        values = (list(part.shape) if isinstance(part, torch.Tensor) else part for part in self)
        return f"Task({', '.join(f'{name} {value}' for name, value in zip(self._fields, values))})"


def as_tasks(tasks: Iterable[Any], caller: str) -> list[Task]:
    """`Task`s, from such or from plain tuples (xs, ys, xq, yq).

    >>> as_tasks([(torch.zeros(5, 1, 28, 28), torch.arange(5), torch.zeros(75, 1, 28, 28), None)], "evaluate")[0].ys
    tensor([0, 1, 2, 3, 4])

    Raises:
        TypeError: an entry is neither.
        ValueError: a tuple's images and labels are not of equal number.
    """
    return [task if isinstance(task, Task) else _task(task, f"{caller}: task {k}") for k, task in enumerate(tasks)]


def _task(given: Any, what: str) -> Task:
    if not isinstance(given, (tuple, list)) or len(given) != len(Task._fields):
        told = type(given).__name__
        if isinstance(given, (tuple, list)):
            told = f"{told} of {len(given)} ({', '.join(type(part).__name__ for part in given[:5])})"
        hint = "; data.from_learn2learn divides pairs of images and labels" if told.startswith("tuple of 2") else ""
        raise TypeError(
            f"{what} is a {told}, expected Task(xs, ys, xq, yq), as data.sample_tasks gives it, or a plain tuple of "
            f"these four{hint}"
        )
    task = Task(*given)
    for images, labels, name in ((task.xs, task.ys, "s"), (task.xq, task.yq, "q")):
        if isinstance(images, torch.Tensor) and isinstance(labels, torch.Tensor) and len(images) != len(labels):
            raise ValueError(
                f"{what}: {len(images)} images in x{name}, {len(labels)} labels in y{name}; the order is xs, ys, xq, yq"
            )
    return task


def sample_tasks(
    dataset: ImageSet, n: int, ways: int = 5, shots: int = 1, query: int = 15, seed: int = 0, first: int = 0,
    augment: Augment | None = None,
) -> list[Task]:  # fmt: skip
    """Tasks `first` to `first + n - 1` of the endless sequence that `seed` names.

    Task k depends on nothing but the set's content, `seed`, k, `ways`, `shots` and `query`: a shorter list is a prefix
    of a longer one, and training resumes anywhere by `first`. Each task draws `ways` distinct classes in random order
    (the order gives the labels 0..ways-1), then `shots + query` distinct images of each, the support images first.
    Images come class-major, so `ys` is `0 .. 0 1 .. 1 ...`. Draws are raw PCG64 words, the same under every NumPy.
    `augment` changes the images of task k by draws that depend on `seed` and k alone.

    >>> xs, ys, xq, yq = sample_tasks(data.load("glyphs"), 1, ways=5, shots=1)[0]
    >>> xs.shape, ys.tolist(), xq.shape
    (torch.Size([5, 1, 28, 28]), [0, 1, 2, 3, 4], torch.Size([75, 1, 28, 28]))

    Raises:
        ValueError: a number is out of range, the set has too few classes or too few images in a class, or `augment`
            is not for such images.
    """
    for label, value, least in (
        ("n", n, 0),
        ("ways", ways, 1),
        ("shots", shots, 1),
        ("query", query, 0),
        ("seed", seed, 0),
        ("first", first, 0),
    ):
        if value < least:
            raise ValueError(f"sample_tasks: {label} is {value}, expected at least {least}")
    where = f"{dataset.name} {dataset.split}"
    if ways > dataset.num_classes:
        raise ValueError(f"sample_tasks: {ways} ways, but {where} has {dataset.num_classes} classes")
    smallest = int(np.argmin(np.diff(dataset.starts)))
    if shots + query > dataset.counts[smallest]:
        raise ValueError(
            f"sample_tasks: {shots} shots and {query} query images need {shots + query} images per class, but class "
            f"{dataset.class_names[smallest]} of {where} has {dataset.counts[smallest]}"
        )
    labels = torch.arange(ways)
    tasks = []
    for k in range(first, first + n):
        index = _draw(dataset, ways, shots + query, seed, k)
        pixels: NDArray[Any] = dataset.images[index.reshape(-1)]
        if augment:
            own = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(k, 1)))
            pixels = augment(pixels, augment.draws(own, len(pixels)))
        grouped = pixels.reshape(ways, shots + query, *pixels.shape[1:])
        xs, xq = (
            dataset.normalised(part.reshape(-1, *pixels.shape[1:])) for part in (grouped[:, :shots], grouped[:, shots:])
        )
        tasks.append(Task(xs, labels.repeat_interleave(shots), xq, labels.repeat_interleave(query)))
    return tasks


def _draw(dataset: ImageSet, ways: int, images: int, seed: int, k: int) -> NDArray[np.int64]:
    """Indices [ways, images] of the images of task k."""
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(k,))).random_raw(ways * (1 + images)).tolist()
    classes = _distinct(words[:ways], dataset.num_classes)
    rows = [
        _distinct(words[ways + i * images : ways + (i + 1) * images], dataset.counts[c]) for i, c in enumerate(classes)
    ]
    return np.array(rows, dtype=np.int64).reshape(ways, images) + dataset.starts[classes][:, None]


def _distinct(words: list[int], size: int) -> list[int]:
    """`len(words)` distinct numbers below `size` in random order: a Fisher-Yates shuffle, as far as it is needed."""
    moved: dict[int, int] = {}
    drawn = []
    for i, word in enumerate(words):
        j = i + word % (size - i)  # the bias is below size / 2**64
        drawn.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return drawn
