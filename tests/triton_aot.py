"""Compiles the Triton kernels for three architectures without a GPU and prints what each one uses, as JSON.

What is compiled is what the backend launches for a four-block network (tests/triton_launches.py). Run without
TRITON_INTERPRET: `python tests/triton_aot.py [--every-tile] [float32 | tf32 | bfloat16 | float16 | float64]...`.
Without --every-tile the first tile of each product is compiled, and all of them for TF32 on sm_90 alone.
With --specialisations each launch is compiled to Triton's IR for sizes of every kind, and what fails is printed.
Another triton's folder in PYTHONPATH is compiled with.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from triton_launches import Launch, calls, specialised, variants

ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "tf32", "bfloat16", "float16", "float64")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# 16 bytes at a time from device memory, into registers or into shared memory.
WIDE = re.compile(
    r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"
)


def source(launch: Launch) -> Any:
    """What triton compiles."""
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"lambda_kernels.backends.triton.{launch.module}"), launch.kernel)
    return ASTSource(fn=kernel, signature=launch.signature, constexprs=launch.constants, attrs=launch.attributes)


def compiled(job: tuple[str, int, Launch]) -> dict[str, Any]:
    """Registers, stack, local and shared memory of one launch on one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    dtype, architecture, launch = job
    began = time.perf_counter()
    done = triton.compile(
        source(launch),
        target=GPUTarget("cuda", architecture, 32),
        options={"enable_fp_fusion": True, **launch.options},
    )
    tile = [launch.constant(name) for name in ("ROWS", "COLUMNS", "TERMS")]
    return {
        "kernel": launch.kernel,
        "dtype": dtype,
        "architecture": architecture,
        "tile": tile,
        "channels": launch.constant("CHANNELS"),
        "transposed": launch.constant("TRANSPOSED"),
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
            for call in calls(dtype, every_tile or (dtype, architecture) == ("tf32", 90)):
                launch = specialised(call)
                if (architecture, launch) not in seen:
                    seen.append((architecture, launch))
                    yield dtype, architecture, launch


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
    for call in calls("float32", False):
        kernel = call.kernel.fn.__name__
        for what, variant in variants(call, alone=kernel not in tried):
            tried[kernel] = tried.get(kernel, 0) + 1
            try:
                into_ir(specialised(variant))
            except Exception as error:  # whatever triton makes of an error in a kernel
                failed[f"{kernel}, {what}"] = str(error).strip().rpartition("\n")[2]
    return {"triton": triton.__version__, "tried": tried, "failed": failed}


def main(dtypes: list[str], every_tile: bool) -> None:
    with ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compiled, jobs(dtypes, every_tile)))))


if __name__ == "__main__":
    if "--specialisations" in sys.argv:
        print(json.dumps(specialisations()))
    else:
        main([a for a in sys.argv[1:] if a in DTYPES] or list(DTYPES), "--every-tile" in sys.argv)
