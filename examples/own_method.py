"""A method of your own, without a change of the package: the head as class means (prototypes), as a solver with a
learned scale that trains, is resumed, and adapts.

Run: python examples/own_method.py
"""

import tempfile

import torch
import torch.nn.functional as F
from torch import nn

from lambda_maml import adapt, checkpoint, data, models
from lambda_maml.places import Learned
from lambda_maml.train import BEST, Parts, Settings, train


class Prototypes(nn.Module):
    """Logits -scale |features - class mean|^2, written as a linear head (Snell et al. 2017); pattern 0..01."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, problem):
        features, weight, bias = problem.features(problem.meta), *problem.head
        ways = F.one_hot(problem.labels, len(problem.meta[bias])).to(features.dtype)
        means, scale = (ways.T @ features) / ways.sum(0).unsqueeze(1), self.log_scale.exp()
        return Learned({weight: 2 * scale * means, bias: -scale * means.square().sum(1)})


if __name__ == "__main__":
    torch.manual_seed(0)
    images, settings = data.load("glyphs", split="val"), Settings(pattern="head", query=5, val_tasks=20, meta_lr=0.01)
    with tempfile.TemporaryDirectory() as folder:
        for iterations, resume in ((20, False), (40, True)):
            model, parts = models.conv4(ways=5, in_channels=1, width=16, image_size=28), Parts(solver=Prototypes())
            run = {"settings": settings, "iterations": iterations, "resume": resume, "parts": parts}
            result = train(model, images, images, out=folder, **run)
        model, _ = checkpoint.load(f"{folder}/{BEST}")
        checkpoint.load_rule(f"{folder}/{BEST}", parts)
    xs, ys, xq, yq = data.sample_tasks(images, 1)[0]
    right = (adapt(model, xs, ys, pattern="head", solver=parts.solver)(xq).argmax(1) == yq).float().mean().item()
    scale = parts.solver.log_scale.exp().item()
    print(f"iteration {result.iteration}, scale {scale:.3f}, one task's accuracy {right:.2f}")
