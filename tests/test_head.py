"""A linear layer under cross-entropy and its gradients as one operation: two launches of Triton's, or the parts of any
backend."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_as_exact, name_of
from torch import Tensor

from lambda_kernels.backends.autotune import Autotune
from lambda_kernels.backends.base import Call
from lambda_kernels.backends.reference import Reference
from lambda_kernels.backends.table import Choice, Table
from lambda_kernels.backends.triton import MOST_WAYS, Triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
# numpy's, of triton's interpreter
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON: Any = Triton()
REFERENCE: Any = Reference()
ALL = (True, True, True)
Results = tuple[Any, ...]


def operands(  # x, weight, bias, labels
    tasks: int, images: int, ways: int, features: int, dtype: torch.dtype = torch.float64, shared: str = ""
) -> Any:
    def made(name: str, *shape: int) -> Tensor:
        return torch.randn(1 if name in shared else tasks, *shape, dtype=torch.float64).to(DEVICE, dtype)

    labels = torch.randint(ways, (tasks, images), device=DEVICE)
    x, weight = made("x", images, features), made("w", ways, features) / features**0.5
    return [x, weight, made("b", ways), labels]


def plain(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Results:
    """By autograd, task by task."""
    tasks, found = len(labels), []
    for t in range(tasks):
        own = [v[t if len(v) > 1 else 0].detach().requires_grad_() for v in (x, weight, bias)]
        loss = F.cross_entropy(F.linear(*own), labels[t])
        gx, gw, gb = torch.autograd.grad(loss, own)
        found.append((loss.detach(), gw, gb, gx))
    return tuple(torch.stack(parts) for parts in zip(*found))


def check(got: Results, want: Results) -> None:
    for a, b in zip(got, want, strict=True):
        # float64, three short sums: tighter than the table
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", [TRITON, REFERENCE], ids=["triton", "reference"])
@pytest.mark.parametrize("shared", ["", "x", "w", "b", "wb", "xwb"])
def test_it_is_autograds(backend: Any, shared: str) -> None:
    for images, ways, features in ((25, 5, 48), (1, 1, 1), (3, 2, 70), (40, 17, 3), (2, MOST_WAYS, 5)):
        given = operands(2, images, ways, features, shared=shared)
        check(backend.head_grad(*given, ALL), plain(*given))


def test_many_ways_go_by_the_parts() -> None:
    given = operands(1, 4, MOST_WAYS + 1, 9)
    check(TRITON.head_grad(*given, ALL), plain(*given))


@pytest.mark.parametrize("backend", [TRITON, REFERENCE], ids=["triton", "reference"])
def test_what_is_not_wanted_is_none_and_changes_nothing_else(backend: Any) -> None:
    given = operands(2, 6, 5, 20)
    every = backend.head_grad(*given, ALL)
    for wanted in itertools.product((True, False), repeat=3):
        found = backend.head_grad(*given, wanted)
        for flag, mine, theirs in zip((True, *wanted), found, every, strict=True):
            assert (mine is not None) is flag
            assert mine is None or torch.equal(mine, theirs)


def test_memory_of_any_kind() -> None:
    x, weight, bias, labels = operands(2, 6, 5, 20)
    want = plain(x, weight, bias, labels)
    for others in (
        (x.mT.contiguous().mT, weight, bias, labels),
        (x, weight.mT.contiguous().mT, bias, labels),
        (torch.cat([x, x], 2)[..., :20], torch.cat([weight, weight], 1)[:, :5], bias, labels),
        (x, weight, torch.stack([bias, bias], 2)[..., 0], labels.T.contiguous().T),
    ):
        check(TRITON.head_grad(*others, ALL), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
def test_it_is_as_exact_as_the_parts(dtype: torch.dtype) -> None:
    given = operands(2, 25, 5, 300, dtype)
    x, weight, bias, labels = given
    truth = plain(x.double(), weight.double(), bias.double(), labels)
    got, stock = (b.head_grad(*given, ALL) for b in (TRITON, REFERENCE))
    assert got[0].dtype == torch.float32
    for name, mine, theirs, exact in zip(("loss", "weight", "bias", "x"), got, stock, truth, strict=True):
        assert mine is not None and theirs is not None and mine.dtype == theirs.dtype
        assert_as_exact(name, mine.cpu(), theirs.cpu(), exact.cpu(), 300)


@pytest.mark.parametrize("ways", [5, 8])
def test_labels_that_are_no_classes_and_infinite_values_are_nan_in_their_task(ways: int) -> None:
    x, weight, bias, labels = operands(5, 3, ways, 7)
    labels[0, 1], labels[1, 2], labels[2, 0] = ways, -1, -100
    x[3, 0, 2] = torch.nan
    got, want = (b.head_grad(x, weight, bias, labels, ALL) for b in (TRITON, REFERENCE))
    assert got[0].isnan().tolist() == [True, True, True, True, False]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


class Fused(Reference):
    """Has a head of its own."""

    name = "fused"

    def head_grad(self, *given: Any) -> Any:
        return tuple(None if t is None else t.clone() for t in REFERENCE.head_grad(*given))


class Plain(Reference):
    name = "plain"

    def refusals(self, call: Call) -> list[str]:
        return []


def test_autotune_measures_a_head_of_its_own_against_the_parts() -> None:
    asked: list[list[str]] = []

    def clock(runs: Any) -> dict[str, float]:
        asked.append(list(runs))
        for run in runs.values():
            run()
        return {name: float(name != "fused") for name in runs}

    table = Table(None)
    tuned: Any = Autotune([Fused(), Plain(), REFERENCE], lambda device: table, clock)
    given = operands(2, 6, 5, 20)
    for _ in range(2):
        check(tuned.head_grad(*given, ALL), plain(*given))
    assert asked.count(["fused", "parts"]) == 1
    ours = [key for key in table.choices if key.startswith("head_grad")]
    assert len(ours) == 1 and isinstance(table.choices[ours[0]], Choice) and table.choices[ours[0]].chosen == "fused"
    tuned.head_grad(*given, (True, True, False))
    assert asked.count(["fused", "parts"]) == 2
