"""Choice by measurement: for every operation and shape, the backend that was fastest on this device.

The first call of a shape runs every backend that takes it, compares the results with ATen's, times those that agree and
keeps the fastest. What was found is written to a file a device and set of versions, so that the next process starts
from it; `python -m lambda_kernels.info --choices` prints it.

Environment: LAMBDA_KERNELS_MEASURE=0 takes the first backend that can run the call instead; LAMBDA_KERNELS_CACHE names
the folder of the files (default: lambda-kernels in the user's cache folder).
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..agreement import apart
from ..spec import ConvSpec
from .reference import Reference

__all__ = ["Choice", "Measured", "Table", "cache_folder"]

_log = logging.getLogger("lambda_kernels")
Run = Callable[[], Any]
Clock = Callable[[Mapping[str, Run]], dict[str, float]]
_TRUTH = "reference"


class Choice(NamedTuple):
    """Who runs a call, and why: median milliseconds of those that were timed, and what the others said."""

    chosen: str
    milliseconds: dict[str, float]
    excluded: dict[str, str]

    @property
    def reason(self) -> str:
        """One line for people."""
        times = ", ".join(f"{n} {t:.4f} ms" for n, t in sorted(self.milliseconds.items(), key=lambda item: item[1]))
        others = "; ".join(f"{name}: {why}" for name, why in self.excluded.items())
        return f"{times or 'not measured'}{'; ' if others else ''}{others}"


class Table:
    """The choices of one device, kept in a file; one that cannot be read or written is said once and done without."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.choices: dict[str, Choice] = {}
        self._lock = threading.Lock()
        if path is not None:
            self.choices.update(self._read())

    def _read(self) -> dict[str, Choice]:
        assert self.path is not None
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            return {key: Choice(**value) for key, value in stored["choices"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("the choices in %s cannot be read (%s): they are measured again", self.path.name, error)
            return {}

    def add(self, key: str, choice: Choice) -> None:
        """Keep a choice, in the file too; other processes' choices that came there in the meantime are kept."""
        with self._lock:
            self.choices[key] = choice
            if self.path is None:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                both = {**self._read(), **self.choices}
                with tempfile.NamedTemporaryFile(
                    "w", dir=self.path.parent, suffix=".tmp", delete=False, encoding="utf-8"
                ) as file:
                    json.dump({"choices": {k: c._asdict() for k, c in sorted(both.items())}}, file, indent=1)
                os.replace(file.name, self.path)
            except OSError as error:
                _log.warning("the choices are kept in this process only: %s", error)
                self.path = None


def cache_folder() -> Path:
    """Where the tables lie."""
    if named := os.environ.get("LAMBDA_KERNELS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lambda-kernels"


def table_of(device: torch.device) -> Table:
    """The table of a CUDA device in these versions of torch, triton and this package."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    from .. import __version__  # at the top it would be a circle

    parts = (torch.cuda.get_device_name(device), "torch", torch.__version__, "triton", triton, "lk", __version__)
    return Table(cache_folder() / f"choices-{re.sub(r'[^A-Za-z0-9.]+', '-', '-'.join(parts))}.json")


def cuda_clock(runs: Mapping[str, Run], budget: float = 100.0) -> dict[str, float]:
    """Median milliseconds of a call, by CUDA events, the runs in turn: 3 to 11 times each, about `budget` ms in all.

    Short calls of one run are timed together, so that its launches follow each other.
    """

    def elapsed(run: Run, calls: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    longest = max(min(elapsed(run, 1) for _ in range(2)) for run in runs.values())
    calls = max(1, min(10, int(1.0 / max(longest, 1e-3))))
    rounds = max(3, min(11, int(budget / max(longest * calls * len(runs), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(elapsed(run, calls))
    return {name: statistics.median(values) for name, values in times.items()}


class Measured(Reference):
    """Each call by the candidate that was measured fastest for its operation, shapes, dtypes and layouts."""

    name = "measured"

    def __init__(
        self,
        candidates: Sequence[Reference],
        tables: Callable[[torch.device], Table] = table_of,
        clock: Clock = cuda_clock,
    ) -> None:
        self.candidates = {backend.name: backend for backend in candidates}
        self._tables, self._clock = tables, clock
        self._by_device: dict[torch.device, Table] = {}
        self._settled: dict[Any, Reference] = {}  # the table's entries by what a call shows without spelling it
        self._lock = threading.Lock()

    def table(self, device: torch.device) -> Table:
        """What is known of a device."""
        with self._lock:
            if device not in self._by_device:
                self._by_device[device] = self._tables(device)
            return self._by_device[device]

    def _pick(self, op: str, group: str, x: Tensor, pool: int, signature: tuple[Any, ...]) -> Reference:
        """The candidate for a call of the method `op` with the operands `signature`; `group` is what refusals name."""
        short = (op, x.device, *((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in signature))
        if short in self._settled:
            return self._settled[short]
        able: dict[str, Reference] = {}
        excluded: dict[str, str] = {}
        for name, backend in self.candidates.items():
            why = backend.refusals(group, x.device, x.dtype, pool)
            if why:
                excluded[name] = "; ".join(why)
            else:
                able[name] = backend
        runs = {name: lambda b=backend: getattr(b, op)(*signature) for name, backend in able.items()}
        key = f"{op} {_spelled(signature)}"
        backend = able[self._fastest(key, x.device, runs, excluded)]
        if len(able) == 1 or key in self.table(x.device).choices:
            self._settled[short] = backend
        return backend

    def _fastest(
        self, key: str, device: torch.device, runs: Mapping[str, Run], excluded: dict[str, str],
        checks: Mapping[str, Run] | None = None,
    ) -> str:  # fmt: skip
        """The name of the fastest of `runs` whose result agrees with ATen's (where ATen is none of them, with the last
        one's), from the table or measured now. `checks` give the results in place of `runs`."""
        if len(runs) == 1:
            return next(iter(runs))
        table = self.table(device)
        known = table.choices.get(key)
        if known is not None and known.chosen in runs:
            return known.chosen
        if os.environ.get("LAMBDA_KERNELS_MEASURE") == "0" or _is_recording(device):
            return next(iter(runs))  # not kept: a later call may measure
        try:
            choice = self._measured(key, runs, runs if checks is None else checks, excluded)
        except torch.OutOfMemoryError as error:
            _log.warning("%s is not measured, the memory does not suffice: %s", key, _first_line(error))
            return next(iter(runs))
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
        return self._pick("conv2d", "conv2d", x, 1, operands).conv2d(*operands)

    def conv2d_input_grad(self, gy: Tensor, weight: Tensor, x_shape: torch.Size, spec: ConvSpec) -> Tensor:
        operands = gy, weight, x_shape, spec
        return self._pick("conv2d_input_grad", "conv2d", gy, 1, operands).conv2d_input_grad(*operands)

    def conv2d_weight_grad(self, gy: Tensor, x: Tensor, weight_shape: torch.Size, spec: ConvSpec) -> Tensor:
        operands = gy, x, weight_shape, spec
        return self._pick("conv2d_weight_grad", "conv2d", gy, 1, operands).conv2d_weight_grad(*operands)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        operands = x, weight, bias
        return self._pick("linear", "linear", x, 1, operands).linear(*operands)

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, pool: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        operands = z, gamma, beta, eps, pool
        return self._pick("norm_relu_pool", "conv_block", z, pool, operands).norm_relu_pool(*operands)

    def norm_relu_pool_grad(
        self, gy: Tensor, z: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, pool: int, need_z: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        operands = gy, z, gamma, index, mean, rstd, pool, need_z
        return self._pick("norm_relu_pool_grad", "conv_block", z, pool, operands).norm_relu_pool_grad(*operands)

    def conv_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, spec: ConvSpec, eps: float, pool: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fastest of each candidate's own block and of its parts, each by the fastest candidate."""
        operands = x, weight, gamma, beta, spec, eps, pool
        apart = super().conv_block
        whole = {
            name: lambda b=backend: b.conv_block(*operands)
            for name, backend in self.candidates.items()
            if name != _TRUTH and not backend.refusals("conv_block", x.device, x.dtype, pool)
        }
        runs: dict[str, Run] = {**whole, "parts": lambda: apart(*operands)}
        return runs[self._fastest(f"conv_block {_spelled(operands)}", x.device, runs, {})]()

    def image_refusals(self, x: Tensor, weight: Tensor, spec: ConvSpec, pool: int) -> list[str]:
        """Empty where a candidate has kernels for the first block, and these were measured faster than going over z."""
        backend = self._image(x, weight, spec, pool)
        if backend is None:
            return [f"{b.name}: {'; '.join(b.image_refusals(x, weight, spec, pool))}" for b in self.candidates.values()]
        gamma, beta = (weight.new_full((1, weight.shape[1]), value) for value in (1.0, 0.1))
        moments = backend.image_moments(x, (weight.shape[-2], weight.shape[-1]), spec)
        eps = 1e-5

        def over_moments() -> tuple[Tensor, Tensor]:
            y, index, mean, rstd = backend.image_block(x, weight, gamma, beta, moments, spec, eps, pool)
            saved = index, mean, rstd, moments
            return y, backend.image_block_grad(y, x, weight, gamma, *saved, spec, pool)[0]

        def over_z() -> tuple[Tensor, Tensor]:
            z, y, index, mean, rstd = self.conv_block(x, weight, gamma, beta, spec, eps, pool)
            dz, _, _ = self.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, pool, True)
            assert dz is not None
            own = torch.Size((dz.shape[0], *weight.shape[1:]))
            return y, self.conv2d_weight_grad(dz, x, own, spec)

        key = f"first block {_spelled((x, weight, spec, pool))}"
        chosen = self._fastest(key, x.device, {backend.name: over_moments, "over z": over_z}, {})
        return [] if chosen == backend.name else [f"{backend.name}: {self.table(x.device).choices[key].reason}"]

    def _image(self, x: Tensor, weight: Tensor, spec: ConvSpec, pool: int) -> Reference | None:
        able = (b for b in self.candidates.values() if not b.image_refusals(x, weight, spec, pool))
        return next(able, None)

    def _with_kernels(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec, pool: int) -> Reference:
        backend = self._image(x, x.new_empty(1, 1, x.shape[2], *kernel), spec, pool)
        assert backend is not None, "image_refusals was not asked"
        return backend

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: ConvSpec) -> Tensor:
        return self._with_kernels(x, kernel, spec, 1).image_moments(x, kernel, spec)

    def image_block(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor, spec: ConvSpec, eps: float,
        pool: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        backend = self._with_kernels(x, (weight.shape[-2], weight.shape[-1]), spec, pool)
        return backend.image_block(x, weight, gamma, beta, moments, spec, eps, pool)

    def image_block_grad(
        self, gy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
        moments: Tensor, spec: ConvSpec, pool: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        backend = self._with_kernels(x, (weight.shape[-2], weight.shape[-1]), spec, pool)
        return backend.image_block_grad(gy, x, weight, gamma, index, mean, rstd, moments, spec, pool)

    def cross_entropy_grad(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        operands = logits, labels
        return self._pick("cross_entropy_grad", "linear", logits, 1, operands).cross_entropy_grad(*operands)

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], lr: float) -> None:
        if parameters:
            self._updater(parameters, gradients, lr).sgd_(parameters, gradients, lr)

    def _updater(self, parameters: list[Tensor], gradients: list[Tensor], lr: float) -> Reference:
        """The candidate for an update, which is in place: it is measured on copies, and compared by what it changes."""
        first = parameters[0]
        able = {n: b for n, b in self.candidates.items() if not b.refusals("linear", first.device, first.dtype, 1)}
        copies = [p.clone() for p in parameters] if len(able) > 1 else []

        def change(backend: Reference) -> list[Tensor]:
            own = [p.clone() for p in parameters]
            backend.sgd_(own, gradients, lr)
            return [a - p for a, p in zip(own, parameters)]

        runs = {name: lambda b=backend: b.sgd_(copies, gradients, lr) for name, backend in able.items()}
        checks = {name: lambda b=backend: change(b) for name, backend in able.items()}
        return able[self._fastest(f"sgd_ {_spelled(tuple(parameters))}", first.device, runs, {}, checks)]


def _is_recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _spelled(operands: tuple[Any, ...]) -> str:
    """What a time depends on: shapes, dtypes, layouts, constants."""
    return " ".join(_word(value) for value in operands)


def _word(value: Any) -> str:
    if isinstance(value, torch.Size):
        return "x".join(map(str, value))
    if isinstance(value, ConvSpec):
        return "s{}.{}p{}.{}d{}.{}g{}".format(*value.stride, *value.padding, *value.dilation, value.groups)
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
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [t for t in results if isinstance(t, Tensor) and t.is_floating_point()]
