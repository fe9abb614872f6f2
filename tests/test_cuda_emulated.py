"""The emulated CUDA kernels where memory begins at odd addresses, and with products and sums contracted to fused
multiply-adds, as nvcc does: the results are the same to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import name_of, norm_block
from cuda_checks import channels_last
from cuda_emulator import build
from torch import Tensor

from lambda_kernels.agreement import tolerance
from lambda_kernels.backends.cuda import Cuda
from lambda_kernels.spec import BlockSpec, ConvSpec

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BLOCK = BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, 2)


def has_fma() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and " fma " in cpu.read_text()


@pytest.fixture(scope="module")
def contracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not has_fma():
        pytest.skip("needs a CPU with fused multiply-add: /proc/cpuinfo names none")
    flags = "-ffp-contract=fast", "-mfma", "-fexpensive-optimizations"
    return build.library(tmp_path_factory.mktemp("contracted"), *flags)


def at_an_odd_address(t: Tensor) -> Tensor:
    """The same values in dense memory of the same order, one element further than an allocation starts."""
    moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride())
    assert moved.data_ptr() % 16 == t.element_size()
    return moved.copy_(t)


def everything(backend: Any, dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> dict[str, list[Tensor]]:
    """The results of all kernels, whose operands `place` puts into memory."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return place(channels_last(drawn) if len(shape) == 5 and shape[-1] > 3 else drawn)

    found: dict[str, list[Tensor]] = {}
    z, gamma, beta = made(2, 3, 16, 7, 6), made(2, 16), made(1, 16)
    found["norm"] = list(backend.norm_relu_pool(z, gamma, beta, norm_block(2)))
    saved = [place(t) for t in found["norm"][1:]]
    gy = made(2, 3, 16, 3, 3).to(dtype)
    gradients = backend.norm_relu_pool_grad(place(channels_last(gy)), z, gamma, *saved, norm_block(2), True)
    found["norm gradient"] = list(gradients)
    x, weight = made(1, 3, 3, 9, 8), made(2, 16, 3, 3, 3)
    moments = place(backend.image_moments(x, (3, 3), BLOCK.conv))
    found["image"] = [moments, *backend.image_block(x, weight, gamma, beta, moments, BLOCK)]
    index, mean, rstd = (place(t) for t in found["image"][2:])
    gy = made(2, 3, 16, 4, 4)
    found["image gradient"] = list(backend.image_block_grad(gy, x, weight, gamma, index, mean, rstd, moments, BLOCK))
    logits, labels = made(2, 5, 7), torch.randint(7, (2, 5), generator=generator)
    found["loss"] = list(backend.cross_entropy_grad(logits, place(labels)))
    parameters = [made(9, 5), made(130)]
    backend.sgd_(parameters, [made(9, 5), made(130)], [0.1, 0.2])
    found["update"] = parameters
    first = [place(p) for p in (made(8, 4, 3, 3) * 0.3, made(8), made(8), made(7, 72) * 0.1, made(7))]
    steps = backend.inner_loop(made(2, 5, 4, 6, 7), labels, first, [True] * 5, [BLOCK], 2, [0.1])
    found["steps"] = [steps.rows, *steps.updated]
    return found


def same_to_rounding(got: dict[str, list[Tensor]], want: dict[str, list[Tensor]], dtype: torch.dtype) -> None:
    allowed = 10 * tolerance(dtype).operation
    for name, results in want.items():
        for mine, theirs in zip(got[name], results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=allowed, atol=allowed, msg=f"{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=name_of)
def test_operands_at_odd_addresses(dtype: torch.dtype, emulated_library: Path) -> None:
    backend = Cuda(emulated_library, "cpu")
    got, want = (everything(backend, dtype, place) for place in (at_an_odd_address, torch.clone))
    same_to_rounding(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_contracted_to_fused_multiply_adds(dtype: torch.dtype, emulated_library: Path, contracted: Path) -> None:
    got, want = (everything(Cuda(path, "cpu"), dtype, torch.clone) for path in (contracted, emulated_library))
    same_to_rounding(got, want, dtype)
    assert not all(map(torch.equal, got["norm"], want["norm"])), "nothing was contracted"
