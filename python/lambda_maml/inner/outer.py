"""Steps that are differentiated without autograd's graph of them: a chain under cross-entropy, by gradient descent with
one rate per parameter and step, known beforehand or learned, is one operation with its own way back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lambda_kernels.chain import Chain
from lambda_kernels.outer import adapted

from . import chain as chains
from .adaptation import Adaptation, Stretch, Support
from .rules import sgd
from .state import version_of

__all__ = ["Passed", "refusals", "run", "step_of", "unfit"]


def refusals(a: Adaptation, stretch: Stretch, chain: Chain | None, x: Any, support: Support) -> list[str]:
    """Why these steps from x on are not one operation with its own way back; empty where they are.

    x: what the frozen prefix hands over, of one task or with T in front.
    """
    why = []
    if not a.in_graph:
        why.append("first order with known rates does not differentiate through the steps")
    elif stretch.rates is None and _learned(a, stretch, stretch.part.updated) is None:
        why.append(f"{a.rule!r} is no gradient descent with one rate per parameter and step")
    return why + unfit(a, stretch, chain, x, support)


def unfit(a: Adaptation, stretch: Stretch, chain: Chain | None, x: Any, support: Support) -> list[str]:
    """Why a chain has no way back for these steps, whatever their rates."""
    why = chains.unfit(a, stretch, chain, x, support)
    if not why and isinstance(x, Tensor) and x.dtype not in (torch.float32, torch.float64):
        why.append(f"the way back is in float32 or float64, not in {str(x.dtype).removeprefix('torch.')}")
    if not why and chain is not None and not all(chain.names):
        why.append("a norm or the linear layer of the chain has no weight or no bias")
    return why


def run(
    a: Adaptation, stretch: Stretch, chain: Chain, state: Mapping[str, Tensor], x: Tensor, support: Support
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All steps of a stretch: the losses [T] before each, and the state after the last, in autograd's graph."""
    assert support.labels is not None
    images = x if support.tasks is not None else x.unsqueeze(0)
    updated = stretch.part.updated
    order = chain.order(updated)
    rates = _known(stretch, order) if stretch.rates is not None else _learned(a, stretch, order)
    assert rates is not None
    losses, new = adapted(
        chain.backend(images, support.labels),
        images,
        support.labels,
        [state[name] for name in chain.names],
        [name in updated for name in chain.names],
        chain.specs,
        rates,
        second_order=a.second_order,
    )
    values = new if support.tasks is not None else [value.squeeze(0) for value in new]
    return list(losses), a.tie({**state, **dict(zip(order, values))})


def _known(stretch: Stretch, order: Sequence[str]) -> Tensor:
    """The rates [steps, names]."""
    row = torch.tensor(stretch.row_by_row(order), dtype=torch.float64)
    return (row if len(row) > 1 else row.expand(stretch.steps * len(order))).reshape(stretch.steps, len(order))


def _learned(a: Adaptation, stretch: Stretch, names: Sequence[str]) -> Tensor | None:
    return _rates(a.rule, names, range(stretch.first, stretch.first + stretch.steps))


def _rates(rule: Any, names: Sequence[str], steps: range) -> Tensor | None:
    """The rates [steps, names] in autograd's graph; None where the rule is another than gradient descent, or a rate is
    of its parameter's shape."""
    if not isinstance(rule, sgd) or type(rule).update is not sgd.update:
        return None
    found = []
    for step in steps:
        for name in names:
            rate = torch.as_tensor(rule.rates.at(name, step), dtype=torch.float64, device="cpu")
            if rate.dim() != 0:
                return None
            found.append(rate)
    return torch.stack(found).reshape(len(steps), len(names))


class Passed(NamedTuple):
    """A pass of one task over a whole chain, as a step on its loss asks for it."""

    node: Callable[[], Any]  # in autograd's graph, while that is there
    read: list[Tensor]  # the images and the parameters
    versions: list[int]

    @classmethod
    def noted(cls, chain: Chain, state: Mapping[str, Tensor], x: Tensor, logits: Tensor) -> Passed:
        node: Any = logits.grad_fn
        read = [x, *(state[name] for name in chain.names if name)]
        return cls(weakref.ref(node.next_functions[0][0]), read, [version_of(t) for t in read])

    def was_with(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it read these parameters, and nothing of what it read was written since."""
        _, *mine = self.read
        same = len(mine) == len(parameters) and all(p is q for p, q in zip(mine, parameters))
        return same and self.versions == [version_of(t) for t in self.read]


def step_of(
    chain: Chain, state: Mapping[str, Tensor], updated: Sequence[str], rule: Any, step: int, loss: Tensor,
    passed: Passed,
) -> dict[str, Tensor] | None:  # fmt: skip
    """One second-order step on a loss that somebody else took: the new values by name, in autograd's graph.

    None where the loss is anything else than torch.nn.functional.cross_entropy of the pass's logits, where the pass was
    with other parameters or a hook may change a gradient on the way, or where the rule is no gradient descent with one
    rate per parameter.
    """
    node, order = passed.node(), chain.order(updated)
    rates = _rates(rule, order, range(step, step + 1))
    if node is None or rates is None or not order or not all(chain.names):
        return None
    now = [state[name] for name in chain.names]
    if not passed.was_with(now) or any(t._backward_hooks for t in now):
        return None
    labels = _labels_of(loss, node)
    if labels is None:
        return None
    x, labels = passed.read[0].unsqueeze(0), labels.unsqueeze(0)
    flags = [name in updated for name in chain.names]
    _, new = adapted(chain.backend(x, labels), x, labels, now, flags, chain.specs, rates, second_order=True)
    return dict(zip(order, (value.squeeze(0) for value in new)))


def _labels_of(loss: Tensor, passed: Any) -> Tensor | None:
    """The labels [N] of a loss that is the mean cross-entropy of a pass's logits; None for any other."""
    node: Any = loss.grad_fn
    if (
        node is None
        or node.name() != "NllLossBackward0"
        or node._saved_reduction != 1
        or node._saved_weight is not None
    ):
        return None
    labels: Tensor = node._saved_target
    ignored: int = node._saved_ignore_index
    softmax: Any = node.next_functions[0][0]
    if softmax is None or softmax.name() != "LogSoftmaxBackward0":
        return None
    squeeze: Any = softmax.next_functions[0][0]
    if squeeze is None or squeeze.name() != "SqueezeBackward1" or squeeze.next_functions[0][0] is not passed:
        return None
    if labels.dtype != torch.int64 or labels.dim() != 1 or bool(((labels < 0) | (labels == ignored)).any()):
        return None
    return labels if _comes_back_as_it_is(loss, softmax._saved_result, labels, passed) else None


def _comes_back_as_it_is(loss: Tensor, log_softmax: Tensor, labels: Tensor, passed: Any) -> bool:
    """Whether the gradient that reaches the logits is cross-entropy's over [N, ways]: no hook of a user's changes it,
    and log-softmax [N, ways] was over the classes."""
    (found,) = torch.autograd.grad(loss, [GradientEdge(passed, 0)], retain_graph=True)
    with torch.no_grad():
        count = log_softmax.new_full((), len(labels))
        g = torch.ops.aten.nll_loss_backward(torch.ones_like(loss), log_softmax, labels, None, 1, -100, count)
        expected = torch.ops.aten._log_softmax_backward_data(g, log_softmax, 1, log_softmax.dtype)
        return torch.equal(found.reshape(expected.shape), expected)
