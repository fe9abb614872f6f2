"""The rule of agreement: what passes and what is refused, in each dtype; and that its numbers stand in one place."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch
from cases import assert_as_exact
from torch import Tensor

from lambda_kernels import agreement
from lambda_kernels.agreement import TOLERANCES, Errors, Tolerance, apart, distance, element_errors, errors, tolerance

ROOT = Path(__file__).resolve().parents[1]
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def results(dtype: torch.dtype, off: float = 0.0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(result, stock PyTorch's, truth): the result is `off` of its length away from stock PyTorch's."""
    truth = [torch.randn(5, 7, dtype=torch.float64), torch.randn(11, dtype=torch.float64)]
    stock = [t.to(dtype) for t in truth]
    return [(t.double() * (1 + off)).to(dtype) for t in truth], stock, truth


@DTYPES
def test_an_inner_loop_within_rounding_agrees(dtype):
    assert errors(*results(dtype)).agree
    assert errors(*results(dtype, tolerance(dtype).loop / 2)).agree


@DTYPES
def test_a_wrong_inner_loop_is_refused(dtype):
    found = errors(*results(dtype, 3 * tolerance(dtype).loop))
    assert not found.agree and found.mine > found.limit >= agreement.FACTOR * found.stock


@DTYPES
def test_one_wrong_value_among_many_is_refused(dtype):
    got, stock, truth = results(dtype)
    got[1][3] += 4 * tolerance(dtype).loop * distance(truth, [torch.zeros_like(t) for t in truth])
    assert not errors(got, stock, truth).agree


@DTYPES
def test_a_result_that_is_not_a_number_is_refused(dtype):
    for value in (float("nan"), float("inf")):
        got, stock, truth = results(dtype)
        got[0][0, 0] = value
        assert not errors(got, stock, truth).agree and not element_errors(got[0], stock[0], truth[0]).agree
        assert apart(got[0], stock[0]) is not None


@DTYPES
def test_the_units_are_the_length_that_is_given(dtype):
    got, stock, truth = results(dtype, 3 * tolerance(dtype).loop)
    own = distance(truth, [torch.zeros_like(t) for t in truth])
    assert errors(got, stock, truth, 10 * own).agree and not errors(got, stock, truth, own / 10).agree


@DTYPES
def test_an_operation_may_be_twice_as_far_as_stock_torch_and_a_few_roundings(dtype):
    truth = torch.linspace(0.5, 1.0, 33, dtype=torch.float64)
    stock = truth.to(dtype)
    rounding = torch.finfo(dtype).eps
    assert element_errors(stock, stock, truth).agree
    for roundings, right in ((agreement.ROUNDINGS - 2, True), (agreement.ROUNDINGS + 4, False)):
        got = stock.clone()
        got[-1] -= roundings * rounding
        assert element_errors(got, stock, truth).agree == right, roundings
        if not right:
            with pytest.raises(AssertionError, match="operation: error"):
                assert_as_exact("operation", got, stock, truth)
            assert element_errors(got, stock, truth, terms=(2 * agreement.ROUNDINGS) ** 2).agree
    further = stock - 100 * rounding  # where stock PyTorch is far away, a result may be twice as far
    assert element_errors(stock - 195 * rounding, further, truth).agree
    assert not element_errors(stock - 300 * rounding, further, truth).agree


@DTYPES
def test_two_results_of_an_operation_are_apart_or_not(dtype):
    (got, _), (stock, _), _ = results(dtype)
    assert apart(got, stock) is None
    far = apart((stock.double() * (1 + 3 * tolerance(dtype).pair)).to(dtype), stock)
    assert far == pytest.approx(3 * tolerance(dtype).pair, rel=0.2)
    assert apart(stock, stock * float("nan")) is None  # ATen gives no number either


@DTYPES
def test_a_smaller_dtype_allows_more(dtype):
    order = list(TOLERANCES)
    if order.index(dtype):
        assert all(a >= b for a, b in zip(tolerance(dtype), tolerance(order[order.index(dtype) - 1])))
    assert all(value < 0.2 for value in tolerance(dtype)), "a rule that nothing breaks is none"


def test_complex_values_have_the_tolerance_of_their_parts():
    assert tolerance(torch.complex64) == tolerance(torch.float32)
    truth = [torch.randn(4, dtype=torch.complex128)]
    assert errors([truth[0].to(torch.complex64)], [truth[0].to(torch.complex64)], truth).agree
    assert not errors([truth[0].conj().to(torch.complex64)], [truth[0].to(torch.complex64)], truth).agree


def test_whole_numbers_have_no_tolerance():
    with pytest.raises(TypeError, match=r"torch.int64 has no tolerance, expected one of torch.float64, "):
        tolerance(torch.int64)


def test_an_error_that_is_not_a_number_never_agrees():
    nan = float("nan")
    assert [Errors(*e).agree for e in ((nan, 1.0, 2.0), (1.0, nan, nan), (1.0, 1.0, 2.0))] == [False, False, True]
    assert set(Tolerance._fields) == {"loop", "pair", "operation", "gradient", "steps"}


def test_the_examples_hold():
    found = doctest.testmod(agreement)
    assert found.attempted and not found.failed


# A number of its own beside one that says why, on its line or the line above.
OWN = re.compile(r"\b[ra]tol=(?!0\b)[\d.]+e-\d+|\b[ra]tol=0\.\d+")


def test_a_tolerance_outside_the_table_says_why():
    places = []
    for folder in ("bench", "tests", "python", "lambda_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for before, line in zip(["", *lines], lines):
                if OWN.search(line) and "#" not in line and not before.lstrip().startswith("#"):
                    places.append(f"{path.relative_to(ROOT)}: {line.strip()}")
    assert places == [], "take the tolerance from lambda_kernels.agreement, or say in a comment why not"
