"""The operations that a backend has: what each one computes, on which shapes, and what a call of one is.

Operands carry a task axis of size 1 (shared by all tasks) or T, as `spec` says. `Backend` holds no computation; the
reference (`reference.py`) has all operations in ATen, and other backends derive from it and override what they do
better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import BlockSpec, ConvSpec

__all__ = ["Backend", "Call", "InnerLoop"]


class Call(NamedTuple):
    """What a backend is asked to run: an operation, and all that its answer may depend on but the values."""

    op: str  # "conv2d", "linear", "conv_block" or "inner_loop"; gradients go with their operation
    device: torch.device
    dtype: torch.dtype  # of x
    shapes: tuple[torch.Size, ...] = ()  # of x and weight as the caller gave them; () where they are not known
    spec: ConvSpec | None = None  # of a convolution, and of the one in a block
    pool: int = 1  # window of a block's max-pool, 1 for none
    norm: str = "batch"  # kind of a block's norm; "batch" takes the batch's own statistics
    slope: float = 0.0  # of a block's ReLU below zero

    def __str__(self) -> str:
        """The inputs, for an error's text."""
        named = [f"{name} {list(shape)}" for name, shape in zip(("x", "weight"), self.shapes)]
        if self.spec is not None:
            named += [f"{name}={value}" for name, value in zip(self.spec._fields, self.spec)]
        if self.op == "conv_block":
            named.append(f"pool={self.pool}")
        named += [f"norm={self.norm!r}"] * (self.norm != "batch") + [f"slope={self.slope}"] * (self.slope != 0.0)
        return f"{self.op} on {self.device} in {self.dtype}" + (f" ({', '.join(named)})" if named else "")


class InnerLoop(NamedTuple):
    """What K steps of an inner loop give."""

    rows: Tensor  # [steps + 1, T]: losses before each step; 0 where updated parameters are finite, else NaN
    updated: list[Tensor]  # the updated parameters' new values
    logits: Tensor | None  # [T, Q, ways] of the query images


class Wanted(NamedTuple):
    """What gradients are asked for beside those of the updated parameters."""

    parameters: list[bool]  # which of all; the updated ones have theirs whether asked for or not
    x: bool
    rates: bool


class StepsGrad(NamedTuple):
    """What `Backend.steps_grad` gives; None for what was not wanted."""

    updated: Tensor  # [T, numbers]: of the first values, side by side
    others: list[Tensor | None]  # one per parameter, [T, ...]; None for updated ones
    x: Tensor | None
    rates: Tensor | None  # [T, steps, number of updated parameters], float64


class Backend:
    """The operations. `name` is what `use_backend` takes."""

    name = ""
    reasons_are_said = False  # whether `reasons` are in the log from the import on
    label_errors = False  # whether `inner_loop` raises an error for a label that is no class; else its losses are NaN

    @property
    def linear_is_torchs(self) -> bool:
        """Whether `linear` is ATen's: then torch's own function does the same with less around it."""
        return False

    def reasons(self) -> list[str]:
        """Why this backend cannot run on this machine; empty when it can."""
        return []

    def refusals(self, call: Call) -> list[str]:
        """Why this backend cannot run this call; empty when it can. A backend that knows more norms or slopes than
        the plain ones does not ask this method."""
        why = []
        if call.norm != "batch":
            why.append(f"it has no {call.norm} norm")
        if call.slope != 0.0:
            why.append(f"it has no ReLU with a slope of {call.slope} below zero")
        return why

    def layout(self, x: Tensor) -> Tensor:
        """x [1|T, N, C, H, W] in the memory layout in which this backend's fused block reads it."""
        return x

    # Convolution and matrix product: each one's gradients are made of the others.

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        """x [1|T, N, C, H, W], weight [1|T, O, C/g, kh, kw], bias [1|T, O] -> [T, N, O, H', W']."""
        raise NotImplementedError

    def conv2d_input_grad(self, gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec) -> Tensor:
        """gy [1|T, N, O, H', W'], weight [1|T, ...] -> the gradient of x, summed over tasks where x is shared."""
        raise NotImplementedError

    def conv2d_weight_grad(self, gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: ConvSpec) -> Tensor:
        """gy [1|T, N, O, H', W'], x [1|T, N, C, H, W] -> the gradient of weight, summed over tasks that share it."""
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1|T, M, in], weight [1|T, out, in], bias [1|T, out] -> [T, M, out]."""
        raise NotImplementedError

    # The fused block.

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch-statistics norm, ReLU and max-pool: z [T, N, C, H, W], gamma and beta [1|T, C].

        Returns y, index (uint8: the maximum's place in its window, pool * pool where the ReLU is shut), and each
        task's mean and rstd [T, C]. Half-precision input is computed in float32.
        """
        raise NotImplementedError

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        need_z: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
        """Gradients of `norm_relu_pool`: of z (None unless need_z), and of gamma and beta per task, [T, C]."""
        raise NotImplementedError

    def norm_relu_pool_grad_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        v: Tensor | None, v_gamma: Tensor, v_beta: Tensor, need_z: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """The gradients of <dz, v> + <dgamma, v_gamma> + <dbeta, v_beta>, of `norm_relu_pool_grad`'s results.

        v is like z or None for zeros, v_gamma and v_beta are [T, C]. Returns those of gy, of z (None unless need_z)
        and of gamma per task, [T, C].
        """
        raise NotImplementedError

    def conv_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A convolution and `norm_relu_pool` behind it: z [T, N, O, H', W'], y, index, mean, rstd."""
        raise NotImplementedError

    def block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`conv_block` where nothing is kept for a gradient: y, mean, rstd."""
        raise NotImplementedError

    def block_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        """Why `block` has no pass of its own for these operands and goes by `conv_block`; empty when it has."""
        return ["it has no pass of its own over a block"]

    def affine_block(self, x: Tensor, weight: Tensor, bias: Tensor, block: BlockSpec) -> Tensor:
        """Max-pool of ReLU of the convolution with a bias [1|T, O], where nothing is kept for a gradient: a block whose
        norm has fixed statistics, which are part of weight and bias. `block.eps` is not used."""
        raise NotImplementedError

    # The first block, whose input are the images themselves: K = C kh kw is small, x is the same in every step, and
    # its gradient is never needed. With p the patches of x [M, K], z = p w^T: all sums over z at full resolution
    # are sums over the moments p^T p, which are taken once for all steps, and z itself need not be kept.

    def image_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        """Why `image_moments`, `image_block` and `image_block_grad` are not for this block; empty when they are."""
        return ["it has no kernel that takes a block's statistics from its patches"]

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        """x [1|T, N, C, H, W] -> the second moments [1|T, K + 1, K + 1], float64, of its patches with a 1 behind them.

        K = C kh kw in the order of a weight's [C, kh, kw]. With M patches: [:K, :K] = p^T p, [:K, K] = sum p,
        [K, K] = M.
        """
        raise NotImplementedError

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`conv_block` without z: y, index, mean, rstd, with the statistics taken from `image_moments`.

        mean = w sum(p) / M, variance = w (p^T p / M - mean(p) mean(p)^T) w^T.
        """
        raise NotImplementedError

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, block: BlockSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of `image_block` per task: of weight [T, O, C, kh, kw], gamma and beta [T, O].

        With g = gy at the maxima, A = g^T p [O, K] is the one sum over pixels, of the pooled size. Then
        dbeta = sum(g), dgamma = rstd (<w, A> - mean dbeta), and
        dw = gamma rstd (A - dbeta / M sum(p) - dgamma / M rstd (w p^T p - mean sum(p))).
        """
        raise NotImplementedError

    # The inner loop.

    def cross_entropy_grad(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each task's mean cross-entropy and its gradient: logits [T, N, ways], labels [1|T, N] int64 -> [T] in at
        least float32, [T, N, ways] in the logits' dtype. A label outside 0..ways-1 gives NaN for its task's loss."""
        raise NotImplementedError

    def head_grad(
        self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The loss of `cross_entropy_grad` behind `linear`, and the linear layer's gradients: x [1|T, N, in],
        weight [1|T, ways, in], bias [1|T, ways], labels [T, N] -> [T] in at least float32, and the gradients of weight
        and bias, and of x, per task, [T, ...]; None for what is not wanted."""
        raise NotImplementedError

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], rates: Sequence[float]) -> None:
        """parameter <- parameter - rate gradient, in place, for every pair of equal shapes and dtypes.

        `rates` are one per parameter, or a single one for all. With a rate of 0 a parameter stays as it is, whatever
        its gradient holds; equal rates do bit for bit what a single one does.
        """
        raise NotImplementedError

    def inner_loop(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        steps: int, rates: Sequence[float], query: Tensor | None = None,
    ) -> InnerLoop:  # fmt: skip
        """`steps` steps of gradient descent on each task's mean cross-entropy, for a chain of fused blocks and a
        linear layer. The parameters are left as they are.

        Args:
            x: [1|T, N, C, H, W], or [1|T, N, F] where there is no block.
            labels: [T, N] int64.
            parameters: weight, gamma, beta per block, then the linear layer's weight [ways, F] and bias [ways]; each
                of them shared by the tasks, or with a leading task axis.
            updated: for each of the parameters, whether it is.
            rates: one number, or steps x (number of updated parameters) numbers, row by row.
            query: [T, Q, C, H, W] or [T, Q, F], or None.

        Returns:
            The losses [steps + 1, T] in at least float32, with a last row of 0, which is NaN for a task whose updated
            parameters are not all finite, and may then be so for the others too. The updated parameters' new values
            [T, ...], without the axis where T is 1 and the parameter came without; in one row of memory (`flat`) where
            they are of one dtype and the backend's steps are `inner_loop.inner_loop`. The query's logits.
        """
        raise NotImplementedError

    def prepared(
        self, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec]
    ) -> Callable[..., list[Tensor] | None] | None:
        """`inner_loop` of one task for given parameters as a function of (x [N, ...], labels [N], steps, rates), which
        has little to do but to compute. It gives the new values, or None where anything is not as it should be: wrong
        labels, infinite results. None where there is no such function."""
        return None

    # The outer gradient: steps that are kept for a way back through them. "Side by side" is all updated parameters
    # [T, ...] of a task flat in one row, in their order.

    def steps(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        rates: Sequence[Sequence[float]], from_images: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`inner_loop` whose way is kept, by operations that `steps_grad` repeats bit for bit: a pixel beside a kink
        falls the same way in both.

        Args:
            x, labels: as `inner_loop` takes them; parameters: [1|T, ...].
            rates: [steps][number of updated parameters].
            from_images: no gradient of x will be asked for.

        Returns:
            The losses [steps, T] before each step, in at least float32; the updated parameters side by side before
            each step and at the end, [T, steps + 1, numbers].
        """
        raise NotImplementedError

    def steps_grad(
        self, v: Tensor, x: Tensor, labels: Tensor, parameters: list[Tensor], path: Tensor, updated: list[bool],
        blocks: list[BlockSpec], rates: Sequence[Sequence[float]], from_images: bool, wanted: Wanted,
        second_order: bool,
    ) -> StepsGrad:  # fmt: skip
        """The way back through `steps`: v [T, numbers] is the gradient with respect to the last values, side by side.

        Without `second_order` a step's gradient counts as a constant.
        """
        raise NotImplementedError

    def logits(
        self, x: Tensor, parameters: list[Tensor], blocks: list[BlockSpec], from_images: bool
    ) -> tuple[Tensor, Tensor] | None:
        """A chain's logits [T, N, ways] of x [T, N, ...] with parameters [1|T, ...], and what `logits_grad` reads of
        the pass. None where a backend has no such operation: the blocks are then run one by one."""
        return None

    def logits_grad(
        self, g: Tensor, x: Tensor, parameters: list[Tensor], kept: Tensor, blocks: list[BlockSpec],
        wanted: Sequence[bool], from_images: bool, want_x: bool,
    ) -> tuple[list[Tensor | None], Tensor | None]:  # fmt: skip
        """From the gradient of the logits [T, N, ways]: those of the parameters, per task [T, ...], and of x; None for
        what is not wanted."""
        raise NotImplementedError
