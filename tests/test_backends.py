"""The registry of backends, the choice among them, and what the native kernels promise beside their values."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import pytest
import torch
from cases import BACKENDS, BLOCKS
from machine import fresh, on_threads
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels import backends
from lambda_kernels.functional import conv2d, conv_block

X, W = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)


def run_python(code: str, **environment: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    return json.loads(fresh(code, **environment).splitlines()[-1])


def chosen(dtype: torch.dtype = torch.float32, pool: int = 2, device: str = "cpu") -> str:
    return backends.choose("conv_block", torch.empty(1, dtype=dtype, device=device), pool=pool).name


def test_registry() -> None:
    assert backends.names() == ["native", "cuda", "triton", "reference"]
    assert all(backends.reasons(name) == [] for name in BACKENDS)
    with pytest.raises(lk.BackendError, match="no backend 'nativ': choose from native, cuda, triton, reference, auto"):
        backends.reasons("nativ")


def test_contexts_nest_and_end() -> None:
    assert backends.current() == "auto" and chosen() == "native"
    with lk.use_backend("reference"):
        assert chosen() == "reference"
        with lk.use_backend("auto"):
            assert chosen() == "native"
        with pytest.raises(ZeroDivisionError), lk.use_backend("native"):
            _ = 1 / 0
        assert chosen() == "reference"
    with pytest.raises(lk.BackendError, match="no backend"), lk.use_backend("tpu"):
        pass
    assert backends.current() == "auto"


def test_a_plain_call_holds_until_the_next_and_ends_with_the_block_around_it() -> None:
    with lk.use_backend("auto"):
        lk.use_backend("reference")
        assert chosen() == "reference"
        with lk.use_backend("native"):
            assert chosen() == "native"
        assert chosen() == "reference"
        lk.use_backend("native")
        assert chosen() == "native"
    assert backends.current() == "auto"


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("tpu", lk.BackendError, "no backend 'tpu': choose from native, cuda, triton, reference, auto"),
        ("", lk.BackendError, "no backend ''"),
        ("Native", lk.BackendError, "no backend 'Native'"),
        (None, TypeError, "the name of a backend, got NoneType"),
        (["native"], TypeError, "the name of a backend, got list"),
    ],
)
def test_a_wrong_name_is_refused_at_once(name: Any, error: type[Exception], words: str) -> None:
    with lk.use_backend("reference"):
        with pytest.raises(error, match=words):
            lk.use_backend(name)
        assert backends.current() == "reference"


def test_a_decorator_holds_in_its_function_alone() -> None:
    @lk.use_backend("reference")
    def inside(times: int) -> list[str]:
        return [chosen()] * times

    assert chosen() == "native" and inside(times=2) == ["reference"] * 2 and chosen() == "native"
    assert inside.__name__ == "inside"


def test_a_context_holds_in_its_thread_alone() -> None:
    seen: list[str] = []
    with lk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_the_backward_pass_keeps_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = W.clone().requires_grad_()
    with lk.use_backend("reference"):
        y = conv_block(X, weight, None, None, None)
    monkeypatch.setattr(
        backends.native.Native, "norm_relu_pool_grad", lambda *_: pytest.fail("the native gradient ran")
    )
    y.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "pool", "device", "words"),
    [
        (torch.bfloat16, 2, "cpu", "built for float32 and float64, not torch.bfloat16"),
        (torch.float32, 3, "cpu", "pools by 1 or 2, not 3"),
        (torch.float32, 2, "meta", "runs on the CPU, the tensors are on meta"),
    ],
    ids=["dtype", "pool", "device"],
)
def test_what_native_refuses(dtype: torch.dtype, pool: int, device: str, words: str) -> None:
    assert chosen(dtype, pool, device) == "reference"
    with (
        lk.use_backend("native"),
        pytest.raises(lk.BackendError, match=f"'native' cannot run conv_block on {device}.*{words}"),
    ):
        chosen(dtype, pool, device)


def test_a_reason_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_said", set())
    with caplog.at_level(logging.INFO, "lambda_kernels"):
        for _ in range(3):
            chosen(pool=3)
            chosen()
    assert [r.getMessage() for r in caplog.records] == [
        "backend native does not run conv_block on cpu in torch.float32: it pools by 1 or 2, not 3"
    ]


REPORT = """
import json, logging, sys
messages = []
class Keep(logging.Handler):
    def emit(self, record): messages.append(record.getMessage())
logging.getLogger("lambda_kernels").addHandler(Keep()); logging.getLogger("lambda_kernels").setLevel(logging.INFO)
import torch, lambda_kernels as lk
from lambda_kernels import backends
def call():
    x = torch.empty(1)
    try: return backends.choose("conv_block", x, pool=2).name
    except lk.BackendError as error: return str(error)
names = [call(), call()]
with lk.use_backend("reference"): names.append(call())
print(json.dumps({"names": names, "reasons": backends.reasons("native"), "messages": messages}))
"""


@pytest.mark.parametrize("name", ["reference", "native", "auto", ""])
def test_environment_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_KERNELS_BACKEND", name)
    assert chosen() == ("reference" if name == "reference" else "native")
    with lk.use_backend("reference"):
        assert chosen() == "reference"


def test_wrong_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_KERNELS_BACKEND", "fast")
    with pytest.raises(lk.BackendError, match="no backend 'fast': choose from native, cuda, triton, reference, auto"):
        conv2d(X, W)


def test_an_instruction_set_that_cannot_be_had_leaves_the_reference() -> None:
    got = run_python(REPORT, LAMBDA_KERNELS_ISA="mmx")
    assert got["names"] == ["reference"] * 3
    assert got["reasons"][0].startswith("LAMBDA_KERNELS_ISA=mmx: this machine runs generic")
    assert len(got["messages"]) == 2 and all(got["reasons"][0] in message for message in got["messages"])
    assert got["messages"][0].startswith("CPUs compute by backend `reference`")
    named = run_python(REPORT, LAMBDA_KERNELS_ISA="mmx", LAMBDA_KERNELS_BACKEND="native")["names"][0]
    assert "'native' cannot run" in named and "LAMBDA_KERNELS_ISA=mmx" in named


CHECKSUMS = """
import json, sys, torch
from lambda_kernels import _C
torch.set_num_threads(2)
out = []
for dtype in (torch.float32, torch.float64):
    for pool in (1, 2):
        for c in (1, 5, 48, 600):
            g = torch.Generator().manual_seed(c)
            z = torch.randn(2, 3, c, 9, 7, generator=g, dtype=torch.float64).to(dtype)
            gamma, beta = torch.randn(2, 2, c, generator=g, dtype=torch.float64).to(dtype)
            y, index, mean, rstd = torch.ops.lambda_kernels.norm_relu_pool(z, gamma, beta, 1e-5, pool)
            grads = torch.ops.lambda_kernels.norm_relu_pool_grad(
                torch.ones_like(y), z, gamma, index, mean, rstd, pool, True)
            second = torch.ops.lambda_kernels.norm_relu_pool_grad_grad(
                torch.ones_like(y), z, gamma, index, mean, rstd, pool, z.flip(0), gamma, beta, True)
            for t in (y, mean, rstd, *grads, *second):
                out.append(float((t.double() * torch.arange(t.numel()).reshape(t.shape).cos()).sum()))
print(json.dumps({"isa": _C.isa(), "sums": out}))
"""


def test_every_instruction_set_gives_the_same_to_rounding() -> None:
    usable = run_python(REPORT, LAMBDA_KERNELS_ISA="mmx")["reasons"][0].partition("this machine runs ")[2].split(", ")
    assert "generic" in usable
    results = {isa: run_python(CHECKSUMS, LAMBDA_KERNELS_ISA=isa) for isa in usable}
    for isa, got in results.items():
        assert got["isa"] == isa
        # sums of many values, less than the values themselves
        torch.testing.assert_close(got["sums"], results["generic"]["sums"], rtol=1e-4, atol=1e-3)
    half = len(results["generic"]["sums"]) // 2  # float64
    for got in results.values():
        # as above
        torch.testing.assert_close(got["sums"][half:], results["generic"]["sums"][half:], rtol=1e-10, atol=1e-9)


def kernel_results(z: Tensor, pool: int) -> list[Tensor]:
    """Everything that the three operators return for z [T, N, C, H, W]."""
    tasks, _, channels = z.shape[:3]
    generator = torch.Generator().manual_seed(1)
    gamma, beta, v_gamma, v_beta = torch.randn(4, tasks, channels, generator=generator, dtype=torch.float64).to(z.dtype)
    ops = torch.ops.lambda_kernels
    y, index, mean, rstd = ops.norm_relu_pool(z, gamma, beta, 1e-5, pool)
    gy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(z.dtype)
    grads = ops.norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, pool, True)
    seconds = ops.norm_relu_pool_grad_grad(gy, z, gamma, index, mean, rstd, pool, z.flip(1), v_gamma, v_beta, True)
    without = ops.norm_relu_pool_grad_grad(gy, z, gamma, index, mean, rstd, pool, None, v_gamma, v_beta, True)
    return [y, index, mean, rstd, *grads, *seconds, *without]


SHAPES = [
    (1, 25, 64, 42, 42),
    (3, 5, 48, 21, 21),
    (2, 1, 5, 33, 47),
    (1, 75, 1, 9, 9),
    (2, 2, 600, 7, 5),
    (1, 4, 6, 1, 1),
]


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, ...], pool: int) -> None:
    z = torch.randn(shape)
    results = []
    for threads in (1, 2):
        with on_threads(threads):
            results.append(kernel_results(z, pool))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_every_element_is_written(shape: tuple[int, ...], pool: int) -> None:
    z = torch.randn(shape)
    clean = kernel_results(z, pool)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN, bytes with 255
    try:
        assert torch.empty(9).isnan().all()
        poisoned = kernel_results(z, pool)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned):
        assert torch.equal(a, b) and not (a.is_floating_point() and a.isnan().any())
    assert bool((clean[1] <= pool * pool).all())


@pytest.mark.parametrize("case", BLOCKS[:3], ids=[c.name for c in BLOCKS[:3]])
def test_operators_keep_torchs_rules(case: Any) -> None:
    z = torch.randn(2, case.images, case.width, *case.size)
    gamma, beta = torch.randn(1, case.width), torch.randn(2, case.width)
    ops = torch.ops.lambda_kernels
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(ops.norm_relu_pool.default, (z, gamma, beta, 1e-5, 2), test_utils=tests[:2])
    y, index, mean, rstd = ops.norm_relu_pool(z, gamma, beta, 1e-5, 2)
    for need_z in (True, False):
        arguments = (torch.randn_like(y), z, gamma, index, mean, rstd, 2)
        torch.library.opcheck(ops.norm_relu_pool_grad.default, (*arguments, need_z), test_utils=tests[:2])
        for v in (torch.randn_like(z), None):
            more = (*arguments, v, torch.randn_like(mean), beta, need_z)
            torch.library.opcheck(ops.norm_relu_pool_grad_grad.default, more, test_utils=tests[:2])


def test_operators_check_their_arguments() -> None:
    ops = torch.ops.lambda_kernels
    z, gamma = torch.randn(1, 2, 3, 4, 4), torch.ones(1, 3)
    y, index, mean, rstd = ops.norm_relu_pool(z, gamma, gamma, 1e-5, 2)
    wrong: list[tuple[Any, str]] = [
        (lambda: ops.norm_relu_pool(z[0], gamma, gamma, 1e-5, 2), "z must be"),
        (lambda: ops.norm_relu_pool(z[:, :0], gamma, gamma, 1e-5, 2), r"z must be .*got \[1, 0, 3, 4, 4\]"),
        (lambda: ops.norm_relu_pool(z, gamma, gamma, 1e-5, 3), "pool must be 1 or 2, got 3"),
        (lambda: ops.norm_relu_pool(z, gamma[:, :2], gamma, 1e-5, 2), r"gamma must be \[1, 3\] .*got \[1, 2\]"),
        (lambda: ops.norm_relu_pool(z, gamma, gamma.double(), 1e-5, 2), "beta must be .* in Double"),
        (lambda: ops.norm_relu_pool_grad(y[..., :1], z, gamma, index[..., :1], mean, rstd, 2, True), "index must be"),
        (lambda: ops.norm_relu_pool_grad(y, z, gamma, index, mean[:, :1], rstd, 2, True), r"mean must be \[1, 3\]"),
        (
            lambda: ops.norm_relu_pool_grad(y[..., :1], z, gamma, index, mean, rstd, 2, True),
            r"gy must be \[1, 2, 3, 2, 2\]",
        ),
        (
            lambda: ops.norm_relu_pool_grad_grad(y, z, gamma, index, mean[:, :1], rstd, 2, None, gamma, gamma, True),
            "mean",
        ),
        (
            lambda: ops.norm_relu_pool_grad_grad(
                y[..., :1], z, gamma, index[..., :1], mean, rstd, 2, None, gamma, gamma, True
            ),
            "index",
        ),
    ]
    for function, words in wrong:
        with pytest.raises(RuntimeError, match=words):
            function()


def test_inputs_are_left_as_they_were() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3).requires_grad_()
    before = x.clone(), weight.detach().clone()
    (conv_block(x, weight, None, None, None).sum() + conv2d(x, weight).sum()).backward()
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
