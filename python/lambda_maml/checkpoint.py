"""Checkpoints: one safetensors file that holds everything, and a readable JSON copy of its header beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from . import models
from .files import atomic, write_json, written
from .statistics import restore

FORMAT = "lambda-maml 1"
_RULE = "rule:"  # in front of the names of a rule's tensors; no parameter of a module has a colon in its name


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON-able `meta` to one safetensors file, atomically.

    Raises:
        OSError: the file cannot be written, as on a full disk; names it. An earlier file stays as it was.
    """
    whole = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    header = {"format": FORMAT, "meta": json.dumps(meta, allow_nan=False)}
    with written(path), atomic(path) as part:
        part.write_bytes(save_bytes(whole, metadata=header))  # save_file has a temporary file of its own


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Raises FileNotFoundError, or ValueError for a file of another kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format is {header.get('format')!r}, expected {FORMAT!r}: not a lambda-maml checkpoint"
        )
    return tensors, json.loads(header["meta"])


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


def load(path: str | Path, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Read a checkpoint: the model built from its config, on the CPU, and its `meta`. An adapted network comes with the
    norm statistics of its support set, in evaluation mode.

    With `model` given, its parameters are overwritten instead and it is returned. Raises ValueError that names both
    networks, if their names differ, or the first key that differs in name or shape; `model` is then unchanged.
    """
    tensors, meta = read_tensors(path)
    if model is None:
        if not isinstance(meta.get("network"), dict):
            raise ValueError(f"{path}: holds no network config: it is a training state, pass best.safetensors")
        model = models.build(meta["network"])
        if "adapted" in meta:
            restore(model, tensors)
    else:
        _check_same_network(path, model, meta.get("network"))
    load_tensors(model, {k: v for k, v in tensors.items() if not k.startswith(_RULE)}, str(path))
    return model, meta


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


def tensors_of_rule(rule: object) -> dict[str, Tensor]:
    """A rule's parameters and buffers, by the names that a checkpoint has for them; one that is no module has none."""
    held = rule.state_dict() if isinstance(rule, nn.Module) else {}
    return {f"{_RULE}{name}": tensor for name, tensor in held.items()}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str, what: str = "network") -> None:
    """Copy `tensors` into `model` after checking every name and shape. `source` names the file in errors."""
    expected = model.state_dict()
    for key in [*expected, *(k for k in tensors if k not in expected)]:
        if key not in tensors or key not in expected or tensors[key].shape != expected[key].shape:
            has = list(tensors[key].shape) if key in tensors else "no such tensor"
            wants = list(expected[key].shape) if key in expected else "no such tensor"
            raise ValueError(f"{source}: is of another {what}: {key} is {has} in the file, {wants} in the {what}")
    model.load_state_dict(dict(tensors))
