"""The least time of an adaptation or a meta-gradient here: its necessary floating-point operations over the processor's
measured peak.

Counted are convolutions and linear layers: forward, weight gradients and input gradients as the pattern asks for them,
a frozen prefix once; in second order the way back through each of these, with nothing computed twice. The peak is the
higher of fused multiply-adds in registers and the fastest matrix product of torch.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import CONFIGURATIONS, make_problem
from torch import nn

from lambda_maml import Pattern
from lambda_maml.cost import layer_costs

SOURCE = Path(__file__).with_name("peak.cpp")
SIDES = (128, 256, 512, 1024, 2048)  # of the matrix products


def operations(model: nn.Module, shape: tuple[int, ...], pattern: Pattern, steps: int) -> int:
    """Floating-point operations, two for a multiply-add, of an adaptation to a support set of shape [N, C, H, W]."""
    first, total = 0, 0
    for _, count in pattern.segments(steps):
        cost = pattern.cost(model, shape, step=first)
        total += 2 * (cost.prefix + count * cost.step)
        first += count
    return total


def meta_operations(
    model: nn.Module, support: tuple[int, ...], query: tuple[int, ...], pattern: Pattern, steps: int, second_order: bool
) -> int:
    """Floating-point operations of one task's meta-gradient, by all parameters: an adaptation to a support set of shape
    [N, C, H, W], and the query images of shape [Q, C, H, W] forward and back.

    In second order an operation of a step has a way back to each of its two factors, which costs as much as itself; the
    images need none. So a step takes nine passes of a layer, six where it is the first updated one behind a frozen
    prefix, and four where it is the network's first.
    """
    if not second_order:
        steps_alone = operations(model, support, pattern, steps)
        return steps_alone + 2 * sum(_there_and_back(layer_costs(model, query)))
    forward = layer_costs(model, support)
    total = sum(_there_and_back(layer_costs(model, query)))
    for bits, count in pattern.segments(steps):
        first = bits.index("1")
        total += sum(_there_and_back(forward)[:first])
        for layer, cost in list(enumerate(forward))[first:]:
            inputs = int(layer > 0)  # do its inputs depend on a parameter?
            passes = 1 + (1 + inputs)  # forward, and the way back to weights and inputs
            if bits[layer] == "1":
                passes += 1 + (1 + inputs)  # the weight gradient: of inputs and the outputs' gradient
            if layer > first:
                passes += 1 + 2  # the input gradient: of weights and the outputs' gradient
            total += count * passes * cost
    return 2 * total


def _there_and_back(forward: list[int]) -> list[int]:
    """Multiply-adds of each layer: forward, by the weights, and by the inputs but for those of the first layer."""
    return [cost * (3 if layer else 2) for layer, cost in enumerate(forward)]


def best(run: Callable[[], object], seconds: float) -> float:
    """The shortest of the runs that fit, in seconds; three at least. Other work on the machine only lengthens a run."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def fma_rates(threads: int, seconds: float) -> dict[str, float]:
    """Operations a second of peak.cpp, in one thread and in all; RuntimeError where it cannot be compiled."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    compiler = next(filter(None, map(shutil.which, wanted)), None)
    if compiler is None:
        raise RuntimeError(f"no C++ compiler ({', '.join(wanted)})")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile: {done.stderr.strip().splitlines()[0]}")
        peak = ctypes.CDLL(str(library))
    peak.flops_of.restype, peak.run.restype = ctypes.c_double, ctypes.c_float
    rounds = ctypes.c_long(1_000_000)  # some milliseconds
    rates = {}
    for count in {1, threads}:
        with ThreadPoolExecutor(count) as pool:  # ctypes lets go of the interpreter's lock
            took = best(lambda calls=[rounds] * count: list(pool.map(peak.run, calls)), seconds)  # type: ignore[misc]
        rates[count] = count * peak.flops_of(rounds) / took
    return {"fma_flops": rates[threads], "fma_flops_one_thread": rates[1]}


def ceilings(seconds: float = 0.5) -> dict[str, Any]:
    """What this process reaches with its threads: operations per second, and bytes per second, read plus written, of a
    copy far beyond the caches. Takes about eight times `seconds`."""
    threads = torch.get_num_threads()
    found: dict[str, Any] = {"threads": threads, "remark": ""}
    try:
        found.update(fma_rates(threads, seconds))
    except (OSError, RuntimeError) as error:
        found["remark"] = f"the peak is that of torch's matrix product: {error}"
    products = []
    for side in SIDES:
        a, b, out = (torch.randn(side, side) for _ in range(3))
        products.append(2 * side**3 / best(functools.partial(torch.mm, a, b, out=out), seconds))
    found["mm_flops"] = max(products)
    found["flops"] = max(found["mm_flops"], found.get("fma_flops", 0.0))
    source = torch.ones(1 << 26)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    found["copy_bytes_per_s"] = 2 * source.nbytes / best(copy, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--threads", type=int, help="Threads of torch. Default: torch's own choice")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    found = ceilings()
    with contextlib.suppress(KeyError):
        rates = [found[key] / 1e9 for key in ("fma_flops", "fma_flops_one_thread")]
        print(f"fused multiply-adds: {rates[0]:.0f} GFLOP/s in {found['threads']} threads, {rates[1]:.0f} in one")
    print(f"matrix product: {found['mm_flops'] / 1e9:.0f} GFLOP/s in {found['threads']} threads")
    print(f"copy: {found['copy_bytes_per_s'] / 1e9:.1f} GB/s, read and written")
    if found["remark"]:
        print(found["remark"])
    for name, c in CONFIGURATIONS.items():
        model, xs, _ = make_problem(c, torch.device("cpu"))
        for pattern in map(Pattern, ("11111", "00011")):
            count = operations(model, tuple(xs.shape), pattern, c.steps)
            print(f"{name} ({c}), {pattern}: {count / 1e9:.3f} GFLOP, floor {1e3 * count / found['flops']:.2f} ms")


if __name__ == "__main__":
    main()
