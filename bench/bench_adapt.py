"""Adaptation time of conv4, support tensors to adapted parameters, under every pattern and in stock PyTorch.

`lambda-maml select --timings FILE.json` chooses by these times. A pattern's rounds alternate with the stock loop's, and
nothing is timed before its result was compared with the plain loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from harness import Configuration, PlainLoop, Problem, alternate, check_adapt, make_problem
from pytest_benchmark.fixture import BenchmarkFixture

from lambda_maml import Pattern, adapt
from lambda_maml.timing import timing_info

# The gate's own failure, not that nothing was timed after it, is what is to be reported.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")

FULL = Pattern.full(5)


@pytest.fixture(scope="session")
def problem(configuration: Configuration, where: torch.device) -> Problem:
    return make_problem(configuration, where)


@pytest.mark.benchmark(disable_gc=True)
def test_stock(
    benchmark: BenchmarkFixture, configuration: Configuration, problem: Problem, synchronize: Callable[[], None],
    limits: Mapping[str, float], pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    """All layers updated, by plain PyTorch: the yardstick."""
    lr, norm = pytestconfig.getoption("lr"), pytestconfig.getoption("norm")
    c = configuration
    check_adapt(problem, FULL, c.steps, lr, norm)
    loop = PlainLoop(problem, FULL, c.steps, lr, norm)
    benchmark.group = f"adaptation time: {c}"
    benchmark.extra_info.update(
        timing_info(problem.model, problem.xs, pattern=FULL, shots=c.shots, steps=c.steps, norm=norm, stock=True)
    )
    alternate(benchmark, loop, stock=None, reset=loop.reset, synchronize=synchronize, limits=limits)


@pytest.mark.benchmark(disable_gc=True)
def test_adapt(
    benchmark: BenchmarkFixture, configuration: Configuration, pattern: Pattern, problem: Problem,
    synchronize: Callable[[], None], limits: Mapping[str, float], pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    lr, norm = pytestconfig.getoption("lr"), pytestconfig.getoption("norm")
    c = configuration
    check_adapt(problem, pattern, c.steps, lr, norm)
    model, xs, ys = problem
    benchmark.group = f"adaptation time: {c}"
    benchmark.extra_info.update(timing_info(model, xs, pattern=pattern, shots=c.shots, steps=c.steps, norm=norm))
    alternate(
        benchmark,
        lambda: adapt(model, xs, ys, pattern=pattern, steps=c.steps, lr=lr, norm=norm),
        stock=PlainLoop(problem, FULL, c.steps, lr, norm),
        synchronize=synchronize,
        limits=limits,
    )
