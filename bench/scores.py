"""Scores of the demo's network under all its patterns, task by task, and how long each one adapts: what the tests of
racing replay.

    python bench/scores.py tests/glyphs_scores.npz

It trains the demo's network in a folder that is thrown away, and writes the right answers [patterns, tasks] of each
task's queries, the milliseconds [patterns, 3] (median, quartiles) and the patterns' texts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lambda_maml import Pattern, checkpoint, data
from lambda_maml.cli_demo import DEMO
from lambda_maml.cli_train import train_with_progress
from lambda_maml.cli_types import SELECT_SEED
from lambda_maml.evaluate import evaluate
from lambda_maml.settings import Settings
from lambda_maml.timing import measure_times
from lambda_maml.train import BEST


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--tasks", type=int, default=400, help="validation tasks (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=DEMO["iterations"], help="of training (default: %(default)s)")
    given = parser.parse_args()
    settings = Settings(**DEMO["settings"], seed=0)
    network = {"network": "conv4", "width": DEMO["width"]}
    train_set, val_set = (data.load(DEMO["dataset"], split=split) for split in ("train", "val"))
    with tempfile.TemporaryDirectory() as folder:
        train_with_progress(train_set, val_set, Path(folder), settings, network, iterations=given.iterations)
        model, _ = checkpoint.load(Path(folder) / BEST)
    episode: dict[str, Any] = {"ways": settings.ways, "shots": settings.shots, "query": DEMO["query"]}
    tasks = data.sample_tasks(val_set, given.tasks, seed=SELECT_SEED, **episode)
    inner: dict[str, Any] = {"steps": settings.evaluation_steps, "lr": settings.lr, "norm": settings.norm}
    patterns = list(Pattern.all(5))
    scores = torch.stack([evaluate(model, tasks, pattern=pattern, **inner).scores for pattern in patterns])
    queries = len(tasks[0].yq)
    right = (scores * queries).round()
    torch.testing.assert_close(right / queries, scores)
    times = measure_times(model, tasks[0].xs, tasks[0].ys, patterns=patterns, stock=False, **inner)
    np.savez_compressed(
        given.out, right=right.to(torch.uint8).numpy(), queries=queries, patterns=np.array([str(p) for p in patterns]),
        ms=np.array([times[str(p)][:3] for p in patterns]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
