"""A backend of your own that overrides one operation: matrix products in float64, whatever the network's dtype.

Run: python examples/backend.py
"""

import torch

import lambda_kernels as lk
from lambda_kernels.backends.reference import Reference
from lambda_maml import adapt, data, models


class Precise(Reference):
    """The reference with linear layers summed in float64."""

    name = "precise"

    def linear(self, x, weight, bias):
        wide = None if bias is None else bias.double()
        return super().linear(x.double(), weight.double(), wide).to(x.dtype)


if __name__ == "__main__":
    lk.register_backend(Precise())
    torch.manual_seed(0)
    model = models.conv4(ways=5, in_channels=1, width=16, image_size=28)
    xs, ys, xq, _ = data.sample_tasks(data.load("glyphs"), 1, ways=5, shots=1)[0]
    found = {}
    for name in ("precise", "reference"):
        with lk.use_backend(name):
            found[name] = adapt(model, xs, ys, pattern="00011", steps=5, lr=0.4)(xq)
    print(f"largest difference of the logits: {(found['precise'] - found['reference']).abs().max().item():.2e}")
