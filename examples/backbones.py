"""Backbones of timm and torchvision, with a bit for each stage in place of one for each layer.

Run: python examples/backbones.py
"""

import torch

import lambda_kernels as lk
from lambda_maml import Pattern, adapt

try:
    import timm
    import torchvision
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside a torch that it was not built for
    raise SystemExit(f"timm and torchvision are needed, built for torch {torch.__version__}: {error}") from None

if __name__ == "__main__":
    torch.manual_seed(0)
    xs, ys, xq = torch.randn(10, 3, 64, 64), torch.arange(5).repeat(2), torch.randn(15, 3, 64, 64)
    # Without pretrained weights, which would be downloaded. What moves: the last stage and the head.
    networks = {
        "torchvision resnet18": (torchvision.models.resnet18(num_classes=5), {"layer4": 1, "fc": 1}),
        "timm resnet10t": (timm.create_model("resnet10t", num_classes=5), "stages:000011"),
        "timm convnext_atto": (timm.create_model("convnext_atto", num_classes=5), {"stages.3": 1, "head": 1}),
    }
    for name, (network, moves) in networks.items():
        model = lk.convert(network)
        learner = adapt(model, xs, ys, pattern=Pattern.of(model, moves), steps=3, lr=0.01)
        print(f"{name}, {moves}: {Pattern.of(model, moves)}, logits {list(learner(xq).shape)}")
