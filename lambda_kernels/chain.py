"""Chains: the end of a network that is fused blocks, one after another, and a linear layer.

K steps of gradient descent on a chain's cross-entropy run as a backend's inner loop, without autograd: its blocks and
its loss have known gradients, and nothing is kept from one step to the next. On the CPU it is one native operator, on a
GPU a sequence of kernels that a CUDA graph can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .backends import Backend, choose
from .backends import current as backend_in_force
from .program import BlockCall, LinearCall, Program, Slot, Step
from .spec import BlockSpec, output_size

__all__ = ["Backend", "Chain", "backend_in_force"]


@dataclass(frozen=True)
class Chain:
    """What an inner loop needs to know of a chain: where it begins, its blocks and its linear layer."""

    source: int  # slot of the value that the chain starts from
    blocks: tuple[BlockCall, ...]
    linear: LinearCall
    fitting: dict[torch.Size, bool] = field(default_factory=dict, compare=False, repr=False)  # what `_takes` found

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

    def backend(self, x: Tensor, labels: Tensor) -> Backend | str:
        """The backend whose inner loop runs the chain on x [T, N, ...] and labels [T, N], or why there is none."""
        if labels.dtype != torch.int64 or labels.dim() != 2:
            return "the labels are not class numbers"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return "a transform is active"
        fits = self.fitting.get(x.shape)
        if fits is None:
            if len(self.fitting) >= 256:
                self.fitting.clear()
            fits = self.fitting[x.shape] = self._takes(x.shape)
        if not fits:
            return f"the layers do not fit images or features {list(x.shape)}"
        backends = [choose("conv_block", x, size) for size in self.pools] or [choose("linear", x)]
        if len(set(backends)) > 1:
            return f"its layers are of several backends: {', '.join(sorted({b.name for b in backends}))}"
        return "; ".join(backends[0].inner_loop_refusals(x.dtype)) or backends[0]

    @cached_property
    def pools(self) -> list[int]:
        """The pooling windows that there are."""
        return sorted({block.size for block in self.blocks})

    @cached_property
    def specs(self) -> list[BlockSpec]:
        return [block.spec for block in self.blocks]

    @cached_property
    def names(self) -> list[str]:
        """The parameters as an inner loop gets them, "" for a norm's or a bias that is not there."""
        return [*(name for block in self.blocks for name in block.names), *self.linear.names]

    def _takes(self, shape: torch.Size) -> bool:
        """Whether every layer can take what comes to it from x [T, N, ...] of this shape."""
        if len(shape) != (5 if self.blocks else 3):
            return False
        size = list(shape[2:])
        for block in self.blocks:
            if size[0] != block.inputs:
                return False
            size = [block.outputs, *output_size(torch.Size(size), torch.Size(block.kernel), block.spec.conv)]
            if min(size[1:]) < block.size or shape[1] * size[1] * size[2] < 2:
                return False
            size[1:] = [side // block.size for side in size[1:]]
        return math.prod(size) == self.linear.inputs

    def descend(
        self, backend: Backend, state: Mapping[str, Tensor], updated: Collection[str], x: Tensor, labels: Tensor, *,
        steps: int, lr: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """`steps` steps of gradient descent on the mean cross-entropy of each task.

        Args:
            backend: as `backend` gives it.
            state: parameters by name, each [...], shared by all tasks, or [T, ...].
            updated: the names of the parameters to update.
            x: [T, N, C, H, W], or [T, N, F] for a chain of the linear layer alone; labels: [T, N].

        Returns:
            [steps + 1, T]: the loss before each step, and 0 where all of a task's updated parameters are finite, else
            NaN. The updated parameters' new values by name, [T, ...]; without the axis where T is 1 and they came so.
        """
        with torch.no_grad():
            rows, new, _ = backend.inner_loop(x, labels, *self._given(state, updated, x), self.specs, steps, [lr])
        return rows, dict(zip((name for name in self.names if name in updated), new))

    def prepare(
        self, backend: Backend, state: Mapping[str, Tensor], updated: Collection[str]
    ) -> Callable[..., list[Tensor] | None] | None:
        """`Backend.prepared` for these parameters, which the function reads where they lie in each call."""
        if not all(self.names):
            return None
        return backend.prepared([state[n] for n in self.names], [n in updated for n in self.names], self.specs)

    def classify(
        self, backend: Backend, state: Mapping[str, Tensor], updated: Collection[str], x: Tensor, labels: Tensor,
        query: Tensor, *, steps: int, lr: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `descend`, with the logits [T, Q, ways] of query images [T, Q, ...] in place of the parameters."""
        with torch.no_grad():
            given = self._given(state, updated, x)
            rows, _, logits = backend.inner_loop(x, labels, *given, self.specs, steps, [lr], query)
        assert logits is not None
        return rows, logits

    def _given(
        self, state: Mapping[str, Tensor], updated: Collection[str], x: Tensor
    ) -> tuple[list[Tensor], list[bool]]:
        """The parameters as a backend takes them, and which are updated."""
        tensors = [state[name] if name else self._missing(i, x) for i, name in enumerate(self.names)]
        return tensors, [name in updated for name in self.names]

    def _missing(self, at: int, x: Tensor) -> Tensor:
        """What stands for a parameter that is not there: a norm's weight is 1, its bias and a linear layer's are 0."""
        block, which = divmod(at, 3)
        outputs = self.blocks[block].outputs if block < len(self.blocks) else self.linear.outputs
        return x.new_full((outputs,), 1.0 if block < len(self.blocks) and which == 1 else 0.0)
