"""`lambda-maml demo`: training, the choice and what it gains, on images that come with the package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .cli_checkpoint import load
from .cli_select import command_line, publish
from .cli_train import exit_if_stopped, say_if_stopped, train_with_progress
from .cli_types import PLACE, SEED, SELECT_SEED, TEST_SEED
from .console import bar, json_option, say

__all__ = ["DEMO", "demo"]

DEMO: dict[str, Any] = {
    "dataset": "glyphs",
    "width": 32,
    "settings": {
        "ways": 5, "shots": 1, "query": 5, "steps": 1, "test_steps": 10, "lr": 0.4, "meta_lr": 2e-3, "meta_batch": 8,
        "val_tasks": 100, "val_every": 200,
    },
    "iterations": 600,
    "train_minutes": 1.2,
    "query": 15,
    "select_tasks": 150,
    "test_tasks": 200,
    "timing_seconds": 8.0,
    "max_drop": 0.01,
}  # fmt: skip
"""All that the demo's time and result depend on; the whole of it stays within 3 minutes on 2 cores."""


@click.command()
@click.option("--out", type=PLACE, default=Path("runs/demo"), help="Folder for the results.")
@click.option("--seed", type=SEED, default=0, help="Seed of the network and of the tasks.")
@json_option
def demo(out: Path, seed: int, as_json: bool) -> None:
    """Train, choose a pattern and show what it gains, in three minutes.

    Meta-trains a small network on glyphs (characters of many scripts, which come with the package), evaluates and times
    all 31 patterns, and compares the chosen one with MAML in stock PyTorch on tasks that it was not chosen on. In the
    folder: best.safetensors, pattern.json and report.png. A demo of the same seed that lies there is made again;
    another run is left alone.
    """
    from . import data
    from .lock import locked
    from .run_state import held_by, is_same_run
    from .select import select_pattern
    from .train import BEST, LAST, Settings

    start = time.perf_counter()
    settings = Settings(**DEMO["settings"], seed=seed)
    network = {"network": "conv4", "width": DEMO["width"]}
    again = is_same_run(out / LAST, settings, network, DEMO["dataset"], DEMO["iterations"])
    if not again and (held := held_by(out)):
        raise ValueError(f"{held}: the folder holds another run: choose another one (--out)")
    say("preparing glyphs")
    train_set, val_set, test_set = (data.load(DEMO["dataset"], split=split) for split in ("train", "val", "test"))
    result = train_with_progress(
        train_set, val_set, out, settings, network, iterations=DEMO["iterations"], minutes=DEMO["train_minutes"],
        overwrite=again,
    )  # fmt: skip
    say_if_stopped(result, "the demo begins anew")
    exit_if_stopped(result.stopped)
    model, _ = load(out / BEST, "cpu")
    episode = {"ways": settings.ways, "shots": settings.shots, "query": DEMO["query"]}
    with bar("selecting") as progress:
        chosen = select_pattern(
            model,
            data.sample_tasks(val_set, DEMO["select_tasks"], seed=SELECT_SEED + seed, **episode),
            test_tasks=data.sample_tasks(test_set, DEMO["test_tasks"], seed=TEST_SEED + seed, **episode),
            steps=settings.evaluation_steps, lr=settings.lr, norm=settings.norm, max_drop=DEMO["max_drop"],
            seconds=DEMO["timing_seconds"], progress=progress,
        )  # fmt: skip
    with locked(out, "demo"):
        publish({**chosen.to_dict(), "command": command_line()}, chosen.warnings, out / "pattern.json", as_json)
    say(f"the whole demo took {time.perf_counter() - start:.0f} s")
