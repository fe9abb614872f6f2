"""Every launcher of the CUDA backend, on small odd sizes: `compute-sanitizer python tests/sanitize_cuda.py`."""

from __future__ import annotations

import torch

from lambda_kernels.backends.cuda import Cuda
from lambda_kernels.backends.cuda.library import DTYPES
from lambda_kernels.spec import BlockSpec, ConvSpec


def made(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def main() -> None:
    backend = Cuda()
    if why := backend.reasons():
        raise SystemExit(f"the backend cuda cannot run here: {'; '.join(why)}")
    spec = ConvSpec((1, 1), (1, 1), (1, 1), 1)
    for dtype in DTYPES:
        for width, pool in ((5, 2), (16, 2), (16, 1)):
            z, gamma, beta = made(dtype, 2, 3, width, 7, 9), made(dtype, 2, width), made(dtype, 1, width)
            y, index, mean, rstd = backend.norm_relu_pool(z, gamma, beta, BlockSpec(spec, 1e-5, pool))
            backend.norm_relu_pool_grad(y, z, gamma, index, mean, rstd, BlockSpec(spec, 1e-5, pool), True)
            x, weight = made(dtype, 2, 3, 3, 7, 9), made(dtype, 1, width, 3, 3, 3)
            moments = backend.image_moments(x, (3, 3), spec)
            y, index, mean, rstd = backend.image_block(x, weight, gamma, beta, moments, BlockSpec(spec, 1e-5, pool))
            backend.image_block_grad(y, x, weight, gamma, index, mean, rstd, moments, BlockSpec(spec, 1e-5, pool))
        backend.image_moments(made(dtype, 2, 2, 3, 24, 37), (3, 3), spec)  # by distance
        backend.cross_entropy_grad(made(dtype, 2, 7, 5), torch.randint(5, (2, 7), device="cuda"))
        parameters = [made(dtype, n) for n in (1, 5, 4097, 64)]
        backend.sgd_(parameters, [torch.ones_like(p) for p in parameters], [0.1, 0.0, 0.2, 0.3])
        x, labels = made(dtype, 2, 5, 4, 7, 6), torch.randint(5, (2, 5), device="cuda")
        first = [made(dtype, 9, 4, 3, 3), made(dtype, 9), made(dtype, 9), made(dtype, 5, 81), made(dtype, 5)]
        backend.inner_loop(x, labels, first, [True] * 5, [BlockSpec(spec, 1e-5, 2)], 2, [0.1])
        backend.inner_loop(x, labels, first, [False] * 3 + [True] * 2, [BlockSpec(spec, 1e-5, 2)], 2, [0.1])
    torch.cuda.synchronize()
    print("ok")


if __name__ == "__main__":
    main()
