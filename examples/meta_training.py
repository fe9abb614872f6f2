"""Meta-training in twenty lines: second-order MAML on glyphs, a meta-batch in one call.

Run: python examples/meta_training.py
"""

import torch
import torch.nn.functional as F

from lambda_maml import adapt_tasks, data, models
from lambda_maml.evaluate import evaluate

if __name__ == "__main__":
    torch.manual_seed(0)
    model = models.conv4(ways=5, in_channels=1, width=16, image_size=28)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    inner = {"pattern": "11111", "steps": 1, "lr": 0.4}
    train_set, val_set = data.load("glyphs"), data.load("glyphs", split="val")
    val_tasks = data.sample_tasks(val_set, 40, ways=5, shots=1, query=5)
    before = evaluate(model, val_tasks, **inner)
    for iteration in range(60):
        tasks = data.sample_tasks(train_set, 8, ways=5, shots=1, query=5, seed=iteration)
        xs, ys, xq, yq = (torch.stack(part) for part in zip(*tasks))  # [8, 5, 1, 28, 28], [8, 5], ...
        logits = adapt_tasks(model, xs, ys, xq, second_order=True, **inner)  # [8, 25, 5]
        loss = F.cross_entropy(logits.flatten(0, 1), yq.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = evaluate(model, val_tasks, **inner)
    print(f"accuracy on {len(val_tasks)} new tasks: {before.mean:.1%}, after: {after.mean:.1%}")
