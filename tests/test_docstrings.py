"""The docstrings of the kernel package: their examples run, and conv_block is what its docstring defines."""

from __future__ import annotations

import doctest
import textwrap
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BLOCKS, BlockCase

from lambda_kernels import backends, functional, layers

MODULES = (functional, layers, backends)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_examples_run(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    done = doctest.testmod(module)
    assert done.attempted >= 3 and not done.failed


def test_every_public_name_has_an_example() -> None:
    for module in (functional, layers):
        for name in module.__all__:
            assert ">>>" in (getattr(module, name).__doc__ or ""), f"{module.__name__}.{name}"


@pytest.mark.parametrize("case", BLOCKS, ids=[case.name for case in BLOCKS])
def test_conv_block_is_what_its_docstring_defines(case: BlockCase) -> None:
    text = functional.conv_block.__doc__ or ""
    definition = text.partition("by definition\n\n")[2].partition("\n\n")[0]
    assert definition.count("\n") == 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    operands = {
        "x": draw(case.images, case.inputs, *case.size),
        "weight": draw(case.width, case.inputs // case.groups, 3, 3),
        **{name: draw(case.width) for name in ("bias", "gamma", "beta")},
    }
    constants: dict[str, Any] = {name: getattr(case, name) for name in ("stride", "padding", "groups", "pool")}
    constants |= {"eps": 1e-3, "dilation": 1}
    names: dict[str, Any] = {"torch": torch, "F": F, **operands, **constants}
    exec(textwrap.dedent(definition), names)
    got = functional.conv_block(**operands, **constants)
    torch.testing.assert_close(got, names["y"], rtol=1e-10, atol=1e-10)
