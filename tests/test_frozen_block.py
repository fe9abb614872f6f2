"""The frozen block in one pass: the reference's result, whatever the memory, the values and the threads."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cases import EXACT, assert_as_exact, layouts
from machine import on_threads
from winograd_cases import EPS, FROZEN, OPS, block, check_frozen, frozen_operands

from lambda_kernels.agreement import within
from lambda_kernels.backends import native
from lambda_kernels.backends.native import Native
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("tasks", "shared"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_block_is_the_references(name: str, tasks: int, shared: bool) -> None:
    check_frozen(FROZEN[name], tasks, shared)


@pytest.mark.parametrize("name", ["7x7", "rgb-48"])
def test_operands_of_a_frozen_block_are_shared_one_by_one(name: str) -> None:
    case = FROZEN[name]
    given = frozen_operands(case, torch.float64, 3)
    for own in product((True, False), repeat=4):
        some = tuple(t if wanted else t[:1] for t, wanted in zip(given, own))
        truth = block(Reference(), case, some)
        got = OPS.frozen_block(*some, native._geometry(BlockSpec(case.spec, EPS, case.pool)), EPS)
        for value, want in zip(got, truth.values()):
            torch.testing.assert_close(value, want, **EXACT)
        assert got[0].shape[0] == (3 if any(own) else 1)


@pytest.mark.parametrize("name", ["7x7", "width-600", "rgb-48"])
def test_memory_layouts_of_a_frozen_block(name: str) -> None:
    case = FROZEN[name]
    x, weight, gamma, beta = frozen_operands(case, torch.float32, 2)
    geometry = native._geometry(BlockSpec(case.spec, EPS, case.pool))
    want = OPS.frozen_block(x, weight, gamma, beta, geometry, EPS)
    weights = {**layouts(weight), "transposed": weight.transpose(1, 2).contiguous().transpose(1, 2)}
    for images, other in product(layouts(x).values(), weights.values()):
        other_gamma, other_beta = (torch.stack([t, t], -1)[..., 0] for t in (gamma, beta))
        got = OPS.frozen_block(images, other, other_gamma, other_beta, geometry, EPS)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", ["7x7", "2x2", "21x21", "no-padding", "rgb-48", "no-pool", "stride"])
@pytest.mark.parametrize("shift", [10.0, 1000.0])
def test_images_far_from_zero_lose_no_more_than_in_torch(name: str, shift: float) -> None:
    case = FROZEN[name]
    case = case._replace(spec=case.spec._replace(padding=(0, 0))) if min(case.x[2:]) > 3 else case
    single = frozen_operands(case, torch.float32, 1, shift=shift)
    truth = block(Reference(), case, [t.double() for t in single])
    got, theirs = (block(backend, case, single) for backend in (Native(), Reference()))
    for key in got:
        assert_as_exact(f"{name} {key}", got[key], theirs[key], truth[key])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FROZEN)
def test_nan_in_one_image_comes_out_of_every_image_of_its_task(name: str, dtype: torch.dtype) -> None:
    case = FROZEN[name]
    given = frozen_operands(case, dtype, 2)
    clean = block(Native(), case, given)
    given[0][1, -1, -1, case.x[2] // 2, case.x[3] // 2] = torch.nan
    truth, got = (block(backend, case, given) for backend in (Reference(), Native()))
    for key in got:
        assert torch.equal(got[key][0], clean[key][0])
        assert torch.equal(got[key].isnan(), truth[key].isnan())
    assert got["y"][1].isnan().all()


def test_zero_gamma_gives_beta() -> None:
    for name in ("7x7", "rgb-48"):
        case = FROZEN[name]
        x, weight, gamma, beta = frozen_operands(case, torch.float32, 1)
        y = block(Native(), case, (x, weight, torch.zeros_like(gamma), beta))["y"]
        assert torch.equal(y, beta.relu()[:, None, :, None, None].expand_as(y))


def test_constant_images_have_no_variance() -> None:
    """Neither a square root of less than zero nor a mean that is off."""
    case = FROZEN["7x7"]._replace(spec=ConvSpec((1, 1), (0, 0), (1, 1), 1))
    _, weight, gamma, beta = frozen_operands(case, torch.float32, 1)
    x = torch.full((1, *case.x), 3.0)
    y, mean, rstd = block(Native(), case, (x, weight, gamma, beta)).values()
    torch.testing.assert_close(mean, 3.0 * weight.sum((2, 3, 4)), **within(torch.float32))
    # a variance of next to nothing beside eps
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5), rtol=1e-4, atol=0.0)
    assert y.isfinite().all()


def test_a_frozen_block_after_a_run_of_nan() -> None:
    for case in FROZEN.values():
        given = frozen_operands(case, torch.float32, 1)
        want = block(Native(), case, given)
        block(Native(), case, [torch.full_like(t, torch.nan) for t in given])
        again = block(Native(), case, given)
        assert all(torch.equal(again[key], want[key]) for key in want), case.name


def test_threads_change_a_frozen_block_by_rounding_alone() -> None:
    for case in FROZEN.values():
        for tasks in (1, 3):
            given, found = frozen_operands(case, torch.float64, tasks), []
            for threads in (1, 2):
                with on_threads(threads):
                    found.append(block(Native(), case, given))
            for key in found[0]:
                torch.testing.assert_close(found[0][key], found[1][key], **EXACT)
