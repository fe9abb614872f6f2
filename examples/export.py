"""An adapted network as a file: written, then used by torch alone, one picture at a time."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from lambda_maml import adapt, data, models

images = data.load("glyphs", split="test")
xs, ys, xq, yq = data.sample_tasks(images, 1, ways=5, shots=5)[0]
torch.manual_seed(0)
model = models.conv4(ways=5, in_channels=1, width=16, image_size=28)  # or a meta-trained one: checkpoint.load(path)
learner = adapt(model, xs, ys, pattern="11111", steps=20, lr=0.1)

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "adapted.pt2"  # adapted.onnx: for ONNX Runtime and others
    learner.export(file, classes=["a", "b", "c", "d", "e"])
    note = {"lambda_maml.json": ""}
    network = torch.export.load(file, extra_files=note).module()
classes = json.loads(note["lambda_maml.json"])["classes"]
with torch.no_grad():
    logits = torch.cat([network(x[None]) for x in xq])
    off = (logits - learner.freeze_statistics()(xq)).abs().max()
print(f"{(logits.argmax(-1) == yq).float().mean():.0%} right; the first one is {classes[logits[0].argmax()]}")
print(f"largest difference to the learner's logits: {off:.2e}")
