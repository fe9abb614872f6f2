"""Norms whose statistics are those of a support set: each prediction is then of its own image alone.

Batch normalisation in MAML normalises query images together, so that a prediction depends on the images beside it (the
transductive setting of Finn et al. 2017; Nichol et al. 2018, section 6.2, measures what that is worth). Taken once from
the adapted network's pass over the support set, the statistics are constants, and a norm is an affine function that
folds into the convolution ahead of it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from lambda_kernels.agreement import apart, distance, tolerance
from lambda_kernels.evaluated import EvaluatedChain
from lambda_kernels.fused import as_one_operation
from lambda_kernels.layers import ConvBlock, as_written, has_hooks, moments, told_of_statistics, uses_batch_statistics
from lambda_kernels.program import Program, program_for
from lambda_kernels.program.structure import flatten

from .say import say_once

__all__ = ["StatisticsError", "fold", "freeze", "norms_of_batches", "restore", "warn_of_few"]

FEW = 5
"""Fewer images than these say little of a task's statistics."""
BESIDE = 8
"""Images beside which one is classified, to see whether they change its result."""


class StatisticsError(ValueError):
    """A network whose results for an image cannot be had without the images beside it; the message says why."""


def norms_of_batches(network: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that, in their present mode, use the statistics of their input, by path.

    >>> list(norms_of_batches(conv4(ways=5, in_channels=1, width=32, image_size=28)))
    ['block1.norm', 'block2.norm', 'block3.norm', 'block4.norm']
    """
    return {path: m for path, m in network.named_modules() if isinstance(m, _BatchNorm) and uses_batch_statistics(m)}


@torch.no_grad()
def freeze(network: nn.Module, xs: Any) -> None:
    """Give each batch norm the mean and variance that it sees in one pass over `xs`, for good, in place.

    The norms are then in evaluation mode with running statistics of their own. A norm that the network does not reach
    stays as it is.

    Raises:
        StatisticsError: a norm is called several times, each with statistics of its own; or the result for an image
            still depends on the images beside it, or cannot be had for one image.
    """
    norms = norms_of_batches(network)
    seen = _told_by_blocks(network, xs, norms)
    for path, (mean, variance) in (_seen_by_norms(network, xs, norms) if seen is None else seen).items():
        _hold(norms[path], mean, variance)
    _check_alone(network, xs)


class _Seen(dict[str, tuple[Tensor, Tensor]]):
    """Mean and variance [C] that each norm saw in one pass, by path."""

    def note(self, path: str, mean: Tensor, variance: Tensor) -> None:
        if path in self:
            raise StatisticsError(
                f"{path} normalises several times in one pass, each time by other statistics, of which it can hold one "
                "pair: give each call a norm of its own"
            )
        self[path] = mean, variance


def _told_by_blocks(network: nn.Module, xs: Any, norms: Mapping[str, _BatchNorm]) -> _Seen | None:
    """What the norms see in one pass over `xs`, where all are parts of fused blocks, which tell it; else None."""
    inside = {f"{path}.norm".lstrip(".") for path, m in network.named_modules() if isinstance(m, ConvBlock)}
    run: Callable[[Any], Any] = network
    program = program_for(network, (xs,), {}, called=False)
    if program is not None and program.untraceable is None:
        inside |= {fusion.norm for fusion in program.fusions}
        run = functools.partial(program, network)
    if not norms.keys() <= inside:
        return None
    seen, paths = _Seen(), {id(norm): path for path, norm in norms.items()}
    dtype = next(network.parameters()).dtype

    def note(norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
        if (path := paths.get(id(norm))) is not None:
            seen.note(path, mean.to(dtype), variance.clamp_min(0).to(dtype))

    with told_of_statistics(note):
        run(xs)
    return seen if seen.keys() == norms.keys() else None  # else a block was not reached, or was not run as one


def _seen_by_norms(network: nn.Module, xs: Any, norms: Mapping[str, _BatchNorm]) -> _Seen:
    """What the norms see in one pass over `xs`, layer by layer."""
    seen = _Seen()

    def look(path: str) -> Callable[..., None]:
        return lambda norm, given: seen.note(path, *moments(given[0]))

    with ExitStack() as stack:
        for path, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(look(path)).remove)
        stack.enter_context(as_written())
        network(xs)
    return seen


def _hold(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    norm.running_mean, norm.running_var = mean, variance
    norm.num_batches_tracked = torch.ones((), dtype=torch.long, device=mean.device)
    norm.track_running_stats = True
    norm.training = False


def restore(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the network take the `state_dict` of one whose norms were given statistics, in place: batch norms without
    running statistics that have some there get room for them, and all is in evaluation mode."""
    for path, norm in norms_of_batches(network).items():
        mean, variance = (state.get(f"{path}.running_{name}".lstrip(".")) for name in ("mean", "var"))
        if norm.running_mean is None and mean is not None and variance is not None:
            _hold(norm, torch.empty_like(mean), torch.empty_like(variance))
    network.eval()


def warn_of_few(x: Any) -> None:
    """Say once what it costs to normalise few images by their own statistics."""
    images = x.shape[0] if isinstance(x, Tensor) and x.dim() else FEW
    if images < FEW:
        told = "1 image is normalised by its" if images == 1 else f"{images} images are normalised by their"
        say_once(
            f"{told} own statistics alone, which costs accuracy: "
            'adapt(..., statistics="support") or learner.freeze_statistics() takes those of the support set'
        )


def _check_alone(network: nn.Module, xs: Any) -> None:
    """The first image by itself gives what it gives among the others; all in evaluation mode, without dropout."""
    tensors, again = flatten(xs)
    if any(t.dim() == 0 or t.shape[0] != tensors[0].shape[0] for t in tensors) or tensors[0].shape[0] < 2:
        return
    with _evaluating(network):
        beside = network(again([t[:BESIDE] for t in tensors]))
        try:
            alone = network(again([t[:1] for t in tensors]))
        except Exception as error:
            raise StatisticsError(f"the network cannot be called with one image: {error}") from error
    for got, all_images in zip(flatten(alone)[0], flatten(beside)[0]):
        want = all_images[:1]
        if not want.is_floating_point():
            continue
        off = distance([got], [want]) / max(distance([want], [torch.zeros_like(want)]), 1e-30)
        if off > tolerance(want.dtype).steps:
            raise StatisticsError(
                f"the result for an image still depends on the images beside it, by {off:.1e} of its length: something "
                "other than its batch norms uses the whole batch, such as a call of torch.nn.functional.batch_norm"
            )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def fold(network: nn.Module, xs: Any) -> None:
    """Put each norm with fixed statistics into the convolution or linear layer whose result it alone reads, in place.

    gamma (w x + b - mean) / sqrt(variance + eps) + beta is one affine function of x: the layer's weight and bias take
    all of it, and an `nn.Identity` takes the norm's place. Norms behind anything else stay. `xs` is an input by which
    the network is looked into.

    Raises:
        ValueError: a norm uses the statistics of each batch, or the network cannot be looked into.
    """
    if norms := norms_of_batches(network):
        raise ValueError(
            f"{next(iter(norms))} takes its statistics from each batch, which no layer can hold: call "
            "freeze_statistics() first"
        )
    program = program_for(network, (xs,), {})
    if program.untraceable is not None:
        raise ValueError(f"{type(network).__name__} cannot be folded: {program.untraceable}")
    with _evaluating(network):
        before = network(xs)
        for layer, norm in list(_pairs(network, program)):
            _fuse(network, layer, norm)
        _hand_on(network, xs)
        after = network(xs)
        if EvaluatedChain.find(program_for(network, (xs,), {}), network) is not None:
            as_one_operation(network)
    for got, want in zip(flatten(after)[0], flatten(before)[0]):
        if (off := apart(got, want)) is not None:
            raise RuntimeError(f"the folded network differs from the network by {off:.1e} of its result: not folded")


def _pairs(network: nn.Module, program: Program) -> Iterator[tuple[str, str]]:
    """Layers, each with the norm that alone reads its result; both are called once, and share no parameter."""
    steps = {step.slot: step for step in program.steps}
    calls = Counter(getattr(step.call, "path", "") for step in program.steps)
    read = Counter(slot for step in program.steps for slot in step.reads)
    read.update(program.result_slots)
    shared = {*program.aliases, *program.aliases.values()}
    for step in program.steps:
        path = getattr(step.call, "path", "")
        if calls[path] != 1 or not shared.isdisjoint(step.parameters):
            continue
        if step.kind == "module":
            block = network.get_submodule(path)
            if isinstance(block, ConvBlock) and block.is_fused() and not has_hooks(block):
                yield f"{path}.conv".lstrip("."), f"{path}.norm".lstrip(".")
        elif step.kind == "norm" and len(step.reads) == 1 and read[step.reads[0]] == 1:
            layer = steps.get(step.reads[0])
            if layer is not None and layer.kind in ("conv", "linear") and shared.isdisjoint(layer.parameters):
                own: str = layer.call.path  # type: ignore[attr-defined]
                if calls[own] == 1:
                    yield own, path


def _hand_on(network: nn.Module, xs: Any) -> None:
    """Blocks that other blocks or a flattening alone read leave their results as their kernel lays them out."""
    program = program_for(network, (xs,), {})
    blocks = {}
    for step in program.steps:
        if step.kind == "module" and isinstance(block := network.get_submodule(step.call.path), ConvBlock):  # type: ignore[attr-defined]
            blocks[step.slot] = block
    for slot, block in blocks.items():
        readers = [step for step in program.steps if slot in step.reads]
        block.hands_on = slot not in program.result_slots and all(
            step.kind == "flatten" or step.slot in blocks for step in readers
        )


def _fuse(network: nn.Module, layer_path: str, norm_path: str) -> None:
    layer: Any = network.get_submodule(layer_path)
    norm = network.get_submodule(norm_path)
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    fuse: Any = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    weight, bias = fuse(layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    parent, _, name = norm_path.rpartition(".")
    network.get_submodule(parent)._modules[name] = nn.Identity()
