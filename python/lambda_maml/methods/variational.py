"""Layers whose weights have a spread, which training draws zeros from: sparse networks, and smaller ones.

Madan, Prasad, *B-SMALL: A Bayesian Neural Network approach to Sparse Model-Agnostic Meta-Learning*, ICASSP 2021, arXiv
2101.00203, after the sparse variational dropout of Molchanov, Ashukha, Vetrov, ICML 2017. Each weight has a mean mu and
log sigma; with eps from N(0, 1) per output, log alpha = 2 log sigma - 2 ln(|mu| + 1e-8) within [-10, 10]:

    training      out = conv(x, mu) + b + eps sqrt(conv(x^2, e^(2 log sigma) + 1e-8))
    evaluation    out = conv(x, mask mu) + b,   mask = [log alpha <= 3]
    kl            sum over weights of -(k1 sig(k2 + k3 log alpha) - 1/2 ln(1 + e^(-log alpha))), k = 0.63576, 1.8732,
                  1.48695; its weight is 2e-6, and 1e-6 more every 1000 iterations, up to 1e-5

What differs here: the mask is made by `prune` and used in evaluation (their test is of the noisy network, whose zeros
are counted); `cut` makes the network really smaller, by the channels that nothing reads or that are 0, and says how
many these are: zeros here and there make no dense kernel faster. Noise is the network's own, from torch's generator,
whose state a run keeps; a layer that draws it is run in every step, frozen or not.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lambda_kernels import to_torch

from ..models import conv4
from ..places import Learned, Objective, Params, Problem
from .catalogue import method

__all__ = ["Pruned", "cut", "kl", "prune", "sparse_conv4", "variational"]

_THRESHOLD, _SPREAD, _TINY = 3.0, "log_sigma", 1e-8


class _Spread(nn.Module):
    """What both layers share: log sigma of each weight, and the mask of what is pruned."""

    weight: Any
    bias: Any
    log_sigma: nn.Parameter
    mask: Tensor

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._product(x, self.weight * self.mask, self.bias)
        mean = self._product(x, self.weight, self.bias)
        variance = self._product(x.square(), (2 * self.log_sigma).exp() + _TINY, None)
        return mean + torch.randn_like(mean) * variance.sqrt()


class _Conv2d(_Spread, nn.Conv2d):
    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class _Linear(_Spread, nn.Linear):
    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


def variational(model: nn.Module, log_sigma: float = -8.0) -> nn.Module:
    """A copy of a network in torch's layers, whose convolutions and linear layers have a spread of weights.

    >>> network = variational(models.conv4(ways=5, in_channels=1, width=8, image_size=28))
    >>> Pattern("00001").parameters(network)
    ('head.weight', 'head.bias', 'head.log_sigma')
    """
    twin: nn.Module = to_torch(model)
    if isinstance(twin, nn.Sequential):  # a class of `models` says how it is built anew, without the spread
        twin = nn.Sequential(OrderedDict(twin.named_children())).train(model.training)
    for module in twin.modules():
        kind = {nn.Conv2d: _Conv2d, nn.Linear: _Linear}.get(type(module))
        if kind is not None:
            weight: Any = module.weight
            module.__class__ = kind
            module.log_sigma = nn.Parameter(torch.full_like(weight, log_sigma))
            module.register_buffer("mask", torch.ones_like(weight))
    return twin


def sparse_conv4(ways: int, in_channels: int, image_size: Any, width: int = 32) -> nn.Module:
    """conv4 with a spread of weights, as a run's network: --network lambda_maml.methods.variational:sparse_conv4.

    >>> sparse_conv4(ways=5, in_channels=1, image_size=28, width=8)(xs).shape
    torch.Size([5, 5])
    """
    return variational(conv4(ways, in_channels, width, image_size))


def log_alpha(mean: Tensor, log_sigma: Tensor) -> Tensor:
    """Of each weight, within [-10, 10]."""
    return (2 * log_sigma - 2 * (mean.abs() + _TINY).log()).clamp(-10, 10)


def divergence(log_alphas: Tensor) -> Tensor:
    """The sum of kl over weights."""
    return -(0.63576 * torch.sigmoid(1.8732 + 1.48695 * log_alphas) - 0.5 * F.softplus(-log_alphas)).sum()


@method("objective", needs="a network of `variational`", chain="no: its layers draw noise")
class kl(Objective):
    """The divergence of all weights, times its weight in an iteration; added to `query_loss()`.

    >>> query_loss() + kl()
    query_loss(cross_entropy) + kl(2e-06)

    `kl.penalty(weight)` is the same for `descend`, of what a step updates.

    Raises:
        ValueError: a number is out of range; when it is asked: no layer has a spread.
    """

    def __init__(self, weight: float = 2e-6, growth: float = 1e-6, every: int = 1000, most: float = 1e-5) -> None:
        super().__init__()
        if not 0.0 <= weight <= most or growth < 0 or every < 1:
            raise ValueError(
                f"kl: weight in [0, {most}], growth of at least 0 and every of at least 1 expected, got {weight}, "
                f"{growth} and {every}"
            )
        self.weight, self.growth, self.every, self.most = weight, growth, every, most

    def extra_repr(self) -> str:
        return f"{self.weight}"

    def at(self, iteration: int) -> float:
        """The weight in an iteration, counted from 0."""
        return min(self.most, self.weight + self.growth * (iteration // self.every))

    def forward(self, problem: Problem, learned: Learned, xq: Any, yq: Any) -> Tensor:
        return self.at(problem.turn.iteration) * _whole({**problem.everything, **learned.params})

    @staticmethod
    def penalty(weight: float) -> Callable[[Params], Tensor]:
        return lambda params: weight * _whole(params)


def _whole(params: Mapping[str, Tensor]) -> Tensor:
    """The divergence of all weights that have a spread."""
    pairs = [(params.get(f"{n.removesuffix(_SPREAD)}weight"), p) for n, p in params.items() if n.endswith(_SPREAD)]
    found = [divergence(log_alpha(mean, spread)) for mean, spread in pairs if mean is not None]
    if not found:
        raise ValueError("kl: no layer has a spread of weights: train a network of methods.variational")
    return torch.stack(found).sum()


class Pruned(NamedTuple):
    """What `prune` found."""

    weights: float
    """The share of weights that are pruned."""
    channels: dict[str, tuple[int, int]]
    """By layer, how many of its outputs have no weight left, and of how many."""


def prune(model: nn.Module, threshold: float = _THRESHOLD) -> Pruned:
    """Make the masks of a network's weights anew, by log alpha; evaluation is then without the others.

    >>> prune(variational(models.conv4(ways=5, in_channels=1, width=8, image_size=28))).weights < 0.01
    True
    """
    masked, total, channels = 0, 0, {}
    with torch.no_grad():
        for name, layer in _spread_layers(model):
            layer.mask.copy_(log_alpha(layer.weight, layer.log_sigma) <= threshold)
            masked, total = masked + int((layer.mask == 0).sum()), total + layer.mask.numel()
            channels[name] = int((layer.mask.flatten(1).sum(1) == 0).sum()), len(layer.mask)
    if not total:
        raise ValueError("prune: no layer has a spread of weights: give a network of methods.variational")
    return Pruned(masked / total, channels)


def _spread_layers(model: nn.Module) -> Iterator[tuple[str, _Spread]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, _Spread))


def cut(model: nn.Module) -> nn.Sequential:
    """The masked network in evaluation as plain layers, without the channels that change no result.

    >>> network = sparse_conv4(ways=5, in_channels=1, image_size=28, width=8)
    >>> with torch.no_grad():
    ...     network.block2.conv.log_sigma[3:] = 9.0                  # five channels without a weight, and 0 after ReLU
    ...     _ = network.block2.norm.bias.fill_(-0.1)
    >>> prune(network).channels["block2.conv"], cut(network).block2.conv.weight.shape
    ((5, 8), torch.Size([3, 8, 3, 3]))

    An output channel goes if no weight that is left reads it; or if it has no weight and is 0 behind norm and ReLU, or,
    ahead of the linear layer, a constant, which joins that layer's bias. Each block keeps one channel.

    Raises:
        ValueError: the network is not blocks of convolution, norm of batch statistics, ReLU and max-pool, a flattening
            and a linear layer.
    """
    blocks, head = _chain(model)
    weights = [_masked(block[0]) for block in blocks]
    last = _masked(head)
    positions = last.shape[1] // len(weights[-1])
    columns = last.view(len(last), len(weights[-1]), positions)
    bias = head.bias.detach().clone() if head.bias is not None else torch.zeros(len(last)).to(last)
    keeps = [torch.ones(len(w), dtype=torch.bool) for w in weights]
    changed = True
    while changed:
        before = [k.clone() for k in keeps]
        for i, w in enumerate(weights):
            inputs = keeps[i - 1] if i else torch.ones(w.shape[1], dtype=torch.bool)
            empty = w[:, inputs].flatten(1).abs().sum(1) == 0
            final = i + 1 == len(weights)
            following = columns if final else weights[i + 1][keeps[i + 1]].flatten(2)
            unread = following.abs().sum((0, 2)) == 0
            constant = F.relu(blocks[i][1].bias.detach())
            gone = unread | (empty & ((constant == 0) | torch.tensor(final)))
            keeps[i] &= ~gone
            if not keeps[i].any():
                keeps[i][0] = True
        changed = any(not torch.equal(a, b) for a, b in zip(before, keeps))
    lost = F.relu(blocks[-1][1].bias.detach()) * ~keeps[-1]
    bias += (columns.sum(2) * lost).sum(1)
    return _smaller(model, weights, columns, bias, keeps)


def _masked(layer: Any) -> Tensor:
    """A layer's weights in evaluation."""
    return (layer.weight * layer.mask).detach() if isinstance(layer, _Spread) else layer.weight.detach()


def _chain(model: nn.Module) -> tuple[list[list[Any]], Any]:
    """The blocks' modules, and the linear layer."""
    *blocks, flat, head = model.children()
    found = [list(block.children()) for block in blocks]
    kinds = nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d
    fits = all(len(b) == 4 and all(isinstance(m, k) for m, k in zip(b, kinds)) for b in found)
    if not fits or not found or not isinstance(flat, nn.Flatten) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"cut: {type(model).__name__} is not blocks of convolution, norm, ReLU and max-pool, a flattening and a "
            "linear layer: prune alone works for any network"
        )
    if any(b[0].groups != 1 or b[1].track_running_stats or b[1].bias is None for b in found):
        raise ValueError("cut: a block has groups, running statistics, or a norm without a bias")
    return found, head


def _smaller(
    model: nn.Module, weights: list[Tensor], columns: Tensor, bias: Tensor, keeps: list[Tensor]
) -> nn.Sequential:  # fmt: skip
    """A network of plain layers with these channels."""
    names = [name for name, _ in model.named_children()]
    found = nn.Sequential()
    for i, (name, keep) in enumerate(zip(names, keeps)):
        block = nn.Sequential()
        for part, module in getattr(model, name).named_children():
            own: Any = copy.deepcopy(module)
            if isinstance(own, nn.Conv2d):
                own.__class__ = nn.Conv2d
                for gone in ("log_sigma", "mask"):
                    own._parameters.pop(gone, None)
                    own._buffers.pop(gone, None)
                inputs = keeps[i - 1] if i else torch.ones(weights[i].shape[1], dtype=torch.bool)
                own.weight = nn.Parameter(weights[i][keep][:, inputs].clone())
                own.in_channels, own.out_channels = own.weight.shape[1], own.weight.shape[0]
                own.bias = None if own.bias is None else nn.Parameter(own.bias.detach()[keep].clone())
            elif isinstance(own, nn.BatchNorm2d):
                own.num_features = int(keep.sum())
                own.weight, own.bias = (nn.Parameter(p.detach()[keep].clone()) for p in (own.weight, own.bias))
            block.add_module(part, own)
        found.add_module(name, block)
    found.add_module(names[-2], nn.Flatten())
    rest = columns[:, keeps[-1]].flatten(1).clone()
    head = nn.Linear(rest.shape[1], len(rest)).to(rest)
    head.weight, head.bias = nn.Parameter(rest), nn.Parameter(bias)
    found.add_module(names[-1], head)
    return found.train(model.training)
