"""Runs of convolution, norm, ReLU and max-pool in a graph, and the small computations around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import layers
from ..layers import ConvBlock, has_hooks
from .steps import Fusion

__all__ = ["EVALUATION", "RELUS", "Fuser", "block_refusal"]

RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")  # functions and names of tensor methods
EVALUATION = "the norm is in evaluation mode, with running statistics"
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


class Fuser:
    """Finds runs in the graph of a network whose modules are given by path."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def run(self, node: fx.Node, path: str) -> tuple[Fusion, fx.Node] | str:
        """The run of layers that begins with a convolution and the run's last node, or why there is none."""
        conv = self.modules[path]
        assert isinstance(conv, nn.Conv2d)
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return f"its padding is {conv.padding_mode if conv.padding_mode != 'zeros' else conv.padding!r}"
        following = _only_user(node)
        norm = None if following is None else self.module(following)
        if following is None or type(norm) is not nn.BatchNorm2d:
            return "no BatchNorm2d alone follows it"
        assert isinstance(norm, nn.BatchNorm2d)
        why = "the norm has hooks" if has_hooks(norm) else _norm_refusal(norm)
        if why is not None:
            return why
        relu = _only_user(following)
        if relu is None or not self._is_relu(relu):
            return "no ReLU alone follows its norm"
        pool = _only_user(relu)
        size = 0 if pool is None else self._pool_size(pool)
        last = pool if pool is not None and size else relu
        where = [
            str(n.target) if n is not None and n.op == "call_module" else "" for n in (relu, pool if size else None)
        ]
        return Fusion(path, str(following.target), where[0], where[1], size or 1), last

    def _is_relu(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return type(module) is nn.ReLU and not has_hooks(module)
        return node.target in RELUS

    def _pool_size(self, node: fx.Node) -> int:
        """The window of a max-pool whose windows tile the image, else 0."""
        module = self.module(node)
        if type(module) is nn.MaxPool2d and not has_hooks(module):
            assert isinstance(module, nn.MaxPool2d)
            given: list[Any] = [getattr(module, name) for name in _POOL]
        elif node.target in (F.max_pool2d, torch.max_pool2d):
            given = [None, None, 0, 1, False, False]
            for i, value in enumerate(node.args[1:]):
                given[i] = value
            for name, value in node.kwargs.items():
                if name in _POOL:
                    given[_POOL.index(name)] = value
        else:
            return 0
        kernel, stride, padding, dilation, *flags = given
        size = set(_pair(kernel)) | set(_pair(stride if stride not in (None, [], ()) else kernel))
        tiles = len(size) == 1 and set(_pair(padding)) == {0} and set(_pair(dilation)) == {1} and not any(flags)
        only = size.pop() if tiles else 0
        return only if isinstance(only, int) else 0

    def flattens(self, node: fx.Node) -> bool:
        """Whether the node makes [N, F] of [N, ...]: the step between the blocks and a linear layer."""
        module = self.module(node)
        if module is not None:
            return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        if node.kwargs or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        x, *shape = node.args
        if node.target in (torch.flatten, "flatten"):
            return shape in ([1], [1, -1])
        size = node.meta.get("batch")  # of what a captured step flattens
        return node.target in ("view", "reshape", torch.reshape) and shape in ([size, -1], [(size, -1)])


def block_refusal(block: ConvBlock, arguments: int) -> str | None:
    """Why a ConvBlock that is called with so many arguments is not one fused block."""
    parts = [block, block.conv, block.norm, block.relu, block.pool]
    if any(has_hooks(part) for part in parts):
        return "a part of the block has hooks"
    if arguments != 1 or not block.is_whole():
        return "a part of the block was replaced"
    return _norm_refusal(block.norm)


def _norm_refusal(norm: nn.Module) -> str | None:
    return EVALUATION if layers.is_evaluated(norm) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
