"""The first block from the moments of its patches, on the CPU: every instruction set, odd sizes, exactness."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from cases import EXACT, IMAGES, ImageCase, assert_as_exact
from machine import fresh, on_threads
from torch import Tensor

from lambda_kernels.backends.native import Native
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec

EPS = 1e-5


LARGE = (
    ImageCase("28x28", 5, 1, 64, (28, 28)),
    ImageCase("84x84", 2, 3, 32, (84, 84)),
    ImageCase("75-images", 75, 3, 5, (7, 7)),
    ImageCase("21x21", 3, 1, 48, (21, 21), pool=1),
    ImageCase("33x47", 1, 3, 100, (33, 47)),
    ImageCase("one-row", 3, 2, 5, (1, 8), (3, 2), pool=1),  # fewer rows of results than taps that read each row
    ImageCase("three-rows", 4, 1, 6, (7, 9), (5, 5), padding=(0, 0), pool=1),
)
CASES = {case.name: case for case in (*IMAGES, *LARGE)}


def operands(
    case: ImageCase, dtype: torch.dtype, tasks: int, shared: bool = False, shift: float = 0.0
) -> dict[str, Tensor]:
    """The operands, drawn in float64, and the gradient of y."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own = 1 if shared else tasks
    taps = case.inputs * case.kernel[0] * case.kernel[1]
    x = draw(tasks, case.images, case.inputs, *case.size) + shift
    drawn = {
        "x": x,
        "weight": draw(own, case.width, case.inputs, *case.kernel) / taps**0.5,
        "gamma": draw(own, case.width),
        "beta": draw(own, case.width),
    }
    return {name: t.to(dtype) for name, t in drawn.items()}


def results(
    backend: Reference, case: ImageCase, given: dict[str, Tensor], index: Tensor | None = None
) -> dict[str, Tensor]:
    """All that the three operations give; the gradients by the given choice of maxima."""
    x, weight, gamma, beta = given.values()
    moments = backend.image_moments(x, case.kernel, case.spec)
    y, own, mean, rstd = backend.image_block(x, weight, gamma, beta, moments, BlockSpec(case.spec, EPS, case.pool))
    index = own if index is None else index
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    saved = index, mean, rstd, moments
    block = BlockSpec(case.spec, EPS, case.pool)
    dweight, dgamma, dbeta = backend.image_block_grad(gy, x, weight, gamma, *saved, block)
    found = {"y": y, "mean": mean, "rstd": rstd, "dweight": dweight, "dgamma": dgamma, "dbeta": dbeta}
    return {"moments": moments, "index": own, **found}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name: str, dtype: torch.dtype, tasks: int, shared: bool) -> None:
    case = CASES[name]
    truth = results(Reference(), case, operands(case, torch.float64, tasks, shared))
    given = operands(case, dtype, tasks, shared)
    assert Native().image_refusals(given["x"], given["weight"], BlockSpec(case.spec, 1e-5, case.pool)) == []
    stock = results(Reference(), case, given, truth["index"])
    got = results(Native(), case, given, truth["index"])
    if dtype == torch.float64:
        assert torch.equal(got.pop("index"), truth["index"])
    terms = case.images * case.size[0] * case.size[1]
    rounding = 1e-14 if dtype == torch.float64 else 1e-6  # of the images, which are moved to zero first
    assert (got.pop("moments") - truth["moments"]).abs().max() <= rounding * truth["moments"].abs().max()
    for key in got:
        if dtype == torch.float64:
            torch.testing.assert_close(got[key], truth[key], **EXACT)
        elif key != "index":
            assert_as_exact(key, got[key], stock[key], truth[key], terms)


def test_images_far_from_zero_lose_no_more_than_in_torch() -> None:
    case = CASES["28x28"]._replace(padding=(0, 0))
    given = operands(case, torch.float64, 1, shift=100.0)
    truth = results(Reference(), case, given)
    single = {n: t.float() for n, t in given.items()}
    x, weight, gamma, beta = single.values()
    stock = Reference().conv_block(x, weight, gamma, beta, BlockSpec(case.spec, EPS, case.pool))
    got = results(Native(), case, single, truth["index"])
    for name, theirs in zip(("y", "mean", "rstd"), (stock[1], *stock[3:])):
        assert_as_exact(name, got[name], theirs, truth[name])


def test_nan_comes_through() -> None:
    case = CASES["75-images"]
    given = operands(case, torch.float32, 1)
    given["x"][0, 0, 0, 0, 0] = torch.nan
    assert results(Native(), case, given)["y"].isnan().all()


def test_threads_do_not_change_a_bit() -> None:
    for case in CASES.values():
        found = []
        for threads in (1, 2):
            with on_threads(threads):
                found.append(results(Native(), case, operands(case, torch.float32, 1)))
        assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_every_element_is_written() -> None:
    clean = {n: results(Native(), case, operands(case, torch.float32, 2)) for n, case in CASES.items()}
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN, bytes with 255
    try:
        for name, case in CASES.items():
            again = results(Native(), case, operands(case, torch.float32, 2))
            assert all(torch.equal(clean[name][n], again[n]) for n in again), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_it_does_not_take() -> None:
    x, weight = torch.randn(1, 2, 4, 6, 6), torch.randn(1, 3, 4, 3, 3)
    spec = ConvSpec((1, 1), (1, 1), (1, 1), 1)
    assert "not 36" in "".join(Native().image_refusals(x, weight, BlockSpec(spec, 1e-5, 2)))
    with pytest.raises(RuntimeError, match="at most 32 numbers per patch"):
        Native().image_moments(x, (3, 3), spec)
    assert "pools by 1 or 2" in "".join(Native().image_refusals(x, weight[:, :, :3], BlockSpec(spec, 1e-5, 3)))


CHECKSUMS = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import test_image_block as t
from lambda_kernels import _C
torch.set_num_threads(2)
found = {}
for name, case in t.CASES.items():
    for dtype in (torch.float32, torch.float64):
        for key, value in t.results(t.Native(), case, t.operands(case, dtype, 1)).items():
            found[f"{name} {dtype} {key}"] = (
                float((value.double() * torch.arange(value.numel()).reshape(value.shape).cos()).sum()),
                float(value.double().norm()),
            )
print(json.dumps({"isa": _C.isa(), "found": found}))
"""


def test_every_instruction_set_gives_the_same_to_rounding() -> None:
    here = os.path.dirname(os.path.abspath(__file__))

    def run(isa: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(fresh(CHECKSUMS, here, LAMBDA_KERNELS_ISA=isa))
        return found

    plain = run("generic")["found"]
    for isa in ("avx2", "avx512"):
        report = run(isa)
        assert report["isa"] == isa
        for key, (value, norm) in report["found"].items():
            # a maximum that rounding turns is another index: in float32 it may move sums by a few elements
            slack = 1e-10 if "float64" in key else 1e-2 if "index" in key else 1e-4
            assert abs(value - plain[key][0]) <= slack * norm + 1e-9, (isa, key)
