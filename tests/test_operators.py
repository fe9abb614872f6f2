"""torch's rules for the operators: schema, shapes and memory layouts without data, autograd keys, tracing."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import IMAGES, ImageCase
from chains import FEW, LR, MIXED, Network, given, in_other_memory
from machine import needs_native

from lambda_kernels.backends import cuda, native
from lambda_kernels.backends.reference import channels_last
from lambda_kernels.spec import BlockSpec, ConvSpec

pytestmark = needs_native

OPS = torch.ops.lambda_kernels


def test_every_operator_knows_its_shapes_without_data() -> None:
    every = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    names = [name for name in every if name.startswith("lambda_kernels::")]
    assert len(names) == 18
    assert [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "Meta")] == []


def calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator."""
    geometry = native._geometry(BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, 2))
    z, x, images = (channels_last(torch.randn(2, 3, *size)) for size in ((4, 6, 7), (16, 9, 9), (3, 8, 9)))
    gamma, beta, weight = torch.randn(2, 4), torch.randn(2, 4), torch.randn(1, 64, 16, 3, 3)
    filters = torch.randn(1, 4, 3, 3, 3)
    y, index, mean, rstd = OPS.norm_relu_pool(z, gamma, beta, 1e-5, 2)
    wide, moments = OPS.winograd(x, weight, [1, 1]), OPS.image_moments(images, [3, 3], geometry)
    pooled, places, _, scale = OPS.image_block(images, filters, gamma, beta, moments, geometry, 1e-5)
    network = FEW["5x5"][0]
    task, updated = given(network, torch.float32), network.from_layer(0)
    flags, *shape = native._constants(updated, network.specs)
    constants = (flags, *shape, 2, [LR])
    own = [p.unsqueeze(0) for p in task.parameters]
    ways_back = (flags, *shape, 2, [LR] * (2 * sum(flags)))
    _, path = OPS.chain_steps(task.x, task.labels, own, *ways_back, False)
    logits, kept = OPS.chain_logits(task.x, own, *shape, True)
    every = [1] * len(own)
    layers = [filters[0], beta[0], torch.randn(5, 64), torch.randn(5)]
    return {
        "norm_relu_pool": (z, gamma, beta, 1e-5, 2),
        "norm_relu_pool_grad": (y, z, gamma, index, mean, rstd, 2, True),
        "norm_relu_pool_grad_grad": (y, z, gamma, index, mean, rstd, 2, z, gamma, beta, True),
        "winograd": (x, weight, [1, 1]),
        "winograd_input_grad": (wide, weight, x.shape, [1, 1]),
        "winograd_weight_grad": (wide, x, weight.shape, [1, 1]),
        "frozen_block": (images, filters, gamma, beta, geometry, 1e-5),
        "affine_block": (images, filters, beta, geometry),
        "affine_chain": (images[0], layers, geometry, OPS.affine_chain_prepare(layers, geometry, images.shape[2:])),
        "affine_chain_prepare": (layers, geometry, images.shape[2:]),
        "image_moments": (images, [3, 3], geometry),
        "image_block": (images, filters, gamma, beta, moments, geometry, 1e-5),
        "image_block_grad": (pooled, images, filters, gamma, places, scale, moments, geometry),
        "inner_loop": (task.x, task.labels, task.parameters, *constants, task.query),
        "chain_steps": (task.x, task.labels, own, *ways_back, False),
        "chain_steps_grad": (path[:, -1], task.x, task.labels, own, path, *ways_back, every, False, True, True, True),
        "chain_logits": (task.x, own, *shape, True),
        "chain_logits_grad": (logits, task.x, own, kept, *shape, every, True, False),
    }


def test_every_operator_keeps_all_of_torchs_rules() -> None:
    known = calls()
    every = torch._C._dispatch_get_all_op_names()
    assert known.keys() == {n.split("::")[1] for n in every if n.startswith("lambda_kernels::")}
    for name, arguments in known.items():
        torch.library.opcheck(getattr(OPS, name).default, arguments)
    x, parameters, *shape, from_images = known["chain_logits"]
    features = (x, parameters[:-2], *shape, from_images)
    y, kept = OPS.chain_logits(*features)
    torch.library.opcheck(OPS.chain_logits.default, features)
    back = (y, x, parameters[:-2], kept, *shape, [1] * (len(parameters) - 2), True, False)
    torch.library.opcheck(OPS.chain_logits_grad.default, back)


def test_the_implementations_for_cuda_keep_torchs_rules(
    emulated_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those of the operators above that have one: as operators of their own, on the CPU.
    monkeypatch.setattr(cuda, "_OPERATORS", cuda.Cuda(emulated_library, "cpu"))
    every = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    names = [name.split("::")[1] for name in every if name.startswith("lambda_kernels::")]
    assert sorted(names) == ["norm_relu_pool", "norm_relu_pool_grad"]
    library, known = torch.library.Library("lambda_kernels_emulated", "DEF"), calls()
    for name in names:
        operator = getattr(OPS, name).default
        library.define(str(operator._schema).partition("::")[2])
        library.impl(name, getattr(cuda, f"_{name}"), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lambda_kernels_emulated::{name}", operator, lib=library)
        torch.library.opcheck(getattr(torch.ops.lambda_kernels_emulated, name).default, known[name])


SHAPES = ("test_schema", "test_faketensor")
TRACED = (*SHAPES, "test_autograd_registration", "test_aot_dispatch_dynamic")  # the last one takes seconds


def check_first_block(case: ImageCase, tasks: int, tests: tuple[str, ...]) -> None:
    x = torch.randn(tasks, case.images, case.inputs, *case.size)
    weight = torch.randn(1, case.width, case.inputs, *case.kernel)
    gamma, beta = torch.randn(tasks, case.width), torch.randn(1, case.width)
    geometry = native._geometry(BlockSpec(case.spec, 1e-5, case.pool))
    moments = OPS.image_moments(x, case.kernel, geometry)
    y, index, _, rstd = OPS.image_block(x, weight, gamma, beta, moments, geometry, 1e-5)
    saved = (torch.randn_like(y), x, weight, gamma, index, rstd, moments, geometry)
    torch.library.opcheck(OPS.image_moments.default, (x, case.kernel, geometry), test_utils=tests)
    given = (x, weight, gamma, beta, moments, geometry, 1e-5)
    torch.library.opcheck(OPS.image_block.default, given, test_utils=tests)
    torch.library.opcheck(OPS.image_block_grad.default, saved, test_utils=tests)


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.name)
def test_the_first_blocks_operators_keep_torchs_rules(case: ImageCase) -> None:
    for tasks in (1, 2):
        check_first_block(case, tasks, SHAPES)


def check_inner_loop(network: Network, tasks: int, own: bool, first: int, tests: tuple[str, ...]) -> None:
    task, updated = given(network, torch.float32, tasks=tasks, own=own), network.from_layer(first)
    constants = (*native._constants(updated, network.specs), 2, [LR] * (2 * sum(updated)))
    for x, labels, query, parameters in (task, in_other_memory(task)):
        for images in (None, query):
            arguments = (x, labels, parameters, *constants, images)
            torch.library.opcheck(OPS.inner_loop.default, arguments, test_utils=tests)


@pytest.mark.parametrize("network", [*MIXED.values(), FEW["5x5"][0]], ids=[*MIXED, "5x5"])
def test_the_inner_loop_keeps_torchs_rules(network: Network) -> None:
    for tasks, own, first in product((1, 2), (False, True), {0, len(network.layers)}):
        check_inner_loop(network, tasks, own, first, SHAPES)


def test_operators_are_traced() -> None:
    check_first_block(IMAGES[0], 2, TRACED)
    check_inner_loop(MIXED["linear"], 2, False, 0, TRACED)
    check_inner_loop(MIXED["library-groups"], 1, False, 1, TRACED)
