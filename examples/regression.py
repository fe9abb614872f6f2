"""Regression: sines from 10 points, y = a sin(x + b) (Finn et al. 2017, section 5.1), and the pattern chosen by MSE.

Run: python examples/regression.py
"""

import math
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

from lambda_maml import data, models, select_pattern
from lambda_maml.evaluate import evaluate
from lambda_maml.train import Settings, train


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def sines(first: int, count: int) -> list[data.Task]:
    """Tasks `first` to `first + count - 1`, always the same: 10 support and 10 query points each."""
    tasks = []
    for k in range(first, first + count):
        a, b, *x = torch.rand(22, generator=torch.Generator().manual_seed(k))
        points = 10 * torch.stack(x)[:, None] - 5
        values = (0.1 + 4.9 * a) * torch.sin(points + math.pi * b)
        tasks.append(data.Task(points[:10], values[:10], points[10:], values[10:]))
    return tasks


if __name__ == "__main__":
    torch.manual_seed(0)
    model = models.create("regression:mlp", args={"width": 32})  # this file's function, so that checkpoints can name it
    settings = Settings(steps=3, lr=0.02, val_tasks=20, val_every=100, meta_lr=0.01)
    test = sines(10**6, 50)
    by_mse = {"loss": F.mse_loss, "metric": F.mse_loss, "steps": 3, "lr": 0.02}
    print(evaluate(model, test, pattern="MAML", **by_mse))
    with tempfile.TemporaryDirectory() as folder:
        train(
            model, sines, lambda first, count: sines(10**5 + first, count), out=folder, settings=settings,
            iterations=100, loss=F.mse_loss, metric=F.mse_loss, lower_is_better=True,
        )  # fmt: skip
    print(evaluate(model, test, pattern="MAML", **by_mse))
    chosen = select_pattern(model, test, lower_is_better=True, max_drop=0.5, relative=True, seconds=1.0, **by_mse)
    print(chosen.table)
