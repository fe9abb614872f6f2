"""The build information that setup.py stores beside the extension."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import torch


def read() -> dict[str, str | None] | None:
    """Compiler, flags, torch, CUDA, commit and date of the build; None where the extension was never built.

    Raises:
        ValueError: the stored file is damaged.
    """
    path = Path(__file__).with_name("_build_info.json")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error}): build the extension again") from None
    if not isinstance(stored, dict) or "torch" not in stored:
        raise ValueError(f"{path.name} names no torch: build the extension again")
    return stored


def mismatch() -> str:
    """Why an extension that was built for another torch must not be loaded; "" where it fits or nothing is known.

    torch keeps its C++ interface within one minor version only.
    """
    stored = read()
    built, running = (stored or {}).get("torch"), torch.__version__
    if built is None or built.split(".")[:2] == running.split(".")[:2]:
        return ""
    return f"the extension was built for torch {built}, this is torch {running}: build it again"


def hidden() -> str:
    """The folder of an installed package that this one, which was not built, hides: as where Python was started in a
    checkout. "" where there is none."""
    own = Path(__file__).resolve().parent
    try:
        installed = Path(str(metadata.distribution("lambda-kernels").locate_file("lambda_kernels"))).resolve()
    except metadata.PackageNotFoundError:
        return ""
    return str(installed) if installed != own and any(installed.glob("_C*.so")) else ""


def not_built(error: ImportError) -> str:
    """Why there is no extension to load, and the remedy."""
    if other := hidden():
        return (
            f"this is the source in {Path(__file__).resolve().parents[1]}, which was not built and hides the package "
            f"installed in {other}: start Python in another folder, or build the source with `make`"
        )
    return f"the extension lambda_kernels._C is not built ({error}): run `make`, or `pip install .` with a C++ compiler"
