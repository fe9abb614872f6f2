"""What the native operators, the prepared call and the snapshots cannot do is refused by name."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import runner
from machine import fresh, needs_native
from torch import Tensor, nn

from lambda_kernels.backends import native
from lambda_maml import adapt

pytestmark = needs_native

OPS = torch.ops.lambda_kernels
ONE = [1, 1, 1, 1, 1, 1, 2]


def z(*size: int) -> Tensor:
    return torch.zeros(size)


def chain(**changes: Any) -> Any:
    """A call of inner_loop: one block of 2 channels over 3 images, then 5 ways."""
    arguments = {
        "x": z(1, 3, 1, 6, 6), "labels": z(1, 3).long(),
        "parameters": [z(2, 1, 3, 3), z(2), z(2), z(5, 18), z(5)],
        "updated": [0, 0, 0, 1, 1], "geometry": [*ONE[:6], 1, 2], "eps": [1e-5], "steps": 1, "rates": [0.1],
        "query": None,
    }  # fmt: skip
    return OPS.inner_loop(**{**arguments, **changes})


X, W, V = z(1, 2, 3, 9, 9), z(1, 8, 3, 3, 3), z(1, 8)
BLOCK = X, W, V, V, z(1, 28, 28).double()
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "stride 0": (
        lambda: OPS.image_moments(X, [3, 3], [0, *ONE[1:]]),
        r"image_moments: the numbers \[0, 1, 1, 1, 1, 1\]",
    ),
    "dilation 0": (
        lambda: OPS.affine_block(X, W, V, [*ONE[:4], 0, 1, 2]),
        r"affine_block: the numbers \[1, 1, 1, 1, 0",
    ),
    "pool 0": (lambda: OPS.frozen_block(X, W, V, V, [*ONE[:6], 0], 1e-5), "frozen_block: .* pool 0"),
    "pool 3": (lambda: chain(geometry=[*ONE[:6], 1, 3]), "inner_loop: the pool of block 0 must be 1 or 2, got 3"),
    "padding below 0": (lambda: OPS.winograd(X, W, [-1, 0]), r"winograd: the numbers \[1, 1, -1, 0"),
    "sizes that are negative twice": (
        lambda: OPS.winograd_input_grad(X, W, [1, -2, -3, 9, 9], [1, 1]),
        r"images \[-2, -3",
    ),
    "padding that overflows": (
        lambda: OPS.image_block(*BLOCK, [1, 1, 2**62, 2**62, 1, 1, 2], 1e-5),
        "4611686018427387904",
    ),
    "padding beyond memory": (lambda: OPS.winograd(X, W, [2**28, 2**28]), "values at a time"),
    "kernel beyond the images": (lambda: OPS.image_moments(X, [1, 10], [1, 1, 0, 0, 1, 1, 1]), "are too small"),
    "-1 steps": (lambda: chain(steps=-1), "inner_loop: steps must be from 0 to .* got -1"),
    "no images": (lambda: chain(x=z(1, 0, 1, 6, 6), labels=z(1, 0).long()), r"x must be .* got \[1, 0, 1, 6, 6\]"),
    "no ways": (lambda: chain(parameters=[z(2, 1, 3, 3), z(2), z(2), z(0, 18), z(0)]), r"layer 1 .* got \[1, 0, 18\]"),
    "no dimensions": (
        lambda: chain(parameters=[z(2, 1, 3, 3), z(), z(2), z(5, 18), z(5)]),
        r"gamma of layer 0 .* got \[\]",
    ),
    "no parameters": (lambda: chain(parameters=[], updated=[]), "1 blocks need 5 parameters, got 0"),
    "no pool": (lambda: chain(geometry=ONE), "geometry must be 8 numbers, got 7"),
    "short gamma": (
        lambda: OPS.image_block(X, W, z(1, 7), V, BLOCK[4], ONE, 1e-5),
        r"image_block: gamma must be \[1, 8\] .* \[1, 7\]",
    ),
    "short moments": (
        lambda: OPS.image_block(X, W, V, V, z(1, 9, 9).double(), ONE, 1e-5),
        r"moments must be \[1, 28, 28\]",
    ),
    "short index": (
        lambda: OPS.image_block_grad(z(1, 2, 8, 4, 4), X, W, V, z(1, 2, 8, 4, 3).byte(), V, BLOCK[4], ONE),
        r"index must be \[1, 2, 8, 4, 4\] in Byte",
    ),
    "a label too many": (lambda: chain(labels=z(1, 3).long() + 5), "inner_loop: label 5 is not one of 0 to 4"),
    "another dtype": (
        lambda: OPS.norm_relu_pool(X, V[:, :3].double(), V[:, :3], 1e-5, 2),
        "gamma must be .* Float .* Double",
    ),
    "meta beside CPU": (lambda: OPS.norm_relu_pool(X, V[:, :3].to("meta"), V[:, :3], 1e-5, 2), "gamma .* on meta"),
    "CPU beside meta": (lambda: chain(x=z(1, 3, 1, 6, 6).to("meta")), "on cpu"),
    "half": (lambda: OPS.winograd(X.half(), W.half(), [1, 1]), "not implemented for 'Half'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_operator_cannot_do_is_refused_by_name(name: str) -> None:
    call, text = WRONG[name]
    with pytest.raises(RuntimeError, match=text):
        call()


def test_the_prepared_call_takes_nothing_but_tensors_that_fit() -> None:
    flags: list[Any] = [[1, 1], [], []]
    call = native.Native().prepared([z(5, 18), z(5)], [True, True], [])
    xs, ys = z(3, 18), z(3).long()
    assert call(xs, ys, 1, [0.1]) is not None
    for wrong in ((None, ys), (xs, None), ([1], ys), (z(), ys), (xs, z().long()), (xs[:0], ys[:0]), (xs, ys + 5),
                  (xs.to("meta"), ys), (xs, ys.int()), (xs.double(), ys), (xs[:, :9], ys)):  # fmt: skip
        assert call(*wrong, 1, [0.1]) is None
    assert call(xs, ys, -1, [0.1]) is call(xs, ys, 1, []) is None
    for parameters in ([z(), z(5)], [z(5, 18), z()], [z(5, 18)], []):
        assert native._extension.PreparedCall(parameters, *flags)(xs, ys, 1, [0.1]) is None
    with pytest.raises(TypeError, match="no tensor: None"):
        native._extension.PreparedCall([None], *flags)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("forms", ([1],)),
        ("versions", ([1], [])),
        ("versions", ([], [1])),
        ("addresses", ([], [1], True)),
        ("addresses", ([1], [], True)),
    ],
)
def test_a_snapshot_of_something_else_is_a_type_error(name: str, arguments: Any) -> None:
    with pytest.raises(TypeError, match="got"):
        getattr(native._extension, name)(*arguments)


def test_an_adaptation_with_a_parameter_without_dimensions_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 5))
    xs, ys = torch.randn(5, 18), torch.arange(5)
    for _ in range(3):
        adapt(model, xs, ys, pattern="1", steps=1, lr=0.1)
    model[1].bias.data = z()
    for _ in range(3):
        with pytest.raises((RuntimeError, ValueError)):
            adapt(model, xs, ys, pattern="1", steps=1, lr=0.1)


def test_what_does_not_fit_into_memory_says_how_much_it_needed() -> None:
    for call in (
        lambda: OPS.image_moments(X, [3, 3], [1, 1, 10**6, 10**6, 1, 1, 1]),
        lambda: OPS.winograd(X, W, [10**6, 10**6]),
        lambda: OPS.chain_logits(
            z(1, 1, 1, 84, 84).expand(1, 10**8, 1, 84, 84),
            [z(1, 64, 1, 3, 3), z(1, 64), z(1, 64), z(1, 5, 64 * 42 * 42), z(1, 5)],
            [*ONE[:4], 1, 1, 1, 2],
            [1e-5],
            True,
        ),
    ):
        with pytest.raises(RuntimeError, match=r"(?s)not enough memory.*\d{14} bytes.*fewer tasks or images"):
            call()


INTERRUPTED = """
import signal, sys
import torch
from chains import LR, MIXED, given
from lambda_kernels.backends import native

threads, tasks, door = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(threads)
network = MIXED["images-winograd-library"]
task, updated, steps, count = given(network, torch.float32, tasks=tasks), network.from_layer(0), 10000, 0
own = [p.unsqueeze(0) for p in task.parameters]
flags, geometry, eps = native._constants(updated, network.specs)

def stop(*_):
    global count
    if count == 3:  # a signal that came while the timer was stopped
        return
    count += 1
    if count == 3:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
try:
    if door == "prepared":
        native.Native().prepared(task.parameters, updated, network.specs)(task.x[0], task.labels[0], steps, [LR])
    elif door == "steps":
        rates = [LR] * steps * sum(flags)
        torch.ops.lambda_kernels.chain_steps(task.x, task.labels, own, flags, geometry, eps, steps, rates, False)
    else:
        native.Native().inner_loop(task.x, task.labels, task.parameters, updated, network.specs, steps, [LR])
    print("to the end after", count)
except KeyboardInterrupt:
    print("interrupted at", count)
"""


@pytest.mark.parametrize(
    ("threads", "tasks", "door"), [(1, 1, "loop"), (2, 4, "loop"), (1, 1, "prepared"), (2, 3, "steps")]
)
def test_signals_are_handled_while_a_long_adaptation_runs(threads: int, tasks: int, door: str) -> None:
    """A call that looks at none until it ends has its handler called once, after it."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    assert fresh(INTERRUPTED, str(threads), str(tasks), door, PYTHONPATH=path) == "interrupted at 3\n"


def test_calls_with_arguments_that_do_not_fit_are_refused_or_right() -> None:
    counts: Counter[str] = Counter()
    found = list(runner.failures("operator", [range(0, 500)], counts))
    assert not found, "PYTHONPATH=tests python -m fuzz --kind operator --seed N shows one: " + "; ".join(
        map(str, found)
    )
    assert counts["refused"] > 200 and counts["ok"] > 50, counts
