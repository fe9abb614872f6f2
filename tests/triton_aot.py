"""Compiles the Triton kernels for three architectures without a GPU and prints what each one uses, as JSON.

What is compiled is what the backend launches for a four-block network (tests/triton_launches.py). Run without
TRITON_INTERPRET: `python tests/triton_aot.py [--every-tile] [float32 | tf32 | bfloat16 | float16 | float64]...`.
Without --every-tile the first tile of each product is compiled, and all of them for TF32 on sm_90 alone.
With --budget and patterns, what an adaptation compiles and times is counted; nothing is compiled.
With --products the products for tensor cores alone are, on sm_90.
With --specialisations each launch is compiled to Triton's IR for sizes of every kind, and what fails is printed.
Another triton's folder in PYTHONPATH is compiled with.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from triton_code import blocks_abreast, ptx_counts, sass_counts, usage
from triton_launches import Launch, adaptation, calls, specialised, variants

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "tf32", "bfloat16", "float16", "float64")
PRODUCTS = ("convolve", "weight_gradient", "matrix_product")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def source(launch: Launch) -> Any:
    """What triton compiles."""
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"lambda_kernels.backends.triton.{launch.module}"), launch.kernel)
    return ASTSource(fn=kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes)


def compiled(job: tuple[str, int, Launch]) -> dict[str, Any]:
    """What one launch uses on one architecture, and what its code does."""
    import triton
    from triton.backends.compiler import GPUTarget

    dtype, architecture, launch = job
    began = time.perf_counter()
    done = triton.compile(
        source(launch),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": True, **launch.options},
    )
    used = usage(done.asm["cubin"])
    return {
        "kernel": launch.kernel,
        "dtype": dtype,
        "architecture": architecture,
        "tile": [launch.constant(name) for name in ("ROWS", "COLUMNS", "TERMS")],
        "swapped": launch.constant("SWAPPED"),
        "precision": launch.constant("PRECISION"),
        "channels": launch.constant("CHANNELS"),
        "transposed": launch.constant("TRANSPOSED"),
        "pool": launch.constant("POOL"),
        "options": launch.options,
        "seconds": round(time.perf_counter() - began, 2),
        "shared_limit": SHARED_LIMIT[architecture],
        **used,
        "shared": done.metadata.shared,
        "blocks": blocks_abreast(architecture, done.metadata.num_warps, used["registers"], done.metadata.shared),
        "ptx": ptx_counts(done.asm["ptx"]),
        "sass": sass_counts(done.asm["cubin"]) if launch.kernel in PRODUCTS and architecture == 90 else {},
        "added_outside": "arith.addf" in done.asm["ttgir"],
    }


def jobs(dtypes: list[str], every_tile: bool) -> Iterator[tuple[str, int, Launch]]:
    """Each launch once per architecture, also where two dtypes share it."""
    seen = []
    for dtype in dtypes:
        for architecture in ARCHITECTURES:
            all_tiles = every_tile or (dtype, architecture) == ("tf32", 90)
            launches = list(map(specialised, calls(dtype, all_tiles, rare=dtype == "float16")))
            for launch in launches + (parted() if (dtype, architecture) == ("float32", 90) else []):
                if (architecture, launch) not in seen:
                    seen.append((architecture, launch))
                    yield dtype, architecture, launch


def parted() -> list[Launch]:
    """Products of float32 by tensor cores though TF32 is off."""
    return [
        launch for launch in map(specialised, calls("float32", True)) if "x" in (launch.constant("PRECISION") or "")
    ]


def products_of_hopper() -> Iterator[tuple[str, int, Launch]]:
    """The products for tensor cores alone, for sm_90, in every tile of float32."""
    launches = [("tf32", specialised(call)) for call in calls("tf32", True)]
    launches += [("bfloat16", specialised(call)) for call in calls("bfloat16", False)]
    launches += [("float32", launch) for launch in parted()]
    return ((dtype, 90, launch) for dtype, launch in launches if launch.kernel in PRODUCTS)


def into_ir(launch: Launch) -> None:
    """Translate a launch to Triton's IR, where an argument of an unforeseen type shows."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", ARCHITECTURES[0], 32)
    backend = make_backend(target)
    options = backend.parse_options({"enable_fp_fusion": True, **launch.options})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source(launch).make_ir(target, options, functions, modules, context)


def specialisations() -> dict[str, Any]:
    """How many specialisations of each kernel were translated, and the errors of those that cannot be."""
    import triton

    tried: dict[str, int] = {}
    failed = {}
    for call in calls("float32", False, rare=True):
        kernel = call.kernel.fn.__name__
        for what, variant in variants(call, alone=kernel not in tried):
            tried[kernel] = tried.get(kernel, 0) + 1
            try:
                into_ir(specialised(variant))
            except Exception as error:  # whatever triton makes of an error in a kernel
                failed[f"{kernel}, {what}"] = str(error).strip().rpartition("\n")[2]
    return {"triton": triton.__version__, "tried": tried, "failed": failed}


def budget(pattern: str) -> dict[str, int]:
    """What a first adaptation of one task does once: kernels compiled, keys that a tile is chosen for, tiles timed."""
    recorded = adaptation(pattern, 1)
    timed = sum(count for count in recorded.tiles.values() if count > 1)
    return {"compiles": len(recorded.calls), "keys": len(recorded.tiles), "timed": timed}


def printed(work: Iterable[tuple[str, int, Launch]]) -> None:
    """Compile in two processes and print what was found."""
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compiled, work))))


if __name__ == "__main__":
    if "--specialisations" in sys.argv:
        print(json.dumps(specialisations()))
    elif "--budget" in sys.argv:
        print(json.dumps({pattern: budget(pattern) for pattern in sys.argv[2:]}))
    elif "--products" in sys.argv:
        printed(products_of_hopper())
    else:
        printed(jobs([a for a in sys.argv[1:] if a in DTYPES] or list(DTYPES), "--every-tile" in sys.argv))
