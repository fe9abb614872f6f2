"""Inner rates that are meta-trained with the network: made, watched in training, and used afterwards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .inner.rates import Rate
from .inner.rules import sgd
from .network import layers_of
from .settings import Settings

__all__ = ["check_rates", "fault_in", "fixed_rates", "learned_rule", "load_learned_rule", "load_rates"]

_log = logging.getLogger("lambda_maml")


def learned_rule(model: nn.Module, settings: Settings) -> sgd:
    """Gradient descent with rates that are parameters, each `settings.lr` at the start.

    >>> learned_rule(model, Settings(learn_lr="layer-step", steps=5))
    sgd(lr=tensor [5, 5])

    "one": one rate. "layer": [layers]. "step": [steps, 1]. "layer-step": [steps, layers], as in MAML++ (Antoniou et al.
    2019, section 4). "weight": one for each number of the adapted parameters, as in Meta-SGD (Li et al. 2017,
    algorithm 1).
    """
    layers, some = layers_of(model), next(model.parameters())
    if settings.learn_lr == "weight":
        named = dict(model.named_parameters())
        adapted = [n for layer in layers for n in layer.adapted(settings.norm)]
        return sgd({n: nn.Parameter(torch.full_like(named[n], settings.lr)) for n in adapted})
    shapes: dict[str | None, tuple[int, ...]] = {
        "one": (), "layer": (len(layers),), "step": (settings.steps, 1), "layer-step": (settings.steps, len(layers))
    }  # fmt: skip
    rates = torch.full(shapes[settings.learn_lr], settings.lr, dtype=some.dtype, device=some.device)
    return sgd(nn.Parameter(rates))


def fixed_rates(rule: sgd, form: str, steps: int) -> Rate:
    """The rates as they stand, for `steps` steps, as the `lr` of `adapt`: known beforehand.

    Steps beyond those that were trained have the last one's rates, as the last pattern of a schedule holds for all
    later steps.
    """
    if form == "weight":
        return {name: rate.detach() for name, rate in rule.rates.value.items()}
    rates: Tensor = rule.rates.value.detach()
    if "step" not in form:
        return rates
    return rates[torch.arange(steps, device=rates.device).clamp(max=len(rates) - 1)]


def load_learned_rule(path: str | Path, model: nn.Module, meta: Mapping[str, Any]) -> sgd | None:
    """The rule with the learned rates of a checkpoint, of which `checkpoint.load` gave `model` and `meta`; None if it
    has none.

    Raises:
        ValueError: the checkpoint's rates are of another form than its settings say.
    """
    saved = meta.get("settings", {})
    if saved.get("learn_lr") is None:
        return None
    rule = learned_rule(model, Settings(**{key: saved[key] for key in ("learn_lr", "steps", "lr", "norm")}))
    tensors, _ = checkpoint.read_tensors(path)
    checkpoint.load_tensors(rule, checkpoint.own_tensors(tensors, "rule"), str(path), "rule")
    return rule


def load_rates(path: str | Path, model: nn.Module, meta: Mapping[str, Any], steps: int) -> Rate | None:
    """The same as `fixed_rates` gives them, the `lr` of an adaptation of so many steps."""
    rule = load_learned_rule(path, model, meta)
    return None if rule is None else fixed_rates(rule, meta["settings"]["learn_lr"], steps)


def fault_in(model: nn.Module, rule: nn.Module, of_gradient: bool = False) -> tuple[str, float] | None:
    """The first number of a rule's parameters, or of their gradients, that is infinite or NaN, and what it is for."""
    layers = [layer.name for layer in layers_of(model)]
    for name, parameter in [*_rates(rule), *rule.named_parameters()]:
        tensor = parameter.grad if of_gradient else parameter.detach()
        if tensor is not None and not torch.isfinite(tensor).all():
            at = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            return _place(name, tensor, at, layers), tensor[tuple(at)].item()
    return None


def check_rates(model: nn.Module, rule: nn.Module, where: str, told: set[str]) -> None:
    """Look at what was learned of a rule: a negative rate is said once in the log, `told` keeps that it was.

    Raises:
        FloatingPointError: a number is infinite or NaN.
    """
    fault = fault_in(model, rule)
    if fault is not None:
        raise FloatingPointError(
            f"training diverged: the learned rate of {fault[0]} became {fault[1]} {where}: lower the meta rate, start "
            "from a lower inner rate, or bound the gradient (clip_norm)"
        )
    below = [(name, p.detach(), at) for name, p in _rates(rule) for at in (p.detach() < 0).nonzero().tolist()]
    if below and not told:
        name, tensor, at = below[0]
        told.add(name)
        _log.warning(
            "the learned rate of %s became %.3g %s%s: that step now climbs the loss. Training goes on and may bring it "
            "back; if validation suffers, lower the meta rate or start from a higher inner rate",
            _place(name, tensor, at, [layer.name for layer in layers_of(model)]), tensor[tuple(at)].item(), where,
            f" ({len(below)} rates are negative)" if len(below) > 1 else "",
        )  # fmt: skip


def _rates(rule: nn.Module) -> list[tuple[str, Tensor]]:
    """The rates of a rule that are tensors, by the weight or layer that they are for; "" is the whole network."""
    given = [part.rates.value for part in rule.modules() if isinstance(part, sgd)]
    named = [item for value in given for item in (value.items() if isinstance(value, dict) else [("", value)])]
    return [(name, rate) for name, rate in named if isinstance(rate, Tensor)]


def _place(name: str, rates: Tensor, at: list[int], layers: list[str]) -> str:
    """What one of the rates is for: a layer, a step, or a number of a weight."""
    if name:
        return f"{name}{at if at else ''}"
    layer = f"layer {layers[at[-1]]}" if at and rates.shape[-1] == len(layers) else "all layers"
    return layer + (f" in step {at[0] + 1}" if len(at) == 2 else "")
