"""The inner loop with rates per parameter and step, on every backend, against a plain loop of torch's autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lambda_kernels.backends import Backend, InnerLoop
from lambda_kernels.spec import BlockSpec, ConvSpec

TASKS, STEPS = 2, 3
PLAIN = ConvSpec((1, 1), (1, 1), (1, 1), 1)
BLOCKS = [BlockSpec(PLAIN, 1e-5, 2), BlockSpec(PLAIN._replace(stride=(1, 2)), 1e-3, 1)]
SHAPES = [(8, 3, 3, 3), (8,), (8,), (6, 8, 3, 3), (6,), (6,), (5, 48), (5,)]


class Given(NamedTuple):
    x: Tensor  # [T, N, C, H, W]
    labels: Tensor  # [T, N]
    query: Tensor  # [T, Q, C, H, W]
    parameters: list[Tensor]

    def to(self, device: str) -> Given:
        x, labels, query = (t.to(device) for t in self[:3])
        return Given(x, labels, query, [p.to(device) for p in self.parameters])


def given(tasks: int = TASKS, dtype: torch.dtype = torch.float64) -> Given:
    """Two blocks and a head; half of the parameters are the tasks' own."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    axes = [(tasks,) if i % 2 else () for i in range(len(SHAPES))]
    parameters = [0.3 * draw(*axis, *shape) + (len(shape) == 1) for axis, shape in zip(axes, SHAPES)]
    labels = torch.randint(5, (tasks, 5), generator=generator)
    return Given(draw(tasks, 5, 3, 9, 8), labels, draw(tasks, 4, 3, 9, 8), parameters)


def network(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The logits of one task, in torch's own layers."""
    for i, ((stride, padding, dilation, groups), eps, pool) in enumerate(BLOCKS):
        weight, gamma, beta = parameters[3 * i : 3 * i + 3]
        z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
        x = F.max_pool2d(F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.0, eps)), pool)
    return F.linear(x.flatten(1), *parameters[-2:])


def plain(task: Given, updated: Sequence[bool], rates: Sequence[float], steps: int = STEPS) -> InnerLoop:
    """What an inner loop gives, by autograd, one task after another."""
    at = [i for i, moves in enumerate(updated) if moves]
    rows, new, logits = [], [], []
    for t in range(task.labels.shape[0]):
        own = [p if p.dim() == len(shape) else p[t] for p, shape in zip(task.parameters, SHAPES)]
        losses = []
        for step in range(steps):
            leaves = [own[i].detach().requires_grad_() for i in at]
            own = [leaves[at.index(i)] if i in at else p for i, p in enumerate(own)]
            loss = F.cross_entropy(network(task.x[t], own), task.labels[t])
            losses.append(loss.detach())
            row = rates if len(rates) == 1 else rates[step * len(at) : (step + 1) * len(at)]
            for n, (i, gradient) in enumerate(zip(at, torch.autograd.grad(loss, leaves))):
                own[i] = own[i].detach() - row[n if len(row) > 1 else 0] * gradient
        rows.append(torch.stack([*losses, task.x.new_zeros(())]))
        new.append([own[i].detach() for i in at])
        logits.append(network(task.query[t], own).detach())
    return InnerLoop(torch.stack(rows, 1), [torch.stack(p) for p in zip(*new)], torch.stack(logits))


def drawn(updated: Sequence[bool], steps: int = STEPS) -> list[float]:
    """Rates per step and updated parameter; every third one is 0, and one is negative."""
    generator = torch.Generator().manual_seed(2)
    rates = (0.05 * torch.rand(steps * sum(updated), generator=generator)).tolist()
    rates[::3] = [0.0] * len(rates[::3])
    rates[1 % len(rates)] = -0.02
    return rates


def run(backend: Backend, task: Given, updated: list[bool], rates: Sequence[float], **more: Any) -> InnerLoop:
    return backend.inner_loop(task.x, task.labels, task.parameters, updated, BLOCKS, STEPS, rates, **more)


def check(backend: Backend, device: str = "cpu") -> None:
    """Rates as in a plain loop, exact freezing, equal rates as one, parameters left as they are."""
    task = given().to(device)
    before = [p.clone() for p in task.parameters]
    for bits in ("11111111", "00000011", "00011100", "10010010", "01000001"):
        updated = [bit == "1" for bit in bits]
        rates = drawn(updated)
        got, want = run(backend, task, updated, rates, query=task.query), plain(task.to("cpu"), updated, rates)
        assert got.rows.shape == (STEPS + 1, TASKS) and got.logits is not None and want.logits is not None
        torch.testing.assert_close(got.rows.cpu().double(), want.rows, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close([p.cpu() for p in got.updated], want.updated, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(got.logits.cpu(), want.logits, rtol=1e-9, atol=1e-9)

        one = run(backend, task, updated, [0.03], query=task.query)
        same = run(backend, task, updated, [0.03] * (STEPS * sum(updated)), query=task.query)
        assert torch.equal(one.rows, same.rows) and all(map(torch.equal, one.updated, same.updated)), bits
        assert one.logits is not None and same.logits is not None and torch.equal(one.logits, same.logits)
        assert run(backend, task, updated, [0.03]).logits is None

        frozen = [0.0 if i % sum(updated) == 0 else 0.03 for i in range(STEPS * sum(updated))]
        found = run(backend, task, updated, frozen).updated
        first = task.parameters[updated.index(True)]
        assert torch.equal(found[0], first.expand_as(found[0])), bits
        assert all(torch.equal(p, old) for p, old in zip(task.parameters, before)), bits


def check_sgd(backend: Backend, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """One rate per parameter; a rate of 0 leaves a parameter as it is, whatever the gradient holds."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(7,), (1025,), (3, 4, 5), (1,), (2048,), *[(n,) for n in range(9, 120)]]
    first, slopes = (
        [torch.randn(s, generator=generator).to(device=device, dtype=dtype) for s in shapes] for _ in range(2)
    )
    slopes[2] = torch.full_like(slopes[2], torch.nan)
    rates = [0.01 * i for i in range(len(shapes))]
    rates[2] = 0.0
    got, want = ([p.clone() for p in first] for _ in range(2))
    backend.sgd_(got, slopes, rates)
    for parameter, slope, rate in zip(want, slopes, rates):
        if rate != 0.0:
            backend.sgd_([parameter], [slope], [rate])
    assert all(map(torch.equal, got, want))
    assert torch.equal(got[0], first[0]) and torch.equal(got[2], first[2])
    equal, one = ([p.clone() for p in first] for _ in range(2))
    backend.sgd_(equal, slopes, [0.1] * len(shapes))
    backend.sgd_(one, slopes, [0.1])
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(equal, one)) if i != 2)
