"""The Triton kernels compile ahead of time for the GPUs they are meant for, within registers and shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from machine import PATIENCE

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {
    "convolve",
    "weight_gradient",
    "sum_splits",
    "matrix_product",
    "moments",
    "merge",
    "normalise",
    "gradient_sums",
    "finish_sums",
    "dense_gradient",
    "cross_entropy",
    "head_forward",
    "head_backward",
    "sgd",
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "triton_aot.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu_and_dtype(rows: list[dict[str, Any]]) -> None:
    for architecture in (80, 90, 100):
        assert {row["kernel"] for row in rows if row["architecture"] == architecture} == KERNELS
        products = {(row["kernel"], row["dtype"]) for row in rows if row["architecture"] == architecture}
        for kernel in ("convolve", "weight_gradient", "matrix_product"):
            assert {dtype for name, dtype in products if name == kernel} == {
                "float32",
                "tf32",
                "bfloat16",
                "float16",
                "float64",
            }


@pytest.mark.slow
def test_nothing_spills_and_shared_memory_suffices(rows: list[dict[str, Any]]) -> None:
    # The ptxas of older versions puts a few bytes aside, of far fewer registers than there are, for one more block.
    aside = 0 if metadata.version("triton").startswith("3.9.") else 16
    assert [row for row in rows if row["stack"] > (aside if row["registers"] <= 128 else 0) or row["local"]] == []
    assert [row for row in rows if row["shared"] > row["shared_limit"]] == []


@pytest.mark.slow
def test_tiles_to_choose_from(rows: list[dict[str, Any]]) -> None:
    # A convolution within 99 KB, for consumer cards, in at least half of the tiles.
    tiles = [
        row
        for row in rows
        if (row["kernel"], row["dtype"], row["architecture"], row["channels"]) == ("convolve", "tf32", 90, 64)
        and not row["transposed"]
    ]
    assert len(tiles) >= 4 and sum(row["shared"] <= 99 * 1024 for row in tiles) * 2 >= len(tiles)


@pytest.mark.slow
def test_memory_is_read_in_16_bytes(rows: list[dict[str, Any]]) -> None:
    # Of 64 channels, side by side; the first block's three cannot be.
    wide = ("convolve", "moments", "normalise", "dense_gradient", "gradient_sums", "sum_splits", "merge")
    narrow = [
        (row["kernel"], row["dtype"], row["architecture"], row["tile"])
        for row in rows
        if row["kernel"] in wide and row["channels"] != 3 and not row["wide_loads"]
    ]
    assert narrow == []
