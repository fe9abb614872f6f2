"""The kernels as operators of torch.ops.lambda_kernels_triton, which torch.compile takes as they are.

Registering them imports nothing of triton; calling one does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...spec import ConvSpec
from . import outputs

__all__ = ["call", "kernel"]

LIBRARY = torch.library.Library("lambda_kernels_triton", "DEF")
# Name: the module with its implementation, and its signature. geometry is stride, padding, dilation, groups.
OPERATORS = {
    "conv2d": ("products", "(Tensor x, Tensor weight, Tensor? bias, int[] geometry) -> Tensor"),
    "conv2d_input_grad": ("products", "(Tensor gy, Tensor weight, SymInt[] x_shape, int[] geometry) -> Tensor"),
    "conv2d_weight_grad": ("products", "(Tensor gy, Tensor x, SymInt[] weight_shape, int[] geometry) -> Tensor"),
    "linear": ("products", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"),
    "norm_relu_pool": (
        "norm",
        "(Tensor z, Tensor gamma, Tensor beta, float eps, int pool) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    "conv_block": (
        "norm",
        "(Tensor x, Tensor weight, Tensor gamma, Tensor beta, int[] geometry, float eps, int pool)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    "block": (
        "norm",
        "(Tensor x, Tensor weight, Tensor gamma, Tensor beta, int[] geometry, float eps, int pool)"
        " -> (Tensor, Tensor, Tensor)",
    ),
    "norm_relu_pool_grad": (
        "norm",
        "(Tensor gy, Tensor z, Tensor gamma, Tensor index, Tensor mean, Tensor rstd, int pool, bool need_z)"
        " -> (Tensor, Tensor, Tensor)",
    ),
    "cross_entropy_grad": ("loss", "(Tensor logits, Tensor labels) -> (Tensor, Tensor)"),
}


def call(name: str, *arguments: Any) -> Any:
    """The operator's results: through torch's dispatcher where a compiler looks on, else at once."""
    if torch.compiler.is_compiling():
        flat = (_flat(a) if isinstance(a, ConvSpec) else a for a in arguments)
        return getattr(torch.ops.lambda_kernels_triton, name)(*flat)
    return kernel(name)(*arguments)


@cache
def kernel(name: str) -> Callable[..., Any]:
    """The implementation of an operator, or of what is none: `sgd_`, which changes its operands, and `head_grad`."""
    module = OPERATORS[name][0] if name in OPERATORS else {"sgd_": "update", "head_grad": "head"}[name]
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def _flat(spec: ConvSpec) -> list[int]:
    return [*spec.stride, *spec.padding, *spec.dilation, spec.groups]


def _spec(geometry: list[int]) -> ConvSpec:
    sh, sw, ph, pw, dh, dw, groups = geometry
    return ConvSpec((sh, sw), (ph, pw), (dh, dw), groups)


def _implementation(name: str) -> Callable[..., Any]:
    def implementation(*arguments: Any) -> Any:
        return kernel(name)(*(_spec(a) if i == place else a for i, a in enumerate(arguments)))

    signature = OPERATORS[name][1]
    place = signature.partition("int[] geometry")[0].count(",") if "int[] geometry" in signature else -1
    return implementation


for _name, (_, _signature) in OPERATORS.items():
    LIBRARY.define(_name + _signature)
    LIBRARY.impl(_name, _implementation(_name), "CompositeExplicitAutograd")


def _imagine(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"lambda_kernels_triton::{name}", lib=LIBRARY)


@_imagine("conv2d")
def _imagined_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    return outputs.conv2d_output(x, weight, bias, _spec(geometry))


@_imagine("conv2d_input_grad")
def _imagined_conv2d_input_grad(gy: Tensor, weight: Tensor, x_shape: list[int], geometry: list[int]) -> Tensor:
    return outputs.input_grad_output(gy, weight, torch.Size(x_shape))


@_imagine("conv2d_weight_grad")
def _imagined_conv2d_weight_grad(gy: Tensor, x: Tensor, weight_shape: list[int], geometry: list[int]) -> Tensor:
    return outputs.weight_grad_output(gy, x, torch.Size(weight_shape))


@_imagine("linear")
def _imagined_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return outputs.linear_output(x, weight, bias)


@_imagine("norm_relu_pool")
def _imagined_norm_relu_pool(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int) -> tuple[Tensor, ...]:
    return *outputs.pooled_outputs(z, pool), *outputs.statistics(z, z.shape[0], z.shape[2])


@_imagine("conv_block")
def _imagined_conv_block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, geometry: list[int], eps: float, pool: int
) -> tuple[Tensor, ...]:
    z = outputs.conv2d_output(x, weight, None, _spec(geometry), max(gamma.shape[0], beta.shape[0]))
    return z, *outputs.pooled_outputs(z, pool), *outputs.statistics(z, z.shape[0], z.shape[2])


@_imagine("block")
def _imagined_block(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, geometry: list[int], eps: float, pool: int
) -> tuple[Tensor, ...]:
    y = outputs.block_output(x, weight, _spec(geometry), pool, max(gamma.shape[0], beta.shape[0]))
    return y, *outputs.statistics(y, y.shape[0], y.shape[2])


@_imagine("norm_relu_pool_grad")
def _imagined_norm_relu_pool_grad(
    gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
) -> tuple[Tensor, ...]:
    return outputs.grad_outputs(z, gamma, need_z)


@_imagine("cross_entropy_grad")
def _imagined_cross_entropy_grad(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return outputs.loss_outputs(logits)
