"""A pytest plugin (`-p journal`) of `make gpu`: every outcome is written down at once, and of the tests only those are
kept that use a device where there is one: the ones marked gpu first, those of torch.compile, which take long, last."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FILES = ("test_gpu.py", "test_triton")  # how the names of files begin whose unmarked tests use a device as well


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lambda kernels")
    group.addoption("--journal", type=Path, default=None, help="File that gets each test's outcome, one JSON a line.")
    group.addoption("--per-file", type=int, default=None, help="Keep only so many tests of each file.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("per_file")
    seen: Counter[Path] = Counter()
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        wanted = item.get_closest_marker("gpu") is not None or item.path.name.startswith(FILES)
        seen[item.path] += wanted
        (kept if wanted and (most is None or seen[item.path] <= most) else dropped).append(item)
    items[:] = sorted(kept, key=lambda item: ("compile" in item.name, item.get_closest_marker("gpu") is None))
    config.hook.pytest_deselected(items=dropped)


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            why = ""
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                why = crash.message if crash is not None else str(report.longrepr)[-300:]
            elif report.skipped and isinstance(report.longrepr, tuple):
                why = report.longrepr[2].removeprefix("Skipped: ")
            entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self.write(**entry, reason=" ".join(why.split())[:300])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", seconds=0.0, reason="cannot be collected")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("journal")
    if path is not None and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to this process
        config.pluginmanager.register(Journal(path), "lambda-kernels-journal")
