"""From learn2learn: its MAML loop as it is written. Two lines changed: the import, and the network is converted.

Run: python examples/from_learn2learn.py
"""

import torch
import torch.nn.functional as F

import lambda_kernels as lk
from lambda_maml import LambdaMAML as MAML  # was: from learn2learn.algorithms import MAML
from lambda_maml import data, models

if __name__ == "__main__":
    torch.manual_seed(0)
    model = models.conv4(ways=5, in_channels=1, width=16, image_size=28)
    maml = MAML(lk.convert(model), lr=0.1)  # was: MAML(model, lr=0.1)
    optimiser = torch.optim.Adam(maml.parameters(), lr=2e-3)
    train_set = data.load("glyphs")
    for iteration in range(3):
        optimiser.zero_grad()
        total = 0.0
        for xs, ys, xq, yq in data.sample_tasks(train_set, 4, ways=5, shots=1, query=5, seed=iteration):
            task = maml.clone()
            for _ in range(2):
                task.adapt(F.cross_entropy(task(xs), ys))
            loss = F.cross_entropy(task(xq), yq) / 4
            loss.backward()
            total += loss.item()
        optimiser.step()
        print(f"iteration {iteration}: query loss {total:.4f}")
