"""Supervised pretraining: the layers before the last one learn to tell all training classes apart, before MAML begins.

The way of W.-Y. Chen et al., A Closer Look at Few-shot Classification (ICLR 2019, "Baseline"), with which H.-J. Ye and
W.-L. Chao, How to Train Your MAML to Excel in Few-Shot Classification (ICLR 2022), begin meta-training.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from . import checkpoint, models
from .data.augment import Augment
from .data.imageset import ImageSet, with_rotations
from .forms import Count, Finite, NotBelow0, checked
from .lock import locked
from .network import layers_of, zero_last
from .progress import Progress, shown
from .run_tasks import told_of_pixels
from .say import say_once
from .schedule import along_cosine
from .stopping import Stop, stoppable

__all__ = ["PRETRAINED", "STATE", "Epoch", "Pretrained", "Pretraining", "pretrain", "start_from"]

PRETRAINED, STATE = "pretrained.safetensors", "pretraining.safetensors"


@dataclass(frozen=True)
class Pretraining:
    """What a pretraining goes by; a resumed one must have the same.

    epochs: passes over the images. batch: images of an update, at least (an epoch is divided evenly). lr: rate of SGD
    with Nesterov's momentum 0.9, which falls to 0 along half a cosine. weight_decay: of all weights. flip, crop,
    jitter: as in `data.Augment`. rotations: each class, turned by 90, 180 and 270 degrees, is three more classes, so
    that the classifier learns the way up too (Lee, Hwang, Shin 2020, "label augmentation"). seed: of the order of the
    images, their changes, and the classifier's first weights.

    Raises:
        ValueError: a number is out of range.
    """

    epochs: int = 30
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    flip: bool = False
    crop: int = 0
    jitter: float = 0.0
    rotations: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 2), ("seed", 0), ("weight_decay", 0)):
            if not least <= getattr(self, name) <= 10**9:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}, expected above 0")
        Augment(self.flip, self.crop, self.jitter)


class Epoch(NamedTuple):
    """A pass over the images: its mean loss and the share of images told rightly, both while the weights moved, and
    seconds since the start in all runs so far."""

    epoch: Count
    loss: Finite
    accuracy: NotBelow0
    seconds: NotBelow0


@dataclass
class Pretrained:
    """Where a pretraining stands: its epochs, the classes that it learns to tell apart (turned ones too), and why it
    ended ("epochs", or a word of `stopping.SIGNALS`)."""

    history: list[Epoch]
    classes: int
    stopped: str = "epochs"


class _Header(msgspec.Struct):
    run: dict[str, dict[str, Any]]
    history: list[Epoch]


def pretrain(
    model: nn.Module, images: ImageSet, *, out: str | Path, settings: Pretraining | None = None, resume: bool = False,
    overwrite: bool = False, progress: Progress | bool | None = None,
) -> Pretrained:  # fmt: skip
    """Train all layers but the last one as a classifier of all classes of `images`, in place; the last one, which MAML
    adapts to each task's own classes, becomes zero.

    >>> images = data.load("glyphs", split="val")
    >>> model = models.conv4(5, 1, 4, 28)
    >>> pretrain(model, images, out=folder, settings=Pretraining(epochs=1)).history[0].epoch
    1
    >>> float(model.head.weight.abs().max())
    0.0

    In `out`: pretrained.safetensors with pretrained.json, for `start_from`; until it is done, pretraining.safetensors,
    the state after the last epoch. An interrupted run that is resumed ends with the same bits as one that is not, on
    the same machine and number of threads.

    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError: the network does not end in a linear layer; or `out` holds a pretraining and neither `resume` nor
            `overwrite` is set; or settings, network or images differ from those of the run to resume; or another run
            writes into `out`.
        OSError: a file cannot be written; names it. Files that were there before are whole.
    """
    settings, folder = settings or Pretraining(), Path(out)
    with locked(folder, "pretrain"):
        run = _Run(model, images, folder, settings)
        held = [path for path in (folder / STATE, folder / PRETRAINED) if path.is_file()]
        if resume:
            run.resume()
        elif held and not overwrite:
            way = "resume it (--resume) or choose" if held[0].name == STATE else "choose"
            raise ValueError(f"{held[0]}: the folder holds a pretraining: {way} another folder")
        else:  # nothing of an earlier one may be taken for this one, should it be interrupted
            for path in (*held, (folder / PRETRAINED).with_suffix(".json")):
                path.unlink(missing_ok=True)
        with shown(progress, "pretraining", left=False) as told, stoppable() as stop:
            run.go(stop, told)
        return run.result


class _Run:
    """A pretraining on its way."""

    def __init__(self, model: nn.Module, images: ImageSet, folder: Path, settings: Pretraining) -> None:
        name = layers_of(model)[-1].name
        last = model.get_submodule(name)
        if not isinstance(last, nn.Linear):
            raise ValueError(f"{type(model).__name__} ends in {type(last).__name__} {name}, expected a linear layer")
        self.augment = Augment(settings.flip, settings.crop, settings.jitter)
        self.augment.check(images.image_shape[0])
        if settings.rotations:
            images = with_rotations(images)
        self.model, self.images, self.folder, self.settings, self.last = model, images, folder, settings, name
        self.classifier = copy.deepcopy(model).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            head = nn.Linear(last.in_features, images.num_classes)
        self.classifier.set_submodule(name, head.to(last.weight))
        self.like = last.weight  # for device and dtype
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay, nesterov=True
        )
        self.updates = max(1, len(images) // settings.batch)  # per epoch
        self.result = Pretrained([], images.num_classes)
        self.about = {
            "pretraining": asdict(settings), "network": models.config_of(model), "dataset": told_of_pixels(images),
            "images": {"of pretraining": images.fingerprint()},
        }  # fmt: skip

    def go(self, stop: Stop, progress: Progress | None) -> None:
        """The epochs that are left, and the checkpoint."""
        history, epochs = self.result.history, self.settings.epochs
        before, begun = history[-1].seconds if history else 0.0, time.perf_counter()
        while len(history) < epochs:
            found = self._epoch(len(history), stop, progress)
            if found is None:
                self.result.stopped = str(stop.reason)
                return
            history.append(Epoch(len(history) + 1, *found, before + time.perf_counter() - begun))
            if len(history) < epochs:
                self._save()
        own = {k: v for k, v in self.classifier.state_dict().items() if not k.startswith(f"{self.last}.")}
        self.model.load_state_dict(own, strict=False)
        zero_last(self.model)
        metrics = {"loss": history[-1].loss, "accuracy": history[-1].accuracy, "seconds": history[-1].seconds}
        checkpoint.save(self.folder / PRETRAINED, self.model, {**self.about, "metrics": metrics})
        (self.folder / STATE).unlink(missing_ok=True)

    def _epoch(self, epoch: int, stop: Stop, progress: Progress | None) -> tuple[float, float] | None:
        """Mean loss and accuracy of a pass over the images; None where a signal ended it."""
        labels, loss_sum, right = self.images.targets, 0.0, 0
        total = self.updates * self.settings.epochs
        for number, index in enumerate(np.array_split(self._order(epoch), self.updates)):
            if stop.reason is not None:
                return None
            update = epoch * self.updates + number
            for group in self.optimizer.param_groups:
                group["lr"] = along_cosine(update / total, self.settings.lr)
            y = torch.from_numpy(labels[index]).to(self.like.device)
            logits = self.classifier(self._batch(index, update))
            loss = F.cross_entropy(logits, y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if not math.isfinite(value := loss.item()):
                raise FloatingPointError(
                    f"pretraining diverged: the loss is {value} at update {update + 1}: lower the rate "
                    f"({self.settings.lr})"
                )
            loss_sum, right = loss_sum + value * len(index), right + int((logits.argmax(1) == y).sum())
            if progress is not None:
                progress(update + 1, total, f"updates, loss {value:.3f}")
        return loss_sum / len(labels), right / len(labels)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The images in the order of an epoch, the same under every NumPy."""
        words = np.random.PCG64(np.random.SeedSequence(self.settings.seed, spawn_key=(epoch, 3)))
        return np.argsort(words.random_raw(len(self.images)), kind="stable")

    def _batch(self, index: NDArray[np.int64], update: int) -> Tensor:
        pixels: NDArray[Any] = self.images.images[index]
        if self.augment:
            words = np.random.PCG64(np.random.SeedSequence(self.settings.seed, spawn_key=(update, 4)))
            pixels = self.augment(pixels, self.augment.draws(words, len(pixels)))
        return self.images.normalised(pixels).to(self.like)

    def _save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.classifier.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors[f"momentum.{index}"] = state["momentum_buffer"]
        meta = {"run": self.about, "history": self.result.history}
        checkpoint.write_tensors(self.folder / STATE, tensors, meta)

    def resume(self) -> None:
        """Go on from the state in the folder; where there is none, begin.

        Raises:
            ValueError: it is of another pretraining, or this one is done.
        """
        path = self.folder / STATE
        if not path.is_file():
            if (self.folder / PRETRAINED).is_file():
                raise ValueError(f"{self.folder / PRETRAINED}: the pretraining is done: train --start-from takes it")
            return
        tensors, meta = checkpoint.read_tensors(path)
        header: _Header = checked(meta, _Header, path, checkpoint.REMEDY)
        # Settings that are newer than the state: not set.
        then = {**header.run, "pretraining": {**asdict(Pretraining()), **header.run.get("pretraining", {})}}
        for key, own in self.about.items():
            if then.get(key) != own:
                raise ValueError(
                    f"{path}: the run to resume has {key} {then.get(key)}, this one {own}: give the same, or another "
                    "folder"
                )
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        checkpoint.load_tensors(self.classifier, weights, str(path))
        state = {
            int(k.removeprefix("momentum.")): {"momentum_buffer": v}
            for k, v in tensors.items()
            if k.startswith("momentum.")
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.result.history.extend(header.history)


def start_from(path: str | Path, model: nn.Module, images: object = None, val: object = None) -> dict[str, str]:
    """Give a network the weights of a checkpoint, of `pretrain` or `train`, and return what tells the checkpoint from
    others. A last layer for another number of classes stays as it is in `model`.

    >>> start_from(folder / "pretrained.safetensors", models.conv4(20, 1, 4, 28)).keys()
    dict_keys(['sha256'])

    images, val: the sets that it is to be trained and validated on. A line on stderr says where the checkpoint's images
    were normalised otherwise, and where it was trained on classes of `val`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another network; names the first tensor that differs.
    """
    weights, meta = checkpoint.read_weights(path, model)
    found = {"sha256": checkpoint.digest(weights, "")}
    own, last = model.state_dict(), f"{layers_of(model)[-1].name}."
    for name in [n for n in own if n.startswith(last) and n in weights]:
        if weights[name].shape[1:] == own[name].shape[1:] and len(weights[name]) != len(own[name]):
            weights[name] = own[name]
    checkpoint.load_tensors(model, weights, str(path))
    known = meta.get("dataset") or {}
    if isinstance(images, ImageSet):
        now = told_of_pixels(images)
        for key in ("mean", "std"):
            if known.get(key) != now[key]:
                say_once(f"{path}: its pixels have {key} {known.get(key)}, those of {images.name} {now[key]}")
    seen = sorted(set(known.get("classes", ())) & set(val.class_names)) if isinstance(val, ImageSet) else []
    if seen:
        say_once(
            f"warning: {path} was trained on {len(seen)} of the validation classes, {seen[0]} among them: divide the "
            "folder alike (--shares, --split-seed)"
        )
    return found
