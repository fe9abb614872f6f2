"""Compiles the Triton kernels for three architectures without a GPU and prints what each one uses, as JSON.

What is compiled is what the backend launches for a four-block network: its calls are recorded, not guessed. Run without
TRITON_INTERPRET: `python tests/triton_aot.py [--every-tile] [float32 | tf32 | bfloat16 | float16 | float64]...`.
Without --every-tile the first tile of each product is compiled, and all of them for TF32 on sm_90 alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "tf32", "bfloat16", "float16", "float64")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# 16 bytes at a time from device memory, into registers or into shared memory.
WIDE = re.compile(
    r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"
)


class Launch(NamedTuple):
    """A kernel by its module and name, with what a launch gave it."""

    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[str, Any]
    divisible: tuple[tuple[int, ...], ...]  # places of the arguments, or in one of them, that are multiples of 16
    options: dict[str, int]


def recorded(kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> Launch:
    """The launch as triton.jit would specialise it: ones are constants, multiples of 16 are known as such."""
    names = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    names |= {torch.uint8: "*u8", torch.int64: "*i64"}
    signature, constants, divisible = {}, {}, []

    def kind(value: Any, *path: int) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(v, *path, i) for i, v in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            divisible.append(path)
        return names[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = kind(value, place)
    module = kernel.fn.__module__.rpartition(".")[2]
    return Launch(module, kernel.fn.__name__, signature, constants, tuple(divisible), options)


def launches(dtype: str, every_tile: bool) -> list[Launch]:
    """What the backend launches for first and inner blocks, a head and their gradients, each once."""
    from lambda_kernels.backends.triton import head as heads
    from lambda_kernels.backends.triton import launch, loss, norm, products, update
    from lambda_kernels.spec import ConvSpec

    found: list[Launch] = []

    def keep(kernel: Any, programs: int, where: torch.Tensor, *arguments: Any, **options: int) -> None:
        launch_ = recorded(kernel, arguments, options)
        if launch_ not in found:
            found.append(launch_)

    def tile(self: Any, key: Any, tiles: Any, where: Any, run: Any) -> Any:
        for one in tiles if every_tile else tiles[:1]:
            run(one)
        return tiles[0]

    def arithmetic(operand: torch.Tensor, kind: str) -> tuple[str, bool, Any]:
        import triton.language as tl

        return "tf32" if dtype == "tf32" else "ieee", False, tl.float64 if dtype == "float64" else tl.float32

    kind = getattr(torch, {"tf32": "float32"}.get(dtype, dtype))
    spec = ConvSpec((1, 1), (1, 1), (1, 1), 1)
    tasks, images, width, size, ways = 4, 25, 64, 20, 5
    with (
        mock.patch.object(launch.Tuner, "tile", tile),
        mock.patch.object(products, "_arithmetic", arithmetic),
        mock.patch.object(products, "launch", keep),
        mock.patch.object(norm, "launch", keep),
        mock.patch.object(loss, "launch", keep),
        mock.patch.object(heads, "launch", keep),
        mock.patch.object(update, "launch", keep),
    ):
        gamma = torch.empty(tasks, width, dtype=kind)
        for channels in (3, width):
            x = torch.empty(tasks, images, size, size, channels, dtype=kind).permute(0, 1, 4, 2, 3)
            weight = torch.empty(tasks, width, channels, 3, 3, dtype=kind)
            z, y, index, mean, rstd = norm.conv_block(x, weight, gamma, gamma, spec, 1e-5, 2)
            products.conv2d_weight_grad(z, x, weight.shape, spec)
            if channels == 3 and every_tile:  # differs from the other by its constants alone
                products.conv2d(x, weight[:1], gamma[:1], spec)
        products.conv2d_input_grad(z, weight, x.shape, spec)
        norm.norm_relu_pool(z, gamma, gamma, 1e-5, 2)
        norm.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, 2, True)
        features = y.flatten(2)
        head = torch.empty(tasks, ways, features.shape[2], dtype=kind)
        g = products.linear(features, head, gamma[:, :ways])
        products.linear(g.mT, features.mT, None)
        products.linear(g, head.mT, None)
        update.sgd_([gamma, head], [gamma, head], [0.01, 0.02])
        loss.cross_entropy_grad(g, torch.zeros(1, images, dtype=torch.int64))
        labels = torch.zeros(tasks, images, dtype=torch.int64)
        heads.head_grad(features, head, gamma[:, :ways], labels, (True, True, True))
        heads.head_grad(features[:1, :1, :1], head[:1, :1, :1], gamma[:1, :1], labels[:1, :1], (False, False, True))
    return found


def compiled(job: tuple[str, int, Launch]) -> dict[str, Any]:
    """Registers, stack, local and shared memory of one launch on one architecture."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtype, architecture, launch = job
    kernel = getattr(importlib.import_module(f"lambda_kernels.backends.triton.{launch.module}"), launch.kernel)
    attributes = {path: [["tt.divisibility", 16]] for path in launch.divisible}
    source = ASTSource(fn=kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    began = time.perf_counter()
    done = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"enable_fp_fusion": True, **launch.options}
    )
    tile = [launch.constants[name] for name in ("ROWS", "COLUMNS", "TERMS") if name in launch.constants]
    return {
        "kernel": launch.kernel,
        "dtype": dtype,
        "architecture": architecture,
        "tile": tile,
        "channels": launch.constants.get("CHANNELS"),
        "transposed": launch.constants.get("TRANSPOSED"),
        "options": launch.options,
        "seconds": round(time.perf_counter() - began, 2),
        "shared_limit": SHARED_LIMIT[architecture],
        **usage(done.asm["cubin"]),
        "shared": done.metadata.shared,
        "wide_loads": len(WIDE.findall(done.asm["ptx"])),
    }


def usage(cubin: bytes) -> dict[str, int]:
    """registers, stack and local bytes per thread, by triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert counts, text
    return {"registers": int(counts[1]), "stack": int(counts[2]), "local": int(counts[3])}


def jobs(dtypes: list[str], every_tile: bool) -> Iterator[tuple[str, int, Launch]]:
    """Each launch once per architecture, also where two dtypes share it."""
    seen = []
    for dtype in dtypes:
        for architecture in ARCHITECTURES:
            for launch in launches(dtype, every_tile or (dtype, architecture) == ("tf32", 90)):
                if (architecture, launch) not in seen:
                    seen.append((architecture, launch))
                    yield dtype, architecture, launch


def main(dtypes: list[str], every_tile: bool) -> None:
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compiled, jobs(dtypes, every_tile)))))


if __name__ == "__main__":
    main([a for a in sys.argv[1:] if a in DTYPES] or list(DTYPES), "--every-tile" in sys.argv)
