"""Chains: the end of a network that is fused blocks, one after another, and a linear layer.

K steps of gradient descent on a chain's cross-entropy run as a backend's inner loop, without autograd: its blocks and
its loss have known gradients, and nothing is kept from one step to the next. On the CPU it is one native operator, on a
GPU a sequence of kernels that a CUDA graph can hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backends import Backend, choose
from .graph import BlockCall, LinearCall, Program, Slot, Step
from .spec import BlockSpec, ConvSpec, pair

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain:
    """What an inner loop needs to know of a chain: where it begins, its blocks and its linear layer."""

    source: int  # slot of the value that the chain starts from
    blocks: tuple[BlockCall, ...]
    linear: LinearCall

    @classmethod
    def find(cls, program: Program, steps: Sequence[Step]) -> Chain | None:
        """The chain that these last steps of a program form, or None where they are anything else."""
        if not steps or program.aliases or program.result != Slot(steps[-1].slot):
            return None
        *before, last = (step for step in steps if step.kind != "size")
        if not isinstance(last.call, LinearCall) or len(last.reads) != 1:
            return None
        blocks: list[BlockCall] = []
        source = at = before[0].reads[0] if before and before[0].reads else last.reads[0]
        flat = not before
        for step in before:
            if isinstance(step.call, BlockCall) and not flat and step.reads == (at,) and not step.tracks:
                blocks.append(step.call)
            elif blocks and not flat and step.kind == "flatten" and step.reads[0] == at:
                flat = True
            else:
                return None
            at = step.slot
        paths = [block.path for block in blocks] + [block.norm for block in blocks]
        if last.reads != (at,) or not flat or len(set(paths)) < len(paths):
            return None
        return cls(source, tuple(blocks), last.call)

    def refusal(self, modules: Mapping[str, nn.Module], x: Tensor, labels: Tensor) -> str | None:
        """Why no backend's inner loop can run the chain on x [T, N, ...] and labels [T, N]; None where one can."""
        if labels.dtype != torch.int64 or labels.dim() != 2:
            return "the labels are not class numbers"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if x.dim() != (5 if self.blocks else 3):
            return f"it takes {'images' if self.blocks else 'feature rows'}, got {list(x.shape)}"
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return "a transform is active"
        if self._features(modules, x) != getattr(modules[self.linear.path], "in_features", None):
            return "the shapes do not fit"
        backends = self._backends(x)
        if len(set(backends)) > 1:
            return f"its layers are of several backends: {', '.join(sorted({b.name for b in backends}))}"
        return "; ".join(backends[0].inner_loop_refusals(x.dtype)) or None

    def _backends(self, x: Tensor) -> list[Backend]:
        return [choose("conv_block", x, block.size) for block in self.blocks] or [choose("linear", x)]

    def _features(self, modules: Mapping[str, nn.Module], x: Tensor) -> int | None:
        """The number of features that the linear layer gets; None where a block cannot take what comes to it."""
        size = list(x.shape[2:])
        for block in self.blocks:
            conv = modules[block.path]
            assert isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str)
            if size[0] != conv.in_channels:
                return None
            size[0] = conv.out_channels
            for axis in (0, 1):
                reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
                size[axis + 1] = (size[axis + 1] + 2 * conv.padding[axis] - reach) // conv.stride[axis] + 1
            if min(size[1:]) < block.size or x.shape[1] * size[1] * size[2] < 2:
                return None
            size[1:] = [side // block.size for side in size[1:]]
        return math.prod(size)

    def descend(
        self,
        modules: Mapping[str, nn.Module],
        state: Mapping[str, Tensor],
        updated: Sequence[str],
        x: Tensor,
        labels: Tensor,
        *,
        steps: int,
        lr: float,
        own: Collection[str],
    ) -> Tensor:
        """`steps` steps of gradient descent on the mean cross-entropy of each task, in place on the updated tensors.

        Args:
            state: parameters by name; the updated ones are changed.
            updated: the names of the parameters to update.
            own: the names of those that have a task axis, updated now or earlier.
            x: [T, N, C, H, W], or [T, N, F] for a chain of the linear layer alone; labels: [T, N].

        Returns:
            The loss before each step, [steps, T], float64.
        """
        names: list[str] = []
        tensors: list[Tensor] = []
        wanted = set(updated)

        def add(module: nn.Module, path: str, name: str, missing: float, size: int) -> None:
            present = getattr(module, name) is not None
            names.append(f"{path}.{name}" if present else "")
            tensor = state[names[-1]] if present else x.new_full((size,), missing)
            tensors.append(tensor if names[-1] in own else tensor.unsqueeze(0))

        specs: list[BlockSpec] = []
        for block in self.blocks:
            conv, norm = modules[block.path], modules[block.norm]
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            add(conv, block.path, "weight", 0.0, 0)
            add(norm, block.norm, "weight", 1.0, conv.out_channels)
            add(norm, block.norm, "bias", 0.0, conv.out_channels)
            padding = conv.padding
            assert not isinstance(padding, str)
            stride, dilation = pair("stride", conv.stride, 1), pair("dilation", conv.dilation, 1)
            convolution = ConvSpec(stride, pair("padding", padding, 0), dilation, conv.groups)
            specs.append(BlockSpec(convolution, norm.eps, block.size))
        linear = modules[self.linear.path]
        assert isinstance(linear, nn.Linear)
        add(linear, self.linear.path, "weight", 0.0, 0)
        add(linear, self.linear.path, "bias", 0.0, linear.out_features)
        flags = [name in wanted for name in names]
        with torch.no_grad():
            return self._backends(x)[0].inner_loop(x, labels, tensors, flags, specs, steps, lr)
