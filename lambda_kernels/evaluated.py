"""Chains of blocks whose norms have fixed statistics, and a linear layer: the logits of images as one operation.

The norms are part of the convolutions. An image's logits are the same bits whatever images are classified beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import layers
from ._torch import looked_at, stand_ins_made, transform_active
from .backends import Native, choose
from .functional import asks_for_a_derivative
from .program import Program, Step, memo_of, program_for, tensors_of
from .program.fuse import RELUS
from .program.snapshot import same_values
from .spec import BlockSpec, conv_spec, output_size

__all__ = ["Evaluated", "EvaluatedChain", "Folded", "logits_of"]


class _Block(NamedTuple):
    conv: str  # paths
    norm: str  # "" for none
    spec: BlockSpec


class Folded:
    """Weight and bias of each block, with its norm in them, and of the linear layer; and what the operation made of
    them for the latest size of images."""

    def __init__(self, tensors: Sequence[Tensor], geometry: Sequence[int]) -> None:
        self.tensors, self._geometry = list(tensors), geometry
        self._ready: tuple[torch.Size, list[Tensor]] | None = None

    def ready(self, backend: Native, size: torch.Size) -> list[Tensor]:
        """What the operation reads in place of the weights, for images [C, H, W]."""
        found = self._ready
        if found is None or found[0] != size:
            found = self._ready = size, backend.prepare_affine_chain(self.tensors, self._geometry, size)
        return found[1]


class EvaluatedChain:
    """The blocks and the linear layer of a program that is nothing else.

    >>> program = program_for(model.eval(), (x,), {})              # its norms have running statistics
    >>> chain = EvaluatedChain.find(program, model)
    >>> torch.allclose(chain(chain.folded(model.state_dict()), x), model(x), atol=1e-5)        # roundings
    True
    """

    def __init__(self, blocks: Sequence[_Block], head: str) -> None:
        self.blocks, self.head = tuple(blocks), head
        self._geometry = [
            number
            for block in blocks
            for number in (
                *block.spec.conv.stride,
                *block.spec.conv.padding,
                *block.spec.conv.dilation,
                block.spec.pool,
            )
        ]
        self._names = [f"{path}.{name}" for block in blocks for path, own in _held(block) for name in own]
        self._names += [f"{head}.weight", f"{head}.bias"]
        self._taken: dict[tuple[torch.Size, torch.dtype], bool] = {}

    @classmethod
    def find(cls, program: Program, model: nn.Module) -> EvaluatedChain | None:
        """The chain that a program of the model is, or None."""
        if program.untraceable is not None or program.inputs != 1 or program.aliases:
            return None
        steps = program.steps
        if any(step.reads != (before,) for before, step in enumerate(steps)) or program.result_slots != [len(steps)]:
            return None
        steps = tuple(step for step in steps if not _does_nothing(model, step))
        blocks, at = [], 0
        while (found := _block(model, steps, at)) is not None:
            blocks.append(found[0])
            at = found[1]
        if not blocks or [step.kind for step in steps[at:]] != ["flatten", "linear"]:
            return None
        return cls(blocks, steps[-1].call.path)  # type: ignore[attr-defined]

    def tensors(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """All that `folded` reads."""
        return [state[name] for name in self._names if name in state]

    @torch.no_grad()
    def folded(self, state: Mapping[str, Tensor]) -> Folded:
        """The parameters with the norms in them."""
        found: list[Tensor] = []
        for block in self.blocks:
            weight, bias = state[f"{block.conv}.weight"], state.get(f"{block.conv}.bias")
            if block.norm:
                gamma, beta = (state.get(f"{block.norm}.{name}") for name in ("weight", "bias"))
                mean, variance = (state[f"{block.norm}.running_{name}"] for name in ("mean", "var"))
                weight, bias = layers.with_norm(weight, bias, gamma, beta, mean, variance, block.spec.eps)
            found += [weight, weight.new_zeros(len(weight)) if bias is None else bias]
        weight, bias = state[f"{self.head}.weight"], state.get(f"{self.head}.bias")
        found += [weight, weight.new_zeros(len(weight)) if bias is None else bias]
        return Folded(found, self._geometry)

    def __call__(self, folded: Folded, x: Any) -> Tensor | None:
        """The logits [N, ways] of images x [N, C, H, W]; None where the operation does not take the call, a derivative
        may be asked for, or something looks at torch's operators."""
        tensors = folded.tensors
        if type(x) is not Tensor or x.dim() != 4 or not x.numel() or asks_for_a_derivative(x, *tensors):
            return None
        if looked_at() or transform_active(x.device.type) is not None:
            return None
        if any(t.dtype != x.dtype or t.device != x.device for t in tensors):
            return None
        first = self.blocks[0].spec
        backend = choose("conv_block", x, tensors[0], first.conv, first.pool)
        if not isinstance(backend, Native):
            return None
        key = x.shape[1:], x.dtype
        if key not in self._taken:
            self._taken[key] = self._fits(backend, tensors, x)
        if not self._taken[key]:
            return None
        return backend.affine_chain(x, tensors, self._geometry, folded.ready(backend, key[0]))

    def _fits(self, backend: Native, folded: Sequence[Tensor], x: Tensor) -> bool:
        size = x.shape[1:]
        for block, weight in zip(self.blocks, folded[::2]):
            images = torch.Size((1, 1, *size))
            if weight.shape[1] != size[0]:
                return False
            rows, columns = output_size(images[1:], weight.shape, block.spec.conv)
            if min(rows, columns) < block.spec.pool:
                return False
            if not backend.takes_affine(images, torch.Size((1, *weight.shape)), x.dtype, block.spec):
                return False
            size = torch.Size((weight.shape[0], rows // block.spec.pool, columns // block.spec.pool))
        return folded[-2].shape[1] == size.numel()


class _Made(NamedTuple):
    """A chain's folded tensors, and what they were made of."""

    chain: EvaluatedChain
    own: list[Tensor]
    values: list[Tensor]
    versions: list[int]
    folded: Folded

    def holds(self, chain: EvaluatedChain, own: list[Tensor]) -> bool:
        same = self.chain is chain and all(a is b for a, b in zip(self.own, own))
        return same and self.versions == [t._version for t in own] and same_values(own, self.values)


class Evaluated:
    """What a chain made of a network's tensors; anew when one of them holds other numbers or is another."""

    def __init__(self) -> None:
        self._made: _Made | None = None

    def __call__(self, chain: EvaluatedChain, state: Mapping[str, Tensor], x: Any) -> Tensor | None:
        """The logits [N, ways] of images x [N, C, H, W] by the tensors of `state`; None where the chain gives none."""
        own = chain.tensors(state)
        if torch.is_grad_enabled() and any(t.requires_grad for t in own):
            return None
        if any(t.is_inference() for t in own):  # torch counts no writes to these
            return None
        if any(t.device.type != "cpu" for t in own):  # no chain runs there, and to compare would wait
            return None
        made = self._made
        if made is None or not made.holds(chain, own):
            if stand_ins_made():
                return None
            values = [t.detach().clone() for t in own]
            made = self._made = _Made(chain, own, values, [t._version for t in own], chain.folded(state))
        return chain(made.folded, x)


def logits_of(network: nn.Module, x: Any) -> Tensor | None:
    """The logits of a network's call as one operation; None where it is no `EvaluatedChain` as it is now, or that gives
    none for this call."""
    memo = memo_of(network, x)
    if memo is None:
        if not isinstance(x, Tensor) or stand_ins_made() or any(map(layers.has_hooks, network.modules())):
            return None
        program_for(network, (x,), {})
        if (memo := memo_of(network, x)) is None:
            return None
    found = memo.get(Evaluated)
    if found is None:
        if stand_ins_made():
            return None
        chain = EvaluatedChain.find(program_for(network, (x,), {}), network)
        parameters, buffers = tensors_of(network)
        found = memo[Evaluated] = chain, {**parameters, **buffers}, Evaluated()
    chain, state, evaluated = found
    return None if chain is None else evaluated(chain, state, x)


_NORM = ("weight", "bias", "running_mean", "running_var")


def _held(block: _Block) -> list[tuple[str, tuple[str, ...]]]:
    return [(block.conv, ("weight", "bias")), *([(block.norm, _NORM)] if block.norm else [])]


def _block(model: nn.Module, steps: Sequence[Step], at: int) -> tuple[_Block, int] | None:
    """The block that the steps from `at` on compute, and where the next one begins."""
    if at >= len(steps):
        return None
    path = getattr(steps[at].call, "path", "")
    if steps[at].kind == "module":
        block = model.get_submodule(path)
        if (
            not isinstance(block, layers.ConvBlock)
            or not block.is_whole()
            or any(map(layers.has_hooks, block.modules()))
        ):
            return None
        if not layers.is_evaluated(block.norm):
            return None
        norm = "" if isinstance(block.norm, nn.Identity) else f"{path}.norm"
        return _Block(f"{path}.conv", norm, _spec(block.conv, block.norm, layers.pool_size(block.pool))), at + 1
    conv: Any = model.get_submodule(path) if steps[at].kind == "conv" else None
    if conv is None or type(conv) not in (nn.Conv2d, layers.Conv2d):
        return None
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    at += 1
    norm_path, norm_module = "", None
    if at < len(steps) and steps[at].kind == "norm":
        norm_path = steps[at].call.path  # type: ignore[attr-defined]
        norm_module = model.get_submodule(norm_path)
        if type(norm_module) is not nn.BatchNorm2d or not layers.is_evaluated(norm_module):
            return None
        at += 1
    if at >= len(steps) or not _is_relu(model, steps[at]):
        return None
    pool = _pool(model, steps[at + 1]) if at + 1 < len(steps) else 0
    return _Block(path, norm_path, _spec(conv, norm_module, pool or 1)), at + (2 if pool else 1)


def _spec(conv: Any, norm: Any, pool: int) -> BlockSpec:
    spec = conv_spec("affine_block", conv.stride, conv.padding, conv.dilation, conv.groups, conv.kernel_size)
    return BlockSpec(spec, getattr(norm, "eps", 0.0), pool)


def _module(model: nn.Module, step: Step) -> nn.Module | None:
    return model.get_submodule(step.call.path) if step.kind == "module" else None  # type: ignore[attr-defined]


def _does_nothing(model: nn.Module, step: Step) -> bool:
    module = _module(model, step)
    return type(module) is nn.Identity and not layers.has_hooks(module)


def _is_relu(model: nn.Module, step: Step) -> bool:
    module = _module(model, step)
    if module is not None:
        return type(module) is nn.ReLU and not layers.has_hooks(module)
    return step.kind == "function" and getattr(step.call, "function", getattr(step.call, "name", None)) in RELUS


def _pool(model: nn.Module, step: Step) -> int:
    """The window of a max-pool whose windows tile the image, else 0."""
    module = _module(model, step)
    if type(module) is not nn.MaxPool2d or layers.has_hooks(module) or not layers.tiles(module):
        return 0
    return layers.pool_size(module)
