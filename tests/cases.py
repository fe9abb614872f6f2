"""Shapes and tolerances of the tests of the kernel package, and the plain PyTorch beside which its results stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lambda_kernels.agreement import element_errors, within
from lambda_kernels.spec import BlockSpec, ConvSpec

BACKENDS = ("reference", "native")
# float64 against float64, for torch.testing.assert_close; `within(dtype, what)` gives those of other dtypes.
EXACT = within(torch.float64, "operation")
GRADIENT = within(torch.float64, "gradient")  # through batch statistics
STEPS = within(torch.float64, "steps")  # some steps of an inner loop against the same in another order


class ConvCase(NamedTuple):
    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


CONVS = (
    ConvCase("1x1", (2, 3, 5, 4), (6, 3, 1, 1)),
    ConvCase("padding", (3, 4, 7, 7), (5, 4, 3, 3), padding=1),
    ConvCase("padding-pair", (2, 4, 9, 6), (5, 4, 3, 5), padding=(0, 2)),
    ConvCase("same-odd-kernel", (2, 3, 8, 5), (4, 3, 3, 5), padding="same"),
    ConvCase("same-even-kernel", (2, 3, 8, 5), (4, 3, 4, 2), padding="same", dilation=(1, 3)),
    ConvCase("valid", (2, 3, 8, 5), (4, 3, 3, 3), padding="valid"),
    ConvCase("stride-pair", (2, 4, 21, 10), (6, 4, 3, 3), stride=(2, 3), padding=1),
    ConvCase("stride-beyond-kernel", (2, 4, 11, 10), (6, 4, 2, 2), stride=3),
    ConvCase("dilation-pair", (2, 4, 11, 12), (6, 4, 3, 3), padding=2, dilation=(2, 3)),
    ConvCase("groups", (2, 8, 7, 7), (4, 4, 3, 3), padding=1, groups=2),
    ConvCase("depthwise", (2, 6, 9, 7), (12, 1, 3, 3), padding=1, stride=2, groups=6),
    ConvCase("everything", (2, 4, 13, 11), (6, 2, 3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2),
    ConvCase("kernel-as-image", (3, 4, 5, 5), (2, 4, 5, 5)),
    ConvCase("batch-75", (75, 3, 9, 9), (8, 3, 3, 3), padding=1),
    ConvCase("batch-0", (0, 3, 9, 9), (8, 3, 3, 3), padding=1),
    ConvCase("unbatched", (3, 9, 7), (8, 3, 3, 3), padding=1),
)


class BlockCase(NamedTuple):
    name: str
    images: int
    inputs: int
    width: int
    size: tuple[int, int]
    pool: int = 2
    stride: int = 1
    padding: int = 1
    groups: int = 1


BLOCKS = (
    BlockCase("7x7", 5, 4, 5, (7, 7)),
    BlockCase("21x21", 3, 3, 48, (21, 21)),
    BlockCase("33x47", 2, 3, 5, (33, 47)),
    BlockCase("one-image", 1, 4, 100, (9, 7)),
    BlockCase("75-images", 75, 1, 8, (9, 9)),
    BlockCase("one-channel", 4, 1, 1, (28, 28)),
    BlockCase("width-600", 3, 2, 600, (7, 5)),  # more than the kernels' strip of 512 channels
    BlockCase("no-pool", 3, 4, 48, (7, 7), pool=1),
    BlockCase("no-pool-one-pixel", 9, 4, 6, (1, 1), pool=1),
    BlockCase("1x9-no-pool", 2, 4, 6, (1, 9), pool=1),
    BlockCase("2x2", 6, 4, 6, (2, 2)),
    BlockCase("groups-stride", 3, 4, 6, (15, 12), stride=2, groups=2, padding=0),
)
THIRDS = BlockCase("pool-3", 3, 4, 5, (10, 11), pool=3)  # a window that the native backend has no kernel for


class ImageCase(NamedTuple):
    """A first block whose patches have at most 32 numbers."""

    name: str
    images: int
    inputs: int
    width: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pool: int = 2

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec(self.stride, self.padding, self.dilation, 1)


IMAGES = (
    ImageCase("rgb-48", 3, 3, 48, (13, 15)),
    ImageCase("rgb-100", 2, 3, 100, (9, 12)),
    ImageCase("gray-5", 5, 1, 5, (14, 11)),
    ImageCase("width-1", 4, 3, 1, (7, 7), padding=(0, 0)),
    ImageCase("5x5", 3, 1, 48, (11, 12), kernel=(5, 5), padding=(2, 1)),
    ImageCase("2x3-of-5", 2, 5, 33, (9, 10), kernel=(2, 3), padding=(0, 1)),
    ImageCase("dilation", 2, 3, 5, (13, 12), dilation=(2, 2)),
    ImageCase("dilation-pair", 2, 2, 16, (12, 13), padding=(0, 2), dilation=(2, 3), pool=1),
    ImageCase("stride", 3, 1, 8, (15, 16), stride=(2, 1)),
    ImageCase("no-pool", 2, 3, 48, (6, 7), pool=1),
    ImageCase("no-pool-stride", 3, 3, 5, (9, 9), stride=(2, 2), padding=(0, 0), pool=1),
    ImageCase("one-pixel", 7, 3, 6, (1, 1), kernel=(1, 1), padding=(0, 0), pool=1),
    ImageCase("32-taps", 2, 2, 12, (9, 8), kernel=(4, 4)),
)

LINEARS = {
    "rows": ((5, 7), (3, 7)),
    "one-row": ((1, 7), (3, 7)),
    "no-rows": ((0, 7), (3, 7)),
    "vector": ((7,), (3, 7)),
    "many-axes": ((2, 3, 4, 7), (1, 7)),
}


def name_of(value: Any) -> str:
    """A dtype or a case, in the name of a test."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else getattr(value, "name", str(value))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory: contiguous, channels-last, and cut out of a larger tensor."""
    larger = x.new_full([n + 3 for n in x.shape], float("nan"))
    sliced = larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
    every_other = torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    last = x.movedim(-3, -1).contiguous().movedim(-1, -3) if x.dim() >= 3 else x
    return {"contiguous": x.contiguous(), "channels-last": last, "sliced": sliced, "strided": every_other}


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every non-empty choice of operands that require a gradient."""
    return [chosen for n in range(1, len(names) + 1) for chosen in combinations(names, n)]


def by_task(op: Callable[..., Tensor], tasks: int, *operands: tuple[Tensor | None, int]) -> Tensor:
    """op task by task; an operand with more dimensions than its rank has one value per task."""
    return torch.stack(
        [op(*(t[i] if t is not None and t.dim() > rank else t for t, rank in operands)) for i in range(tasks)]
    )


def stock_block(*arguments: Any) -> Tensor:
    """conv_block as anyone writes it, of x, weight, bias, gamma, beta, eps and a BlockCase."""
    x, weight, bias, gamma, beta, eps, case = arguments
    z = F.conv2d(x, weight, bias, case.stride, case.padding, 1, case.groups)
    y = F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.0, eps))
    return F.max_pool2d(y, case.pool) if case.pool > 1 else y


def explicit_block(*arguments: Any) -> Tensor:
    """As stock_block, but right at every order of derivative; torch's batch norm is not at the third."""
    x, weight, bias, gamma, beta, eps, case = arguments
    z = F.conv2d(x, weight, bias, case.stride, case.padding, 1, case.groups)
    variance, mean = torch.var_mean(z, (0, 2, 3), correction=0, keepdim=True)
    a = (z - mean) * torch.rsqrt(variance + eps)
    y = F.relu(a * gamma[:, None, None] + beta[:, None, None])
    return F.max_pool2d(y, case.pool) if case.pool > 1 else y


def decided(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, case: BlockCase, margin: float) -> Tensor:
    """Windows whose maximum and whose ReLU no rounding can turn: elsewhere the gradient jumps. All in float64."""
    z = F.conv2d(x, weight, None, case.stride, case.padding, 1, case.groups)
    a = F.batch_norm(z, None, None, gamma, beta, True, 0.0, 1e-5)
    n, c, h, w = a.shape
    p = case.pool
    tiles = a[..., : h // p * p, : w // p * p].reshape(n, c, h // p, p, w // p, p).transpose(3, 4).flatten(4)
    first = tiles.sort(-1, descending=True).values
    sure = first[..., 0].abs() > margin
    return sure & ((first[..., 0] - first[..., 1] > margin) | (first[..., 0] < 0)) if p > 1 else sure


def assert_as_exact(name: str, got: Tensor | None, stock: Tensor | None, truth: Tensor | None, terms: int = 1) -> None:
    """The rule of `lambda_kernels.agreement` for one operation; `terms` as there."""
    assert (got is None) == (truth is None), name
    if got is None or truth is None or stock is None or not truth.numel():
        return
    assert got.shape == truth.shape and got.dtype == stock.dtype, name
    found = element_errors(got, stock, truth, terms)
    assert found.agree, f"{name}: error {found.mine:.2e}, stock {found.stock:.2e}, allowed {found.limit:.2e}"


def norm_block(pool: int) -> BlockSpec:
    """A block for its norm, ReLU and pooling alone."""
    return BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, pool)
