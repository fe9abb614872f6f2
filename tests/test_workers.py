"""Adaptations in the workers of a data loader, started by fork and by spawn, beside those of the process itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine import fresh

LOADER = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from torch.utils.data import DataLoader
from test_workers_data import Adapted
if __name__ == "__main__":
    torch.set_num_threads(1)
    here = [Adapted()[i] for i in range(4)]
    loader = DataLoader(Adapted(), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[1])
    assert all(torch.equal(a, b) for a, b in zip(loader, here, strict=True))
    print("the same")
"""
DATA = """
import torch
from torch.utils.data import Dataset
from lambda_maml import adapt, models

class Adapted(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        torch.manual_seed(i)
        model = models.conv4(ways=3, in_channels=1, width=8, image_size=16)
        xs, ys = torch.randn(3, 1, 16, 16), torch.arange(3)
        for _ in range(2):  # the second one is a prepared call
            learner = adapt(model, xs, ys, pattern="00011", steps=2, lr=0.1)
        return learner(xs).detach()
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_data_loaders_workers_adapt_as_the_process_does(start: str, tmp_path: Path) -> None:
    (tmp_path / "test_workers_data.py").write_text(DATA)
    assert "the same" in fresh(LOADER, start, str(tmp_path), OMP_NUM_THREADS="1")
