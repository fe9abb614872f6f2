"""Choice by measurement: for every operation and shape, the backend that was fastest on this device.

The first call of a shape runs every backend that takes it, compares the results with ATen's, times those that agree and
keeps the fastest. What was found is written to one file per device and set of versions, so that the next process starts
from it; `python -m lambda_kernels.info --choices` prints it.

Under torch.use_deterministic_algorithms the first backend that can run the call takes it, on every machine the same.

Environment: LAMBDA_KERNELS_MEASURE=0 does that for calls that are not in the file; LAMBDA_KERNELS_CACHE names the
folder of the files (default: lambda-kernels in the user's cache folder).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._capture import capturing
from .._torch import switches, unusual_switches
from ..agreement import apart
from ..spec import BlockSpec, ConvSpec
from .base import Backend, Call, InnerLoop
from .clock import Run, cuda_clock, say_measuring, unmeasured
from .cuda import Cuda, last_steps
from .reference import Reference, each_rate
from .table import Choice, Table, table_of

__all__ = ["Autotune", "Choice", "Table"]

_log = logging.getLogger("lambda_kernels")
Clock = Callable[[Mapping[str, Run]], dict[str, float]]
_TRUTH = "reference"


class Autotune(Reference):
    """Each call by the candidate that was measured fastest for its operation, shapes, dtypes and layouts."""

    name = "autotune"

    def __init__(
        self,
        candidates: Sequence[Backend],
        tables: Callable[[torch.device], Table] = table_of,
        clock: Clock = cuda_clock,
    ) -> None:
        self.candidates = {backend.name: backend for backend in candidates}
        self._tables, self._clock = tables, clock
        self._by_device: dict[torch.device, Table] = {}
        self._settled: dict[Any, Backend] = {}  # the table's entries by what a call shows without spelling it
        self._lock = threading.Lock()

    def table(self, device: torch.device) -> Table:
        """What is known of a device."""
        with self._lock:
            if device not in self._by_device:
                self._by_device[device] = self._tables(device)
            return self._by_device[device]

    def _pick(self, op: str, call: Call, operands: tuple[Any, ...], spelled: tuple[Any, ...] | None = None) -> Backend:
        """The candidate for a call of the method `op`. `spelled` are the operands that its time depends on."""
        looks = ((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in operands)
        short = (op, call.device, switches(), *looks)
        if short in self._settled:
            return self._settled[short]
        able: dict[str, Backend] = {}
        excluded: dict[str, str] = {}
        for name, backend in self.candidates.items():
            why = backend.refusals(call)
            if why:
                excluded[name] = "; ".join(why)
            else:
                able[name] = backend
        runs = {name: lambda b=backend: getattr(b, op)(*operands) for name, backend in able.items()}
        key = f"{op} {_spelled(operands if spelled is None else spelled)}"
        backend = able[self._fastest(key, call.device, runs, excluded)]
        if len(able) == 1 or _under_switches(key) in self.table(call.device).choices:
            self._settled[short] = backend
        return backend

    def _fastest(
        self, key: str, device: torch.device, runs: Mapping[str, Run], excluded: dict[str, str],
        checks: Mapping[str, Run] | None = None,
    ) -> str:  # fmt: skip
        """The name of the fastest of `runs` whose result agrees with ATen's (where ATen is none of them, with the last
        one's), from the table or measured now. `checks` give the results in place of `runs`."""
        first = next(iter(runs))
        if len(runs) == 1:
            return first
        key, table = _under_switches(key), self.table(device)
        known = table.choices.get(key)
        if known is not None and known.chosen in runs:
            return known.chosen
        if unmeasured() or capturing(device):
            return first  # not kept: a later call may measure
        say_measuring(device)
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                choice = self._measured(key, runs, runs if checks is None else checks, excluded)
        except torch.OutOfMemoryError as error:
            _log.warning("%s is not measured, the memory does not suffice: %s", key, _first_line(error))
            return first
        table.add(key, choice)
        return choice.chosen

    def _measured(
        self, key: str, runs: Mapping[str, Run], results: Mapping[str, Run], excluded: dict[str, str]
    ) -> Choice:
        """The fastest of the runs whose result is right."""
        truth = _TRUTH if _TRUTH in runs else list(runs)[-1]
        want = results[truth]()
        usable: dict[str, Run] = {}
        for name, run in runs.items():
            why = None if name == truth else _disagreement(results[name], want)
            if why is None:
                usable[name] = run
            else:
                excluded[name] = why
                _log.warning("backend %s is not used for %s: %s", name, key, why)
        del want  # its memory
        times = self._clock(usable)
        return Choice(min(times, key=lambda name: times[name]), times, excluded)

    def layout(self, x: Tensor) -> Tensor:
        return next(iter(self.candidates.values())).layout(x)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        operands = x, weight, bias, spec
        return self._pick("conv2d", _convolution(x, x.shape, weight.shape, spec), operands).conv2d(*operands)

    def conv2d_input_grad(self, gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec) -> Tensor:
        operands = gy, weight, x_shape, spec
        call = _convolution(gy, x_shape, weight.shape, spec)
        return self._pick("conv2d_input_grad", call, operands).conv2d_input_grad(*operands)

    def conv2d_weight_grad(self, gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: ConvSpec) -> Tensor:
        operands = gy, x, weight_shape, spec
        call = _convolution(gy, x.shape, weight_shape, spec)
        return self._pick("conv2d_weight_grad", call, operands).conv2d_weight_grad(*operands)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        operands = x, weight, bias
        call = Call("linear", x.device, x.dtype, (x.shape, weight.shape))
        return self._pick("linear", call, operands).linear(*operands)

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        operands, spelled = (z, gamma, beta, block), (z, gamma, beta, block.eps, block.pool)
        return self._pick("norm_relu_pool", _block(z, block), operands, spelled).norm_relu_pool(*operands)

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, block: BlockSpec,
        need_z: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
        tensors = gy, z, gamma, index, mean, rstd
        operands, spelled = (*tensors, block, need_z), (*tensors, block.pool, need_z)
        return self._pick("norm_relu_pool_grad", _block(z, block), operands, spelled).norm_relu_pool_grad(*operands)

    def conv_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fastest of each candidate's own block and of its parts, each by the fastest candidate."""
        operands = x, weight, gamma, beta, block
        apart, call = super().conv_block, _block(x, block, weight)
        whole = {
            name: lambda b=backend: b.conv_block(*operands)
            for name, backend in self.candidates.items()
            if name != _TRUTH and not backend.refusals(call)
        }
        runs: dict[str, Run] = {**whole, "parts": lambda: apart(*operands)}
        return runs[self._fastest(f"conv_block {_spelled(operands)}", x.device, runs, {})]()

    def block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fastest of each candidate's own pass and of its parts."""
        operands, apart = (x, weight, gamma, beta, block), super().block
        whole = {
            name: lambda b=backend: b.block(*operands)
            for name, backend in self.candidates.items()
            if not backend.block_refusals(x, weight, block)
        }
        runs: dict[str, Run] = {**whole, "parts": lambda: apart(*operands)}
        return runs[self._fastest(f"block {_spelled(operands)}", x.device, runs, {})]()

    def image_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        """Empty where a candidate has kernels for the first block, and these were measured faster than going over z."""
        backend = self._image(x, weight, block)
        if backend is None:
            return [f"{b.name}: {'; '.join(b.image_refusals(x, weight, block))}" for b in self.candidates.values()]
        block = block._replace(eps=1e-5)

        @cache  # nothing is computed where the choice is known
        def vectors() -> list[Tensor]:
            return [weight.new_full((1, weight.shape[1]), value) for value in (1.0, 0.1)]

        @cache  # once for all steps
        def moments() -> Tensor:
            return backend.image_moments(x, (weight.shape[-2], weight.shape[-1]), block.conv)

        def over_moments() -> tuple[Tensor, Tensor]:
            gamma, beta = vectors()
            y, index, mean, rstd = backend.image_block(x, weight, gamma, beta, moments(), block)
            return y, backend.image_block_grad(y, x, weight, gamma, index, mean, rstd, moments(), block)[0]

        def over_z() -> tuple[Tensor, Tensor]:
            gamma, beta = vectors()
            z, y, index, mean, rstd = self.conv_block(x, weight, gamma, beta, block)
            dz, _, _ = self.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, block, True)
            assert dz is not None
            own = torch.Size((dz.shape[0], *weight.shape[1:]))
            return y, self.conv2d_weight_grad(dz, x, own, block.conv)

        key = f"first block {_spelled((x, weight, block.conv, block.pool))}"
        chosen = self._fastest(key, x.device, {backend.name: over_moments, "over z": over_z}, {})
        if chosen == backend.name:
            return []
        return [f"{backend.name}: {self.table(x.device).choices[_under_switches(key)].reason}"]

    def _image(self, x: Tensor, weight: Tensor, block: BlockSpec) -> Backend | None:
        return next((b for b in self.candidates.values() if not b.image_refusals(x, weight, block)), None)

    def _with_kernels(self, x: Tensor, kernel: tuple[int, int], block: BlockSpec) -> Backend:
        backend = self._image(x, x.new_empty(1, 1, x.shape[2], *kernel), block)
        assert backend is not None, "image_refusals was not asked"
        return backend

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        return self._with_kernels(x, kernel, BlockSpec(spec, 0.0, 1)).image_moments(x, kernel, spec)

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        backend = self._with_kernels(x, (weight.shape[-2], weight.shape[-1]), block)
        return backend.image_block(x, weight, gamma, beta, moments, block)

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, block: BlockSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        backend = self._with_kernels(x, (weight.shape[-2], weight.shape[-1]), block)
        return backend.image_block_grad(gy, x, weight, gamma, index, mean, rstd, moments, block)

    def cross_entropy_grad(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        call = Call("linear", logits.device, logits.dtype)
        return self._pick("cross_entropy_grad", call, (logits, labels)).cross_entropy_grad(logits, labels)

    def head_grad(
        self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The fastest of each candidate's own and of its parts, each by the fastest candidate."""
        operands = x, weight, bias, labels, wanted
        apart, call = super().head_grad, Call("linear", x.device, x.dtype, (x.shape, weight.shape))
        whole = {
            name: lambda b=backend: b.head_grad(*operands)
            for name, backend in self.candidates.items()
            if getattr(type(backend), "head_grad", None) is not Reference.head_grad and not backend.refusals(call)
        }
        runs: dict[str, Run] = {**whole, "parts": lambda: apart(*operands)}
        return runs[self._fastest(f"head_grad {_spelled(operands)}", x.device, runs, {})]()

    def inner_loop(
        self, x: Tensor, labels: Tensor, parameters: list[Tensor], updated: list[bool], blocks: list[BlockSpec],
        steps: int, rates: Sequence[float], query: Tensor | None = None,
    ) -> InnerLoop:  # fmt: skip
        """All steps by one launch, where the CUDA backend has it and it is faster; else one operation at a time."""
        given, apart = (x, labels, parameters, updated, blocks, steps, rates), super().inner_loop
        cuda = self.candidates.get("cuda")
        plan = last_steps.planned(cuda, *given) if isinstance(cuda, Cuda) else []
        if not isinstance(cuda, Cuda) or isinstance(plan, list):
            return apart(*given, query)
        one, table = cuda, plan
        runs: dict[str, Run] = {
            "cuda": lambda: last_steps.inner_loop(one, self, table, *given, query),
            "steps": lambda: apart(*given, query),
        }

        def check(run: Run) -> InnerLoop:
            done: InnerLoop = run()
            return done._replace(rows=done.rows.to(x.dtype))  # losses have no more digits than what they are of

        checks = {name: lambda run=run: check(run) for name, run in runs.items()}
        moving = "".join("01"[flag] for flag in updated)
        asked = x, labels, *parameters, moving, *blocks, steps, *(() if query is None else (query,))
        return runs[self._fastest(f"inner_loop {_spelled(asked)}", x.device, runs, {}, checks)]()

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], rates: Sequence[float]) -> None:
        moving = [i for i, rate in enumerate(each_rate(parameters, rates)) if rate != 0.0]
        if moving:
            parameters, gradients = [parameters[i] for i in moving], [gradients[i] for i in moving]
            rates = rates if len(rates) == 1 else [rates[i] for i in moving]
            self._updater(parameters, gradients, rates).sgd_(parameters, gradients, rates)

    def _updater(self, parameters: list[Tensor], gradients: list[Tensor], rates: Sequence[float]) -> Backend:
        """The candidate for an update, which is in place: it is measured on copies, and compared by what it changes."""
        first = parameters[0]
        call = Call("linear", first.device, first.dtype)
        able = {n: b for n, b in self.candidates.items() if not b.refusals(call)}

        @cache  # where the choice is known there are none
        def copies() -> list[Tensor]:
            return [p.clone() for p in parameters]

        def change(backend: Backend) -> list[Tensor]:
            own = [p.clone() for p in parameters]
            backend.sgd_(own, gradients, rates)
            return [a - p for a, p in zip(own, parameters)]

        runs = {name: lambda b=backend: b.sgd_(copies(), gradients, rates) for name, backend in able.items()}
        checks = {name: lambda b=backend: change(b) for name, backend in able.items()}
        several = " of several rates" * (len(set(rates)) > 1)
        key = f"sgd_ {_spelled(tuple(parameters))}{several}"
        return able[self._fastest(key, first.device, runs, {}, checks)]


def _convolution(like: Tensor, x: torch.Size, weight: torch.Size, spec: ConvSpec) -> Call:
    return Call("conv2d", like.device, like.dtype, (x, weight), spec)


def _block(like: Tensor, block: BlockSpec, weight: Tensor | None = None) -> Call:
    """A block's call; for one of its parts, without a weight, the shapes of both are not known."""
    shapes = () if weight is None else (like.shape, weight.shape)
    return Call("conv_block", like.device, like.dtype, shapes, block.conv, block.pool)


def _under_switches(key: str) -> str:
    """A key of the table; times and roundings depend on torch's switches too."""
    return f"{key} {words}" if (words := unusual_switches()) else key


def _spelled(operands: tuple[Any, ...]) -> str:
    """What a time depends on: shapes, dtypes, layouts, constants."""
    return " ".join(_word(value) for value in operands)


def _word(value: Any) -> str:
    if isinstance(value, torch.Size):
        return "x".join(map(str, value))
    if isinstance(value, ConvSpec):
        return "s{}.{}p{}.{}d{}.{}g{}".format(*value.stride, *value.padding, *value.dilation, value.groups)
    if isinstance(value, BlockSpec):
        return _spelled(tuple(value))
    if not isinstance(value, Tensor):
        return str(value)
    if value.is_contiguous():
        layout = ""
    elif value.dim() > 2 and value.movedim(-3, -1).is_contiguous():
        layout = " channels-last"
    else:
        layout = f" strides {list(value.stride())}"
    shape = "x".join(map(str, value.shape))
    return f"{str(value.dtype).removeprefix('torch.')}[{shape}{layout}]"


def _disagreement(run: Run, want: Any) -> str | None:
    """Why a run's result is not ATen's; None where it is, to rounding."""
    try:
        got = run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel raises: another one computes the same
        return f"it failed with {type(error).__name__}: {_first_line(error)}"
    for a, b in zip(_floats(got), _floats(want), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"its result is {a.dtype} {list(a.shape)}, ATen's {b.dtype} {list(b.shape)}"
        if (off := apart(a, b)) is not None:
            return f"its result is {off:.2g} of its length away from ATen's"
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _floats(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
