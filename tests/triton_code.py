"""What compiled code of a GPU does: copies and loads by their width, tensor cores, registers, how many blocks fit."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+)")
LOAD = re.compile(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
LABEL = re.compile(r"^(\$\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")


class Processor(NamedTuple):
    """What the blocks of one multiprocessor share."""

    shared: int  # bytes
    warps: int
    blocks: int
    registers: int = 65536
    reserved: int = 1024  # bytes of shared memory that each block takes beside its own


PROCESSORS = {
    80: Processor(164 * 1024, 64, 32),
    90: Processor(228 * 1024, 64, 32),
    100: Processor(228 * 1024, 64, 32),
}


def ptx_counts(ptx: str) -> dict[str, int]:
    """Instructions of a kernel in PTX: copies into shared memory and loads into registers by bytes, and tensor cores'.

    `loop_loads` are the loads into registers within loops.
    """
    counts: Counter[str] = Counter()
    lines = ptx.splitlines()
    inside = _in_loops(lines)
    for line, looped in zip(lines, inside):
        if found := COPY.search(line):
            counts[f"copies_{int(found[1], 16)}"] += 1
        elif found := LOAD.search(line):
            counts[f"loads_{int(found[1] or 1) * int(found[2]) // 8}"] += 1
            counts["loop_loads"] += looped
        counts["wgmma"] += "wgmma.mma_async" in line
        counts["mma"] += "mma.sync" in line
        counts["tcgen05"] += "tcgen05.mma" in line
    return dict(counts)


def _in_loops(lines: list[str]) -> list[bool]:
    """Is a line between a label and a jump back to it?"""
    labels = {found[1]: number for number, line in enumerate(lines) if (found := LABEL.match(line))}
    inside = [False] * len(lines)
    for number, line in enumerate(lines):
        found = BRANCH.search(line)
        if found and labels.get(found[1], number) < number:
            first = labels[found[1]]
            inside[first : number + 1] = [True] * (number + 1 - first)
    return inside


def sass_counts(cubin: bytes) -> dict[str, int]:
    """Instructions of the processor itself: 16-byte copies and others, tensor cores of a warp group and of a warp."""
    text = _cuobjdump("-sass", cubin)
    copies = re.findall(r"\bLDGSTS\S*", text)
    return {
        "LDGSTS.128": sum(".128" in copy for copy in copies),
        "LDGSTS": len(copies),
        "HGMMA": len(re.findall(r"\bHGMMA\.", text)),
        "HMMA": len(re.findall(r"\bHMMA\.", text)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
    }


def usage(cubin: bytes) -> dict[str, int]:
    """registers, stack and local bytes per thread."""
    text = _cuobjdump("-res-usage", cubin)
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert counts, text
    return {"registers": int(counts[1]), "stack": int(counts[2]), "local": int(counts[3])}


def blocks_abreast(architecture: int, warps: int, registers: int, shared: int) -> int:
    """How many blocks a multiprocessor holds at a time, by what each of them takes; registers are those of a thread."""
    processor = PROCESSORS[architecture]
    granted = -(-registers // 8) * 8 * 32 * warps
    return min(
        processor.blocks,
        processor.warps // warps,
        processor.registers // granted,
        processor.shared // (shared + processor.reserved),
    )


def _cuobjdump(what: str, cubin: bytes) -> str:
    """The output of triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
