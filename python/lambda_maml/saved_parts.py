"""The rule and the solver of a checkpoint: what its header says of them, and how they are made again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .methods.catalogue import described, made
from .parts import Parts

__all__ = ["load_inner", "told_of_inner"]

_PLACES = ("rule", "solver")


def told_of_inner(held: Any) -> dict[str, Any]:
    """What a checkpoint says of a run's rule and solver, of what else it trains nothing: adaptation needs no more.

    A part that is none of the package's own is told as None.
    """
    own = {place: getattr(held, place) for place in _PLACES} if isinstance(held, Parts) else {"rule": held}
    found = {}
    for place, part in own.items():
        if part is not None:
            try:
                found[place] = described(part)
            except ValueError:
                found[place] = None
    return found


def load_inner(path: str | Path, model: nn.Module, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The rule or the solver of a checkpoint, of which `checkpoint.load` gave `model` and `meta`, as `adapt` takes
    them; nothing where it has none.

    Raises:
        ValueError: it has one that is none of the package's own, or it is damaged.
    """
    found: dict[str, Any] = {}
    for place, form in meta.get("parts", {}).items():
        if form is None:
            raise ValueError(
                f"{path}: was trained with the {place} {meta.get('rule', {}).get('name', 'of its own')}, which is none "
                f"of the package's own: give --lr for plain gradient descent, or call lambda_maml.adapt(..., {place}=)"
            )
        tensors, _ = checkpoint.read_tensors(path)
        try:
            found[place] = _loaded(form, model, checkpoint.own_tensors(tensors, place), str(path))
        except ValueError as error:
            raise ValueError(f"{path}: its {place}: {error}; {checkpoint.REMEDY}") from error
    return found


def _loaded(form: Any, model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> Any:
    with torch.device("meta"):  # sizes of a header take no memory before they are those of the file
        skeleton = made(form, copy.deepcopy(model).to("meta"))
    if isinstance(skeleton, nn.Module):
        checkpoint.check_tensors(skeleton, tensors, source, "part")
    part = made(form, model)
    if isinstance(part, nn.Module):
        part.load_state_dict(dict(tensors))
        part.to(next(model.parameters()).device)
    return part
