"""Drop-in layers: torch's constructors, state_dict keys and results, on the kernels of `functional`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from ._torch import mode_active
from .neighbours import unpatched

__all__ = ["Conv2d", "ConvBlock", "Linear"]

Update = Callable[[], None]

_CAPTURING = threading.local()


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """In this thread, the layers here are for TorchDynamo what torch's own are: one operation each."""
    _CAPTURING.on = True
    try:
        yield
    finally:
        _CAPTURING.on = False


def is_captured() -> bool:
    """Whether a layer is called for `captured`; Dynamo asks once and takes the answer as a constant."""
    return getattr(_CAPTURING, "on", False)


# What torch.compiler.assume_constant_result does; that would import Dynamo, a second's work, with this package.
is_captured._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """In this thread, converted models run layer by layer, and nothing is captured or said of it: for hooks on single
    layers, which are no part of a user's model."""
    _CAPTURING.as_written = True
    try:
        yield
    finally:
        _CAPTURING.as_written = False


Note = Callable[[nn.Module, Tensor, Tensor], None]


@contextlib.contextmanager
def told_of_statistics(note: Note) -> Iterator[None]:
    """In this thread, each fused block tells its norm, and the mean and variance [C] by which it has normalised."""
    _CAPTURING.note = note
    try:
        yield
    finally:
        _CAPTURING.note = None


def runs_as_written() -> bool:
    """Whether a model is called within `as_written`."""
    return getattr(_CAPTURING, "as_written", False)


def is_read(x: object) -> bool:
    """Whether a layer is called for its graph, as torch's own layer would be: by Dynamo for `captured`, torch.jit.trace
    or torch.fx."""
    if torch.compiler.is_compiling():
        return is_captured()
    return torch._C._is_tracing() or not isinstance(x, Tensor)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on `functional.conv2d`: the input of a frozen layer is not kept for the backward pass.

    >>> layer = Conv2d(3, 16, 3, padding=1)
    >>> layer(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 16, 32, 32])
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_read(input):
            return super().forward(input)
        return convolve(self, input, self.weight, self.bias)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_torchs(self, nn.Conv2d)


class Linear(nn.Linear):
    """`torch.nn.Linear` on `functional.linear`.

    >>> layer = Linear(64, 5)
    >>> layer(torch.randn(25, 64)).shape
    torch.Size([25, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        if is_read(input):
            return super().forward(input)
        return functional.linear(input, self.weight, self.bias)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_torchs(self, nn.Linear)


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU and max-pool as one fused block: the block of MAML's conv4.

    Its children are `conv` (Conv2d), `norm` (BatchNorm2d), `relu` and `pool`, with the state_dict keys that these four
    layers have by themselves.

    >>> block = ConvBlock(3, 16)
    >>> block(torch.randn(8, 3, 32, 32)).shape
    torch.Size([8, 16, 16, 16])

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: of the convolution, as in `torch.nn.Conv2d`.
        pool: window and stride of the max-pool, 1 for none.
        eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`, but by default the batch's own
            statistics serve in training and in evaluation, as MAML has it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        bias: bool = True,
        pool: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, bias=bias, device=device, dtype=dtype
        )
        self.norm = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(pool) if pool > 1 else nn.Identity()

    hands_on = False  # whether blocks alone read the result, so that nobody sees how it lies in memory

    def is_whole(self) -> bool:
        """Whether all parts are of the kinds that one fused block computes: nothing else was put in place of one. An
        Identity in place of the norm says that the norm is part of the convolution."""
        conv, pool = self.conv, self.pool
        if (
            type(conv) not in (Conv2d, nn.Conv2d)
            or type(self.norm) not in (nn.BatchNorm2d, nn.Identity)
            or type(self.relu) is not nn.ReLU
        ):
            return False
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return False
        return tiles(pool) if type(pool) is nn.MaxPool2d else type(pool) is nn.Identity

    def is_fused(self) -> bool:
        """Whether it runs as one block: it is whole, and nobody looks at its parts."""
        return self.is_whole() and not any(map(has_hooks, (self.conv, self.norm, self.relu, self.pool)))

    def forward(self, input: Tensor) -> Tensor:
        if (block := unpatched(self)) is not self:
            return block.forward(input)
        if is_read(input):
            return self.pool(self.relu(self.norm(self.conv(input))))
        apart = not self.is_fused()
        update = None
        evaluated = not apart and is_evaluated(self.norm)
        if apart or (evaluated and not self._folds(input)):
            return self.pool(self.relu(self.norm(self.conv(input))))
        if evaluated:
            y = evaluated_block(self.conv, self.norm, pool_size(self.pool), input)
        else:
            y, update = fused_block(
                self.conv,
                self.norm,
                pool_size(self.pool),
                input,
                self.conv.weight,
                self.conv.bias,
                own_state(self.norm),
            )
        if update is not None:
            update()
        return y.contiguous() if input.is_contiguous() and not self.hands_on else y

    def _folds(self, input: Tensor) -> bool:
        """Whether a norm with fixed statistics may become part of the convolution for this call."""
        if mode_active(input.device.type) is not None:
            return False
        held = (self.conv._parameters, self.norm._parameters, self.norm._buffers)
        own = [t for tensors in held for t in tensors.values() if t is not None and t.dim()]
        return not functional.asks_for_a_derivative(input, *own) and all(t.dtype == input.dtype for t in own)

    def __prepare_scriptable__(self) -> nn.Module:
        return as_torchs(self, nn.Sequential)  # its children in their order


def as_torchs(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """The module as one of torch's own class, with the same tensors: what torch.jit.script compiles.

    Its children are other objects too, down to the last: torch.jit.script puts what it compiles in their places.
    """
    twin = object.__new__(cls)
    children = {
        name: c and as_torchs(c, getattr(c, "_lambda_fuses", torch_class(c))) for name, c in module._modules.items()
    }
    twin.__dict__.update(module.__dict__, _modules=children)
    return twin


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before, after or, for this instance alone, in place of the module's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def convolve(
    conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, as_laid: bool = False
) -> Tensor:  # fmt: skip
    """The result of a torch or lambda_kernels convolution with the given parameters in place of its own. `as_laid`:
    nobody minds how it lies in memory."""
    padding = conv.padding
    if conv.padding_mode != "zeros":
        images = x.flatten(0, -4) if x.dim() > 4 else x  # F.pad takes one batch axis
        images = F.pad(images, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        x = images.unflatten(0, x.shape[:-3]) if x.dim() > 4 else images
        padding = (0, 0)
    convolution = functional.conv2d_as_laid if as_laid else functional.conv2d
    return convolution(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def pool_size(pool: nn.Module) -> int:
    """The window of a block's pooling layer, 1 for none."""
    return int(pool.kernel_size) if isinstance(pool, nn.MaxPool2d) else 1  # type: ignore[arg-type]


def tiles(pool: nn.MaxPool2d) -> bool:
    """Whether a pooling layer's windows tile the image, each pixel in one of them."""
    alone = pool.stride == pool.kernel_size and (pool.padding, pool.dilation, pool.ceil_mode) == (0, 1, False)
    return alone and isinstance(pool.kernel_size, int) and not pool.return_indices


def uses_batch_statistics(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the norm, in its present mode, normalises with the batch's own mean and variance."""
    return norm.training or norm.running_mean is None


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of x [N, C, ...], without the gradient."""
    x = x.detach()
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if plain and x.dim() > 1 and x.numel() and mode_active("cpu") is None:
        # As var_mean, with sums in double, and several times faster: of channels-last ATen's sums are of x's own type.
        mean, variance = torch.batch_norm_update_stats(x.contiguous(), None, None, 0.0)
    else:
        variance, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return mean, variance


def own_state(norm: nn.modules.batchnorm._BatchNorm) -> dict[str, Tensor | None]:
    """gamma, beta and running statistics, by the names that torch's batch norm gives them."""
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {name: getattr(norm, name) for name in names}


def fused_block(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    pool: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Mapping[str, Tensor | None],
) -> tuple[Tensor, Update | None]:
    """conv, norm with the batch's statistics, ReLU and pool as one, with the given parameters.

    Returns the result in the backend's memory layout, and the update of `state`'s running statistics by this batch
    where the norm tracks them.
    """
    assert not isinstance(conv.padding, str)
    if norm.training and norm.track_running_stats and x.dim() > 4:
        raise ValueError(
            f"conv_block: running statistics are of one network, x {list(x.shape)} holds several tasks: "
            "set track_running_stats=False"
        )
    y, statistics = functional.block_and_statistics(
        x,
        weight,
        bias,
        state["weight"],
        state["bias"],
        conv.padding,
        norm.eps,
        pool,
        conv.stride,
        conv.dilation,
        conv.groups,
    )
    note: Note | None = getattr(_CAPTURING, "note", None)
    if note is not None:
        note(norm, *statistics())
    if not (norm.training and norm.track_running_stats):
        return y, None
    height, width = (
        (x.shape[a] + 2 * conv.padding[a] - conv.dilation[a] * (conv.kernel_size[a] - 1) - 1) // conv.stride[a] + 1
        for a in (-2, -1)
    )
    return y, running_update(norm, state, *statistics(), x.shape[0] * height * width)


def is_evaluated(norm: nn.Module) -> bool:
    """Whether a block's norm is a function of each image by itself: by running statistics, or as part of the
    convolution."""
    return type(norm) is nn.Identity or not uses_batch_statistics(norm)  # type: ignore[arg-type]


def evaluated_block(conv: nn.Conv2d, norm: nn.Module, pool: int, x: Tensor) -> Tensor:
    """conv, norm with fixed statistics, ReLU and pool as one; in the backend's memory layout."""
    weight, bias = conv.weight, conv.bias
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None and norm.running_var is not None
        weight, bias = with_norm(weight, bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    given = conv.padding, pool, conv.stride, conv.dilation, conv.groups
    return functional.affine_block_as_laid(x, weight, bias, *given)  # type: ignore[arg-type]


def with_norm(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight [O, C, kh, kw] and bias [O] of a convolution that does what it and the norm behind it do."""
    scale = torch.rsqrt(variance + eps)
    scale = scale if gamma is None else scale * gamma
    shift = mean if bias is None else mean - bias
    return weight * scale[:, None, None, None], -shift * scale if beta is None else beta - shift * scale


def running_update(
    norm: nn.modules.batchnorm._BatchNorm,
    state: Mapping[str, Tensor | None],
    mean: Tensor,
    variance: Tensor,
    count: int,
) -> Update:
    """The update of the running statistics by a batch of `count` values per channel; it may be made K times.

    As torch has it, a batch of none is counted, and statistics that are None are not kept.
    """
    unbiased = variance.detach() * (count / (count - 1)) if count > 1 else variance.detach()

    def update() -> None:
        running_mean, running_var, seen = (state[k] for k in ("running_mean", "running_var", "num_batches_tracked"))
        if seen is not None:
            seen.add_(1)
        if norm.momentum is not None:
            share = norm.momentum
        else:
            share = 0.0 if seen is None else 1.0 / float(seen)
        if running_mean is not None and count:
            running_mean.lerp_(mean.detach().to(running_mean.dtype), share)
        if running_var is not None and count:
            running_var.lerp_(unbiased.to(running_var.dtype), share)

    return update


TORCH_CLASS: dict[type[nn.Module], type[nn.Module]] = {Conv2d: nn.Conv2d, Linear: nn.Linear, ConvBlock: nn.Sequential}


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The class of torch that computes what a module does; its own where there is no other."""
    if type(module) is ConvBlock and list(module._modules) != ["conv", "norm", "relu", "pool"]:
        return ConvBlock  # a Sequential would run what else was put into it
    return TORCH_CLASS.get(type(module), type(module))
