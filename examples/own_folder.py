"""Your own pictures: class folders become tasks, a network is meta-trained on them and judged on classes it never saw.

Run: python examples/own_folder.py [FOLDER]       # without FOLDER, pictures of some glyphs are drawn into a new one
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from lambda_maml import data, models
from lambda_maml.evaluate import evaluate
from lambda_maml.train import Settings, train


def draw(root: Path) -> None:
    """Dark ink on white paper, 10 pictures each of 30 characters: root/<character>/<number>.png."""
    glyphs = data.load("glyphs")
    for name, start in zip(glyphs.class_names[:30], glyphs.starts):
        (root / name.replace("/", " ")).mkdir(parents=True)
        for k in range(10):
            Image.fromarray(255 - glyphs.images[start + k, ..., 0]).save(root / name.replace("/", " ") / f"{k}.png")


if __name__ == "__main__":
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        if str(root) == temporary:
            draw(root)
        folder = data.from_folder(root, image_size=28)
        print(folder)
        model = models.conv4(ways=3, in_channels=folder.channels, width=16, image_size=28)
        settings = Settings(
            ways=3, shots=1, query=5, steps=1, test_steps=5, lr=0.4, meta_lr=5e-3, meta_batch=8, val_tasks=20
        )
        done = train(model, folder.train, folder.val, out=Path(temporary) / "run", settings=settings, iterations=60)
        tasks = data.sample_tasks(folder.test, 50, ways=3, shots=1, query=3)
        found = evaluate(model, tasks, pattern="MAML", steps=5, lr=0.4)
        print(
            f"{done.iteration} iterations: {found.mean:.0%} of new classes' pictures are classified right (chance: 33%)"
        )
