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
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from by_hand import LR, NORM, Compiled, Graphed, LogitsGate, Stock, Tasks, Vmapped
from gpu_kernels import Kernels
from gpu_machine import REAL, TINY, Sizes, ceilings, environment
from harness import (
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
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from lambda_kernels import info
from lambda_kernels.agreement import apart, distance
from lambda_kernels.backends import Cuda
from lambda_maml import Learner, Pattern, adapt, adapt_tasks

FULL = Pattern.full(5)
RECORDED = 3  # the call from which on an adaptation is a replay


class Bench:
    """The rows of one device."""

    def __init__(self, sizes: Sizes, device: torch.device, ceilings: Mapping[str, float] | None = None) -> None:
        self.sizes, self.device, self.given = sizes, device, ceilings
        self.passed: set[tuple[object, ...]] = set()

    @functools.cached_property
    def ceilings(self) -> Mapping[str, float]:
        """Those of the stage `environment`, or measured here, where they are first asked for."""
        return self.given or ceilings(self.sizes, self.device)

    @functools.cached_property
    def kernels(self) -> Kernels:
        return Kernels(self.sizes, self.device, self.ceilings)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def of(self, kind: str, pattern: str, fill: Callable[..., dict[str, Any]], **more: Any) -> Any:
        given = {"configuration": self.sizes.main, "dtype": torch.float32, **more}
        c, dtype = given["configuration"], str(given["dtype"]).removeprefix("torch.")
        special = [dtype] * (dtype != "float32") + [str(c)] * (c != self.sizes.main)
        special += [f"of {more['tasks']}"] if "tasks" in more else []
        head = {"name": " ".join([kind, pattern, *special]), "kind": kind, "pattern": pattern, "dtype": dtype}
        main = c == self.sizes.main and dtype == "float32"
        return {**head, "network": str(c), "main": main}, lambda: fill(Pattern(pattern), **given)

    def replays(self) -> Iterator[Row]:
        """What one replay runs: the first figures of a run, which every other one is explained by."""
        for pattern, tasks in itertools.product(("11111", "00011"), (1, self.sizes.tasks)):
            yield self.of("replay", pattern, self.replay, tasks=tasks)

    def slow(self) -> Iterator[Row]:
        """Columns that take a compiler's minutes, or much memory."""
        of = self.of
        yield of("vmap", "00011", self.vmapped)
        for pattern in ("00011", "11111", "00001"):
            yield of("compile", pattern, self.compiled)
        yield of("vmap", "11111", self.vmapped)

    def rows(self) -> Iterator[Row]:
        """The important ones first."""
        s, of = self.sizes, self.of
        yield of("adapt", "00011", self.adaptation)
        yield of("adapt", "11111", self.adaptation)
        yield of("tasks", "00011", self.many_tasks)
        for layer in range(4):
            yield self.kernels.head(layer), functools.partial(self.kernels.row, layer)
        yield of("tasks", "00011", self.many_tasks, dtype=torch.bfloat16)
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
            check_adapt(problem, pattern, c.steps, LR, NORM, double="reference")
            self.passed.add(key)

    def time(self, columns: Mapping[str, Column]) -> dict[str, Any]:
        """Milliseconds an adaptation for every column, and how often slower each is than the column "ours"."""
        each = each_round(columns, seconds=self.sizes.seconds, rounds=self.sizes.rounds, synchronize=self.synchronize)
        ratios = {n: [t / own for t, own in zip(v, each["ours"])] for n, v in each.items() if n != "ours"}
        return {
            "columns": {name: spread(values) for name, values in each.items()},
            "ratios": {name: spread(values) for name, values in ratios.items()},
            "rounds": len(each["ours"]),
        }

    def against(
        self, makers: Mapping[str, Callable[[], Any]], problem: Problem, c: Configuration, pattern: Pattern
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
        makers: dict[str, Callable[[], Any]] = {
            "ours_dependent": lambda: Dependent(problem, pattern, k),
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

    def vmapped(self, pattern: Pattern, configuration: Configuration, dtype: torch.dtype) -> dict[str, Any]:
        return self.many_tasks(pattern, configuration, dtype, with_vmap=True)

    @torch.no_grad()
    def many_tasks(
        self, pattern: Pattern, configuration: Configuration, dtype: torch.dtype, with_vmap: bool = False
    ) -> dict[str, Any]:
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
        if with_vmap:
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

    @torch.no_grad()
    def replay(self, pattern: Pattern, configuration: Configuration, dtype: torch.dtype, tasks: int) -> dict[str, Any]:
        """The kernels of one replay and their times, after its results were held against those of the eager call."""
        steps, many = configuration.steps, self.tasks(configuration, dtype, query=1)
        task = many.problem(0)
        given: dict[str, Any] = {"pattern": pattern, "steps": steps, "lr": LR, "norm": NORM}

        def run() -> list[Tensor]:
            if tasks > 1:
                return [adapt_tasks(*many, **given)]
            return list(adapt(*task, **given).parameters_dict().values())

        self.gate(task, configuration, pattern)
        with mock.patch.dict(os.environ, LAMBDA_KERNELS_GRAPHS="0"):  # the gate's call may have recorded it
            eager = run()
        run(), run()  # the second call of a form records
        replayed = run()
        if off := [d for a, b in zip(replayed, eager, strict=True) if (d := apart(a, b)) is not None]:
            return {"status": "failed", "reason": f"the replay is {off[0]:.2g} of its length away from the eager call"}
        if tasks > 1:
            LogitsGate(many, pattern, steps)("adapt_tasks", replayed[0])
        kind = DeviceType.CUDA if self.device.type == "cuda" else DeviceType.CPU  # of a dry run: operators
        events = [e for e in self.profiled(run) if e.device_type == kind]
        if not events:  # a machine may keep the profiler from its counters
            return {"status": "failed", "reason": "the replay agrees with the eager call; the profiler sees no kernels"}
        times: dict[str, list[float]] = {}
        for event in events:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
        order = sorted(times, key=lambda name: -sum(times[name]))
        for name in order[:12]:
            print(f"{sum(times[name]):10.1f} us  {len(times[name]):4d}  {name[:90]}", flush=True)
        table = [{"name": name, "count": len(times[name]), "us": sum(times[name])} for name in order]
        first, last = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
        return {"tasks": tasks, "nodes": len(events), "span_us": last - first, "kernels": table}

    def profiled(self, run: Callable[[], object]) -> Any:
        """The profiler's events of one run."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        run()
        self.synchronize()
        for _ in range(2):  # the profiler's first run sets it up
            with torch.profiler.profile(activities=activities) as profile:
                run()
                self.synchronize()
        return profile.events()

    def launches(self, run: Callable[[], object]) -> dict[str, int]:
        events = self.profiled(run)
        on_device = [e.name for e in events if e.device_type == DeviceType.CUDA]
        asked = [e.name for e in events if e.device_type == DeviceType.CPU]
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


class Dependent:
    """Ours with the CUDA library's kernels placed while the one before them ends: whether that gains."""

    def __init__(self, problem: Problem, pattern: Pattern, steps: int) -> None:
        self.cuda, self.given = Cuda(), problem
        self.how: dict[str, Any] = {"pattern": pattern, "steps": steps, "lr": LR, "norm": NORM}
        if why := self.cuda.reasons():
            raise Skip("; ".join(why))

    def __call__(self) -> Learner:
        with self.cuda.dependent_launches():
            return adapt(*self.given, **self.how)

    def reset(self) -> None:
        """There is nothing to put back."""

    def result(self) -> list[Tensor]:
        """Of a replay."""
        for _ in range(RECORDED - 1):
            self()
        return [t.detach() for t in self().parameters_dict().values()]


def plain_and_true(problem: Problem, pattern: Pattern, steps: int) -> tuple[list[Tensor], list[Tensor], float]:
    """The plain loop's parameters in the problem's dtype and in float64, and how far the latter moved."""
    plain, truth = (PlainLoop(p, pattern, steps, LR, NORM).result() for p in (problem, problem.double()))
    return plain, truth, distance(truth, [p.detach() for p in problem.model.parameters()])


def choices() -> str:
    """The measured table of backends, as `python -m lambda_kernels.info --choices` prints it, or why there is none."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            info.main(["--choices"])
    except (SystemExit, RuntimeError) as error:
        return f"not printed: {err.getvalue().strip().splitlines()[-1] if err.getvalue().strip() else reason(error)}"
    return out.getvalue()


def run_rows(bench: Bench, path: Path, seconds: float, which: str = "rows") -> int:
    """Fill the rows until the time is up; how many gave a wrong result or broke."""
    document: dict[str, Any] = {}
    failed = fill_rows(getattr(bench, which)(), document, path, seconds=seconds, after=bench.free)
    if which == "rows":
        document["choices"] = choices()
        document["ceilings"] = bench.ceilings
    write(path, document)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("what", choices=["environment", "replays", "rows", "slow"])
    parser.add_argument("--result", type=Path, required=True, help="File for the results, JSON.")
    parser.add_argument("--seconds", type=float, default=180.0, help="After these no row begins. Default: %(default)s")
    parser.add_argument("--environment", type=Path, help="What `environment` wrote. Default: ceilings measured anew")
    parser.add_argument("--dry-run", action="store_true", help="Tiny shapes on the CPU, to see that everything starts.")
    arguments = parser.parse_args()
    sizes, device = (TINY, torch.device("cpu")) if arguments.dry_run else (REAL, torch.device("cuda", 0))
    if arguments.what == "environment":
        write(arguments.result, environment(sizes, device))
        return 0
    facts = json.loads(arguments.environment.read_text(encoding="utf-8")) if arguments.environment else {}
    bench = Bench(sizes, device, facts.get("ceilings"))
    return 1 if run_rows(bench, arguments.result, arguments.seconds, arguments.what) else 0


if __name__ == "__main__":
    sys.exit(main())
