"""The program of a call with one input, as the tests of programs and plans ask for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lambda_kernels.program import Program, program_for

__all__ = ["program_of"]


def program_of(model: nn.Module, x: Any) -> Program:
    """The program of `model(x)`."""
    return program_for(model, (x,), {})
