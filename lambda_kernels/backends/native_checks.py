"""What the native operators ask of their arguments, for tensors without data: the rules of csrc/checks.h."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..spec import ConvSpec
from . import native

# Sizes of an operand that are no number, and limits: as in csrc/checks.h.
SOME, OWN = -1, -2
MOST_SIDE, MOST_VALUES = 2**31 - 1, 2**46
PER_BLOCK, GEOMETRY = 3, 8


class Operands:
    """An operator's tensors: on one device, in the dtype of the first."""

    def __init__(self, name: str, first: Tensor | None, *with_tasks: Tensor | None) -> None:
        torch._check(first is not None, lambda: f"{name}: the first operand is not given")
        assert first is not None
        self.name, self.dtype, self.device = name, first.dtype, first.device
        self.tasks = max([1, *(t.shape[0] for t in with_tasks if t is not None and t.dim())])
        built = first.device.type != "cpu" or first.dtype in (torch.float32, torch.float64)
        torch._check(built, lambda: f"{name}: it is built for float32 and float64, not {first.dtype}")

    def check(self, what: str, given: Tensor | None, *sizes: int, dtype: torch.dtype | None = None) -> None:
        torch._check(given is not None, lambda: f"{self.name}: {what} is not given")
        assert given is not None
        t, dtype = given, dtype or self.dtype
        fits = t.device == self.device and t.dtype == dtype and t.layout == torch.strided and t.dim() == len(sizes)
        for size, wanted in zip(t.shape, sizes):
            fits = fits and (
                size == wanted
                if wanted >= 0
                else bool(size > 0) and (wanted == SOME or size == 1 or size == self.tasks)
            )
        torch._check(
            bool(fits),
            lambda: (
                f"{self.name}: {what} must be {list(sizes)} in {dtype} on {self.device} (-1: at least 1, -2: 1 or "
                f"{self.tasks}), got {list(t.shape)} in {t.dtype} on {t.device}"
            ),
        )

    def count(self, what: str, given: Sequence[Any], wanted: int) -> None:
        torch._check(len(given) == wanted, lambda: f"{self.name}: {what} must be {wanted} numbers, got {len(given)}")

    def convolution(
        self, x: Sequence[int], weight: Sequence[int], geometry: Sequence[int], groups: int, pool: int
    ) -> list[int]:
        """Height and width behind a convolution: x ends in [N, C, H, W], weight in [O, C / groups, kh, kw]."""
        x, weight = x[-4:], weight[-4:]
        stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:6]
        numbers = [(n, 1) for n in (*stride, *dilation, groups, pool, *x, *weight)] + [(n, 0) for n in padding]
        fits = all(least <= n <= MOST_SIDE for n, least in numbers)
        fits = fits and x[1] % groups == 0 and weight[1] == x[1] // groups and weight[0] % groups == 0
        sides = []
        for axis in (0, 1) if fits else ():
            side, reach = x[2 + axis] + 2 * padding[axis], dilation[axis] * (weight[2 + axis] - 1) + 1
            fits = fits and bool(side >= reach)
            sides.append((side - reach) // stride[axis] + 1)
            fits = fits and bool(sides[axis] >= pool)
        if fits and all(type(n) is int for n in (self.tasks, *x, *weight)):  # a bound on memory is no guard
            padded = [x[2 + axis] + 2 * padding[axis] for axis in (0, 1)]
            most = max(prod([*x[:2], *padded]), prod([x[0], weight[0], *sides]), prod([x[1], weight[0], *weight[2:]]))
            fits = most * self.tasks <= MOST_VALUES
        torch._check(
            bool(fits),
            lambda: (
                f"{self.name}: a weight {list(weight)}, the numbers {list(geometry)}, {groups} groups and pool "
                f"{pool} do not fit images {list(x)}"
            ),
        )
        return sides

    def block(self, x: Tensor, weight: Tensor, numbers: Sequence[int]) -> list[int]:
        """Height and width behind a block with 7 numbers."""
        self.check("x", x, OWN, SOME, SOME, SOME, SOME)
        self.check("the weight", weight, OWN, SOME, SOME, SOME, SOME)
        self.count("geometry", numbers, GEOMETRY - 1)
        sides = self.convolution(x.shape, weight.shape, numbers, 1, numbers[6])
        return [side // numbers[6] for side in sides]

    def kernel(self, x: Sequence[int], weight: Sequence[int], numbers: Sequence[int], filters: bool) -> None:
        """There is one for a block; filters: also by Winograd's algorithm."""
        pool, taps = numbers[6], prod(weight[-3:])
        one = self.by_filters(x, weight, numbers, 1) and pool == 2 and filters
        torch._check(
            one or (pool in (1, 2) and bool(taps <= native.MOST_TAPS)),
            lambda: f"{self.name}: no kernel for a weight {list(weight)} over images {list(x)} with pool {pool}",
        )

    def by_filters(self, x: Sequence[int], weight: Sequence[int], numbers: Sequence[int], groups: int) -> bool:
        (up, left, *_), pads, (down, across) = numbers[:2], numbers[2:4], numbers[4:6]
        spec = ConvSpec((up, left), (pads[0], pads[1]), (down, across), groups)
        images, filters = (torch.Size((1, *sizes[-4:])) for sizes in (x, weight))
        return bool(native._filters(images, filters, spec, self.dtype))

    def chain(
        self, x: Tensor, parameters: Sequence[Tensor], geometry: Sequence[int], blocks: int
    ) -> tuple[list[list[int]], int | None]:
        """Channels, height and width of what goes into each block and comes out of the last one; the ways behind a
        linear layer, else None. All have a task axis."""
        whole = len(parameters) == PER_BLOCK * blocks + 2
        torch._check(
            whole or (len(parameters) == PER_BLOCK * blocks and blocks > 0),
            lambda: f"{self.name}: {blocks} blocks need {PER_BLOCK * blocks + 2} parameters, got {len(parameters)}",
        )
        self.count("geometry", geometry, GEOMETRY * blocks)
        pools = geometry[GEOMETRY - 1 :: GEOMETRY]
        torch._check(all(pool in (1, 2) for pool in pools), lambda: f"{self.name}: pools must be 1 or 2, got {pools}")
        self.check("x", x, self.tasks, *[SOME] * (4 if blocks else 2))
        sizes = [list(x.shape[2:]) if blocks else [x.shape[2], 1, 1]]
        for b in range(blocks):
            numbers, (weight, gamma, beta) = geometry[8 * b : 8 * b + 8], parameters[3 * b : 3 * b + 3]
            self.check(f"the weight of layer {b}", weight, OWN, SOME, SOME, SOME, SOME)
            sides = self.convolution((x.shape[1], *sizes[-1]), weight.shape, numbers[:6], numbers[6], numbers[7])
            for what, t in (("gamma", gamma), ("beta", beta)):
                self.check(f"{what} of layer {b}", t, OWN, weight.shape[1])
            sizes.append([weight.shape[1], *(side // numbers[7] for side in sides)])
        if not whole:
            return sizes, None
        self.check(f"the weight of layer {blocks}", parameters[-2], OWN, SOME, prod(sizes[-1]))
        self.check(f"the bias of layer {blocks}", parameters[-1], OWN, parameters[-2].shape[1])
        return sizes, parameters[-2].shape[1]

    def steps(self, steps: int, updated: Sequence[int], parameters: Sequence[Tensor], rates: int, each: bool) -> None:
        self.count("updated", updated, len(parameters))
        moving = sum(map(bool, updated))
        torch._check(
            0 <= steps <= MOST_SIDE and (rates == steps * moving or (rates == 1 and not each)),
            lambda: f"{self.name}: {steps} steps of {moving} updated parameters do not fit {rates} rates",
        )

    def norm(self, z: Tensor, pool: int, **gammas: Tensor) -> list[int]:
        """Height and width of what norm, ReLU and pool make of z."""
        self.check("z", z, self.tasks, SOME, SOME, SOME, SOME)
        torch._check(pool in (1, 2), lambda: f"{self.name}: pool must be 1 or 2, got {pool}")
        if all(type(n) is int for n in z.shape):  # a bound on memory is no guard
            fits = z.numel() <= MOST_VALUES and max(z.shape[1], *z.shape[3:]) <= MOST_SIDE
            torch._check(fits, lambda: f"{self.name}: z {list(z.shape)} is too large")
        for what, t in gammas.items():
            self.check(what, t, OWN, z.shape[2])
        return [side // pool for side in z.shape[3:]]

    def saved(self, z: Tensor, sides: list[int], gy: Tensor, index: Tensor, mean: Tensor, rstd: Tensor) -> None:
        for what, t in (("mean", mean), ("rstd", rstd)):
            self.check(what, t, z.shape[0], z.shape[2])
        self.check("index", index, *z.shape[:3], *sides, dtype=torch.uint8)
        self.check("gy", gy, *z.shape[:3], *sides)
