"""Neural fields: a network from coordinates to values, and tasks whose set is one signal, a picture or a curve.

Sitzmann, Martel, Bergman, Lindell, Wetzstein, *Implicit Neural Representations with Periodic Activation Functions*,
NeurIPS 2020. Linear layers with sin(30 z) between them; the first layer's weights and biases are drawn from U(-1/d,
1/d), d its inputs, the others' from U(-sqrt(6/d)/30, sqrt(6/d)/30), and 0.5 is added to the last bias. Coordinates lie
in [-1, 1], values in [0, 1]; PSNR = -10 log10 MSE. The sines are those of Finn et al. 2017, section 5.1.

What differs here: any of the layers may be frozen by a pattern; the same call gives the support and the query set.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..data.episodes import Task
from ..data.imageset import ImageSet

__all__ = ["pictures", "psnr", "sines", "siren"]

_FREQUENCY = 30.0


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(_FREQUENCY * x)


def siren(inputs: int = 2, outputs: int = 3, width: int = 256, layers: int = 5) -> nn.Sequential:
    """[N, inputs] to [N, outputs], by so many linear layers.

    >>> siren(2, 1, width=16, layers=3)(torch.zeros(7, 2)).shape
    torch.Size([7, 1])

    Raises:
        ValueError: there are fewer than two layers.
    """
    if layers < 2:
        raise ValueError(f"siren: {layers} layers, expected at least 2")
    sizes = [inputs, *[width] * (layers - 1), outputs]
    modules: list[nn.Module] = []
    for i, (d, next_size) in enumerate(zip(sizes, sizes[1:])):
        linear = nn.Linear(d, next_size)
        bound = math.sqrt(6 / d) / _FREQUENCY if i else 1 / d
        for p in linear.parameters():
            nn.init.uniform_(p, -bound, bound)
        modules += [linear, _Sine()]
    with torch.no_grad():
        linear.bias.add_(0.5)
    return nn.Sequential(*modules[:-1])


def psnr(mse: Tensor) -> Tensor:
    """Decibels, of mean squared errors of values in [0, 1].

    >>> psnr(torch.tensor(0.01))
    tensor(20.)
    """
    return -10 * mse.log10()


class pictures:
    """Task k is image k of a set, as its pixels: xs [H W, 2] coordinates, ys [H W, C] values.

    >>> xs, ys, xq, yq = pictures(data.load("glyphs", split="val"))(first=0, count=1)[0]
    >>> xs.shape, ys.shape
    (torch.Size([784, 2]), torch.Size([784, 1]))

    Images are counted in an order of their own, by `seed`, and anew from the first one after the last.
    """

    def __init__(self, images: ImageSet, seed: int = 0) -> None:
        self.images, self.order = images, np.random.default_rng(seed).permutation(len(images.images))

    def __call__(self, first: int, count: int) -> list[Task]:
        found = []
        for k in range(first, first + count):
            pixels = torch.as_tensor(self.images.images[self.order[k % len(self.order)]])
            height, width, channels = pixels.shape
            values = pixels.reshape(-1, channels).float() / 255
            axes = [torch.linspace(-1, 1, size) for size in (height, width)]
            places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
            found.append(Task(places, values, places, values))
        return found


def sines(first: int, count: int, shots: int = 10, query: int = 10, seed: int = 0, of: int | None = None) -> list[Task]:
    """Tasks `first` to `first + count - 1`: a curve a sin(x + p), a in U[0.1, 5], p in U[0, pi], x in U[-5, 5].

    >>> [part.shape for part in sines(first=3, count=1, shots=5)[0]]
    [torch.Size([5, 1]), torch.Size([5, 1]), torch.Size([10, 1]), torch.Size([10, 1])]

    of: take the curves of so many tasks again and again, with points of their own: the pool of `remembering`.
    """
    found = []
    for k in range(first, first + count):
        curve = np.random.default_rng([seed, k if of is None else k % of, 0])
        amplitude, phase = curve.uniform(0.1, 5.0), curve.uniform(0.0, math.pi)
        x = torch.as_tensor(np.random.default_rng([seed, k, 1]).uniform(-5, 5, (shots + query, 1)), dtype=torch.float32)
        y = amplitude * torch.sin(x + phase)
        found.append(Task(x[:shots], y[:shots], x[shots:], y[shots:]))
    return found
