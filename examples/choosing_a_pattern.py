"""Choosing a pattern: the fastest one whose accuracy is within two points of MAML's, among those that you name.

Run: python examples/choosing_a_pattern.py
"""

import torch

from lambda_maml import Pattern, adapt, data, models, select_pattern

if __name__ == "__main__":
    torch.manual_seed(0)
    # In earnest: a trained network (lambda_maml.checkpoint.load), all patterns (leave `patterns` out) and 200 tasks.
    model = models.conv4(ways=5, in_channels=1, width=16, image_size=28)
    print(Pattern("00011").describe(model, (5, 1, 28, 28)))
    tasks = data.sample_tasks(data.load("glyphs", split="val"), 20, ways=5, shots=1, query=5)
    chosen = select_pattern(
        model, tasks, steps=5, lr=0.1, max_drop=0.02, patterns=["00001", "00011", "00111"], seconds=0.2
    )
    print(chosen.table)
    xs, ys, xq, _ = tasks[0]
    learner = adapt(model, xs, ys, pattern=chosen.pattern, steps=5, lr=0.1, statistics="support")
    print(f"chosen: {chosen.pattern}; classes of three images: {learner(xq[:3]).argmax(1).tolist()}")
