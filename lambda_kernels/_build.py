"""The build information that setup.py stores beside the extension."""

from __future__ import annotations

import json
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
