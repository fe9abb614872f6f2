"""What the tests of users' calls share: small networks in float64, and every way of adapting beside the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from plain import far, plain
from torch import Tensor, nn

from lambda_maml import LambdaMAML, adapt, adapt_tasks
from lambda_maml.network import layers_of

D = torch.float64
X, Y = torch.randn(6, 4, dtype=D), torch.arange(3).repeat(2)
Q = torch.randn(9, 4, dtype=D)
Loss = Callable[[Any, Any], Tensor]


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    return module.double()


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)))


def every_way(model: nn.Module, xs: Any, ys: Any, xq: Any, loss: Loss = F.cross_entropy, steps: int = 3) -> None:
    """adapt, adapt_tasks and the verbs against the plain loop; results are compared by their first tensor."""
    want = first(plain(model, lambda c: loss(c(xs), ys), steps)(xq))
    bits = "1" * len(layers_of(model))
    given: dict[str, Any] = {"pattern": bits, "steps": steps, "lr": 0.1, "loss": loss}
    assert far(first(adapt(model, xs, ys, **given)(xq)), want) < 1e-9
    twice = [doubled(value) for value in (xs, ys, xq)]
    for logits in (adapt_tasks(model, *twice, **given), adapt_tasks(model, *twice, second_order=True, **given)):
        assert all(far(first(logits)[t], want) < 1e-9 for t in range(2))
    with torch.no_grad():
        assert far(first(adapt_tasks(model, *twice, **given))[1], want) < 1e-9
    task = LambdaMAML(model, 0.1).clone()
    for _ in range(steps):
        task.adapt(loss(task(xs), ys))
    assert far(first(task(xq)), want) < 1e-9


def doubled(value: Any) -> Any:
    """Two tasks of the same values."""
    if isinstance(value, Tensor):
        return torch.stack([value, value])
    if isinstance(value, dict):
        return {k: doubled(v) for k, v in value.items()}
    return tuple(doubled(v) for v in value) if isinstance(value, tuple) else value


def first(result: Any) -> Tensor:
    """The logits in a result of any of the forms below."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, dict):
        return next(iter(result.values()))
    return result.logits if hasattr(result, "logits") else result[0]
