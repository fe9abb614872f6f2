"""Options of the benchmarks: what is timed, and where. Give them to pytest, or in PYTEST_ADDOPTS to `make timings`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import CONFIGURATIONS, Configuration

from lambda_kernels import info
from lambda_maml import Pattern


def whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def configurations(text: str) -> list[str]:
    names = list(CONFIGURATIONS) if text == "all" else list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in CONFIGURATIONS]
    if unknown:
        known = ", ".join([*CONFIGURATIONS, "all"])
        raise argparse.ArgumentTypeError(f"no configuration {', '.join(unknown)}: choose from {known}")
    return names


def patterns(text: str) -> list[Pattern]:
    try:
        return list(dict.fromkeys(map(Pattern.parse, text.split())))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from None


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("lambda kernels").addoption
    known = "; ".join(f"{name}: {c}" for name, c in CONFIGURATIONS.items())
    add("--bench-config", type=configurations, default="omniglot,cifar", metavar="NAMES",
        help=f"Configurations of bench_adapt, separated by commas, or all ({known}). Default: %(default)s")  # fmt: skip
    for name in Configuration._fields:
        words = name.replace("_", " ")
        add(f"--{name.replace('_', '-')}", type=whole, help=f"{words}, in place of the configuration's")
    add("--lr", type=float, default=0.01, help="Inner rate. Default: %(default)s")
    add("--norm", choices=["follow", "never"], default="follow", help="Norm convention. Default: %(default)s")
    add("--patterns", type=patterns, default=None, help="Patterns, separated by spaces. Default: all")
    add("--device", type=device, default=None, help="cpu, cuda or cuda:N. Default: cuda where torch sees one")


def chosen(config: pytest.Config) -> dict[str, Configuration]:
    """The configurations by the names that the command line has."""
    given = {f: config.getoption(f) for f in Configuration._fields if config.getoption(f) is not None}
    found = {name: CONFIGURATIONS[name]._replace(**given) for name in config.getoption("bench_config")}
    if len(set(found.values())) < len(found):
        raise pytest.UsageError(f"--bench-config {','.join(found)}: with the other options two of these are the same")
    return found


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.help:  # where argparse stops before defaults are given their types
        chosen(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "configuration" in metafunc.fixturenames:
        found = chosen(metafunc.config)
        metafunc.parametrize("configuration", found.values(), ids=found.keys(), scope="session")
    if "pattern" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("patterns") or list(Pattern.all(5))
        metafunc.parametrize("pattern", wanted, ids=str, scope="session")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["lambda_kernels"] = info.collect()


@pytest.fixture(scope="session")
def where(pytestconfig: pytest.Config) -> torch.device:
    """The device that is timed."""
    return pytestconfig.getoption("device") or device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def synchronize(where: torch.device) -> Callable[[], None]:
    """Waits for the device."""
    return (lambda: torch.cuda.synchronize(where)) if where.type == "cuda" else (lambda: None)


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> dict[str, float]:
    """How long and how often pytest-benchmark was told to run each benchmark."""
    options = {"seconds": "benchmark_max_time", "rounds": "benchmark_min_rounds"}
    return {key: float(pytestconfig.getoption(name)) for key, name in options.items()}
