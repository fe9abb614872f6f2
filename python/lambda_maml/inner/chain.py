"""Steps without autograd: a part of the network that is a chain (fused blocks, then a linear layer) under
cross-entropy, by gradient descent with rates known beforehand, in first order, is one call of a backend's inner
loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lambda_kernels.chain import Chain

from .adaptation import Adaptation, Stretch, Support

__all__ = ["label_errors", "refusals", "run", "unfit"]


def refusals(a: Adaptation, stretch: Stretch, chain: Chain | None, x: Any, support: Support) -> list[str]:
    """Why a chain does not take these steps from x on; empty where it does.

    x: the images, or what the frozen prefix hands over, of one task or with T in front.
    """
    why = []
    if a.second_order:
        why.append("second order differentiates through the steps")
    if stretch.rates is None and a.in_graph and not a.second_order:
        why.append(f"the rates of {a.rule!r} are learned: they require a gradient, and gradients are on")
    elif stretch.rates is None:
        why.append(f"{a.rule!r} is no gradient descent with one known rate per parameter and step")
    return [*why, *unfit(a, stretch, chain, x, support)]


def unfit(a: Adaptation, stretch: Stretch, chain: Chain | None, x: Any, support: Support) -> list[str]:
    """Why these steps, of whatever order and with whatever rates, are not on a chain's cross-entropy."""
    why = []
    if a.loss is not F.cross_entropy:
        why.append(f"the loss is {_called(a.loss)}, not torch.nn.functional.cross_entropy")
    if chain is None:
        why.append(stretch.part.why_no_chain)
    if why or chain is None:
        return why
    if support.labels is None or support.ignores:
        return ["cross-entropy leaves some labels out" if support.ignores else "the labels are no class numbers"]
    if not isinstance(x, Tensor):
        return [f"the chain starts from a {type(x).__name__}, not from one tensor"]
    if support.labels.shape[1:] != x.shape[1 if support.tasks is not None else 0 :][:1]:
        return [f"the labels {list(support.labels.shape[1:])} are not one per input"]
    return chain.refusals(x if support.tasks is not None else x.unsqueeze(0), support.labels)


def label_errors(a: Adaptation, support: Support) -> bool:
    """Whether one of the chains that run the steps, from the inputs on, raises an error for a label that is no class;
    else the loss is NaN."""
    x, labels = support.xs if support.tasks is not None else support.xs.unsqueeze(0), support.labels
    wholes = [s.part.whole for s in a.stretches]
    return any(w is not None and labels is not None and w.backend(x, labels).label_errors for w in wholes)


def run(
    a: Adaptation, stretch: Stretch, chain: Chain, state: Mapping[str, Tensor], x: Tensor, support: Support,
    query: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:  # fmt: skip
    """All steps of a stretch, and the logits [T, Q, ways] of query images [T, Q, ...] where there are any.

    Returns:
        [steps + 1, T], as `state.verdict` gives it; the state after the last step; the logits, or None.
    """
    assert support.labels is not None
    images = x if support.tasks is not None else x.unsqueeze(0)
    updated = stretch.part.updated
    rates = stretch.row_by_row(chain.order(updated))
    rows, new, logits = chain.inner_loop(
        state, updated, images, support.labels, steps=stretch.steps, rates=rates, query=query
    )
    return rows, a.tie({**state, **new}), logits


def _called(loss: Any) -> str:
    return getattr(loss, "__name__", "") or type(loss).__name__
