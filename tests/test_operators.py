"""torch's rules for the operators: schema, shapes and memory layouts without data, autograd keys, tracing."""

from __future__ import annotations

import pytest
import torch
from cases import IMAGES, ImageCase
from chains import FEW, LR, MIXED, Network, given, in_other_memory

from lambda_kernels.backends import native, reasons

pytestmark = pytest.mark.skipif(bool(reasons("native")), reason="; ".join(reasons("native")))

OPS = torch.ops.lambda_kernels


def test_every_operator_knows_its_shapes_without_data() -> None:
    every = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    names = [name for name in every if name.startswith("lambda_kernels::")]
    assert len(names) == 11
    assert [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "Meta")] == []


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.name)
def test_the_first_blocks_operators_keep_torchs_rules(case: ImageCase, tasks: int) -> None:
    x = torch.randn(tasks, case.images, case.inputs, *case.size)
    weight = torch.randn(1, case.width, case.inputs, *case.kernel)
    gamma, beta = torch.randn(tasks, case.width), torch.randn(1, case.width)
    geometry = native._geometry(case.spec, case.pool)
    torch.library.opcheck(OPS.image_moments.default, (x, case.kernel, geometry))
    moments = OPS.image_moments(x, case.kernel, geometry)
    torch.library.opcheck(OPS.image_block.default, (x, weight, gamma, beta, moments, geometry, 1e-5))
    y, index, _, rstd = OPS.image_block(x, weight, gamma, beta, moments, geometry, 1e-5)
    saved = (torch.randn_like(y), x, weight, gamma, index, rstd, moments, geometry)
    torch.library.opcheck(OPS.image_block_grad.default, saved)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("network", [*MIXED.values(), FEW["5x5"][0]], ids=[*MIXED, "5x5"])
def test_the_inner_loop_keeps_torchs_rules(network: Network, tasks: int, own: bool) -> None:
    for first in {0, len(network.layers)}:
        task, updated = given(network, torch.float32, tasks=tasks, own=own), network.from_layer(first)
        for x, labels, query, parameters in (task, in_other_memory(task)):
            constants = (*native._constants(updated, network.specs), 2, [LR] * (2 * sum(updated)))
            for images in (None, query):
                torch.library.opcheck(OPS.inner_loop.default, (x, labels, parameters, *constants, images))
