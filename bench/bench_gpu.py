"""The figures of docs/gpu.md: adaptation on a GPU beside stock PyTorch, run in every way that is worth trying by hand.

`make gpu` calls it. The rows that matter most come first, and the file of results is rewritten after each, so that a
run that is cut off loses little. All columns of a row alternate in one process; a ratio is taken inside each round.
Nothing is timed before its result was compared with stock PyTorch's in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from by_hand import LR, NORM, Compiled, Graphed, LogitsGate, Stock, Tasks, Vmapped
from harness import (
    CONFIGURATIONS,
    Column,
    Configuration,
    PlainLoop,
    Problem,
    Row,
    Skip,
    check_adapt,
    compare,
    each_round,
    fill_rows,
    make_problem,
    reason,
    spread,
    write,
)
from torch import Tensor
from torch._C._autograd import DeviceType

import lambda_kernels as lk
from lambda_kernels import backends, info
from lambda_kernels.agreement import distance
from lambda_maml import Pattern, adapt, adapt_tasks

FULL = Pattern.full(5)
PACKAGES = ("torch", "triton", "numpy", "setuptools", "ninja", "pytest", "pytest-benchmark", "pytest-xdist")


class Sizes(NamedTuple):
    """How large and how long the rows are."""

    main: Configuration
    others: dict[str, Configuration]
    tasks: int
    query: int  # images a task
    stock_tasks: int  # that the eager loop adapts to in a round
    seconds: float  # a row's timed rounds
    rounds: int
    copy_bytes: int
    matmul: int  # rows and columns


REAL = Sizes(
    CONFIGURATIONS["mini-imagenet-64"],
    {name: CONFIGURATIONS[name] for name in ("omniglot", "cifar", "mini-imagenet")},
    tasks=64, query=75, stock_tasks=4, seconds=2.0, rounds=300, copy_bytes=1 << 31, matmul=8192,
)  # fmt: skip
TINY = Sizes(
    Configuration(16, 3, 4, 3, 2, 2), {"omniglot": Configuration(16, 1, 4, 3, 1, 2)},
    tasks=2, query=3, stock_tasks=2, seconds=0.0, rounds=3, copy_bytes=1 << 16, matmul=32,
)  # fmt: skip


class Bench:
    """The rows of one device."""

    def __init__(self, sizes: Sizes, device: torch.device, ceilings: Mapping[str, float]) -> None:
        self.sizes, self.device, self.ceilings = sizes, device, ceilings
        self.passed: set[tuple[object, ...]] = set()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rows(self) -> Iterator[Row]:
        """The important ones first."""
        s = self.sizes

        def of(kind: str, pattern: str, fill: Callable[..., dict[str, Any]], **more: Any) -> Any:
            given = {"configuration": s.main, "dtype": torch.float32, **more}
            c, dtype = given["configuration"], str(given["dtype"]).removeprefix("torch.")
            special = [dtype] * (dtype != "float32") + [str(c)] * (c != s.main)
            name = " ".join([kind, pattern, *special])
            head = {"name": name, "kind": kind, "pattern": pattern, "dtype": dtype, "network": str(c)}
            return {**head, "main": c == s.main and dtype == "float32"}, lambda: fill(Pattern(pattern), **given)

        yield of("adapt", "00011", self.adaptation)
        yield of("adapt", "11111", self.adaptation)
        yield of("tasks", "00011", self.many_tasks)
        for layer in range(4):
            yield self.kernel_head(layer), functools.partial(self.kernel, layer)
        yield of("compile", "00011", self.compiled)
        yield of("compile", "11111", self.compiled)
        yield of("tasks", "11111", self.many_tasks)
        yield of("adapt", "00001", self.adaptation)
        yield of("calls", "00011", self.calls)
        yield of("calls", "11111", self.calls)
        yield of("query", "00011", self.with_query)
        yield of("query", "11111", self.with_query)
        for pattern in ("00011", "11111"):
            yield of("adapt", pattern, self.adaptation, dtype=torch.bfloat16)
        for c in s.others.values():
            for pattern in ("00011", "11111"):
                yield of("adapt", pattern, self.adaptation, configuration=c)
        yield of("compile", "00001", self.compiled)
        yield of("tasks", "00011", self.many_tasks, dtype=torch.bfloat16)

    def problem(self, c: Configuration, dtype: torch.dtype) -> Problem:
        model, xs, ys = make_problem(c, self.device)
        return Problem(model.to(dtype), xs.to(dtype), ys)

    def tasks(self, c: Configuration, dtype: torch.dtype, query: int) -> Tasks:
        """Random pixels for every task."""
        n, shape = self.sizes.tasks, (c.in_channels, c.image_size, c.image_size)
        generator = torch.Generator(self.device).manual_seed(1)
        xs, xq = (
            torch.randn(n, images, *shape, generator=generator, device=self.device).to(dtype)
            for images in (c.ways * c.shots, query)
        )
        model, _, ys = self.problem(c, dtype)
        return Tasks(model, xs, ys.repeat(n, 1), xq)

    def gate(self, problem: Problem, c: Configuration, pattern: Pattern) -> None:
        key = (c, problem.xs.dtype, pattern)
        if key not in self.passed:
            check_adapt(problem, pattern, c.steps, LR, NORM)
            self.passed.add(key)

    def time(self, columns: Mapping[str, Column]) -> dict[str, Any]:
        """Milliseconds an adaptation for every column, and how often slower each is than the column "ours"."""
        each = each_round(
            columns, seconds=self.sizes.seconds, rounds=self.sizes.rounds, synchronize=self.synchronize
        )
        ratios = {n: [t / own for t, own in zip(v, each["ours"])] for n, v in each.items() if n != "ours"}
        return {
            "columns": {name: spread(values) for name, values in each.items()},
            "ratios": {name: spread(values) for name, values in ratios.items()},
            "rounds": len(each["ours"]),
        }

    def against(
        self, makers: Mapping[str, Callable[[], Stock]], problem: Problem, c: Configuration, pattern: Pattern
    ) -> dict[str, Any]:
        """The row of `adapt` beside what each maker gives, less those that cannot be made or give another result."""
        self.gate(problem, c, pattern)
        columns = {"ours": Column(lambda: adapt(*problem, pattern=pattern, steps=c.steps, lr=LR, norm=NORM))}
        plain, truth, moved = plain_and_true(problem, pattern, c.steps)
        skipped: dict[str, str] = {}
        for name, make in makers.items():
            try:
                made = make()
                compare(name, made.result(), plain, truth, moved)
            except Exception as error:  # what others' code cannot do is a note, not a failure of ours
                skipped[name] = reason(error)
            else:
                columns[name] = Column(made.__call__, reset=made.reset)
        full = PlainLoop(problem, FULL, c.steps, LR, NORM)
        columns["stock_full"] = Column(full.__call__, reset=full.reset)
        row = self.time(columns)
        row["columns"].update({name: {"skipped": why} for name, why in skipped.items()})
        return row

    def adaptation(self, pattern: Pattern, configuration: Configuration, dtype: torch.dtype) -> dict[str, Any]:
        """Support tensors to adapted parameters."""
        problem, k = self.problem(configuration, dtype), configuration.steps
        makers: dict[str, Callable[[], Stock]] = {
            "stock_graph": lambda: Graphed(problem, pattern, k),
            "stock_graph_tuned": lambda: Graphed(problem, pattern, k, tuned=True),
        }
        if pattern != FULL:
            makers["stock_masked"] = lambda: Stock(problem, pattern, k, prefix=False)
            makers["stock_prefix"] = lambda: Stock(problem, pattern, k, prefix=True)
        return self.against(makers, problem, configuration, pattern)

    def compiled(self, pattern: Pattern, configuration: Configuration, dtype: torch.dtype) -> dict[str, Any]:
        problem, k = self.problem(configuration, dtype), configuration.steps

        def how(mode: str) -> dict[str, str]:
            return {"mode": mode} if self.device.type == "cuda" else {"backend": "aot_eager"}  # a dry run: no compiler

        try:
            return self.against(
                {
                    "compile_default": lambda: Compiled(problem, pattern, k, **how("default")),
                    "compile_reduce_overhead": lambda: Compiled(problem, pattern, k, **how("reduce-overhead")),
                },
                problem, configuration, pattern,
            )  # fmt: skip
        finally:
            torch._dynamo.reset()

    @torch.no_grad()
    def many_tasks(self, pattern: Pattern, configuration: Configuration, dtype: torch.dtype) -> dict[str, Any]:
        """Per task: adaptation and the logits of one query image, for all tasks in one call."""
        k, few = configuration.steps, self.sizes.stock_tasks
        tasks = self.tasks(configuration, dtype, query=1)
        loops = [PlainLoop(tasks.problem(t), FULL, k, LR, NORM) for t in range(few)]

        def ours() -> Tensor:
            return adapt_tasks(*tasks, pattern=pattern, steps=k, lr=LR, norm=NORM)

        def eager() -> None:
            for loop, xq in zip(loops, tasks.xq):
                loop()
                loop.network(xq)

        def reset() -> None:
            for loop in loops:
                loop.reset()

        agrees = LogitsGate(tasks, pattern, k)
        agrees("adapt_tasks", ours())
        columns = {"ours": Column(ours, len(tasks.xs)), "stock_full": Column(eager, few, reset)}
        skipped: dict[str, str] = {}
        try:
            vmapped = Vmapped(tasks, pattern, k)
            agrees("vmap", vmapped())
        except Exception as error:  # as in `against`
            skipped["vmap"] = reason(error)
        else:
            columns["vmap"] = Column(vmapped, len(tasks.xs))
        row = self.time(columns)
        row["columns"].update({name: {"skipped": why} for name, why in skipped.items()})
        return {**row, "tasks": len(tasks.xs)}

    @torch.no_grad()
    def with_query(self, pattern: Pattern, configuration: Configuration, dtype: torch.dtype) -> dict[str, Any]:
        """Adaptation of one task and the logits of its query images."""
        problem, c = self.problem(configuration, dtype), configuration
        xq = self.tasks(c, dtype, self.sizes.query).xq[0].clone()
        self.gate(problem, c, pattern)
        full, masked = PlainLoop(problem, FULL, c.steps, LR, NORM), Stock(problem, pattern, c.steps, prefix=True)

        def end_to_end(loop: PlainLoop | Stock) -> Column:
            return Column(lambda: (loop(), loop.network(xq)), reset=loop.reset)

        timed = self.time({
            "ours": Column(lambda: adapt(*problem, pattern=pattern, steps=c.steps, lr=LR, norm=NORM)(xq)),
            "stock_full": end_to_end(full),
            **({} if pattern == FULL else {"stock_prefix": end_to_end(masked)}),
        })  # fmt: skip
        return {**timed, "query": len(xq)}

    def calls(self, pattern: Pattern, configuration: Configuration, dtype: torch.dtype) -> dict[str, Any]:
        """What one adaptation asks of the device: launches, kernels, and memory."""
        if self.device.type != "cuda":
            raise Skip("launches and device memory are counted on a CUDA device")
        problem, c = self.problem(configuration, dtype), configuration
        self.gate(problem, c, pattern)
        full = PlainLoop(problem, FULL, c.steps, LR, NORM)
        longer = PlainLoop(problem, FULL, c.steps + 1, LR, NORM)

        def ours(steps: int) -> Callable[[], object]:
            return lambda: adapt(*problem, pattern=pattern, steps=steps, lr=LR, norm=NORM)

        return {
            "counts": {
                # one step more than anywhere else: no graph of it was captured yet
                "ours": {**self.launches(ours(c.steps)), "peak_mib": self.peak(ours(c.steps + 1))},
                "stock_full": {**self.launches(full), "peak_mib": self.peak(longer)},
            }
        }

    def launches(self, run: Callable[[], object]) -> dict[str, int]:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        run()
        self.synchronize()
        for _ in range(2):  # the profiler's first run sets it up
            with torch.profiler.profile(activities=activities) as profile:
                run()
                self.synchronize()
        on_device = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
        asked = [e.name for e in profile.events() if e.device_type == DeviceType.CPU]
        return {
            "kernels": sum(not name.startswith(("Memcpy", "Memset")) for name in on_device),
            "copies_and_fills": sum(name.startswith(("Memcpy", "Memset")) for name in on_device),
            "kernel_launches": sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in asked),
            "graph_launches": sum(name.startswith("cudaGraphLaunch") for name in asked),
        }

    def peak(self, run: Callable[[], object]) -> float:
        """MiB beyond what was held before, in a first call."""
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def kernel_shape(self, layer: int) -> tuple[int, int, int, int, int]:
        """(images a task, input channels, output channels, side, side after the pooling) of a block."""
        c = self.sizes.main
        side = c.image_size >> layer
        return c.ways * c.shots, c.width if layer else c.in_channels, c.width, side, side // 2

    def kernel_head(self, layer: int) -> dict[str, Any]:
        n, i, o, side, _ = self.kernel_shape(layer)
        shape = f"{self.sizes.tasks} tasks x {n} x {i} x {side} x {side} to {o} channels"
        head = {"name": f"block {layer + 1}: {shape}", "kind": "kernel", "pattern": "", "dtype": "float32"}
        return {**head, "network": str(self.sizes.main), "main": True}

    def kernel(self, layer: int) -> dict[str, Any]:
        """The fused block on every backend that can run it: with weights of each task's own, and as a frozen layer."""
        passes = {
            "forward": self.kernel_pass(layer, backward=False, shared=False),
            "backward": self.kernel_pass(layer, backward=True, shared=False),
            "forward, shared weights": self.kernel_pass(layer, backward=False, shared=True),
        }
        broken = [f["failed"] for done in passes.values() for f in done["backends"].values() if "failed" in f]
        return {"passes": passes, **({"status": "failed", "reason": "; ".join(broken)} if broken else {})}

    def kernel_pass(self, layer: int, *, backward: bool, shared: bool) -> dict[str, Any]:
        n, i, o, side, half = self.kernel_shape(layer)
        t = self.sizes.tasks
        own = 1 if shared else t
        sizes = {"x": t * n * i * side * side, "w": own * o * i * 9, "v": 2 * own * o, "y": t * n * o * half * half}
        # each input read once, each output written once; the first block's images want no gradient
        values = sum(sizes.values()) + (sizes["w"] + sizes["v"] + (sizes["x"] if layer else 0) if backward else 0)
        flops = 2 * t * n * o * i * 9 * side * side * ((2 if layer else 1) if backward else 1)
        moved = 4 * values
        tf32 = torch.backends.cudnn.allow_tf32 and self.device.type == "cuda"
        rate = self.ceilings["matmul_tf32_flops" if tf32 else "matmul_float32_flops"]
        memory_floor, arithmetic_floor = 1e3 * moved / self.ceilings["copy_bytes_per_s"], 1e3 * flops / rate
        floor = max(memory_floor, arithmetic_floor)

        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 0
        sets = [self.block(layer, seed, shared) for seed in range(max(1, min(8, math.ceil(3 * cache / moved))))]
        checked = sorted({0, 1, t - 1})
        plain, truth = (self.plain_block(sets[0], checked, backward, double) for double in (False, True))
        length = distance(truth, [torch.zeros_like(v) for v in truth])
        timers: dict[str, Callable[[], float]] = {}
        found: dict[str, Any] = {}
        for name in ["auto", *backends.names()]:
            try:
                with lk.use_backend(name):
                    calls = [self.block_call(operands, backward) for operands in sets]
                    ours = calls[0]()
                    what = f"conv_block {'backward' if backward else 'forward'} on {name}"
                    compare(what, [v[checked] for v in ours], plain, truth, length)
                    del ours
                    timers[name], found[name] = self.timer(calls)
            except backends.BackendError as error:
                found[name] = {"skipped": reason(error)}
            except Exception as error:  # one broken backend must not hide the others
                found[name] = {"failed": reason(error)}
        rounds: dict[str, list[float]] = {name: [] for name in timers}
        start = time.perf_counter()
        for turn in range(self.sizes.rounds):
            if turn >= 3 and time.perf_counter() - start > self.sizes.seconds / 2:
                break
            for name, timer in timers.items():
                rounds[name].append(timer())
        for name, times in rounds.items():
            took = spread(times)
            found[name].update(
                took, fraction_of_floor=floor / took["median"], bytes_per_s=1e3 * moved / took["median"],
                flops_per_s=1e3 * flops / took["median"],
            )  # fmt: skip
        return {
            "backends": found, "bytes": moved, "flops": flops, "floor_ms": floor, "memory_floor_ms": memory_floor,
            "arithmetic_floor_ms": arithmetic_floor, "bound": "memory" if floor == memory_floor else "arithmetic",
            "rate": "TF32" if tf32 else "float32", "input_sets": len(sets),
            "rounds": min(map(len, rounds.values()), default=0),
        }  # fmt: skip

    def block(self, layer: int, seed: int, shared: bool) -> list[Tensor]:
        """x [T, N, I, H, W], weight [T, O, I, 3, 3], gamma and beta [T, O], gradient [T, N, O, H/2, W/2]; shared
        parameters are without T."""
        n, i, o, side, half = self.kernel_shape(layer)
        t, generator = self.sizes.tasks, torch.Generator(self.device).manual_seed(seed)
        own = () if shared else (t,)
        shapes = [(t, n, i, side, side), (*own, o, i, 3, 3), (*own, o), (*own, o), (t, n, o, half, half)]
        drawn = [torch.randn(*shape, generator=generator, device=self.device) for shape in shapes]
        drawn[1] /= (9 * i) ** 0.5  # outputs of variance 1
        for place, tensor in enumerate(drawn[:4]):
            tensor.requires_grad_(place > 0 or layer > 0)
        return drawn

    def block_call(self, operands: list[Tensor], backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        x, weight, gamma, beta, gy = operands

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (lk.functional.conv_block(x, weight, None, gamma, beta),)

        if not backward:
            return forward
        with self.side():  # the stream of the forward pass is that of its backward pass
            y = lk.functional.conv_block(x, weight, None, gamma, beta)
        wanted = [v for v in (x, weight, gamma, beta) if v.requires_grad]
        return lambda: torch.autograd.grad(y, wanted, gy, retain_graph=True)

    def plain_block(self, operands: list[Tensor], tasks: Sequence[int], backward: bool, double: bool) -> list[Tensor]:
        """Stock PyTorch's result for some tasks, one after another."""
        rows = []
        for task in tasks:
            own = [v.detach()[task] if v.dim() == axes else v.detach() for v, axes in zip(operands, (5, 5, 2, 2, 5))]
            x, weight, gamma, beta, gy = [
                (v.double() if double else v.clone()).requires_grad_(o.requires_grad) for v, o in zip(own, operands)
            ]
            z = F.conv2d(x, weight, padding=1)
            y = F.max_pool2d(F.relu(F.batch_norm(z, None, None, gamma, beta, training=True)), 2)
            wanted = [v for v in (x, weight, gamma, beta) if v.requires_grad]
            rows.append(torch.autograd.grad(y, wanted, gy) if backward else (y.detach(),))
        return [torch.stack(column) for column in zip(*rows)]

    def side(self) -> Any:
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        if not hasattr(self, "stream"):
            self.stream = torch.cuda.Stream(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def timer(self, calls: Sequence[Callable[[], object]]) -> tuple[Callable[[], float], dict[str, Any]]:
        """(milliseconds of one call, measured anew; how). On a GPU by events around replays of a graph that goes
        through the input sets, or around the calls themselves where they cannot be captured."""

        def all_calls() -> None:
            for call in calls:
                call()

        def waited() -> None:
            all_calls()
            self.synchronize()

        if self.device.type != "cuda":
            return lambda: 1e3 * wall(all_calls) / len(calls), {"timed": "wall clock"}
        with self.side():
            if wall(waited) < 0.5:  # s; some grouped convolutions take longer
                waited()
        how: dict[str, Any] = {"timed": "graph"}
        run: Callable[[], object] = all_calls
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                all_calls()
            run = graph.replay
        except RuntimeError as error:
            self.synchronize()
            how = {"timed": "calls", "not_captured": reason(error)}

        def once(repeats: int = 1) -> float:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / repeats / len(calls)

        once()
        repeats = max(1, min(100, int(20 / max(once() * len(calls), 1e-3))))  # about 20 ms an interval
        return lambda: once(repeats), {**how, "calls_in_interval": repeats * len(calls)}


def plain_and_true(problem: Problem, pattern: Pattern, steps: int) -> tuple[list[Tensor], list[Tensor], float]:
    """The plain loop's parameters in the problem's dtype and in float64, and how far the latter moved."""
    plain, truth = (PlainLoop(p, pattern, steps, LR, NORM).result() for p in (problem, problem.double()))
    return plain, truth, distance(truth, [p.detach() for p in problem.model.parameters()])


def wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_line(*command: str) -> str:
    """What a program prints, in a line; "" where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join(done.stdout.split())


def ceilings(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """What the device reaches at best: bytes a second, read plus written, of a large copy; operations a second of a
    large matrix product of random numbers."""

    def best(run: Callable[[], object]) -> float:
        """Median seconds."""
        times = []
        for turn in range(-3, 10):
            if device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                run()
                end.record()
                end.synchronize()
                took = begin.elapsed_time(end) / 1e3
            else:
                took = wall(run)
            if turn >= 0:
                times.append(took)
        return statistics.median(times)

    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device).random_()
    copy = functools.partial(torch.empty_like(source).copy_, source)
    found = {"copy_bytes_per_s": 2 * sizes.copy_bytes / best(copy)}
    n, before = sizes.matmul, torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in (
        ("float32", torch.float32, False), ("tf32", torch.float32, True), ("bfloat16", torch.bfloat16, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        found[f"matmul_{name}_flops"] = 2 * n**3 / best(functools.partial(torch.mm, a, b, out=out))
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def environment(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Facts about the machine that the figures depend on."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    found: dict[str, Any] = {
        "python": platform.python_version(), "packages": versions, "cuda": torch.version.cuda, "device": str(device),
        "cudnn": torch.backends.cudnn.version(), "nvcc": first_line("nvcc", "--version").rpartition("release ")[2],
        "cores": len(os.sched_getaffinity(0)), "processor": info.collect()["cpu"]["model"],
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "ceilings": ceilings(sizes, device),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        line = first_line("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
        found["gpu"] = {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            **dict(zip(fields.split(","), (word.strip() for word in line.split(","))) if line else {}),
        }  # fmt: skip
    return found


def choices() -> str:
    """The measured table of backends, as `python -m lambda_kernels.info --choices` prints it, or why there is none."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            info.main(["--choices"])
    except (SystemExit, RuntimeError) as error:
        return f"not printed: {err.getvalue().strip().splitlines()[-1] if err.getvalue().strip() else reason(error)}"
    return out.getvalue()


def run_rows(bench: Bench, path: Path, seconds: float) -> int:
    """Fill the rows until the time is up; how many gave a wrong result or broke."""
    document: dict[str, Any] = {}
    failed = fill_rows(bench.rows(), document, path, seconds=seconds, after=bench.free)
    write(path, {**document, "choices": choices()})
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("what", choices=["environment", "rows"])
    parser.add_argument("--result", type=Path, required=True, help="File for the results, JSON.")
    parser.add_argument("--seconds", type=float, default=180.0, help="After these no row begins. Default: %(default)s")
    parser.add_argument("--environment", type=Path, help="What `environment` wrote; the rows need its ceilings.")
    parser.add_argument("--dry-run", action="store_true", help="Tiny shapes on the CPU, to see that everything starts.")
    arguments = parser.parse_args()
    sizes, device = (TINY, torch.device("cpu")) if arguments.dry_run else (REAL, torch.device("cuda", 0))
    if arguments.what == "environment":
        write(arguments.result, environment(sizes, device))
        return 0
    facts = json.loads(arguments.environment.read_text(encoding="utf-8"))
    return 1 if run_rows(Bench(sizes, device, facts["ceilings"]), arguments.result, arguments.seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
