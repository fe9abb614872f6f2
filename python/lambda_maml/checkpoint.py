"""Checkpoints: one safetensors file that holds everything, and a readable JSON copy of its header beside it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from . import models
from .files import atomic, parse_json, write_json, written
from .forms import Count, Finite, From1, Positive, checked
from .network import layers_of
from .settings import Settings
from .statistics import restore

FORMAT = "lambda-maml 1"
REMEDY = "take another copy of the checkpoint, or train it anew"
# What this package brings along: functions of Python's and of these are no networks of a user's.
_NO_NETWORKS = ("PIL", "click", "matplotlib", "msgspec", "numpy", "pip", "rich", "setuptools", "torch", "triton")
_PLACES = ("rule.", "solver.", "objective.", "weights.", "source.")
_RULE = "rule:"  # in front of the names of a rule's tensors; no parameter of a module has a colon in its name


class WaysError(ValueError):
    """A network's last layer is made for another number of classes."""


class Network(msgspec.Struct):
    """A network's config: `models.build` judges the rest of it."""

    network: str
    ways: From1 | None = None
    in_channels: From1 | None = None
    args: dict[str, Any] = {}


class Dataset(msgspec.Struct):
    """A set of images, whose pixels became (pixel / 255 - mean) / std in each channel; or tasks of another kind."""

    name: str
    mean: list[Finite] = []
    std: list[Positive] = []


class _Metrics(msgspec.Struct):
    iteration: Count | None = None
    val_accuracy: Finite | None = None


class _Adapted(msgspec.Struct):
    """What `lambda-maml adapt` adds."""

    pattern: str
    classes: list[str]
    images: list[From1] | None = None
    invert: bool = False


class _Header(msgspec.Struct):
    """What a checkpoint of a network says of itself, as far as it is known to this package."""

    network: Network
    settings: Settings | None = None
    dataset: Dataset | None = None
    metrics: _Metrics | None = None
    adapted: _Adapted | None = None
    images: dict[str, str] = {}
    rule: dict[str, Any] = {}
    parts: dict[str, Any] = {}


class _Asked(msgspec.Struct):
    ways: int
    shots: int
    query: int
    steps: int
    lr: float
    norm: str


class _Trained(msgspec.Struct):
    """What `train` writes into a header and the command line goes by."""

    network: Network
    settings: _Asked
    dataset: Dataset
    parts: dict[str, Any] = {}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON-able `meta` to one safetensors file, atomically: the same bytes for the same.

    Raises:
        OSError: the file cannot be written, as on a full disk; names it. An earlier file stays as it was.
    """
    whole = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    text = json.dumps(meta, allow_nan=False)
    raw = memoryview(save_bytes(whole, {"format": FORMAT, "meta": text, "sha256": digest(whole, text)}))
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(bytes(raw[8 : 8 + size]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors has them in any order
    ordered = json.dumps(header, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)
    with written(path), atomic(path) as part, part.open("wb") as file:
        file.writelines((len(ordered).to_bytes(8, "little"), ordered, raw[8 + size :]))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, cut short or damaged: its checksum is not that of its content. Files of
            before 2026-11-30 have none.
    """
    path = Path(path)
    if not path.is_file():
        told = "is no file" if path.exists() else "no such checkpoint file"
        raise FileNotFoundError(f"{path}: {told}")
    try:
        # safe_open opens its path twice, where another file may lie the second time: what is open here stays the same
        with path.open("rb") as whole, safe_open(f"/proc/self/fd/{whole.fileno()}", framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short ({error}): {REMEDY}") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format is {header.get('format')!r}, expected {FORMAT!r}: not a lambda-maml checkpoint"
        )
    text = header.get("meta", "")
    if "sha256" in header and header["sha256"] != digest(tensors, text):
        raise ValueError(f"{path}: damaged, its checksum is not that of its content: {REMEDY}")
    try:
        meta = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: its header is damaged ({error}): {REMEDY}") from error
    return tensors, checked(meta, dict[str, Any], path, REMEDY, "the header")


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of a text and of every tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def save(
    path: str | Path, model: nn.Module, meta: Mapping[str, Any], rule: object = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write `model` to `path` (a .safetensors name) and `meta` with the network's config to a .json of the same name.
    A rule's parameters and buffers go with them. `state`, an adapted network's `state_dict`, stands in for the model's.

    `meta` holds what JSON can (training settings, metrics). The JSON is for people and programs; `load` reads only the
    safetensors file, whose header holds the same, so that the two can never be mixed up.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a checkpoint's name ends in .safetensors")
    meta = {**meta, "network": models.config_of(model)}
    own = model.state_dict() if state is None else state
    write_tensors(path, {**own, **tensors_of_rule(rule)}, meta)
    write_json(path.with_suffix(".json"), meta)


def load(
    path: str | Path, model: nn.Module | None = None, *, ways: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint: the model built from its config, on the CPU, and its `meta`. An adapted network comes with the
    norm statistics of its support set, in evaluation mode.

    With `model` given, its parameters are overwritten instead and it is returned. `ways`: the classes of your tasks,
    where they are not those of training: a last layer that is zero (`Settings(zero_head=True)`, `pretrain`) is made
    anew for so many, and `meta` says so.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; or of another network than `model`, whose name or first key that differs is named,
            and `model` is unchanged; or `ways` is another number and the last layer was meta-learned (`WaysError`).
    """
    weights, meta = read_weights(path, model)
    if model is None:
        header: _Header = checked(meta, _Header, path, REMEDY)
        model = _built(header, meta["network"], weights, str(path))
    load_tensors(model, weights, str(path))
    trained = meta["network"].get("ways", meta.get("settings", {}).get("ways"))
    return (model, meta) if ways in (None, trained) else _with_ways(model, meta, ways, f"{path}: the network", trained)


def _with_ways(
    model: nn.Module, meta: Mapping[str, Any], ways: int, what: str, trained: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The same network for tasks of so many classes, and what is then said of it."""
    last, weights = layers_of(model)[-1].weights, model.state_dict()
    if "ways" not in meta["network"] or any(weights[name].any() for name in last):
        raise WaysError(
            f"{what} has {trained} classes, not {ways}: only one whose last layer is zero takes another number, as "
            "train --zero-head makes it"
        )
    config = {**meta["network"], "ways": ways}
    other = models.build(config)
    head = {name: torch.zeros_like(other.get_parameter(name)) for name in last}
    load_tensors(other, {**weights, **head}, what)
    return other, {**meta, "network": config, "settings": {**meta.get("settings", {}), "ways": ways}}


def read_weights(path: str | Path, model: nn.Module | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint's network, and its `meta`; ValueError where it holds no network, or none of `model`'s
    name."""
    tensors, meta = read_tensors(path)
    if "network" not in meta:
        raise ValueError(f"{path}: holds no network config: it is a training state, pass best.safetensors")
    if model is not None:
        _check_same_network(path, model, meta["network"])
    checked(meta, _Header, path, REMEDY)
    return {k: v for k, v in tensors.items() if not k.startswith(_RULE)}, meta


def check_trained(path: str | Path, meta: Mapping[str, Any]) -> None:
    """ValueError where a header lacks what the command line goes by, or contradicts itself: the ways of the network and
    of its tasks, the channels of the network and of its images."""
    found: _Trained = checked(meta, _Trained, path, "it was not written by lambda-maml train: train writes it")
    ways, channels = found.network.ways, found.network.in_channels
    if ways is not None and found.settings.ways != ways:
        raise ValueError(
            f"{path}: settings.ways is {found.settings.ways}, but the network has {ways} classes; {REMEDY}"
        )
    for name, values in (("mean", found.dataset.mean), ("std", found.dataset.std)):
        if channels is not None and len(values) != channels:
            raise ValueError(
                f"{path}: dataset.{name} has {len(values)} channels, but the network takes {channels}; {REMEDY}"
            )


def _built(header: _Header, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """The network of a checkpoint's config: one of ours is made without memory first, so that no number of a header
    takes more than the file has. A function is imported: never one of Python's own or torch's, which a header could
    make do anything."""
    where, is_own, _ = header.network.network.partition(":")
    if is_own and where.partition(".")[0] in {*sys.stdlib_module_names, *_NO_NETWORKS}:
        told = f"{header.network.network!r}, a function that makes no network of yours"
        raise ValueError(f"{source}: network.network is {told}; {REMEDY}")

    def made() -> nn.Module:
        model = models.build(config)
        if header.adapted is not None:
            restore(model, tensors)
        return model

    if not is_own:
        try:
            with torch.device("meta"):
                skeleton = made()
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # sizes beyond what a tensor can have
            raise ValueError(f"{source}: network: {error}; {REMEDY}") from error
        check_tensors(skeleton, tensors, source)
    return made()


def _check_same_network(path: str | Path, model: nn.Module, config: Any) -> None:
    """ValueError where file and model are known to be networks of different names."""
    try:
        own = models.config_of(model)
    except ValueError:
        return
    if isinstance(config, dict) and config.get("network") != own["network"]:
        raise ValueError(
            f"{path}: holds the network {config.get('network')}, not {own['network']}: load it without a model, which "
            "is then built as the file says"
        )


def load_rule(path: str | Path, rule: nn.Module) -> None:
    """Put the learned rates, or what else a checkpoint holds of a rule, into a rule of the same form.

    Raises:
        ValueError: the checkpoint holds another rule; `rule` is then unchanged.
    """
    tensors, _ = read_tensors(path)
    load_tensors_of_rule(tensors, rule, str(path))


def load_tensors_of_rule(tensors: Mapping[str, Tensor], rule: nn.Module, source: str) -> None:
    """`load_rule` from what `read_tensors` gave of the file `source`."""
    own = {k.removeprefix(_RULE): v for k, v in tensors.items() if k.startswith(_RULE)}
    load_tensors(rule, own, source, "rule")


def own_tensors(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """A checkpoint's tensors of what stands in a place, such as "rule"; a run with `Parts` names them by it."""
    every = {k.removeprefix(_RULE): v for k, v in tensors.items() if k.startswith(_RULE)}
    if not any(k.startswith(_PLACES) for k in every):
        return every
    return {k.removeprefix(f"{place}."): v for k, v in every.items() if k.startswith(f"{place}.")}


def tensors_of_rule(rule: object) -> dict[str, Tensor]:
    """A rule's parameters and buffers, by the names that a checkpoint has for them; one that is no module has none."""
    held = rule.state_dict() if isinstance(rule, nn.Module) else {}
    return {f"{_RULE}{name}": tensor for name, tensor in held.items()}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str, what: str = "network") -> None:
    """Copy `tensors` into `model` after checking every one. `source` names the file in errors."""
    check_tensors(model, tensors, source, what)
    model.load_state_dict(dict(tensors))


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str, what: str = "network") -> None:
    """ValueError where a name, a shape or a kind of number differs from those of `model`, or a parameter is infinite or
    NaN."""
    expected, learned = model.state_dict(), dict(model.named_parameters())
    for key in [*expected, *(k for k in tensors if k not in expected)]:
        if key not in tensors or key not in expected or tensors[key].shape != expected[key].shape:
            has = list(tensors[key].shape) if key in tensors else "no such tensor"
            wants = list(expected[key].shape) if key in expected else "no such tensor"
            raise ValueError(f"{source}: is of another {what}: {key} is {has} in the file, {wants} in the {what}")
        own, wanted = tensors[key], expected[key]
        if _kind(own) != _kind(wanted):
            raise ValueError(f"{source}: {key} is {own.dtype} in the file, {wanted.dtype} in the {what}; {REMEDY}")
        if key in learned and not bool(torch.isfinite(own).all()):
            raise ValueError(f"{source}: {key} holds numbers that are infinite or NaN; {REMEDY}")


def _kind(tensor: Tensor) -> tuple[bool, bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool
