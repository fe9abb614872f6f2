"""How kernels are started: launches on the right device, and the choice of tile sizes with its cache on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime.cache import get_cache_manager

__all__ = ["INTERPRETED", "Tile", "Tuner", "blocks", "bucket", "launch", "power"]

# What a kernel decorated from here on is: as triton.jit reads it.
INTERPRETED = bool(triton.knobs.runtime.interpret)
LARGEST_COUNT = 2**31 - 2**12  # pixels, rows and programs are counted in int32, with room for one tile


class Tile(NamedTuple):
    """Sizes of a matrix product's tile (rows, columns, terms of the sum), warps and pipeline stages."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}

    def within(self, rows: int, columns: int, terms: int) -> Tile:
        """This tile, no larger than a product of that size needs; tl.dot takes no side below 16."""
        return self._replace(
            rows=min(self.rows, max(16, power(rows))),
            columns=min(self.columns, max(16, power(columns))),
            terms=min(self.terms, max(16, power(terms))),
        )


def launch(kernel: Any, programs: int, where: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start `programs` programs on axis 0 of the grid, on the device of `where`.

    Raises:
        ValueError: there are more programs than a grid takes.
    """
    if programs > LARGEST_COUNT:
        raise ValueError(f"{kernel.__name__}: {programs} programs are more than a grid takes; split the batch")
    elsewhere = where.is_cuda and where.device.index != torch.cuda.current_device()
    with torch.cuda.device(where.device) if elsewhere else nullcontext():
        # Named because triton 3.9 warns of a new default to come.
        kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)


class Tuner:
    """Chooses a kernel's tile by trying each once for every key; remembers the choice, also on disk.

    A key that was never measured cannot be tried while a CUDA graph is captured: run once before the capture, else the
    first tile is taken.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.chosen: dict[tuple[Any, ...], Tile] = {}

    def tile(self, key: tuple[Any, ...], tiles: Sequence[Tile], where: Tensor, run: Callable[[Tile], None]) -> Tile:
        """The fastest of `tiles` for `run`, which must leave its inputs as they are."""
        if INTERPRETED or len(tiles) == 1:
            return tiles[0]
        key = (where.device.index, *key)
        tile = self.chosen.get(key)
        if tile is None:
            if torch.cuda.is_current_stream_capturing():
                return tiles[0]
            tile = self.chosen[key] = self._measured(key, tiles, where, run)
        return tile

    def _measured(
        self, key: tuple[Any, ...], tiles: Sequence[Tile], where: Tensor, run: Callable[[Tile], None]
    ) -> Tile:
        about = (triton.__version__, torch.cuda.get_device_name(where.device), self.kernel.cache_key, key[1:], tiles)
        store = get_cache_manager(hashlib.sha256(repr(about).encode()).hexdigest())
        name = f"{self.kernel.__name__}.tile.json"
        path = store.get_file(name)
        if path:
            with open(path, encoding="utf-8") as file:
                return Tile(**json.load(file))
        with torch.cuda.device(where.device):
            times = [_milliseconds(run, tile) for tile in tiles]
        best = tiles[times.index(min(times))]
        store.put(json.dumps(best._asdict()), name, binary=False)
        return best


def _milliseconds(run: Callable[[Tile], None], tile: Tile) -> float:
    try:
        return triton.testing.do_bench(lambda: run(tile), warmup=5, rep=20, return_mode="median")
    except triton.OutOfResources:  # a chip with less shared memory
        return float("inf")


def blocks(count: int, block: int) -> int:
    """How many blocks cover `count`."""
    return -(-count // block)


def power(count: int) -> int:
    """The least power of two that is not below `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()


def bucket(*counts: int) -> tuple[int, ...]:
    """Counts within a factor of two of each other as one key."""
    return tuple(count.bit_length() for count in counts)
