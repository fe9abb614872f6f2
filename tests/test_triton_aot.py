"""The Triton kernels compile ahead of time for the GPUs they are meant for, within registers and shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from machine import PATIENCE

from lambda_kernels.backends.table import cache_folder

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {
    "convolve",
    "weight_gradient",
    "sum_splits",
    "matrix_product",
    "moments",
    "merge_groups",
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


PRODUCTS = {"convolve", "weight_gradient", "matrix_product"}
OLDEST = "3.6.0"  # of the GPU machines; the pinned one is newer


def ahead_of_time(*options: str, triton: Path | None = None) -> Any:
    """What tests/triton_aot.py prints, with the triton of a folder instead of the installed one."""
    paths = [*([str(triton)] if triton else []), str(ROOT), str(ROOT / "tests")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "triton_aot.py"), *options],
        capture_output=True, text=True, env=environment | {"PYTHONPATH": os.pathsep.join(paths)}, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return ahead_of_time()


@pytest.fixture(scope="module")
def oldest_triton() -> Path:
    """A folder with the oldest triton that the backend takes; downloaded once where pip finds it."""
    if metadata.version("triton") == OLDEST:
        pytest.skip(f"triton {OLDEST} is the installed one")
    named = os.environ.get("LAMBDA_KERNELS_OLDEST_TRITON")
    if named:
        return Path(named)
    folder = cache_folder() / f"triton-{OLDEST}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--no-deps"]
            patience = ["--no-compile", "--retries", "1", "--timeout", "15"]
            done = subprocess.run(
                [*pip, *patience, "--target", f"{fresh}/triton", f"triton=={OLDEST}"], capture_output=True, text=True
            )
            if done.returncode != 0:
                pip_says = done.stderr.strip().rpartition("\n")[2]
                pytest.skip(
                    f"triton {OLDEST} cannot be downloaded, and LAMBDA_KERNELS_OLDEST_TRITON names none: {pip_says}"
                )
            with suppress(OSError):  # another process was first
                os.rename(f"{fresh}/triton", folder)
    return folder


def check_specialisations(found: dict[str, Any], version: str) -> None:
    assert found["triton"] == version
    assert found["tried"].keys() == KERNELS and found["failed"] == {}


def test_sizes_of_every_kind_are_compiled() -> None:
    # An argument that is 1 is a constant of the kernel, and a large one has 64 bits.
    check_specialisations(ahead_of_time("--specialisations"), metadata.version("triton"))


@pytest.mark.slow
def test_the_oldest_triton_compiles_sizes_of_every_kind(oldest_triton: Path) -> None:
    check_specialisations(ahead_of_time("--specialisations", triton=oldest_triton), OLDEST)


# Kernels compiled and tiles timed for a first adaptation of conv4 in TF32, 25 images of 84x84: seconds on a device.
BUDGET = {"11111": (36, 51), "00011": (27, 25), "00001": (20, 22)}


def test_an_adaptation_compiles_and_times_no_more_than_this() -> None:
    found = ahead_of_time("--budget", *BUDGET)
    for pattern, (compiles, timed) in BUDGET.items():
        assert found[pattern]["keys"] <= 11
        assert compiles * 0.8 < found[pattern]["compiles"] <= compiles, found
        assert timed * 0.8 < found[pattern]["timed"] <= timed, found


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


def aside(row: dict[str, Any]) -> int:
    """Bytes of the stack: some versions of ptxas put a few aside, of far fewer registers than there are."""
    return 16 if row["registers"] <= 128 else 0


@pytest.mark.slow
def test_nothing_spills_and_shared_memory_suffices(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["stack"] > aside(row) or row["local"]] == []
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
    # Two groups of four warps at least are on a multiprocessor: one multiplies while the other one loads.
    assert [row for row in tiles if row["blocks"] * row["options"]["num_warps"] < 8] == []


def wide(row: dict[str, Any]) -> int:
    """Instructions that read 16 bytes of device memory."""
    return row["ptx"].get("copies_16", 0) + row["ptx"].get("loads_16", 0)


@pytest.mark.slow
def test_memory_is_read_in_16_bytes(rows: list[dict[str, Any]]) -> None:
    # Of 64 channels, side by side; the first block's three cannot be, nor need the few sums of a linear layer.
    kernels = {"convolve", "weight_gradient", "moments", "normalise", "dense_gradient", "gradient_sums", "sum_splits"}
    kernels |= {"merge_groups"}
    narrow = [
        (row["kernel"], row["dtype"], row["architecture"], row["tile"])
        for row in rows
        if (row["kernel"] in kernels or (row["kernel"], row["dtype"]) == ("matrix_product", "tf32"))
        and row["channels"] not in (1, 3)
        and not wide(row)
    ]
    assert narrow == []


def check_products(rows: list[dict[str, Any]]) -> None:
    """What the products do on sm_90, from 64 channels."""
    rows = [row for row in rows if row["architecture"] == 90 and row["kernel"] in PRODUCTS]
    assert {row["kernel"] for row in rows} == PRODUCTS
    # A product of fused multiply-adds, of no tensor cores of a warp group, may have a few bytes put aside.
    alone = [row for row in rows if row["precision"] == "ieee" and row["dtype"] in ("float32", "float64")]
    may = [row for row in alone if 0 < row["stack"] <= aside(row) and not row["local"]]
    assert [row for row in rows if row not in may and (row["stack"] or row["local"] or row["sass"]["spills"])] == []
    # A product of 64 rows or more is one of a warp group, a smaller one of a warp, but for fused multiply-adds.
    by_cores = [row for row in rows if row["precision"] != "ieee" or row["dtype"] == "bfloat16"]
    for row in by_cores:
        group = row["tile"][1 if row["swapped"] else 0] >= 64
        assert bool(row["sass"]["HGMMA"]) == bool(row["ptx"]["wgmma"]) == group, row
        assert bool(row["sass"]["HMMA"]) == bool(row["ptx"]["mma"]) == (not group), row
    assert {row["kernel"] for row in by_cores if row["sass"]["HGMMA"]} == PRODUCTS
    # All that is read in the loop is read 16 bytes at a time.
    of_layers = [row for row in by_cores if row["channels"] == 64 and min(row["tile"]) >= 32]
    assert {row["pool"] for row in of_layers} == {None, 1, 2}
    assert {(row["kernel"], row["dtype"]) for row in of_layers} == {
        (kernel, dtype) for kernel in ("convolve", "weight_gradient") for dtype in {row["dtype"] for row in by_cores}
    }
    for row in of_layers:
        ptx, sass = row["ptx"], row["sass"]
        assert not any(ptx.get(f"copies_{n}") for n in (2, 4, 8)), row
        # A scale for each output is read once, behind the loop.
        assert (row["pool"] or 1) > 1 or not any(ptx.get(f"loads_{n}") for n in (2, 4, 8)), row
        assert wide(row) and ptx.get("loop_loads", 0) <= 16 and sass["LDGSTS"] == sass["LDGSTS.128"], row
        if "x" not in row["precision"]:
            assert ptx.get("copies_16") and not ptx.get("loop_loads"), row
    linear = [row for row in by_cores if (row["kernel"], row["dtype"]) == ("matrix_product", "tf32")]
    assert linear and [row for row in linear if row["ptx"].get("copies_4") or not wide(row)] == []
    # Float32's exactness rests on sums that are added to each other outside of the tensor cores.
    split = [row for row in rows if "x" in row["precision"] and (row["transposed"] or row["kernel"] != "convolve")]
    assert {row["precision"] for row in split} == {"bf16x3", "bf16x6", "tf32x3"}
    assert [row for row in split if not row["added_outside"]] == []
    assert {tuple(row["tile"]) for row in rows if row["swapped"]} == {(128, 64, 32), (256, 64, 32)}


@pytest.mark.slow
def test_products_use_the_tensor_cores_of_a_warp_group(rows: list[dict[str, Any]]) -> None:
    check_products(rows)


@pytest.mark.slow
def test_products_do_so_by_the_oldest_triton(oldest_triton: Path) -> None:
    check_products(ahead_of_time("--products", triton=oldest_triton))
