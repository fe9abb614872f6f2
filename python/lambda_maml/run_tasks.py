"""Where the tasks of a training run come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import data
from .data.augment import Augment
from .data.episodes import Task, as_tasks
from .data.imageset import ImageSet
from .settings import Settings

__all__ = ["Sample", "check", "sampled", "told_of"]

Sample = Callable[[int, int], Sequence[Task]]
"""Called as sample(first, count), gives the tasks `first` to `first + count - 1` of an endless sequence; a task
may be a plain tuple (xs, ys, xq, yq)."""


def check(source: ImageSet | Sample, settings: Settings) -> None:
    """Raises ValueError where the settings' augmentation does not fit the tasks."""
    if isinstance(source, ImageSet):
        settings.augment.check(source.image_shape[0])
    elif settings.augment:
        raise ValueError("flip, crop and jitter change the images of an ImageSet: leave them out for tasks of your own")


def sampled(
    source: ImageSet | Sample, settings: Settings, count: int, first: int = 0, augment: Augment | None = None
) -> list[Task]:
    """Tasks `first` to `first + count - 1`: episodes of an image set as the settings have them, or the function's."""
    if not isinstance(source, ImageSet):
        return as_tasks(source(first, count), "train")
    return data.sample_tasks(
        source, count, ways=settings.ways, shots=settings.shots, query=settings.query, seed=settings.seed,
        first=first, augment=augment,
    )  # fmt: skip


def told_of(train: ImageSet | Sample, val: ImageSet | Sample) -> dict[str, Any]:
    """What a checkpoint says of them."""
    if not isinstance(train, ImageSet):
        return {"dataset": {"name": getattr(train, "__qualname__", type(train).__qualname__)}}
    told = {"dataset": told_of_pixels(train)}
    if not isinstance(val, ImageSet):
        return told
    return {**told, "images": {"of training": train.fingerprint(), "of validation": val.fingerprint()}}


def told_of_pixels(images: ImageSet) -> dict[str, Any]:
    """Which set it is, and how its pixels become tensors."""
    return {"name": images.name, "mean": list(images.mean), "std": list(images.std), **images.origin}
