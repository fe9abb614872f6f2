"""Patterns of channels: a network whose chosen layers are two layers each, the frozen rows and the chosen ones.

The result of the two is joined along the channels, so autograd's weight-gradient operator sees only the chosen rows, in
any order of derivative and under `torch.func.vmap`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lambda_kernels import layers as own
from lambda_kernels.agreement import apart
from lambda_kernels.layers import has_hooks
from lambda_kernels.program import NORMS, aliases_of, flatten, notes_of, shadow, tensors_of
from lambda_kernels.program.check import Rehearsal

from ..network import Layer, layers_of
from ..patterns import Pattern
from . import checks
from .rule import Rule, links
from .state import Outcome, tied

__all__ = ["Network", "has_split", "split"]

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, own.Conv2d, own.Linear)
_ALONG_1 = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


class _SplitLayer(nn.Module):
    """A layer as two: `kept` has the frozen output channels, `chosen` the others."""

    order: Tensor  # [C], where each channel lies behind the two

    def __init__(self, layer: nn.Module, rows: Tensor, others: Tensor) -> None:
        super().__init__()
        self.axis = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()  # type: ignore[operator]
        self.kept, self.chosen = _with_rows(layer, others), _with_rows(layer, rows)
        self.register_buffer("order", torch.cat([others, rows]).argsort())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.kept(x), self.chosen(x)], self.axis).index_select(self.axis, self.order)


class _Rows(nn.Module):
    """Some rows of a norm's gamma and beta."""


class _SplitNorm(nn.Module):
    """A norm without gamma and beta, which are applied behind it: those of the frozen channels and of the others."""

    order: Tensor

    def __init__(self, norm: nn.Module, rows: Tensor, others: Tensor) -> None:
        super().__init__()
        self.along_1 = isinstance(norm, _ALONG_1)
        self.norm = _shallow(norm, {name: None for name in norm._parameters})
        self.kept, self.chosen = _Rows(), _Rows()
        for part, index in ((self.kept, others), (self.chosen, rows)):
            part._parameters.update({n: p.index_select(0, index) for n, p in norm._parameters.items() if p is not None})  # type: ignore[misc]
        self.names = tuple(self.chosen._parameters)
        self.register_buffer("order", torch.cat([others, rows]).argsort())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        for name in self.names:
            p = torch.cat([getattr(self.kept, name), getattr(self.chosen, name)]).index_select(0, self.order)
            p = p.reshape(-1, *[1] * (y.dim() - 2)) if self.along_1 else p
            y = y * p if name == "weight" else y + p
        return y


class Network(NamedTuple):
    """A network whose chosen layers are split, and how its parameters are those of the model."""

    original: nn.Module
    model: nn.Module
    pattern: Pattern  # in bits of the split network's layers
    rows: dict[str, tuple[str, Tensor]]  # of split parameters: the name of the chosen rows, and their numbers
    buffers: dict[str, str]  # the split network's names, where they are others

    def _check(self, x: Any) -> None:
        """ValueError where the split network computes something else than the model; looked at once for each form."""
        notes = notes_of(self.original)
        form = "channels", tuple(self.rows), tuple((t.shape, t.dtype) for t in flatten(x)[0])
        if form in notes:
            return
        told = (
            f"{type(self.original).__name__} computes something else where {', '.join(self.rows)} are split by "
            "channels: its forward uses a layer in another way than by calling it. Adapt whole layers"
        )
        want = _forward(self.original, x)
        try:
            got = _forward(self.model, x)
        except AttributeError as error:
            raise ValueError(f"{told} ({error})") from error
        if len(got) != len(want) or not all(map(_alike, got, want)):
            raise ValueError(told)
        notes[form] = True

    def outcome(self, state: dict[str, Tensor]) -> Outcome:
        """The adapted state under the model's own names, in the place that it has in autograd's graph."""
        parameters, buffers = tensors_of(self.original)
        full = {n: state[self.buffers.get(n, n)] for n in buffers}
        for name, p in parameters.items():
            if name not in self.rows:
                full[name] = state[name]
                continue
            chosen, rows = self.rows[name]
            full[name] = (p if torch.is_grad_enabled() else p.detach()).index_copy(0, rows, state[chosen])
        aliases = aliases_of(self.original)
        return Outcome(tied(full, aliases), {}, (), aliases, in_graph=True)


def _forward(model: nn.Module, x: Any) -> list[Tensor]:
    """The tensors of a network's result, with random numbers that are drawn from no generator of torch's."""
    tensors, rebuild = flatten(x)
    with torch.no_grad(), Rehearsal():
        return flatten(shadow(model)(rebuild([t.clone() for t in tensors])))[0]


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not b.numel():
        return a.shape == b.shape and a.dtype == b.dtype
    if not (b.is_floating_point() or b.is_complex()):
        return torch.equal(a, b)
    off = apart(a, b)
    return off is None or off < torch.finfo(b.dtype).eps ** 0.5


def has_split(model: nn.Module) -> bool:
    """Whether a network holds layers that are split by channels."""
    return any(isinstance(module, (_SplitLayer, _SplitNorm)) for module in model.modules())


def split(model: nn.Module, x: Any, pattern: Pattern, norm: str, rule: Rule) -> Network:
    """The network in which the layers that a pattern's channels speak of are split, for inputs like x.

    Raises:
        ValueError: a layer, its norm or the rule's rates cannot be split, or the split network is another.
    """
    checks.check_norm(norm)
    checks.check_mode()
    layers = layers_of(model)
    pattern = pattern.on(layers, type(model).__name__)
    _check_rates(rule)
    by_name = {layer.name: layer for layer in layers}
    if missing := [name for name, _ in pattern.rows if name not in by_name]:
        raise ValueError(f"pattern {pattern}: {type(model).__name__} has no layer {', '.join(missing)}: make it anew")
    parameters, _ = tensors_of(model)
    twin = shadow(model, parameters)
    twins, modules = dict(twin.named_modules()), dict(model.named_modules())
    rows: dict[str, tuple[str, Tensor]] = {}
    moved: dict[str, str] = {}  # buffers
    kept: set[str] = set()
    for name, numbers in pattern.rows:
        for path, is_norm in _paths(model, by_name[name], norm, max(numbers)):
            module, dot = modules[path], f"{path}." if path else ""
            given = {n: p for n, p in module._parameters.items() if p is not None}
            first = next(iter(given.values()))
            chosen = torch.tensor(numbers, device=first.device)
            left_out = set(range(len(first))).difference(numbers)
            if not left_out:  # the whole layer
                continue
            others = torch.tensor(sorted(left_out), device=first.device)
            with torch.enable_grad():
                part = (_SplitNorm if is_norm else _SplitLayer)(twins[path], chosen, others)
            part.train(module.training)
            moved.update({f"{dot}{n}": f"{dot}norm.{n}" for n, b in module._buffers.items() if b is not None})
            rows.update({f"{dot}{n}": (f"{dot}chosen.{n}", chosen) for n in given})
            kept.update(f"{dot}kept.{n}" for n in given)
            # The twin's own object: whatever else leads to it, leads to the split one.
            twins[path].__class__ = type(part)
            twins[path].__dict__ = part.__dict__
    network = Network(model, twin, _bits(pattern, model, twin, norm, rows), rows, moved)
    network._check(x)
    return network


def _bits(
    pattern: Pattern, model: nn.Module, twin: nn.Module, norm: str, rows: dict[str, tuple[str, Tensor]]
) -> Pattern:
    """The pattern in bits of the split network's layers, which updates the chosen rows and nothing else of a layer."""
    layers, whole, stages = layers_of(twin), pattern.whole(), []
    for step in range(len(pattern.stages)):
        names = {rows[n][0] if n in rows else n for n in whole.parameters(model, norm, step)}
        stage = "".join("1" if names & set(layer.weights) else "0" for layer in layers)
        found = {n for bit, layer in zip(stage, layers) if bit == "1" for n in layer.adapted(norm)}
        if found != names:
            raise ValueError(
                f"pattern {pattern}: {', '.join(sorted(found ^ names))} of {type(model).__name__} cannot be told "
                "apart from the layers that are split by channels: adapt whole layers"
            )
        stages.append(stage)
    return Pattern(",".join(stages))


def _paths(model: nn.Module, layer: Layer, norm: str, highest: int) -> list[tuple[str, bool]]:
    """The modules of a layer that are split, the convolution or linear layer and its norms, and whether it is a norm.

    Raises:
        ValueError: they cannot be split.
    """
    modules = dict(model.named_modules())
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    ids = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    shared = {n for n, i in zip(names, ids) if ids.count(i) > 1}
    path = layer.weights[0].rpartition(".")[0]
    module = modules.get(path)
    here = f"channels of {layer.name}"
    if type(module) not in _KINDS or getattr(module, "groups", 1) != 1:
        groups = getattr(module, "groups", 1)
        told = type(module).__name__ + (f" with groups={groups}" if groups != 1 else "")
        raise ValueError(
            f"{here}: it is a {told}; Conv1d, Conv2d, Conv3d and Linear themselves with groups=1 have output channels "
            "that can be adapted alone: leave it out of the channels"
        )
    assert module is not None
    channels = len(module.weight)
    if highest >= channels:
        raise ValueError(f"{here}: there is no channel {highest}, it has {channels}, counted from 0")
    found = [(path, False)]
    own_names = {f"{path}.{n}" if path else n for n, p in module._parameters.items() if p is not None}
    if odd := sorted(set(layer.weights) - own_names):
        raise ValueError(f"{here}: {', '.join(odd)} belongs to this layer's bit and has no channels: leave it out")
    if norm == "follow":
        for at in dict.fromkeys(n.rpartition(".")[0] for n in layer.norm):
            part = modules.get(at)
            sizes = {n: list(p.shape) for n, p in part._parameters.items() if p is not None} if part else {}
            if not isinstance(part, NORMS) or any(size != [channels] for size in sizes.values()):
                raise ValueError(
                    f"{here}: {at}, a {type(part).__name__}, follows this layer's bit, and its parameters are not one "
                    f'number for each of {channels} channels: adapt with norm="never", or leave the layer out'
                )
            found.append((at, True))
    for at, _ in found:
        if has_hooks(modules[at]):
            raise ValueError(f"{here}: {at} has hooks, which would see a part of it: remove them, or leave it out")
    if common := sorted(shared.intersection(layer.weights + layer.norm)):
        raise ValueError(f"{here}: {', '.join(common)} is shared with another layer: leave it out of the channels")
    return found


def _check_rates(rule: Rule) -> None:
    """ValueError where a rate is that of a layer or a parameter: the split network has others."""
    for link in links(rule):
        value = getattr(getattr(link, "rates", None), "value", None)
        while isinstance(value, list) and value and isinstance(value[0], list):
            value = value[0]
        last = value.shape[-1] if isinstance(value, Tensor) and value.dim() else 1
        last = len(value) if isinstance(value, list) else last
        if isinstance(value, dict) or last > 1:
            raise ValueError(
                f"{link!r}: a pattern of channels takes one rate for all layers, or one per step as [steps, 1]"
            )


def _with_rows(layer: nn.Module, rows: Tensor) -> nn.Module:
    """The layer with some of its output channels."""
    part = _shallow(layer, {n: None if p is None else p.index_select(0, rows) for n, p in layer._parameters.items()})
    part.__dict__["out_features" if isinstance(layer, nn.Linear) else "out_channels"] = len(rows)
    return part


def _shallow(module: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """The module around other parameters, with its own buffers."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = parameters
    return twin
