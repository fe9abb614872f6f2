"""What is noted of an operation on fake tensors, beside what the operation does to real ones."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lambda_kernels.program.watch import Deeds, Watch, storages

Given = dict[str, Tensor]
Case = tuple[Callable[[Any], Any], Callable[[], Given]]


def images(layout: torch.memory_format = torch.contiguous_format) -> Given:
    return {"x": torch.randn(2, 3, 4, 4).contiguous(memory_format=layout)}


def rows() -> Given:
    return {"x": torch.randn(4, 6)}


def channels_last() -> Given:
    return images(torch.channels_last)


def with_out() -> Given:
    return {"x": torch.randn(4, 6), "out": torch.zeros(4, 6)}


def with_statistics() -> Given:
    return {**images(), "mean": torch.zeros(3), "var": torch.ones(3)}


def layer(module: nn.Module) -> Callable[[Any], Any]:
    return lambda g: module(g["x"])


def attention(p: float) -> Callable[[Any], Any]:
    return lambda g: F.scaled_dot_product_attention(g["x"], g["x"], g["x"], dropout_p=p)


def batch_norm(training: bool) -> Callable[[Any], Any]:
    return lambda g: F.batch_norm(g["x"], g["mean"], g["var"], None, None, training)


def instance_norm(training: bool) -> Callable[[Any], Any]:
    return lambda g: F.instance_norm(g["x"], g["mean"], g["var"], None, None, training)


CASES: dict[str, Case] = {
    "dropout, training": (layer(nn.Dropout(0.5)), rows),
    "dropout, evaluation": (layer(nn.Dropout(0.5).eval()), rows),
    "dropout of nothing": (layer(nn.Dropout(0.0)), rows),
    "dropout in place": (layer(nn.Dropout(0.5, inplace=True)), rows),
    "dropout in place, evaluation": (layer(nn.Dropout(0.5, inplace=True).eval()), rows),
    "dropout of channels": (layer(nn.Dropout2d(0.5)), images),
    "alpha dropout": (layer(nn.AlphaDropout(0.5)), rows),
    "a function of dropout": (lambda g: F.dropout(g["x"], 0.5, True), rows),
    "a function of dropout, evaluation": (lambda g: F.dropout(g["x"], 0.5, False), rows),
    "a function of dropout in place": (lambda g: F.dropout(g["x"], 0.5, True, True), rows),
    "rrelu, training": (layer(nn.RReLU()), rows),
    "rrelu, evaluation": (layer(nn.RReLU().eval()), rows),
    "fractional max-pool": (layer(nn.FractionalMaxPool2d(2, output_size=2)), images),
    "attention": (attention(0.0), images),
    "attention with dropout": (attention(0.5), images),
    "recurrent with dropout": (layer(nn.GRU(6, 3, 2, dropout=0.5)), lambda: {"x": torch.randn(5, 2, 6)}),
    "recurrent": (layer(nn.GRU(6, 3, 2)), lambda: {"x": torch.randn(5, 2, 6)}),
    "gumbel softmax": (lambda g: F.gumbel_softmax(g["x"]), rows),
    "rand_like": (lambda g: torch.rand_like(g["x"]), rows),
    "normal_": (lambda g: g["x"].normal_(), rows),
    "bernoulli": (lambda g: torch.bernoulli(torch.sigmoid(g["x"])), rows),
    "multinomial": (lambda g: torch.multinomial(torch.sigmoid(g["x"]), 2), rows),
    "poisson": (lambda g: torch.poisson(torch.sigmoid(g["x"])), rows),
    "add": (lambda g: g["x"] + 1, rows),
    "add_": (lambda g: g["x"].add_(1), rows),
    "iadd": (lambda g: operator.iadd(g["x"], 1), rows),
    "setitem": (lambda g: operator.setitem(g["x"], (slice(None), 0), 1.0), rows),
    "relu": (layer(nn.ReLU()), rows),
    "relu in place": (layer(nn.ReLU(inplace=True)), rows),
    "in place on a view": (lambda g: g["x"][:, :2].mul_(2), rows),
    "in place on a copy": (lambda g: g["x"].clone().mul_(2), rows),
    "as_strided": (lambda g: g["x"].as_strided((2, 2), (1, 1)), rows),
    "in place on as_strided": (lambda g: g["x"].as_strided((2, 2), (1, 1)).zero_(), rows),
    "slice": (lambda g: g["x"][1:], rows),
    "indices": (lambda g: g["x"][torch.tensor([0, 1])], rows),
    "expand": (lambda g: g["x"][:, :1].expand(4, 6), rows),
    "transpose": (lambda g: g["x"].t(), rows),
    "split": (lambda g: g["x"].split(2), rows),
    "unbind": (lambda g: g["x"].unbind(0), rows),
    "detach": (lambda g: g["x"].detach(), rows),
    "identity": (layer(nn.Identity()), rows),
    "to its own dtype": (lambda g: g["x"].to(torch.float32), rows),
    "to another dtype": (lambda g: g["x"].to(torch.float64), rows),
    "reshape, a view": (lambda g: g["x"].reshape(-1), rows),
    "reshape, a copy": (lambda g: g["x"].t().reshape(-1), rows),
    "flatten, a view": (layer(nn.Flatten()), images),
    "flatten, a copy": (layer(nn.Flatten()), channels_last),
    "contiguous, the same": (lambda g: g["x"].contiguous(), images),
    "contiguous, a copy": (lambda g: g["x"].contiguous(), channels_last),
    "the real part": (lambda g: g["x"].real, lambda: {"x": torch.randn(3, dtype=torch.complex64)}),
    "out=": (lambda g: torch.add(g["x"], 1, out=g["out"]), with_out),
    "out= of two": (
        lambda g: torch.max(g["x"], 1, out=(g["values"], g["indices"])),
        lambda: {**rows(), "values": torch.zeros(4), "indices": torch.zeros(4, dtype=torch.int64)},
    ),
    "copy_": (lambda g: g["out"].copy_(g["x"]), with_out),
    "batch_norm, training": (batch_norm(True), with_statistics),
    "batch_norm, evaluation": (batch_norm(False), with_statistics),
    "batch_norm without statistics": (lambda g: F.batch_norm(g["x"], None, None, None, None, True), images),
    "instance_norm of the input": (instance_norm(True), with_statistics),
    "instance_norm of the statistics": (instance_norm(False), with_statistics),
    "instance_norm without statistics": (lambda g: F.instance_norm(g["x"]), images),
    "group_norm": (lambda g: F.group_norm(g["x"], 3), images),
    "convolution": (lambda g: F.conv2d(g["x"], torch.ones(3, 3, 1, 1)), images),
}


def noted(function: Callable[[Any], Any], given: Given) -> tuple[Deeds, dict[str, frozenset[int]]]:
    """What the watch notes on fake copies of the given tensors, and the copies' storages by name."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Watch() as watch:
        copies = {name: fake.from_tensor(t) for name, t in given.items()}
        _, deeds = watch.run(function, copies)
        return deeds, {name: storages(t) for name, t in copies.items()}


def draws(function: Callable[[Any], Any], given: Given) -> bool:
    """Whether the process's generator moves."""
    before = torch.random.get_rng_state()
    function(copy.deepcopy(given))
    return not torch.equal(torch.random.get_rng_state(), before)


def results(function: Callable[[Any], Any], given: Given) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(function(given)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_what_is_noted_is_what_the_operation_does_to_real_tensors(name: str) -> None:
    function, make = CASES[name]
    given = make()
    deeds, of = noted(function, given)
    assert (deeds.random is not None) is draws(function, given), deeds.random

    before = {n: t.clone() for n, t in given.items()}
    made = results(function, given)
    written = {n for n, t in given.items() if not torch.equal(t, before[n])}
    assert {n for n in given if of[n] & deeds.writes} == written

    shared = {n for n in given if storages(given[n]) & storages(made)}
    assert {n for n in given if of[n] & deeds.memory} == shared
    assert deeds.statistics is bool(written & {"mean", "var"})


# What a result shares depends on how memory lies: contiguous, channels-last, or only in one of them.
LAYOUTS: dict[str, tuple[Callable[[Any], Any], bool, bool]] = {
    "flatten": (lambda g: g["x"].flatten(1), True, False),
    "reshape": (lambda g: g["x"].reshape(2, -1), True, False),
    "contiguous": (lambda g: g["x"].contiguous(), True, False),
    "channels last": (lambda g: g["x"].contiguous(memory_format=torch.channels_last), False, True),
    "rows of pixels": (lambda g: g["x"].permute(0, 2, 3, 1).contiguous(), False, True),
    "slice": (lambda g: g["x"][1:], True, True),
    "relu": (lambda g: torch.relu(g["x"]), False, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_result_would_share_in_another_layout_is_noted_too(name: str) -> None:
    function, *shares = LAYOUTS[name]
    for layout, shared in zip((torch.contiguous_format, torch.channels_last), shares, strict=True):
        given = images(layout)
        assert bool(storages(function(given)) & storages(given)) is shared
        deeds, of = noted(function, given)
        assert bool(of["x"] & deeds.memory) is shared
        assert bool(of["x"] & deeds.otherwise) is (any(shares) and not shared)


def test_what_is_tried_in_another_layout_is_not_noted_as_done() -> None:
    deeds, of = noted(lambda g: g["x"].flatten(1).add_(1), channels_last())
    assert deeds.writes == deeds.memory and not of["x"] & deeds.writes and of["x"] <= deeds.otherwise


def test_nothing_is_drawn_and_nothing_written_by_looking() -> None:
    for function, make in CASES.values():
        given = make()
        before, state = tree_map_only(Tensor, torch.clone, given), torch.random.get_rng_state()
        noted(function, given)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(t, before[n]) for n, t in given.items())


def test_each_operation_is_noted_for_itself() -> None:
    with FakeTensorMode(), Watch() as watch:
        x = torch.empty(3)
        _, first = watch.run(torch.rand_like, x)
        _, second = watch.run(torch.neg, x)
    assert first.random == "aten.rand_like" and second == Deeds(memory=second.memory)


def test_a_tensor_without_a_storage_counts_as_itself() -> None:
    sparse = torch.eye(3).to_sparse()
    assert storages(sparse) == {id(sparse)} and len(storages([sparse, {"a": torch.ones(1)}, None])) == 2
