"""Every operation of the GPU backends once, on small odd sizes, against float64: a line each, within seconds.

With LAMBDA_KERNELS_MEASURE=0 Triton takes its first tile. On a GPU each runs on a side stream that is stalled, and its
operands are written behind the stall: a kernel that is launched on another stream reads NaN, always.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import reason, write
from torch import Tensor

from lambda_kernels.agreement import apart
from lambda_kernels.backends import Backend, Cuda, Reference, Triton
from lambda_kernels.spec import BlockSpec, ConvSpec

STALL = 20_000_000  # cycles, some 10 ms: longer than Python takes to launch an operation
T, N, C, WIDTH, H, W, WAYS = 2, 3, 3, 64, 15, 17, 5  # pixels enough for a sum in two parts
BLOCK = BlockSpec(ConvSpec((1, 1), (1, 1), (1, 1), 1), 1e-5, 2)
REFERENCE = Reference()


class Case(NamedTuple):
    """An operation's operands on the CPU, and the call, whose results are tensors."""

    operands: list[Tensor]
    call: Callable[..., Any]  # of the backend and the operands


def cases() -> dict[str, Case]:
    """By the name of the backend's method."""
    made = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    images, first, weight = made(T, N, C, H, W), made(T, WIDTH, C, 3, 3), made(T, WIDTH, WIDTH, 3, 3)
    x, z, gz = (made(T, N, WIDTH, H, W) for _ in range(3))
    gamma, beta = made(T, WIDTH), made(1, WIDTH)
    wide = made(1, 25, 2 * WIDTH, 23, 23)  # so many pixels that moments of their tiles are merged in groups first
    y, index, mean, rstd = REFERENCE.norm_relu_pool(z, gamma, beta, BLOCK)
    gy = torch.randn_like(y)
    moments, of_image = moments_of(images), REFERENCE.conv_block(images, first, gamma, beta, BLOCK)
    head, bias, features, labels = made(T, WAYS, 70), made(1, WAYS), made(T, N, 70), torch.arange(N).expand(T, N)
    spec, some = BLOCK.conv, [made(n) for n in (1, 5, 4097, 64)]
    chain = [made(8, C, 3, 3), made(8), made(8), made(8, 8, 3, 3), made(8), made(8), made(WAYS, 48), made(WAYS)]

    def sgd(b: Backend, *tensors: Tensor) -> list[Tensor]:
        own = [t.clone() for t in tensors]
        b.sgd_(own, [torch.ones_like(t) for t in own], [0.1, 0.0, 0.2, 0.3])
        return own

    def inner_loop(b: Backend, x: Tensor, labels: Tensor, *parameters: Tensor) -> list[Tensor]:
        updated = [i >= 3 for i in range(len(parameters))]
        done = b.inner_loop(x, labels, list(parameters), updated, [BLOCK] * 2, 2, [0.01], x)
        assert done.logits is not None
        return [done.rows, *done.updated, done.logits]

    return {
        "conv2d": Case([x, weight], lambda b, x, w: b.conv2d(x, w, None, spec)),
        "conv2d_input_grad": Case([gz, weight], lambda b, g, w: b.conv2d_input_grad(g, w, x.shape, spec)),
        "conv2d_weight_grad": Case([gz, x], lambda b, g, x: b.conv2d_weight_grad(g, x, weight.shape, spec)),
        "linear": Case([features, head, bias], lambda b, *o: b.linear(*o)),
        "norm_relu_pool": Case(
            [z, gamma, beta, wide],
            lambda b, z, gamma, beta, wide: (
                *b.norm_relu_pool(z, gamma, beta, BLOCK),
                *b.norm_relu_pool(wide, gamma[:1].repeat(1, 2), beta.repeat(1, 2), BLOCK),
            ),
        ),
        "norm_relu_pool_grad": Case(
            [gy, z, gamma, index, mean, rstd], lambda b, *o: b.norm_relu_pool_grad(*o, BLOCK, True)
        ),
        "conv_block": Case([x, weight, gamma, beta], lambda b, x, *o: b.conv_block(b.layout(x), *o, BLOCK)),
        "block": Case([x, weight[:1], gamma[:1], beta], lambda b, x, *o: b.block(b.layout(x), *o, BLOCK)),
        "image_moments": Case(  # also of images whose taps are multiplied by distance
            [images, made(T, N, C, 21, 37)], lambda b, *xs: [b.image_moments(x, (3, 3), spec) for x in xs]
        ),
        "image_block": Case([images, first, gamma, beta, moments], lambda b, *o: b.image_block(*o, BLOCK)),
        "image_block_grad": Case(
            [gy, images, first, gamma, *of_image[2:], moments], lambda b, *o: b.image_block_grad(*o, BLOCK)
        ),
        "cross_entropy_grad": Case([made(T, N, WAYS), labels], lambda b, *o: b.cross_entropy_grad(*o)),
        "head_grad": Case([features, head, bias, labels], lambda b, *o: b.head_grad(*o, (True, True, True))),
        "sgd_": Case(some, sgd),
        "inner_loop": Case([made(T, N, C, 9, 13), labels, *chain], inner_loop),
    }


def moments_of(images: Tensor) -> Tensor:
    """As `Backend.image_moments`."""
    patches = torch.nn.functional.unfold(images.flatten(0, 1).double(), 3, padding=1)
    p = patches.unflatten(0, images.shape[:2]).transpose(2, 3).flatten(1, 2)
    p = torch.cat([p, torch.ones_like(p[..., :1])], -1)
    return p.mT @ p


def of_patches(name: str, operands: list[Tensor]) -> Any:
    """What the reference has no method for, by autograd of the block with its z."""
    if name == "image_moments":
        return [moments_of(x) for x in operands]
    if name == "image_block":
        x, weight, gamma, beta, _ = operands
        return REFERENCE.conv_block(x, weight, gamma, beta, BLOCK)[1:]
    gy, x, weight, gamma, index, mean, rstd, _ = operands
    z = REFERENCE.conv2d(x, weight, None, BLOCK.conv)
    dz, dgamma, dbeta = REFERENCE.norm_relu_pool_grad(gy, z, gamma, index, mean, rstd, BLOCK, True)
    assert dz is not None
    return REFERENCE.conv2d_weight_grad(dz, x, weight.shape, BLOCK.conv), dgamma, dbeta


def truth(name: str, case: Case) -> list[Tensor]:
    exact = [t.double() if t.is_floating_point() else t for t in case.operands]
    return floats(of_patches(name, exact) if name.startswith("image_") else case.call(REFERENCE, *exact))


def floats(results: Any) -> list[Tensor]:
    every = results if isinstance(results, (tuple, list)) else [results]
    return [t for t in every if isinstance(t, Tensor) and t.is_floating_point()]


def own(backend: Backend) -> list[str]:
    """The operations that a backend does not leave to the reference."""
    return [name for name in cases() if getattr(type(backend), name) is not getattr(Reference, name)]


def behind_a_stall(run: Callable[..., Any], operands: list[Tensor], device: torch.device) -> list[Tensor]:
    """What `run` gives on a stalled stream for operands that are written behind the stall."""
    given = [t.to(device) for t in operands]
    if device.type == "cuda":
        run(*given)  # compiled and loaded: from here on Python is faster than the stall
    mine = [torch.full_like(t, float("nan") if t.is_floating_point() else 0) for t in given]
    if device.type != "cuda":
        side: Any = nullcontext()
    else:
        torch.cuda.synchronize(device)
        side = torch.cuda.stream(torch.cuda.Stream(device))
    with side:
        if device.type == "cuda":
            torch.cuda._sleep(STALL)
        for to, value in zip(mine, given):
            to.copy_(value)
        results = floats(run(*mine))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return results


def check(backend: Backend, name: str, case: Case, device: torch.device) -> dict[str, Any]:
    """What came of one operation."""
    row: dict[str, Any] = {"backend": backend.name, "operation": name, "status": "right"}
    try:
        found = behind_a_stall(functools.partial(case.call, backend), case.operands, device)
        for got, want in zip(found, truth(name, case), strict=True):
            if (off := apart(got.cpu(), want.to(got.dtype))) is not None:
                row.update(status="wrong", reason=f"{off:.2g} of its length away from float64")
    except Exception as error:  # one broken kernel must not hide the others
        row.update(status="failed", reason=reason(error))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--result", type=Path, required=True, help="File for the results, JSON.")
    parser.add_argument("--dry-run", action="store_true", help="On the CPU, kernels interpreted; no CUDA kernel runs.")
    given = parser.parse_args()
    device, rows = torch.device("cpu") if given.dry_run else torch.device("cuda", 0), []
    for backend in (Cuda(), Triton()):
        name = backend.name
        if why := backend.reasons():
            rows.append({"backend": name, "status": "skipped", "reason": "; ".join(why)})
            print(f"{name}: skipped: {rows[-1]['reason']}", flush=True)
            continue
        for operation in own(backend):
            rows.append(check(backend, operation, cases()[operation], device))
            print(f"{name} {operation}: {rows[-1]['status']} {rows[-1].get('reason', '')}".rstrip(), flush=True)
            write(given.result, {"checks": rows})
    bad = ("wrong", "failed") if given.dry_run else ("wrong", "failed", "skipped")
    write(given.result, {"checks": rows})
    return 1 if any(row["status"] in bad for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
