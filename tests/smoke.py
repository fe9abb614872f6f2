"""Run by `make wheel` in the wheel's own environment: the installed packages import, the kernels that can run here
compute, and a wheel of local version +cu... holds a CUDA library that loads."""

import sysconfig
from importlib import metadata
from pathlib import Path

import torch

import lambda_kernels as lk
import lambda_maml
from lambda_kernels import agreement, backends, info

site = Path(sysconfig.get_path("platlib")).resolve()
for package in (lk, lambda_maml):
    where = Path(str(package.__file__)).resolve()
    assert where.is_relative_to(site), f"{package.__name__} comes from {where}, not from the wheel in {site}"

version = metadata.version("lambda-kernels")
with_cuda = version.partition("+")[2].startswith("cu")
libraries = [path.name for path in Path(str(lk.__file__)).parent.glob("_cuda*")]
assert bool(libraries) == with_cuda, f"the wheel {version} holds {libraries or 'no CUDA library'}"
reasons = {name: backend["reasons"] for name, backend in info.collect()["backends"].items()}
if with_cuda:
    # a library that does not load is said before the device is looked for
    broken = [why for why in reasons["cuda"] if "is_available() is False" not in why]
    assert not broken, f"the CUDA library of {version}: {'; '.join(broken)}"
    print(f"{libraries[0]} loads; backend cuda: {'; '.join(reasons['cuda']) or 'can run'}")

torch.manual_seed(0)
operands = [torch.randn(2, 3, 9, 7), torch.randn(4, 3, 3, 3), torch.rand(4), torch.rand(4)]
assert not reasons["native"], f"backend native: {'; '.join(reasons['native'])}"
for name in backends.names():
    if reasons[name]:
        continue
    x, weight, gamma, beta = (t.cuda() for t in operands) if name in ("cuda", "triton") else operands
    results = {}
    for backend in ("reference", name):
        with lk.use_backend(backend):
            results[backend] = lk.functional.conv_block(x, weight, None, gamma, beta)
    off = agreement.apart(results[name], results["reference"])
    assert off is None, f"conv_block on the {name} backend is {off:.2g} of its length away from the reference"
    print(f"conv_block on the {name} backend: {list(results[name].shape)}, equal to the reference")

model = lambda_maml.models.conv4(ways=2, in_channels=1, width=4, image_size=16)
xs, ys = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 0, 1])
adapted = {}
for backend in ("reference", "native"):
    with lk.use_backend(backend):
        learner = lambda_maml.adapt(model, xs, ys, pattern="10011", steps=2)
        adapted[backend] = learner.parameters_dict()
torch.testing.assert_close(adapted["native"], adapted["reference"], **agreement.within(torch.float32, "steps"))
print("adapt on the native backend: equal to the reference")
