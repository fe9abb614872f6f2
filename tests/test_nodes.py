"""Budgets of the graph nodes of one adaptation, counted without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from nodes import KERNELS, Nodes, counted

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"

# The most nodes, by backend, pattern and number of tasks. A convolution of cuDNN's counts as one kernel, and with cuDNN
# many tasks are adapted in turn.
BUDGET = {
    ("autotune", "11111", 1): 190,
    ("autotune", "00011", 1): 40,
    ("autotune", "00001", 1): 40,
    ("autotune", "11111", 64): 207,
    ("autotune", "00011", 64): 40,
    ("triton", "11111", 1): 213,
    ("triton", "00011", 1): 80,
    ("cuda", "11111", 1): 200,
    ("cuda", "00011", 1): 40,
}


@pytest.mark.parametrize(("backend", "pattern", "tasks"), BUDGET)
def test_an_adaptation_keeps_to_its_nodes(backend: str, pattern: str, tasks: int) -> None:
    nodes = counted(pattern, tasks, backend)
    assert 0 < nodes.total <= BUDGET[backend, pattern, tasks], nodes.count.most_common()
    assert counted(pattern, tasks, backend).count == nodes.count


def test_views_and_allocations_are_no_nodes() -> None:
    x = torch.zeros(4, 6)
    with Nodes() as nodes:
        x.t().reshape(-1)  # one copy
        x.view(-1)[3:].unsqueeze(0).expand(2, 21)
        torch.empty_like(x)
        x[0].add_(1)
        torch.stack([x, x]).sum()
        torch._foreach_add_([x[0], x[1]], [x[2], x[3]])
        torch._foreach_add_([x[:, 0], x[1]], [x[:, 1], x[2]])  # not dense: one by one
    assert dict(nodes.count) == {"clone": 1, "add_": 1, "stack": 1, "sum": 1, "_foreach_add_": 3}


def test_kernels_of_the_launchers_are_those_of_the_sources() -> None:
    queued = (
        r"(?<!\) return )\blaunch(?:_together)?\(|\bcudaMemsetAsync\("  # not `if (...) return launch(`: in its place
    )
    exported = {}
    for path in SOURCES.glob("*.cu"):
        text = path.read_text()
        for header in set(re.findall(r'#include "(\w+\.cuh)"', text)) - {"common.cuh"}:  # where a launch is defined
            text += (SOURCES / header).read_text()
        names = re.findall(r"LK_EXPORT int lk_(\w+)\(const", text)
        if names:
            exported[tuple(sorted(names))] = len(re.findall(queued, text))
    assert {names: sum(KERNELS[n] for n in names) for names in exported} == exported
    assert sorted(n for names in exported for n in names) == sorted(KERNELS)
