"""The build of the CUDA kernels by nvcc, what they take of a device, and the emulator that runs them on the CPU."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import setuptools
import torch
from cases import norm_block
from cuda_emulator import build

from lambda_kernels.backends import cuda
from lambda_kernels.backends.base import Call
from lambda_kernels.backends.cuda import Cuda, Library

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROOT = Path(__file__).resolve().parents[1]
# The emulator itself: what it must not let pass.

BROKEN = """
#include "common.cuh"
namespace {
__global__ void barrier(int*) { if (threadIdx.x < 40) __syncthreads(); else __shfl_sync(0xffffffffu, 1, 0); }
__global__ void exchange(int*) { if (threadIdx.x != 3) __shfl_xor_sync(0xffffffffu, 1, 1); }
__global__ void shared(float* out) {
  __shared__ float values[2];
  if (threadIdx.x == 0) values[0] = 1;
  __syncthreads();
  if (threadIdx.x < 2) out[threadIdx.x] = values[threadIdx.x];
}
__global__ void grid(unsigned* counter, unsigned blocks, float* out) {
  __shared__ float own;
  if (threadIdx.x == 0) {
    own = float(blockIdx.x);
    reinterpret_cast<float*>(lk::dynamic_shared())[0] = own;
    atomicAdd(counter, 1u);
    while (*static_cast<volatile unsigned*>(counter) < blocks) __nanosleep(32);
    out[blockIdx.x] = own + reinterpret_cast<float*>(lk::dynamic_shared())[0];
  }
  __syncthreads();
}
__global__ void order(float* out) {
  if (threadIdx.x == 0) out[1 + int(out[0])] = float(blockIdx.x), out[0] += 1;
}
__global__ void waits(int threads) {
  if (int(threadIdx.x) < threads) lk::wait_for_launch_before();
}
}
LK_EXPORT int order_of_blocks(float* out) { return lk::launch(order, 40, dim3(32), nullptr, out); }
LK_EXPORT int together(unsigned* counter, unsigned awaited, int blocks, float* out) {
  return lk::launch_together(grid, blocks, dim3(64), 16, nullptr, counter, awaited, out);
}
LK_EXPORT int dependent(int allowed, int threads) {
  lk::dependent_launches = allowed;
  return lk::launch(waits, 2, dim3(32), nullptr, threads);
}
LK_EXPORT int run(int which, float* out) {
  int* none = nullptr;
  if (which == 0) return lk::launch(barrier, 3, dim3(64), nullptr, none);
  if (which == 1) return lk::launch(exchange, 1, dim3(32), nullptr, none);
  return lk::launch(shared, 1, dim3(8, 8), nullptr, out);
}
LK_EXPORT const char* words() { return cudaGetErrorString(cudaErrorLaunchFailure); }
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.cu").write_text(BROKEN)
    command = ["g++", *build.FLAGS, f"-I{build.HERE}", f"-I{build.SOURCES}", "-shared", "-x", "c++"]
    subprocess.run([*command, str(folder / "broken.cu"), "-o", str(folder / "broken.so")], check=True)
    code = ctypes.CDLL(str(folder / "broken.so"))
    code.words.restype = ctypes.c_char_p
    return code


def test_the_emulator_finds_deadlocks_and_unwritten_shared_memory(broken: Any) -> None:
    code = broken
    out = (ctypes.c_float * 2)()
    assert code.run(0, out) == 719
    words = rb"deadlock in block [012] of 3: 40 threads wait at a barrier, 24 at a warp exchange, 0 sleep"
    assert re.match(words, code.words())
    assert code.run(1, out) == 719 and b"31 at a warp exchange, 0 sleep, 1 have ended" in code.words()
    assert code.run(2, out) == 0 and out[0] == 1 and out[1] != out[1]


def test_emulated_blocks_run_together_where_they_may_wait_for_each_other(broken: Any) -> None:
    out, counter = (ctypes.c_float * 8)(), ctypes.c_uint(0)
    assert broken.together(ctypes.byref(counter), 5, 5, out) == 0 and counter.value == 5
    assert list(out)[:5] == [0, 2, 4, 6, 8]  # each block has its own shared memory, of both kinds
    counter.value = 0
    assert broken.together(ctypes.byref(counter), 6, 5, out) == 719  # they wait for one that is not there
    assert re.match(rb"deadlock in block \d of 5: 63 threads wait at a barrier, .* 1 sleep", broken.words())
    assert broken.together(ctypes.byref(counter), 0, 7, out) == 720  # more than the device holds at a time


def test_emulated_blocks_run_in_another_order_in_each_launch(broken: Any) -> None:
    orders = []
    for _ in range(2):
        out = (ctypes.c_float * 41)()
        assert broken.order_of_blocks(out) == 0
        orders.append(list(out)[1:])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40)) and orders[0] != orders[1]
    assert all(order != sorted(order) for order in orders)


def test_a_thread_that_does_not_wait_for_the_launch_before_is_found(broken: Any) -> None:
    assert broken.dependent(0, 0) == broken.dependent(1, 32) == 0
    assert broken.dependent(1, 31) == 719 and b"did not wait for the launch before" in broken.words()
    assert broken.dependent(0, 31) == 0


@pytest.mark.slow
def test_no_kernel_leaves_its_buffers(tmp_path: Path) -> None:
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")
    objects = build.compile_all(tmp_path, *checks)
    driver = tmp_path / "driver"
    flags = [*build.FLAGS, *checks, f"-I{build.HERE}"]
    subprocess.run(["g++", *flags, *map(str, [build.HERE / "driver.cpp", *objects]), "-o", str(driver)], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run([driver], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr


# The build by nvcc.


@pytest.fixture(scope="module")
def setup_py() -> Iterator[dict[str, Any]]:
    """The names of setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.chdir(ROOT)
        yield runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("wish", "names"),
    [
        ("", ["8.0", "9.0", "10.0+PTX"]),
        ("8.0;9.0a;10.0+PTX", ["8.0", "9.0a", "10.0+PTX"]),
        (" 7.5 8.6+PTX  8.6+PTX;", ["7.5", "8.6+PTX"]),
    ],
)
def test_architectures(setup_py: Any, monkeypatch: pytest.MonkeyPatch, wish: str, names: list[str]) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup_py["architectures"]() == names


def test_flags_of_architectures(setup_py: Any) -> None:
    assert setup_py["generated_code"](["9.0a", "10.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_wrong_wishes(setup_py: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(SystemExit, match="names 'Hopper': write compute capabilities, such as TORCH_CUDA_ARCH_LIST="):
        setup_py["architectures"]()
    monkeypatch.setenv("LAMBDA_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        setup_py["wanted_nvcc"](torch)
    monkeypatch.setenv("LAMBDA_KERNELS_CUDA", "1")
    monkeypatch.setitem(setup_py["wanted_nvcc"].__globals__, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="no nvcc was found: install the CUDA toolkit and set CUDA_HOME"):
        setup_py["wanted_nvcc"](torch)
    monkeypatch.setitem(setup_py["wanted_nvcc"].__globals__, "find_nvcc", lambda: "nvcc")
    assert setup_py["wanted_nvcc"](torch) == "nvcc"
    monkeypatch.setenv("LAMBDA_KERNELS_CUDA", "0")
    assert setup_py["wanted_nvcc"](torch) is None
    monkeypatch.delenv("LAMBDA_KERNELS_CUDA")
    assert setup_py["wanted_nvcc"](torch) == ("nvcc" if torch.version.cuda else None)


def test_nvcc_is_found_by_cuda_home(setup_py: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.1, V99.1.2'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py["find_nvcc"]() == str(nvcc) and setup_py["nvcc_version"](str(nvcc)) == "99.1, V99.1.2"


class Built(NamedTuple):
    library: Path
    report: str  # of ptxas, with demangled names
    runs: Path  # a file for each run of nvcc
    again: Any  # builds once more


@pytest.fixture(scope="module")
def built(setup_py: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The library for an A100, an H200 and a B200, with ptxas's report."""
    nvcc = setup_py["find_nvcc"]()
    if nvcc is None or shutil.which("c++filt") is None:
        pytest.skip("needs nvcc of the CUDA toolkit, and c++filt: not found")
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "runs").mkdir()
    reporting = folder / "nvcc"
    log = f'"{folder}/runs/$$"'
    reporting.write_text(f'#!/bin/sh\n"{nvcc}" -Xptxas=-v "$@" 2>{log} || {{ cat {log} >&2; exit 1; }}\n')
    reporting.chmod(0o755)

    def again() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MAX_JOBS", "2")
            names = ["8.0", "9.0a", "10.0"]
            setup_py["build_cuda"](str(reporting), names, "g++", folder / "objects", folder / "lib" / "_cuda.so")

    again()
    text = "".join(p.read_text() for p in sorted((folder / "runs").iterdir()))
    report = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    return Built(folder / "lib" / "_cuda.so", report, folder / "runs", again)


# The most that any instance of a kernel may take, on any of the three architectures: registers per thread, bytes of
# shared memory a block. 128 registers are two blocks of 256 threads on a multiprocessor.
BOUNDS = {
    "moments": (128, 36864),
    "merge_moments": (96, 8192),
    "apply": (128, 0),
    "reduce": (128, 36864),
    "merge_reduce": (64, 4096),
    "dense": (128, 0),
    "image_moments": (128, 47104),
    "merge_image_moments": (64, 2048),
    "image_statistics": (64, 0),
    "image_apply": (128, 36864),
    "image_products": (128, 32768),
    "image_reduce": (200, 25600),
    "merge_image_reduce": (64, 4096),
    "cross_entropy": (96, 1024),
    "sgd": (64, 0),
    "last_steps": (255, 0),  # one block on a multiprocessor, its shared memory is dynamic
}
ENTRY = re.compile(
    r"Compiling entry function '(?:void )?(?:lk::)?\(anonymous namespace\)::(?P<kernel>\w+)(?P<types><.*?>)?\(.*' "
    r"for '(?P<sm>\w+)'\n.*\n"
    r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?"
)


@pytest.mark.slow
def test_resources(built: Built) -> None:
    seen: dict[str, set[str]] = {}
    for found in ENTRY.finditer(built.report):
        what = f"{found['kernel']}{found['types'] or ''} for {found['sm']}"
        assert found["stack"] == found["stores"] == found["loads"] == "0", f"{what} uses local memory"
        registers, shared = BOUNDS[found["kernel"]]
        assert int(found["registers"]) <= registers, f"{what} uses {found['registers']} registers"
        assert int(found["shared"] or 0) <= shared, f"{what} uses {found['shared']} bytes of shared memory"
        seen.setdefault(found["kernel"], set()).add(found["sm"])
    assert seen == {kernel: {"sm_80", "sm_90a", "sm_100"} for kernel in BOUNDS}
    assert built.report.count("Compiling entry function") == len(ENTRY.findall(built.report))


@pytest.mark.slow
def test_what_did_not_change_is_not_compiled_again(built: Built) -> None:
    def compiled() -> int:
        return sum("Compiling" in path.read_text() for path in built.runs.iterdir())

    before = compiled()
    built.library.unlink()
    built.again()
    assert built.library.exists() and compiled() == before == len(list((ROOT / "csrc" / "cuda").glob("*.cu"))) - 1


@pytest.mark.slow
def test_the_built_library_loads_and_names_cudas_errors(built: Built) -> None:
    library = Library(built.library)
    assert library.architectures == "8.0 9.0a 10.0"
    needed = subprocess.run(["ldd", built.library], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed and "torch" not in needed and "python" not in needed
    if torch.cuda.is_available():
        return
    backend = Cuda(built.library, "cpu")
    words = r"lk_norm_relu_pool failed with CUDA error \d+ \(.+\) for z \[1, 2, 3, 4, 5\]"
    with pytest.raises(RuntimeError, match=words):
        backend.norm_relu_pool(torch.randn(1, 2, 3, 4, 5), torch.ones(1, 3), torch.ones(1, 3), norm_block(2))
    (why,) = Cuda(built.library).reasons()
    assert "torch.cuda.is_available() is False" in why


def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulated_library: Path) -> None:
    (why,) = Cuda(tmp_path / "_cuda.so").reasons()
    assert why.startswith("the CUDA kernels are not built (there is no _cuda.so)") and "LAMBDA_KERNELS_CUDA=1" in why
    (tmp_path / "_cuda.so").write_text("no library")
    (why,) = Cuda(tmp_path / "_cuda.so").reasons()
    assert "_cuda.so is of no use" in why and "build lambda-kernels again" in why
    assert Cuda(emulated_library, "cpu").reasons() == []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    monkeypatch.setattr(Library, "architectures", property(lambda _: "8.0 9.0", lambda *_: None), raising=False)
    (why,) = Cuda(emulated_library).reasons()
    assert why == (
        "emulated.so is built for 8.0 9.0: cuda:0 (T4) has compute capability 7.5, build lambda-kernels again with "
        "TORCH_CUDA_ARCH_LIST=7.5"
    )
    (why,) = Cuda(emulated_library).refusals(Call("conv_block", torch.device("cuda:0"), torch.float32, pool=2))
    assert "capability 7.5" in why

    class Other(ctypes.Structure):
        _fields_ = [("one", ctypes.c_int64)]

    monkeypatch.setitem(cuda.STRUCTURES, "sgd", Other)
    (why,) = Cuda(emulated_library, "cpu").reasons()
    assert re.search(r"Other has \d+ bytes there, 8 here\): build lambda-kernels again", why)


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("8.0 9.0", (9, 0), True),
        ("8.0 9.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0 9.0", (10, 0), False),
        ("8.0 9.0+PTX", (10, 0), True),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("", (9, 0), False),
    ],
)
def test_what_code_covers_which_device(architectures: str, capability: tuple[int, int], covered: bool) -> None:
    assert cuda.covers(architectures, capability) is covered
