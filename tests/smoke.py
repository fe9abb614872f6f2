"""Run by `make wheel` in the wheel's own environment: the installed packages import, and the native kernels compute."""

import sysconfig
from pathlib import Path

import torch

import lambda_kernels as lk
import lambda_maml

site = Path(sysconfig.get_path("platlib")).resolve()
for package in (lk, lambda_maml):
    where = Path(str(package.__file__)).resolve()
    assert where.is_relative_to(site), f"{package.__name__} comes from {where}, not from the wheel in {site}"

torch.manual_seed(0)
x, weight, gamma, beta = torch.randn(2, 3, 9, 7), torch.randn(4, 3, 3, 3), torch.rand(4), torch.rand(4)
results = {}
for backend in ("reference", "native"):
    with lk.use_backend(backend):
        results[backend] = lk.functional.conv_block(x, weight, None, gamma, beta)
torch.testing.assert_close(results["native"], results["reference"])
print(f"conv_block on the native backend: {list(results['native'].shape)}, equal to the reference")
