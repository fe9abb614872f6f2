"""A loss at every layer, so that no signal has to cross layers: the gradient of each is that of its own classifier.

Ren, Kornblith, Liao, Hinton, *Scaling Forward Gradient With Local Losses*, ICLR 2023, arXiv 2210.03310, section 4. What
a layer hands on, [N, C, H, W], is averaged over patches x patches fields and divided into groups of channels; a linear
classifier per layer and group, the same for all fields, gives a cross-entropy, the mean of which is the layer's loss:

    g_l = d/d theta_l mean over fields and groups of cross_entropy(A_l,group pool(z_l) + b_l,group, y)

The last layer has the support loss itself. With `directions`, the derivative of a layer's loss by z_l is an estimate by
forward-mode differentiation, <dL_l/dz, u> u with u ~ N(0, I), averaged; what lies between theta_l and z_l is
differentiated as usual, which crosses no other layer.

What differs here: the classifiers are meta-parameters, which learn through the inner gradients in second order (the
paper trains them by their own losses); directions are the same numbers in each run, by `Problem.random`; u is one for
the layer's total loss, since batch norms mix the examples. LocalMixer, their network, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..inner import autograd
from ..places import Params, Problem
from .catalogue import method

__all__ = ["local_losses"]


@method(
    "estimator", needs="outputs [N, C] or [N, C, H, W] of every updated layer", chain="no: each layer has its own loss",
    fill={"channels": "channels", "ways": "ways"},
)  # fmt: skip
class local_losses(nn.Module):
    """An estimator by a classifier behind each layer that is updated, but for the last.

    >>> estimator = local_losses({f"block{i}.conv": 8 for i in range(1, 5)}, ways=5)
    >>> learner = adapt(model, xs, ys, pattern="11111", solver=descend(rules.sgd(0.1), 5, estimator))

    Args:
        channels: what each layer hands on, by its name.
        ways: classes.
        groups: parts of the channels with a classifier each; they divide every number of channels.
        patches: fields along height and along width.
        directions: 0 for exact gradients of the local losses; else so many directions, in first order.

    Raises:
        ValueError: a number does not fit; when it adapts: a layer has no classifier, or labels are no class numbers, or
            directions are asked for in second order.
    """

    def __init__(
        self, channels: Mapping[str, int], ways: int, groups: int = 1, patches: int = 1, directions: int = 0
    ) -> None:
        super().__init__()
        if (
            ways < 2
            or groups < 1
            or patches < 1
            or directions < 0
            or any(c < 1 or c % groups for c in channels.values())
        ):
            raise ValueError(
                f"local_losses: ways of at least 2, groups that divide the channels, patches of at least 1 and "
                f"directions of at least 0 expected, got {ways}, {groups} of {dict(channels)}, {patches}, {directions}"
            )
        self.groups, self.patches, self.directions = groups, patches, directions
        self.heads = nn.ModuleDict(
            {name.replace(".", "/"): nn.Linear(count // groups, groups * ways) for name, count in channels.items()}
        )
        self.ways = ways

    def extra_repr(self) -> str:
        return f"groups={self.groups}, patches={self.patches}, directions={self.directions}"

    def check(self, problem: Problem) -> None:
        if problem.second_order and self.directions:
            raise ValueError("local_losses: directions have no graph to differentiate through: adapt in first order")
        layers = list(dict.fromkeys(problem.layers.values()))
        ends = problem.layers.get(problem.head[0]) == layers[-1]
        if missing := [n for n in (layers[:-1] if ends else layers) if n.replace(".", "/") not in self.heads]:
            raise ValueError(f"local_losses has no classifier for {', '.join(missing)}: name their channels")
        labels = problem.labels
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
            raise ValueError("local_losses: class numbers [N] expected as labels")

    def loss(self, name: str, z: Tensor, labels: Tensor) -> Tensor:
        """The local loss of what a layer hands on."""
        maps = z if z.dim() == 4 else z[..., None, None]
        pooled = F.adaptive_avg_pool2d(maps, min(self.patches, *maps.shape[2:]))
        rows = pooled.flatten(2).transpose(1, 2)  # [N, P, C]
        own: nn.Linear = self.heads[name.replace(".", "/")]  # type: ignore[assignment]
        parts = rows.view(*rows.shape[:2], self.groups, -1)  # [N, P, G, C / G]
        weight = own.weight.to(z).view(self.groups, self.ways, -1)
        logits = torch.einsum("npgc,gwc->npgw", parts, weight) + own.bias.to(z).view(self.groups, self.ways)
        many = labels[:, None, None].expand(logits.shape[:3])
        return F.cross_entropy(logits.flatten(0, 2), many.flatten())

    def forward(self, problem: Problem, params: Params, step: int) -> tuple[Tensor, Params]:
        self.check(problem)
        outputs = problem.layerwise(params)
        with torch.no_grad():
            loss = problem.loss_of(problem.outputs(params))
        grads: Params = {}
        draw = problem.random(step)
        for at, (layer, z) in enumerate(outputs):
            own = {n: p for n, p in params.items() if problem.layers[n] == layer}
            graph = problem.second_order or at + 1 < len(outputs)
            if layer.replace(".", "/") not in self.heads:
                own_loss = problem.loss_of(z)
            elif self.directions:
                slope = self._slope(layer, z, problem.labels, draw)
                own_loss = (z * slope).sum()
            else:
                own_loss = self.loss(layer, z, problem.labels)
            grads.update(autograd.gradients(problem.pattern, own, own_loss, create_graph=graph))
        cut = problem.second_order
        return loss, {n: g if cut else g.detach() for n, g in grads.items()}

    def _slope(self, layer: str, z: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        """The estimate of the local loss's derivative by z."""
        total = torch.zeros_like(z)
        with torch.no_grad():
            for _ in range(self.directions):
                u = torch.randn(z.shape, generator=draw, dtype=z.dtype).to(z.device)
                with forward_ad.dual_level():
                    value = self.loss(layer, forward_ad.make_dual(z.detach(), u), labels)
                    total += forward_ad.unpack_dual(value).tangent * u
        return total / self.directions
