"""Small training runs, and the same runs in plain PyTorch: layers, inner loop, outer loop and optimiser are torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import to_torch
from lambda_maml import checkpoint, data, models
from lambda_maml.plain_torch import inner_parameters
from lambda_maml.train import LAST, Result, Settings, train

SMALL = Settings(ways=3, shots=1, query=2, steps=2, lr=0.1, meta_lr=5e-3, meta_batch=2, val_tasks=6, val_every=3)


def small(**changes: Any) -> Settings:
    return Settings(**{**asdict(SMALL), **changes})


def image_set(split: str, classes: int = 12, images: int = 8, channels: int = 1) -> data.ImageSet:
    """Classes of 16x16 images: a random picture each, under noise."""
    random = np.random.default_rng(0 if split == "train" else 1)
    pictures = random.integers(60, 196, (classes, 1, 16, 16, channels))
    noise = random.integers(-40, 41, (classes, images, 16, 16, channels))
    pixels = (pictures + noise).astype(np.uint8).reshape(-1, 16, 16, channels)
    return data.ImageSet("pictures", split, pixels, (images,) * classes, tuple(f"c{k}" for k in range(classes)),
                         mean=(0.5,) * channels, std=(0.2,) * channels)  # fmt: skip


TRAIN, VAL = image_set("train"), image_set("val")


def network(width: int = 4, ways: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.conv4(ways=ways, in_channels=1, width=width, image_size=16)


def run(out: Path, iterations: int, settings: Settings = SMALL, model: nn.Module | None = None, **more: Any) -> Result:
    return train(model or network(), TRAIN, VAL, out=out, settings=settings, iterations=iterations, **more)


def state(folder: Path) -> tuple[dict[str, Tensor], list[Any], int]:
    """What a run left: tensors, its history without the seconds, iterations."""
    tensors, meta = checkpoint.read_tensors(folder / LAST)
    return tensors, [line[:4] for line in meta["result"]["history"]], meta["result"]["iteration"]


def assert_same_bits(a: Path, b: Path) -> None:
    """Two runs ended alike: weights, optimiser and history."""
    one, two = state(a), state(b)
    assert one[0].keys() == two[0].keys() and one[1:] == two[1:]
    assert [k for k in one[0] if k != "random" and not torch.equal(one[0][k], two[0][k])] == []


Rate = Callable[[str, int], Any]


def plain_query_losses(
    twin: nn.Module, slow: Mapping[str, Tensor], task: data.Task, settings: Settings, bits: str = "11111",
    second_order: bool = True, rate: Rate | None = None,
) -> list[Tensor]:  # fmt: skip
    """The query loss after each inner step, with functional_call and torch.autograd.grad on plain PyTorch layers."""
    adapted = {n for n, p in twin.named_parameters() if id(p) in {id(q) for q in inner_parameters(twin, settings.norm)}}
    names = list(slow)
    # conv4: four parameters per block (weight, bias, gamma, beta), two for the head.
    layer = {name: min(index // 4, 4) for index, name in enumerate(names)}
    free = [name for name in names if name in adapted and bits[layer[name]] == "1"]
    xs, ys, xq, yq = task
    dtype = next(iter(slow.values())).dtype
    fast, losses = dict(slow), []
    for step in range(settings.steps):
        loss = F.cross_entropy(torch.func.functional_call(twin, fast, (xs.to(dtype),)), ys)
        grads = torch.autograd.grad(loss, [fast[n] for n in free], create_graph=second_order)
        rates = [settings.lr if rate is None else rate(n, step) for n in free]
        fast |= {n: fast[n] - r * g for n, r, g in zip(free, rates, grads, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(twin, fast, (xq.to(dtype),)), yq))
    return losses


def plain_training(
    model: nn.Module, iterations: int, settings: Settings = SMALL, *, rates: Sequence[nn.Parameter] = (),
    rate: Rate | None = None, bits: Callable[[int], str] = lambda _: "11111",
    second_order: Callable[[int], bool] = lambda _: True,
    weights: Callable[[int], Sequence[float]] = lambda _: (0.0, 1.0),
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    before: Callable[[list[Tensor]], Any] = lambda _: None,
    after: Callable[[list[Tensor], int], Any] = lambda *_: None,
    tasks: Callable[[int], list[data.Task]] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The parameters after so many meta-updates in plain PyTorch; `model` stays as it is.

    weights: of the query losses after each inner step. before, after: what is done to the parameters with their
    gradients, and to the parameters after an update.
    """
    twin = to_torch(model)
    slow = {n: p.detach().clone().requires_grad_() for n, p in twin.named_parameters()}
    everything = [*slow.values(), *rates]
    adam = torch.optim.Adam(everything, lr=settings.meta_lr) if optimizer is None else optimizer(everything)
    for i in range(iterations):
        batch = data.sample_tasks(
            TRAIN, settings.meta_batch, ways=settings.ways, shots=settings.shots, query=settings.query,
            seed=settings.seed, first=i * settings.meta_batch,
        ) if tasks is None else tasks(i)  # fmt: skip
        adam.zero_grad()
        for task in batch:
            losses = plain_query_losses(twin, slow, task, settings, bits(i), second_order(i), rate)
            loss = torch.stack([w * own for w, own in zip(weights(i), losses, strict=True)]).sum()
            (loss / len(batch)).backward()
        before(everything)
        adam.step()
        after(everything, i)
    return {n: p.detach() for n, p in slow.items()}
