"""Values that the fields of our files may not have, and bytes that are not as they were."""

from __future__ import annotations

import random
from typing import Any

OTHER: tuple[Any, ...] = (None, True, -1, 0, 10**30, -1.5, "x", "", "[/red]", [], {}, [[]], {"a": 1})
WRONG: dict[str, tuple[Any, ...]] = {
    "settings.ways": (None, True, -1, 0, 1, 4, 10**30, "3", 3.5, []),
    "settings.shots": (None, True, -1, 0, 10**30, "1"),
    "settings.query": (None, -1, 0, 10**30),
    "settings.steps": (None, -5, 0, 10**30, "x", 2.5),
    "settings.lr": (None, -1, 0, "x", 1e30),
    "settings.norm": (None, 1, "maybe", []),
    "network.ways": (None, -1, 0, 4, 10**9, "3"),
    "network.width": (None, -4, 5, 10**9, "4"),
    "network.in_channels": (None, -1, 3, 10**9),
    "network.image_size": (None, -1, 15, 160, 10**9),
    "network.network": (None, 1, "nope", "[/red]", "os:system", "torch:hub.load", "no.such:function"),
    "dataset.mean": (None, [], [0.1, 0.2], ["x"], 0.5),
    "dataset.std": (None, [], [0.0], [-1.0], [0.1, 0.2]),
    "network": (None, [], "conv4"),
    "settings": (None, [], {}),
    "dataset": (None, [], {}),
}
"""Fields of a checkpoint's header, and values that none may have."""
WRONG_STATE: dict[str, tuple[Any, ...]] = {
    "result.iteration": (None, -1, 0, 5, 10**9, "3", 10**30),
    "result.best": ([1, 2], [3, 2.0, 0.0, None, 1.0], "x"),
    "result.history": (None, [], [[1, 2]], [[10**9, 0.5, 0.1, None, 1.0]]),
    "result.losses": (None, ["x"], [1.0] * 7),
    "run.settings.lr": (-1, 0, "x", 0.2),
    "run.network.width": (5, "x"),
    "run": ([], None, {}),
    "result": ([], None, {}),
}
WRONG_CHOICE: dict[str, tuple[Any, ...]] = {
    "schema": (None, 2, "1"), "steps": (None, 0, -5, "x", 10**30), "lr": (-1, "x", {}, None),
    "norm": (None, "maybe"), "rule": (None, "x"), "max_drop": (None, -1, "x"), "candidates": (None, [], {}, [{}]),
    "chosen.time_ms": (None, -1.0, 0, "x", 10**30), "chosen.pattern": (None, "x", "11111000"),
    "full.pattern": (1, "000"), "test": (None, {}, []),
    "stock_full.time_ms": (-1, "x"), "environment": (None, []), "network": (None, 1, []),
}  # fmt: skip
WRONG_TIMES: dict[str, tuple[Any, ...]] = {
    "benchmarks": (None, {}, "x", [1]), "benchmarks.0.stats": (None, {}, []),
    "benchmarks.0.stats.median": (None, -1e-3, 0, "1e-3", 10**400),
    "benchmarks.0.extra_info.pattern": (None, 1, "x", ""), "benchmarks.0.extra_info": (None, []),
}  # fmt: skip


def fields(table: dict[str, tuple[Any, ...]]) -> list[tuple[str, Any]]:
    return [(field, value) for field, values in table.items() for value in values]


def spoiled(raw: bytes, draw: random.Random) -> bytes:
    """With a bit flipped, an end cut off, a piece doubled or zeroed, or noise in its place."""
    where, kind = draw.randrange(len(raw)), draw.randrange(5)
    if kind == 0:
        return raw[:where]
    if kind == 1:
        return raw[:where] + raw[where : where + 40] + raw[where:]
    if kind == 2:
        return raw[:where] + bytes(min(8, len(raw) - where)) + raw[where + 8 :]
    if kind == 3 and draw.random() < 0.1:
        return draw.randbytes(len(raw) // 10)
    return raw[:where] + bytes([raw[where] ^ 1 << draw.randrange(8)]) + raw[where + 1 :]
