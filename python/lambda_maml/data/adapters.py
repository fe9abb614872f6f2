"""Tasks of other packages as lists of `Task`: learn2learn, torchmeta, easyfsl. None of them is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .episodes import Task

__all__ = ["from_easyfsl", "from_learn2learn", "from_torchmeta"]

_PARTS = (("train", "test"), ("support", "query"))  # torchmeta's names of support and query set, its versions' two


def from_learn2learn(taskset: Iterable[Any], n: int, ways: int, shots: int) -> list[Task]:
    """`n` tasks of a learn2learn taskset, whose tasks are (images, labels) of support and query images together.

    Of each class the first `shots` images are the support set, the others the query set; both come class-major, with
    labels 0..ways-1 in the order of the taskset's. (learn2learn's own examples take every other image in place of the
    first ones: as many, drawn alike.)

    >>> sets = l2l.vision.benchmarks.get_tasksets("mini-imagenet", train_ways=5, train_samples=2)
    >>> tasks = data.from_learn2learn(sets.train, 100, ways=5, shots=1)

    Raises:
        ValueError: fewer than n tasks, a task of another number of classes, or no image left for the query set.
        TypeError: a task is no pair of tensors.
    """
    tasks = []
    for place, given in enumerate(islice(taskset, n)):
        what = f"from_learn2learn: task {place}"
        images, labels = _pair(given, what)
        classes, counts = labels.unique(return_counts=True)
        if len(classes) != ways:
            raise ValueError(f"{what} has {len(classes)} classes, expected {ways}")
        if int(counts.min()) <= shots:
            raise ValueError(
                f"{what} has {int(counts.min())} images of a class, of which {shots} would be the support set and none "
                f"the query set: let KShots give {shots} and the number of query images"
            )
        rows = [torch.nonzero(labels == label).flatten() for label in classes]
        support, query = ([row[part] for row in rows] for part in (slice(shots), slice(shots, None)))
        tasks.append(Task(images[torch.cat(support)], _numbers(support), images[torch.cat(query)], _numbers(query)))
    if len(tasks) < n:
        raise ValueError(f"from_learn2learn: the taskset has {len(tasks)} tasks, asked for {n}")
    return tasks


def from_torchmeta(batches: Iterable[Any], n: int | None = None) -> list[Task]:
    """The first `n` tasks of a torchmeta `BatchMetaDataLoader`, by default all (a combination of classes each: many).

    A batch is a dict of "train" and "test", or "support" and "query", each (images [B, N, C, H, W], labels [B, N]).

    >>> loader = torchmeta.utils.data.BatchMetaDataLoader(dataset, batch_size=16)
    >>> tasks = data.from_torchmeta(loader, 100)

    Raises:
        ValueError: fewer than n tasks, or parts that do not fit together.
        TypeError: a batch of another form.
    """
    tasks: list[Task] = []
    for place, batch in enumerate(batches):
        what = f"from_torchmeta: batch {place}"
        keys = [k for k in _PARTS if isinstance(batch, Mapping) and set(k) <= batch.keys()]
        if not keys:
            told = f"of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise TypeError(f"{what} is {told}, expected a dict of train and test: give BatchMetaDataLoader's batches")
        (xs, ys), (xq, yq) = (_pair(batch[key], f"{what}, {key}") for key in keys[0])
        if len(xs) != len(xq) or ys.shape != xs.shape[:2] or yq.shape != xq.shape[:2]:
            shapes = ", ".join(str(list(part.shape)) for part in (xs, ys, xq, yq))
            raise ValueError(f"{what} has the shapes {shapes}, expected [B, N, C, H, W] and [B, N], twice")
        tasks += [Task(*parts) for parts in zip(xs, ys, xq, yq)]
        if n is not None and len(tasks) >= n:
            break
    return _first(tasks, n, "from_torchmeta: the loader has")


def from_easyfsl(batches: Iterable[Any], n: int | None = None) -> list[Task]:
    """The first `n` tasks, by default all, of a `DataLoader` with easyfsl's `TaskSampler`.

    A batch is one task: support images and labels, query images and labels, and the class numbers in the data set,
    which are left out.

    >>> sampler = easyfsl.samplers.TaskSampler(dataset, n_way=5, n_shot=1, n_query=15, n_tasks=100)
    >>> loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    >>> tasks = data.from_easyfsl(loader)

    Raises:
        ValueError: fewer than n tasks.
        TypeError: a batch of another form.
    """
    tasks = []
    for place, batch in enumerate(islice(batches, n)):
        parts = list(batch)[:4] if isinstance(batch, (tuple, list)) else []
        if len(parts) < 4 or not all(isinstance(part, Tensor) for part in parts):
            told = ", ".join(type(part).__name__ for part in parts) or type(batch).__name__
            raise TypeError(
                f"from_easyfsl: batch {place} is {told}, expected support images, support labels, query images, query "
                "labels, class numbers: give the loader collate_fn=sampler.episodic_collate_fn"
            )
        tasks.append(Task(*parts))
    return _first(tasks, n, "from_easyfsl: the loader has")


def _pair(given: Any, what: str) -> tuple[Tensor, Tensor]:
    if not isinstance(given, (tuple, list)) or len(given) != 2 or not all(isinstance(p, Tensor) for p in given):
        told = ", ".join(type(p).__name__ for p in given) if isinstance(given, (tuple, list)) else type(given).__name__
        raise TypeError(f"{what} is {told}, expected a pair of tensors, images and labels")
    return given[0], given[1]


def _numbers(rows: list[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(row),), k, device=row.device) for k, row in enumerate(rows)])


def _first(tasks: list[Task], n: int | None, has: str) -> list[Task]:
    if n is not None and len(tasks) < n:
        raise ValueError(f"{has} {len(tasks)} tasks, asked for {n}")
    return tasks if n is None else tasks[:n]
