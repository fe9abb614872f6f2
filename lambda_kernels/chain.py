"""Chains: the end of a network that is fused blocks, one after another, and a linear layer.

K steps of gradient descent on a chain's cross-entropy run as a backend's inner loop, without autograd: its blocks and
its loss have known gradients, and nothing is kept from one step to the next. On the CPU it is one native operator, on a
GPU a sequence of kernels that a CUDA graph can hold. What is no chain, and what no backend takes, is said in sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ._torch import transform_active
from .backends import Backend, Call, choose_for
from .backends import current as backend_in_force
from .cache import Bounded
from .outer import classified
from .program import BlockCall, LinearCall, Program, Slot, Step
from .spec import BlockSpec, output_size

__all__ = ["Backend", "Chain", "backend_in_force"]


_SURE = 1e4
"""A logit beside which those of 0 have the probability 0, in float64 too."""


@dataclass(frozen=True)
class Chain:
    """What an inner loop needs to know of a chain: where it begins, its blocks and its linear layer."""

    source: int  # slot of the value that the chain starts from
    blocks: tuple[BlockCall, ...]
    linear: LinearCall
    # The backend of a shape, dtype and device, or why there is none.
    answers: Bounded[Backend | list[str]] = field(default_factory=lambda: Bounded(256), compare=False, repr=False)

    @classmethod
    def find(cls, program: Program, steps: Sequence[Step]) -> Chain | None:
        """The chain that these last steps of a program form, or None where they are anything else."""
        found = cls._read(program, steps)
        return None if isinstance(found, str) else found

    @classmethod
    def why_not(cls, program: Program, steps: Sequence[Step]) -> str:
        """Why these last steps of a program are no chain, in one sentence; "" where they are one."""
        found = cls._read(program, steps)
        return found if isinstance(found, str) else ""

    @classmethod
    def _read(cls, program: Program, steps: Sequence[Step]) -> Chain | str:
        if program.untraceable is not None:
            return f"the network is not looked into: {program.untraceable}"
        if not steps:
            return "no layer depends on an updated parameter"
        if program.aliases:
            second, first = next(iter(program.aliases.items()))
            return f"two layers share a parameter ({first} is {second} too)"
        *before, last = (step for step in steps if step.kind != "size")
        if not isinstance(last.call, LinearCall) or len(last.reads) != 1:
            return f"the network ends with {_name(last)}, not with a linear layer"
        if program.result != Slot(steps[-1].slot):
            return f"the network gives something else than the result of its last layer, {_name(last)}"
        blocks: list[BlockCall] = []
        source = at = before[0].reads[0] if before and before[0].reads else last.reads[0]
        flat = not before
        for step in before:
            if isinstance(step.call, BlockCall) and not flat and step.reads == (at,) and not step.tracks:
                blocks.append(step.call)
            elif blocks and not flat and step.kind == "flatten" and step.reads[0] == at:
                flat = True
            else:
                return cls._misplaced(program, step, flat, len(blocks))
            at = step.slot
        if last.reads != (at,):
            return f"the linear layer {_name(last)} reads something else than the result of what comes before it"
        if not flat:
            return f"nothing flattens the images between the last block and the linear layer {_name(last)}"
        paths = [block.path for block in blocks] + [block.norm for block in blocks]
        if twice := next((path for path in paths if paths.count(path) > 1), ""):
            return f"the layer {twice} is used twice"
        return cls(source, tuple(blocks), last.call)

    @staticmethod
    def _misplaced(program: Program, step: Step, flat: bool, blocks: int) -> str:
        """Why a step cannot stand where it does, behind so many blocks and, where `flat`, a flattening."""
        name = _name(step)
        if isinstance(step.call, BlockCall):
            if step.tracks:
                return f"block {blocks + 1} ({name}) updates running statistics"
            after = "comes after the flattening" if flat else "reads something else than the block before it gives"
            return f"block {blocks + 1} ({name}) {after}"
        if step.kind == "conv" and name in program.left_alone:
            return f"block {blocks + 1} ({name}) is not fused: {program.left_alone[name]}"
        if step.kind == "linear":
            return f"the linear layer {name} is not the last one"
        if flat:
            place = "between the flattened features and the linear layer"
        else:
            place = f"behind block {blocks}" if blocks else "ahead of any block"
        path = getattr(step.call, "path", "")
        what = f"layer {path}" if path else f"the step {step.label}"
        return f"{what} stands {place}: a chain is fused blocks, a flattening and a linear layer"

    def is_like(self, other: Chain) -> bool:
        """Whether both compute the same from a value at the same place, whatever its batch size."""
        return (self.source, self.names, self.specs) == (other.source, other.names, other.specs)

    def refusals(self, x: Tensor, labels: Tensor) -> list[str]:
        """Why no backend's inner loop runs the chain on x [T, N, ...] and labels [T, N]; empty where one does."""
        why = []
        if labels.dtype != torch.int64:
            why.append(f"the labels are {_word(labels.dtype)}, not class numbers (int64)")
        if labels.dim() != 2:
            why.append(f"the labels are {list(labels.shape)}, not one class number per image")
        if (mode := transform_active(x.device.type)) is not None:
            why.append(mode)
        if why:
            return why
        answer = self._answer(x)
        return answer if isinstance(answer, list) else []

    def backend(self, x: Tensor, labels: Tensor) -> Backend:
        """The backend whose inner loop runs the chain on x [T, N, ...] and labels [T, N], which `refusals` allows."""
        answer = self._answer(x)
        assert not isinstance(answer, list), answer
        return answer

    def _answer(self, x: Tensor) -> Backend | list[str]:
        key = x.shape, x.dtype, x.device, backend_in_force()
        answer = self.answers.get(key)
        if answer is None:
            answer = self._choose(x)
            self.answers.put(key, answer)
        return answer

    def _choose(self, x: Tensor) -> Backend | list[str]:
        calls = self._calls(x)
        if isinstance(calls, str):
            return [calls]
        backends = {backend.name: backend for backend in map(choose_for, calls)}
        if len(backends) > 1:
            return [f"its layers are computed by several backends: {', '.join(sorted(backends))}"]
        (backend,) = backends.values()
        why = backend.refusals(calls[0]._replace(op="inner_loop"))
        return [f"backend {backend.name} does not run the inner loop: {reason}" for reason in why] or backend

    def _calls(self, x: Tensor) -> list[Call] | str:
        """The blocks' calls for x [T, N, ...], or the linear layer's; a sentence where a layer does not fit."""
        if len(x.shape) != (5 if self.blocks else 3):
            kind = "images [C, H, W]" if self.blocks else "rows of features"
            return f"the layers take {kind}, the inputs are {list(x.shape[2:])}"
        calls, size = [], list(x.shape[2:])
        for number, block in enumerate(self.blocks, 1):
            name = f"block {number} ({block.path})"
            if size[0] != block.inputs:
                return f"{name} takes {block.inputs} channels, it gets {size[0]}"
            weight = torch.Size((block.outputs, block.inputs // block.spec.conv.groups, *block.kernel))
            images = torch.Size((*x.shape[:2], *size))
            calls.append(Call("conv_block", x.device, x.dtype, (images, weight), block.spec.conv, block.spec.pool))
            size = [block.outputs, *output_size(torch.Size(size), weight, block.spec.conv)]
            if min(size[1:]) < block.size:
                return f"{name} pools by {block.size}, its convolution gives {size[1]}x{size[2]} pixels"
            if x.shape[1] * size[1] * size[2] < 2:
                return f"{name} has one value per channel, of which there are no statistics"
            size[1:] = [side // block.size for side in size[1:]]
        if math.prod(size) != self.linear.inputs:
            return f"the linear layer {self.linear.path} takes {self.linear.inputs} features, it gets {math.prod(size)}"
        if not calls:
            weight = torch.Size((self.linear.outputs, self.linear.inputs))
            calls.append(Call("linear", x.device, x.dtype, (x.shape, weight)))
        return calls

    @cached_property
    def specs(self) -> list[BlockSpec]:
        return [block.spec for block in self.blocks]

    @cached_property
    def names(self) -> list[str]:
        """The parameters as an inner loop gets them, "" for a norm's or a bias that is not there."""
        return [*(name for block in self.blocks for name in block.names), *self.linear.names]

    def order(self, updated: Collection[str]) -> list[str]:
        """The updated names in the chain's order, in which rates and new values come."""
        return [name for name in self.names if name in updated]

    def inner_loop(
        self, state: Mapping[str, Tensor], updated: Collection[str], x: Tensor, labels: Tensor, *, steps: int,
        rates: Sequence[float], query: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:  # fmt: skip
        """`steps` steps of gradient descent on the mean cross-entropy of each task, where `refusals` is empty.

        Args:
            state: parameters by name, each [...], shared by all tasks, or [T, ...].
            updated: the names of the parameters to update.
            x: [T, N, C, H, W], or [T, N, F] for a chain of the linear layer alone; labels: [T, N].
            rates: one number, or one per step and updated parameter: row by row, each row in the order of `order`.
            query: images [T, Q, C, H, W] or features [T, Q, F] to classify with the new parameters.

        Returns:
            [steps + 1, T]: the loss before each step, and 0 where all updated parameters are finite, else NaN. The
            updated parameters' new values by name, [T, ...]; without the axis where T is 1 and they came so. The logits
            [T, Q, ways] of the query, None without one.
        """
        with torch.no_grad():
            given = self._given(state, updated, x)
            done = self.backend(x, labels).inner_loop(x, labels, *given, self.specs, steps, rates, query)
        return done.rows, dict(zip(self.order(updated), done.updated)), done.logits

    def classify(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
        """The logits [T, Q, ways] of x [T, Q, C, H, W] or [T, Q, F] as one operation of autograd; None where that is of
        no use (nothing requires a gradient) or there is none.

        state: parameters by name, each [...], shared by all tasks, or [T, ...].
        """
        return self._pass(state, x, len(self.blocks), True)

    def features(self, state: Mapping[str, Tensor], x: Tensor, count: int) -> Tensor | None:
        """What the first `count` blocks, at least one, make of x [T, N, C, H, W], as one operation of autograd:
        [T, N, C', H', W']; None as in `classify`."""
        return self._pass(state, x, count, False)

    def constants(self, state: Mapping[str, Tensor], x: Tensor, count: int) -> Tensor | None:
        """As `features`, in no graph; None where no backend has one operation for it."""
        with torch.no_grad():
            return self._pass(state, x, count, False, graph=False)

    def _pass(
        self, state: Mapping[str, Tensor], x: Tensor, count: int, whole: bool, graph: bool = True
    ) -> Tensor | None:
        tensors, _ = self._given(state, (), x)
        own = tensors if whole else tensors[: 3 * count]
        if (graph and not any(t.requires_grad for t in (x, *own))) or transform_active(x.device.type) is not None:
            return None
        answer = self._answer(x) if x.numel() else []
        if isinstance(answer, list) or any(t.dtype != x.dtype for t in own):
            return None
        silent = [state[block.bias] for block in self.blocks[:count] if block.bias is not None]
        return classified(answer, x, own, self.specs[:count], silent)

    def prepare(
        self, state: Mapping[str, Tensor], updated: Collection[str], x: Tensor, labels: Tensor
    ) -> Callable[..., list[Tensor] | None] | None:
        """`Backend.prepared` for these parameters, which the function reads where they lie in each call, of one task's
        (x [N, ...], labels [N], steps, rates). None where there is no such function, or `refusals` are not empty."""
        if not all(self.names) or self.refusals(x, labels):
            return None
        flags = [name in updated for name in self.names]
        return self.backend(x, labels).prepared([state[name] for name in self.names], flags, self.specs)

    def prepare_features(self, state: Mapping[str, Tensor], x: Tensor) -> Callable[[Tensor], Tensor | None] | None:
        """A function of one task's images [N, C, H, W], as many as in x [1, N, C, H, W], that gives what the blocks
        hand to the linear layer, [N, F], with these parameters as they are in each call; None as in `prepare`.

        It is the inner loop with another linear layer, of N + 1 classes and sure of the last one: in one step of rate
        N, row n moves by the features of image n, of class n.
        """
        labels = torch.arange(x.shape[1]).unsqueeze(0)
        if not self.blocks or not all(self.names) or self.refusals(x, labels):
            return None
        count, (number,) = labels.shape[1], labels
        sure = x.new_zeros(count + 1)
        sure[-1] = _SURE
        own = [*(state[name] for name in self.names[:-2]), x.new_zeros(count + 1, self.linear.inputs), sure]
        flags = [False] * (len(own) - 2) + [True, False]
        run = self.backend(x, labels).prepared(own, flags, self.specs)
        if run is None:
            return None

        def features(images: Tensor) -> Tensor | None:
            found = run(images, number, 1, [float(count)])
            return None if found is None else found[0][:-1]

        return features

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


def _name(step: Step) -> str:
    """A layer's path, or the name of a function."""
    return getattr(step.call, "path", "") or step.label


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
