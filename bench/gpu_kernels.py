"""The fused block on a GPU: every backend beside the floor that memory and arithmetic set."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gpu_machine import Sizes, wall
from harness import compare, reason, spread
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels import backends
from lambda_kernels.agreement import distance
from lambda_kernels.spec import ConvSpec


def needed(
    t: int, n: int, i: int, o: int, side: int, half: int, *, own: int, backward: bool, first: bool
) -> tuple[int, int]:
    """(bytes, operations) of a block's pass in float32: t tasks of n images, each input read once, each output written
    once. The first block's images need no gradient. `own`: how many weights there are, one or t."""
    x, weight, vectors, y = t * n * i * side * side, own * o * i * 9, 2 * own * o, t * n * o * half * half
    values = x + weight + vectors + y + (weight + vectors + (0 if first else x) if backward else 0)
    return 4 * values, 2 * t * n * o * i * 9 * side * side * ((1 if first else 2) if backward else 1)


def as_handed_on(operands: Sequence[Tensor]) -> list[Tensor]:
    """The images and gradients [T, N, C, H, W] among a block's operands in the memory layout in which the backend's
    blocks hand them to each other."""
    x, weight = operands[:2]
    backend = backends.choose("conv_block", x, weight, ConvSpec((1, 1), (1, 1), (1, 1), 1), 2)
    return [backend.layout(t.detach()).requires_grad_(t.requires_grad) if i in (0, 4) else t
            for i, t in enumerate(operands)]  # fmt: skip


class Kernels:
    """The rows of the fused block, with weights of each task's own and as a frozen layer."""

    def __init__(self, sizes: Sizes, device: torch.device, ceilings: Mapping[str, float]) -> None:
        self.sizes, self.device, self.ceilings = sizes, device, ceilings
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def shape(self, layer: int) -> tuple[int, int, int, int, int]:
        """(images per task, input channels, output channels, side, side after the pooling) of a block."""
        c = self.sizes.main
        side = c.image_size >> layer
        return c.ways * c.shots, c.width if layer else c.in_channels, c.width, side, side // 2

    def head(self, layer: int) -> dict[str, Any]:
        n, i, o, side, _ = self.shape(layer)
        shape = f"{self.sizes.tasks} tasks x {n} x {i} x {side} x {side} to {o} channels"
        head = {"name": f"block {layer + 1}: {shape}", "kind": "kernel", "pattern": "", "dtype": "float32"}
        return {**head, "network": str(self.sizes.main), "main": True}

    def row(self, layer: int) -> dict[str, Any]:
        """The fused block on every backend that can run it: with weights of each task's own, and as a frozen layer."""
        passes = {
            "forward": self.one_pass(layer, backward=False, shared=False),
            "backward": self.one_pass(layer, backward=True, shared=False),
            "forward, shared weights": self.one_pass(layer, backward=False, shared=True),
        }
        broken = [f["failed"] for done in passes.values() for f in done["backends"].values() if "failed" in f]
        return {"passes": passes, **({"status": "failed", "reason": "; ".join(broken)} if broken else {})}

    def one_pass(self, layer: int, *, backward: bool, shared: bool) -> dict[str, Any]:
        t = self.sizes.tasks
        moved, flops = needed(t, *self.shape(layer), own=1 if shared else t, backward=backward, first=not layer)
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
        n, i, o, side, half = self.shape(layer)
        t, generator = self.sizes.tasks, torch.Generator(self.device).manual_seed(seed)
        own = () if shared else (t,)
        shapes = [(t, n, i, side, side), (*own, o, i, 3, 3), (*own, o), (*own, o), (t, n, o, half, half)]
        drawn = [torch.randn(*shape, generator=generator, device=self.device) for shape in shapes]
        drawn[1] /= (9 * i) ** 0.5  # outputs of variance 1
        for place, tensor in enumerate(drawn[:4]):
            tensor.requires_grad_(place > 0 or layer > 0)
        return drawn

    def block_call(self, operands: list[Tensor], backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        x, weight, gamma, beta, gy = as_handed_on(operands)

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
        if self.stream is None:
            return contextlib.nullcontext()
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
