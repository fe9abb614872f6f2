"""Norms in operations that torch.func differentiates rightly.

PyTorch's own rules for the second derivative of batch, instance and layer norm are wrong under grad(vmap(grad)): by
4e-3, 6e-3 and 2e-5 of the meta-gradient of small networks, in torch 2.13. So networks of this package compute them by
their definition wherever a transform is on. Group norm is right there, but cannot be mapped in channels-last memory.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._torch import functorch_active

__all__ = ["ByDefinition", "exact_norms"]


def _normalised(
    x: Tensor, axes: Sequence[int], shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """x with mean 0 and variance 1 over the axes, times weight, plus bias, which are viewed as `shape`."""
    variance, mean = torch.var_mean(x, list(axes), correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + eps)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _per_channel(x: Tensor, first: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalised over all axes from `first` on, and the batch where `first` is 0, each channel by itself."""
    axes = [axis for axis in range(first, x.dim()) if axis != 1]
    return _normalised(x, axes, [-1, *(1 for _ in range(x.dim() - 2))], weight, bias, eps)


def _batch(x: dict[str, Any]) -> Tensor | None:
    if not x["training"]:
        return None
    if x["running_mean"] is not None:  # torch's own, without parameters to differentiate, for its effect on them
        F.batch_norm(
            x["input"].detach(), x["running_mean"], x["running_var"], None, None, True, x["momentum"], x["eps"]
        )
    return _per_channel(x["input"], 0, x["weight"], x["bias"], x["eps"])


def _instance(x: dict[str, Any]) -> Tensor | None:
    if not x["use_input_stats"]:
        return None
    if x["running_mean"] is not None:
        state = x["running_mean"], x["running_var"]
        F.instance_norm(x["input"].detach(), *state, None, None, True, x["momentum"], x["eps"])
    return _per_channel(x["input"], 2, x["weight"], x["bias"], x["eps"])


def _layer(x: dict[str, Any]) -> Tensor | None:
    axes = range(-len(x["normalized_shape"]), 0)
    return _normalised(x["input"], axes, x["normalized_shape"], x["weight"], x["bias"], x["eps"])


def _group(x: dict[str, Any]) -> Tensor:
    whole = x["input"]
    parts = whole.reshape(whole.shape[0], x["num_groups"], -1)
    y = _normalised(parts, [2], (), None, None, x["eps"]).reshape(whole.shape)
    shape = [-1, *(1 for _ in range(whole.dim() - 2))]
    y = y if x["weight"] is None else y * x["weight"].reshape(shape)
    return y if x["bias"] is None else y + x["bias"].reshape(shape)


_RULES: dict[Any, tuple[inspect.Signature, Callable[[dict[str, Any]], Tensor | None]]] = {
    function: (inspect.signature(function), rule)
    for function, rule in (
        (F.batch_norm, _batch),
        (F.instance_norm, _instance),
        (F.layer_norm, _layer),
        (F.group_norm, _group),
    )
}


class ByDefinition(TorchFunctionMode):
    """Computes norms with the input's own statistics by their definition.

    with ByDefinition():
        y = torch.nn.functional.layer_norm(x, [8])          # five operations in place of one
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _RULES.get(func)
        if found is not None:
            bound = found[0].bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            result = found[1](bound.arguments)
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def exact_norms() -> contextlib.AbstractContextManager[Any]:
    """`ByDefinition` where a transform of torch.func is on, else nothing."""
    return ByDefinition() if functorch_active() else contextlib.nullcontext()
