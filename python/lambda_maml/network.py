"""What a pattern speaks of: a network's layers, in the order in which the network registers them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lambda_kernels.program import LAYERS, NORMS, Program, notes_of

__all__ = ["Layer", "layer_costs", "layers_of"]


class Layer(NamedTuple):
    """One bit of a pattern: a convolution or linear layer with the norm that follows it."""

    name: str  # the module's path
    weights: tuple[str, ...]  # parameter names
    norm: tuple[str, ...]  # names of the norm's gamma and beta

    def adapted(self, norm: str) -> tuple[str, ...]:
        """The parameters that the inner loop updates where the layer's bit is 1, under a norm convention."""
        return self.weights + self.norm if norm == "follow" else self.weights


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """The layers of a network in the order of registration, as `named_modules` and `summary` give them.

    Every parameter belongs to one layer: those of the convolution or linear layer and of the norm behind it, and any
    other parameter belongs to the layer in front of it (the first layer where there is none). So a pattern of ones is
    MAML. A network without a convolution or linear layer below it is one layer.

    Raises:
        ValueError: the network has no parameter of real or complex numbers.
    """
    notes = notes_of(model)
    found: tuple[Layer, ...] | None = notes.get("layers")
    if found is None:
        found = notes["layers"] = _find(model)
    return found


def _find(model: nn.Module) -> tuple[Layer, ...]:
    modules = dict(model.named_modules())
    order: list[tuple[str, tuple[str, ...]]] = []  # layer path or "", parameter names
    for path, module in modules.items():
        own = tuple(f"{path}.{n}" if path else n for n, _ in module.named_parameters(recurse=False))
        order.append((path if isinstance(module, LAYERS) else "", own))
    own_parameters = {n for n, p in model.named_parameters() if p.is_floating_point() or p.is_complex()}
    if not own_parameters:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is nothing to adapt")
    names = [path for path, _ in order if path] or [type(model).__name__]
    of_norm = {n for path, module in modules.items() if isinstance(module, NORMS) for n in _names(model, path)}
    members: dict[str, list[str]] = {path: [] for path in names}
    taken: set[str] = set()
    current = names[0]
    listed = [*order, ("", tuple(n for n, _ in model.named_parameters()))]
    for path, parameters in listed:
        current = path or current
        for name in parameters:
            if name in own_parameters and name not in taken:
                taken.add(name)
                members[current].append(name)
    return tuple(
        Layer(path, tuple(n for n in own if n not in of_norm), tuple(n for n in own if n in of_norm))
        for path, own in members.items()
    )


def _names(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{n}" if path else n for n, _ in model.get_submodule(path).named_parameters()]


def layer_costs(model: nn.Module, program: Program, input_shape: tuple[int, ...]) -> dict[int, int]:
    """Multiply-adds of the forward pass of each convolution and linear step of a network's program, by step index.

    The shapes come from a run on torch's meta device: no arithmetic is done. The gradient of the input and that of the
    weight cost as much again, each.

    Raises:
        ValueError: no program stands for the network, or it computes with the weight of a layer other than by a
            Conv2d's or Linear's own call.
    """
    if program.untraceable is not None:
        raise ValueError(f"cost: {type(model).__name__} is one operation, not a row of layers ({program.untraceable})")
    for step in program.steps:
        if step.kind == "attribute" and (path := _layer_of(model, step.parameters[0])) is not None:
            raise ValueError(
                f"cost: {path} is not called as a layer alone (it has hooks, say, or its weight is computed)"
            )
    modules = program.bind(model)
    state = _on_meta(model)
    env: dict[int, Tensor] = {0: torch.empty(input_shape, device="meta", dtype=next(model.parameters()).dtype)}
    costs: dict[int, int] = {}
    with torch.no_grad():
        for index, (step, done) in enumerate(program.part(range(len(program.steps)), range(len(program.steps) + 1))):
            program.run([(step, done)], modules, state, env)
            if step.layer is None:
                continue
            layer = model.get_submodule(step.layer)
            x = env[step.args[0].index]
            if isinstance(layer, nn.Conv2d):
                weight = state[f"{step.layer}.weight".lstrip(".")]
                y = nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
                costs[index] = y.numel() * layer.weight[0].numel()
            elif isinstance(layer, nn.Linear):
                costs[index] = math.prod(x.shape[:-1]) * layer.weight.numel()
            else:
                raise ValueError(f"cost: {step.layer} is a {type(layer).__name__}; Conv2d and Linear are counted")
    return costs


def _layer_of(model: nn.Module, name: str) -> str | None:
    """The path of the convolution or linear layer below which a parameter is."""
    parts = name.split(".")
    paths = (".".join(parts[:i]) for i in range(len(parts)))
    return next((path for path in paths if isinstance(model.get_submodule(path), LAYERS)), None)


def _on_meta(model: nn.Module) -> dict[str, Tensor]:
    both = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: torch.empty_like(t, device="meta") for name, t in both}
