"""Packages that only a part of the package needs, and what installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["wanted"]


@contextmanager
def wanted(extra: str, what: str) -> Iterator[None]:
    """Around imports: says which extra of the package brings one that is missing.

    with wanted("report", "a picture"):
        from matplotlib.figure import Figure

    Raises:
        ModuleNotFoundError: names the module and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{what} needs {missing.name}, which is not installed: pip install 'lambda-kernels[{extra}]'",
            name=missing.name,
        ) from None
