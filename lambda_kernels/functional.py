"""Everything the kernels do, as functions: check the call, choose a backend, apply.

All three take an optional leading task axis T: x [T, N, ...], and each parameter either shared by the tasks (torch's
own shape) or one value per task ([T, ...]). Gradients of every order flow to every operand that requires one, and only
those are computed. The backend is that of `use_backend`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd
from ._torch import forward_mode, functorch_active
from .backends import Backend, choose
from .spec import (
    BlockSpec,
    ConvSpec,
    check_affine,
    check_conv2d,
    check_conv_block,
    check_linear,
    check_same,
    conv_spec,
    output_size,
    same_padding,
)

__all__ = ["affine_block", "conv2d", "conv_block", "linear"]

IntOrPair = int | tuple[int, ...]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution with torch's arguments.

    >>> x, weights = torch.randn(2, 8, 3, 32, 32), torch.randn(2, 16, 3, 3, 3)  # two tasks, each with its own weight
    >>> conv2d(x, weights, padding=1).shape
    torch.Size([2, 8, 16, 32, 32])

    Args:
        x: [N, C, H, W], [C, H, W], or [T, N, C, H, W] with a task axis.
        weight: [O, C / groups, kh, kw], or [T, O, C / groups, kh, kw].
        bias: [O] or [T, O].
        stride, padding, dilation: an int or a (vertical, horizontal) pair, in pixels; padding also "same" or "valid".
        groups: number of channel groups that are convolved apart.

    Returns:
        [N, O, H', W'], with a leading T where x or a parameter has one.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message holds them.
    """
    return conv2d_as_laid(x, weight, bias, stride, padding, dilation, groups, lay=False)


def conv2d_as_laid(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
    groups: int,
    lay: bool = True,
) -> Tensor:
    """`conv2d`'s result, with `lay` in the memory layout that is fastest on the device, channels-last on a CPU: that of
    the norms, activations and pools behind it too, so that the next convolution finds it."""
    x, weight, bias = _autocast("conv2d", x, weight, bias)
    if x.dim() == 3:
        return conv2d_as_laid(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, lay).squeeze(-4)
    same = padding == "same"
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"conv2d: padding must be 'same', 'valid', an int or a pair, got {padding!r}")
        padding = 0
    spec = conv_spec("conv2d", stride, padding, dilation, groups, weight.shape[-2:])
    if same:
        x = F.pad(x, same_padding(weight.shape, spec.stride, spec.dilation))
    check_conv2d("conv2d", x.shape, weight.shape, None if bias is None else bias.shape, spec)
    tasks = x.dim() == 5 or weight.dim() == 5 or (bias is not None and bias.dim() == 2)
    backend = choose("conv2d", x, weight, spec)
    images, weights = _lift(x, 4), _lift(weight, 4)
    if lay and _gains_by_layout(images, weights, spec):
        images = _laid(images, backend)
    y = autograd.Conv2d.apply(images, weights, _lift_if(bias, 1), spec, backend)
    return y if tasks else y.squeeze(0)


def _gains_by_layout(x: Tensor, weight: Tensor, spec: ConvSpec) -> bool:
    """Whether ATen and the kernels are faster on channels-last images x [1|T, N, C, H, W], of which nothing lies in
    order too: neither these nor the result have one channel, image or pixel.

    Not within a vmap: some of torch's operators, adaptive pooling and group norm among them, cannot be mapped there.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or functorch_active() or not x.is_contiguous():
        return False
    (height, width), (rows, columns) = x.shape[-2:], output_size(x.shape, weight.shape, spec)
    return min(*x.shape[1:3], weight.shape[1], height * width, rows * columns) > 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weight^T + bias.

    >>> x, weights = torch.randn(2, 25, 64), torch.randn(2, 5, 64)  # two tasks, each with its own weight
    >>> linear(x, weights).shape
    torch.Size([2, 25, 5])

    Args:
        x: [..., in]; with per-task parameters its first axis is the task axis.
        weight: [out, in] or [T, out, in].
        bias: [out] or [T, out].

    Returns:
        [..., out].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; the message holds them.
    """
    x, weight, bias = _autocast("linear", x, weight, bias)
    check_linear(x.shape, weight.shape, None if bias is None else bias.shape)
    per_task = weight.dim() == 3 or (bias is not None and bias.dim() == 2)
    backend = choose("linear", x, weight)
    if not (per_task or functorch_active()) and backend.linear_is_torchs:
        return F.linear(x, weight, bias)
    rows = x if x.dim() > 1 else x.unsqueeze(0)
    if not per_task:
        rows = rows.flatten(0, -2).unsqueeze(0)
    elif x.dim() == 2:
        rows = rows.unsqueeze(1)
    else:
        rows = rows.flatten(1, -2)
    y = autograd.Linear.apply(rows, _lift(weight, 2), _lift_if(bias, 1), backend)
    return y.reshape(*x.shape[:-1], weight.shape[-2])


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    padding: IntOrPair = 1,
    eps: float = 1e-5,
    pool: int = 2,
    stride: IntOrPair = 1,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution, batch norm with the batch's own statistics, ReLU and max-pool (window and stride `pool`) as one.

    For one task, with shared parameters that are all there, this is by definition

        z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        variance, mean = torch.var_mean(z, (0, 2, 3), correction=0, keepdim=True)
        normal = (z - mean) / torch.sqrt(variance + eps)
        y = F.relu(normal * gamma[:, None, None] + beta[:, None, None])
        y = F.max_pool2d(y, pool)

    The statistics are each task's own, over its N images; gradients flow through them. `bias` cancels in the norm: it
    changes nothing and its gradient is exactly zero (Ioffe & Szegedy 2015, section 3.2).

    >>> x, weight, ones = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3), torch.ones(16)
    >>> conv_block(x, weight, None, ones, torch.zeros(16)).shape
    torch.Size([8, 16, 16, 16])

    Args:
        x: [N, C, H, W] or [T, N, C, H, W].
        weight: [O, C / groups, kh, kw] or [T, ...].
        bias, gamma, beta: [O] or [T, O]; gamma None means 1, beta None means 0.
        padding, stride, dilation, groups: of the convolution, as in `conv2d`, in pixels.
        eps: added to the variance.
        pool: 1 for no pooling; surplus rows and columns of a size that it does not divide are dropped, as torch does.

    Returns:
        [N, O, H', W'] or [T, N, O, H', W'], contiguous where x is.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or there is one value per channel only.
    """
    y, _ = block_and_statistics(x, weight, bias, gamma, beta, padding, eps, pool, stride, dilation, groups)
    return y.contiguous() if x.is_contiguous() else y


def block_and_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    padding: IntOrPair,
    eps: float,
    pool: int,
    stride: IntOrPair,
    dilation: IntOrPair,
    groups: int,
) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """`conv_block`'s result in the backend's memory layout, and what gives the mean and variance [O] or [T, O] of the
    convolution's output."""
    x, weight, bias = _autocast("conv_block", x, weight, bias)
    check_affine("conv_block", x, gamma, beta)
    spec = conv_spec("conv_block", stride, padding, dilation, groups, weight.shape[-2:])
    shapes = (None if t is None else t.shape for t in (bias, gamma, beta))
    count = check_conv_block(x.shape, weight.shape, *shapes, spec, pool)
    if x.shape[-4] == 0:
        return _block_of_no_images(x, weight, bias, gamma, beta, spec, pool)
    block = BlockSpec(spec, eps, pool)
    backend = choose("conv_block", x, weight, spec, pool)
    ranks = ((x, 4), (weight, 4), (bias, 1), (gamma, 1), (beta, 1))
    tasks = any(t is not None and t.dim() > rank for t, rank in ranks)
    gamma = x.new_ones(weight.shape[-4]) if gamma is None else gamma
    beta = x.new_zeros(weight.shape[-4]) if beta is None else beta
    operands = _laid(_lift(x, 4), backend), _lift(weight, 4), _lift(gamma, 1), _lift(beta, 1)
    own_bias = _lift_if(bias, 1)
    if not asks_for_a_derivative(*operands, bias):
        y, mean, rstd = autograd.Block.apply(*operands, block, backend)
        if y.shape[0] < count:  # the tasks differ in the bias alone, which cancels
            y, mean, rstd = (t.repeat(count, *[1] * (t.dim() - 1)) for t in (y, mean, rstd))
    elif _by_moments(operands, count, block, backend):
        y, _, mean, rstd, _ = autograd.ImageBlock.apply(*operands, own_bias, block, backend)
    else:
        z = autograd.Conv2d.apply(*operands[:2], None, spec, backend)
        z = z.expand(max(z.shape[0], count), *z.shape[1:])
        y, _, mean, rstd = autograd.NormReluPool.apply(z, *operands[2:], own_bias, block, backend)

    def statistics() -> tuple[Tensor, Tensor]:
        shifted = mean if bias is None else mean + bias.detach()
        variance = rstd.detach().pow(-2) - eps
        return (shifted, variance) if tasks else (shifted.squeeze(0), variance.squeeze(0))

    return y if tasks else y.squeeze(0), statistics


def affine_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    padding: IntOrPair = 1,
    pool: int = 2,
    stride: IntOrPair = 1,
    dilation: IntOrPair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution, ReLU and max-pool (window and stride `pool`) as one: a block whose norm has fixed statistics, which
    are part of weight and bias.

    For one task this is by definition F.max_pool2d(F.relu(F.conv2d(x, weight, bias, ...)), pool). On a CPU, where the
    convolution is one of 3x3 pixels between many channels or of few inputs, an image's result is the same bits
    whatever images are beside it. Where a derivative may be asked for it is computed by the layers one by one.

    >>> x, weight = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3)
    >>> affine_block(x, weight, torch.zeros(16)).shape
    torch.Size([8, 16, 16, 16])

    Arguments, result and errors are those of `conv_block`, without the norm's.
    """
    y = affine_block_as_laid(x, weight, bias, padding, pool, stride, dilation, groups)
    return y.contiguous() if x.is_contiguous() else y


def affine_block_as_laid(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: IntOrPair,
    pool: int,
    stride: IntOrPair,
    dilation: IntOrPair,
    groups: int,
) -> Tensor:
    """`affine_block`'s result in the backend's memory layout."""
    x, weight, bias = _autocast("affine_block", x, weight, bias)
    spec = conv_spec("affine_block", stride, padding, dilation, groups, weight.shape[-2:])
    none = (None if bias is None else bias.shape, None, None)
    count = check_conv_block(x.shape, weight.shape, *none, spec, pool, False)
    if x.shape[-4] == 0 or asks_for_a_derivative(x, weight, bias):
        y = F.relu(conv2d(x, weight, bias, stride, padding, dilation, groups))
        return y if pool == 1 else F.max_pool2d(y.flatten(0, -4), pool).unflatten(0, y.shape[:-3])
    backend = choose("conv_block", x, weight, spec, pool)
    tasks = x.dim() > 4 or weight.dim() > 4 or (bias is not None and bias.dim() > 1)
    own = x.new_zeros(weight.shape[-4]) if bias is None else bias
    y = backend.affine_block(backend.layout(_lift(x, 4)), _lift(weight, 4), _lift(own, 1), BlockSpec(spec, 0.0, pool))
    y = y if y.shape[0] == count else y.expand(count, *y.shape[1:])
    return y if tasks else y.squeeze(0)


def _block_of_no_images(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, spec: ConvSpec, pool: int
) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """What is left of a block where there is nothing to normalise: a shape, and gradients of 0."""
    y = conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    scale, shift = (t if t is None or t.dim() == 1 else t.unsqueeze(-2) for t in (gamma, beta))
    y = y if scale is None else y * scale[..., None, None]
    y = y if shift is None else y + shift[..., None, None]
    none = x.new_zeros(weight.shape[-4])
    return y[..., : y.shape[-2] // pool, : y.shape[-1] // pool], lambda: (none, none)


def asks_for_a_derivative(*tensors: Tensor | None) -> bool:
    """Whether a derivative of what is computed from these may be asked for."""
    if torch.compiler.is_compiling() or forward_mode():
        return True
    if not torch.is_grad_enabled():
        return False
    hidden = functorch_active()  # a mapped tensor does not say whether it requires one
    return hidden or any(t is not None and t.requires_grad for t in tensors)


def _by_moments(operands: tuple[Tensor, ...], tasks: int, block: BlockSpec, backend: Backend) -> bool:
    """Whether a block of x, weight, gamma, beta [1|T, ...] goes by its images' patches: they need no gradient."""
    if torch.compiler.is_compiling() or functorch_active() or forward_mode():
        return False
    x, weight = operands[:2]
    known = not x.requires_grad and max(t.shape[0] for t in operands) == tasks
    return known and not backend.image_refusals(x, weight, block)


def _laid(x: Tensor, backend: Backend) -> Tensor:
    """Images in the backend's layout; of contiguous ones the gradient is contiguous too."""
    flows = x.is_contiguous() and asks_for_a_derivative(x) and not torch.compiler.is_compiling()
    return autograd.Laid.apply(x, backend) if flows else backend.layout(x)


def _lift(tensor: Tensor, rank: int) -> Tensor:
    """The tensor with a task axis of size 1 where it has none."""
    return tensor if tensor.dim() > rank else tensor.unsqueeze(0)


def _lift_if(tensor: Tensor | None, rank: int) -> Tensor | None:
    return None if tensor is None else _lift(tensor, rank)


def _autocast(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in autocast's dtype where it is on, as torch's own layers have them, and checked to agree."""
    if isinstance(x, Tensor) and _autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = _narrow(x, dtype), _narrow(weight, dtype)
        bias = None if bias is None else _narrow(bias, dtype)
    check_same(op, x, ("weight", weight), ("bias", bias))
    return x, weight, bias


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast casts: not float64, and nothing that is no floating-point tensor."""
    eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor
