"""Every launcher of the CUDA backend once, on small odd sizes, for `compute-sanitizer python tests/sanitize_cuda.py`."""

from __future__ import annotations

import torch

from lambda_kernels.backends.cuda import DTYPES, Cuda
from lambda_kernels.spec import ConvSpec


def main() -> None:
    backend = Cuda()
    if why := backend.reasons():
        raise SystemExit(f"the backend cuda cannot run here: {'; '.join(why)}")
    spec = ConvSpec((1, 1), (1, 1), (1, 1), 1)
    for dtype in DTYPES:
        for width, pool in ((5, 2), (16, 2), (16, 1)):

            def made(*shape: int) -> torch.Tensor:
                return torch.randn(shape, device="cuda").to(dtype)  # noqa: B023

            z, gamma, beta = made(2, 3, width, 7, 9), made(2, width), made(1, width)
            y, *saved = backend.norm_relu_pool(z, gamma, beta, 1e-5, pool)
            backend.norm_relu_pool_grad(y, z, gamma, *saved, pool, True)
            x, weight = made(2, 3, 3, 7, 9), made(1, width, 3, 3, 3)
            moments = backend.image_moments(x, (3, 3), spec)
            y, *saved = backend.image_block(x, weight, gamma, beta, moments, spec, 1e-5, pool)
            backend.image_block_grad(y, x, weight, gamma, *saved, moments, spec, pool)
        backend.cross_entropy_grad(made(2, 7, 5), torch.randint(5, (2, 7), device="cuda"))
        parameters = [made(n) for n in (1, 5, 4097, 64)]
        backend.sgd_(parameters, [torch.ones_like(p) for p in parameters], 0.1)
    torch.cuda.synchronize()
    print("ok")


if __name__ == "__main__":
    main()
