"""convert(): any module keeps its behaviour, its parts and its keys."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lambda_kernels as lk
from lambda_kernels.convert import Fused
from lambda_kernels.graph import program_of


def run(inputs: int = 3, width: int = 4, *, inplace: bool = False, tracks: bool = False) -> Any:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1),
        nn.BatchNorm2d(width, track_running_stats=tracks),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.skip, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        y = F.max_pool2d(torch.relu(self.norm2(self.conv(x))), 2)
        y = y + F.max_pool2d(self.skip(x), 2)
        return self.head(y.view(y.size(0), -1))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), run(4, 4)
        self.again = self.block[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.stem(x))) + self.again(self.stem(x)).mean()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = run(3, 3), run(3, 3)
        self.two[0].weight = self.one[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Writes(nn.Module):
    """In-place operations around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = run(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 1.0
        y = self.block(x)
        y += 1
        y.mul_(2)
        return y[..., ::2].transpose(1, 2).contiguous().view(-1)


class TwoUsers(nn.Module):
    """What lies between the layers of a run is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.norm(self.conv(x))
        return self.pool(F.relu(z)), {"before": z}


def overlapping() -> nn.Sequential:
    return nn.Sequential(*run()[:3], nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.LeakyReLU())


# name -> (model, number of fused blocks)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "sequential": (lambda: nn.Sequential(*run(), *run(4), nn.Flatten(), nn.Linear(16, 5)), 2),
    "nested": (
        lambda: nn.Sequential(run(inplace=True), nn.Sequential(run(4, tracks=True), nn.Flatten()), nn.Linear(16, 5)),
        2,
    ),
    "residual": (Residual, 2),
    "shared-module": (Shared, 2),
    "tied-weights": (Tied, 2),
    "in-place": (Writes, 1),
    "two-users": (TwoUsers, 0),
    "overlapping-pool": (overlapping, 1),
    "pool-3": (lambda: nn.Sequential(*run()[:3], nn.MaxPool2d(3)), 1),
    "strided-same": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, 2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        ),
        1,
    ),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), *run()[1:]), 0),
    "dropout": (lambda: nn.Sequential(*run(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5)), 1),
    "group-norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)), 0),
    "block": (lambda: nn.Sequential(lk.ConvBlock(3, 4), lk.ConvBlock(4, 4, pool=1), nn.Flatten(), nn.Linear(64, 5)), 2),
    "conv-alone": (lambda: nn.Conv2d(3, 4, 3), 0),
}


def outcome(model: nn.Module, x: Tensor) -> list[Any]:
    """Result, gradients and buffers after one training step, with the random numbers of a fixed seed."""
    torch.manual_seed(3)
    model.zero_grad()
    y = model(x)
    first = y[0] if isinstance(y, tuple) else y
    first.pow(2).sum().backward()
    return [y, {k: p.grad for k, p in model.named_parameters()}, dict(model.named_buffers())]


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = tuple(value.values())
    return [value] if isinstance(value, Tensor) else [] if value is None else [t for v in value for t in leaves(v)]


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(leaves(got), leaves(want), rtol=1e-9, atol=1e-8)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_converted_models_do_the_same(name: str, x: Tensor) -> None:
    make, blocks = MODELS[name]
    plain = make().double()
    model = copy.deepcopy(plain)
    keys, parameters, modules = list(model.state_dict()), list(model.parameters()), list(model.modules())
    assert lk.convert(model) is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters)) and all(
        a is b for a, b in zip(model.modules(), modules)
    )
    assert not any(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules())
    assert len(program_of(model).fusions) == blocks
    for mode in (True, False, True):
        plain.train(mode), model.train(mode)
        assert all(m.training is mode for m in model.modules())
        assert_same(outcome(model, x), outcome(plain, x))
    lk.convert(model)
    assert_same(outcome(model, x), outcome(plain, x))
    assert [type(m) for m in lk.to_torch(plain).modules()] == [type(m) for m in lk.to_torch(model).modules()]


@pytest.mark.parametrize("how", ["deepcopy", "pickle-2", "pickle-5", "torch-save"])
def test_copies_and_pickles(how: str, x: Tensor) -> None:
    model = lk.convert(Residual().double())
    want = outcome(model, x)
    model.zero_grad()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "torch-save":
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        twin = pickle.loads(pickle.dumps(model, int(how[-1])))
    assert isinstance(twin, Residual) and isinstance(twin, Fused) and twin.conv is not model.conv
    for buffer in twin.buffers():
        buffer.zero_()
    for buffer in model.buffers():
        buffer.zero_()
    assert_same(outcome(twin, x)[:2], want[:2])


def test_optimizer_made_before_goes_on(x: Tensor) -> None:
    models = [Residual().double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in models]
    lk.convert(models[1])
    for _ in range(3):
        for model, optimizer in zip(models, optimizers):
            outcome(model, x)
            optimizer.step()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=1e-6, atol=1e-7)


def test_functional_call_and_per_sample_gradients(x: Tensor) -> None:
    plain = nn.Sequential(*run(), nn.Flatten(), nn.Linear(64, 5)).double()
    model = lk.convert(copy.deepcopy(plain))
    parameters = {k: torch.randn(2, *p.shape, dtype=torch.float64) for k, p in plain.named_parameters()}

    def loss(network: nn.Module) -> Callable[..., Tensor]:
        return lambda p, x: torch.func.functional_call(network, p, (x,)).pow(2).sum()

    got = torch.func.vmap(torch.func.grad(loss(model)), (0, None))(parameters, x)
    alone = [torch.func.grad(loss(plain))({k: p[i] for k, p in parameters.items()}, x) for i in range(2)]
    assert_same(got, {k: torch.stack([a[k] for a in alone]) for k in got})


def clone_module(module: Any) -> Any:
    """As learn2learn does: the same modules around clones of the parameters, through which gradients flow."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = {k: None if p is None else p.clone() for k, p in module._parameters.items()}
    clone._buffers = {k: None if b is None else b.clone() for k, b in module._buffers.items()}
    clone._modules = {k: None if m is None else clone_module(m) for k, m in module._modules.items()}
    return clone


def test_learn2learns_clone(x: Tensor) -> None:
    plain = nn.Sequential(*run(), nn.Flatten(), nn.Linear(64, 5)).double()
    grads = []
    for model in (plain, lk.convert(copy.deepcopy(plain))):
        task = clone_module(model)
        weight = task[5].weight
        (g,) = torch.autograd.grad(task(x).pow(2).mean(), weight, create_graph=True)
        task[5]._parameters["weight"] = weight - 0.1 * g
        grads.append(torch.autograd.grad(task(x).pow(2).mean(), list(model.parameters())))
    assert_same(*grads[::-1])


# What is called.


@pytest.mark.parametrize("path", ["", "0", "0.0", "0.1", "0.2", "0.3", "1", "2"])
def test_hooks_are_called_with_tensors(path: str, x: Tensor) -> None:
    model = lk.convert(nn.Sequential(run(), nn.Flatten(), nn.Linear(64, 5)).double())
    want = model(x)
    seen: list[type] = []
    module = model.get_submodule(path)
    module.register_forward_hook(lambda m, i, o: seen.extend([type(i[0]), type(o)]))
    module.register_forward_pre_hook(lambda m, i: seen.append(type(i[0])))
    torch.testing.assert_close(model(x), want, **EXACT)
    model(x)
    assert seen == [Tensor] * 6


def test_a_forward_replaced_on_the_instance_runs(x: Tensor) -> None:
    for path in ("", "0", "1"):
        model = lk.convert(run().double())
        module = model.get_submodule(path)
        module.forward = lambda x, forward=module.forward: 2 * forward(x) + x.sum()
        got = model(x)
        torch.testing.assert_close(got, run_apart(model, x) if path else 2 * run_apart(model, x) + x.sum(), **EXACT)


def run_apart(model: nn.Module, x: Tensor) -> Tensor:
    for child in model.children():
        x = child(x)
    return x


def test_subclasses_and_parametrized_layers_are_left_alone(x: Tensor) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    normed = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    plain = nn.Sequential(
        Doubled(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), normed, nn.BatchNorm2d(4), nn.ReLU()
    ).double()
    model = copy.deepcopy(plain)
    kinds = [type(m) for m in model.modules()]
    lk.convert(model)
    assert [type(m) for m in model.modules()] == kinds and parametrize.is_parametrized(model[3])
    assert_same(outcome(model, x), outcome(plain, x))
    text = lk.report(model)
    assert "0: Doubled, left alone: a subclass of Conv2d" in text and "3: ParametrizedConv2d, left alone" in text


def test_a_layer_parametrized_later(x: Tensor) -> None:
    model: Any = lk.convert(run().double())
    model(x)
    parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
        model[0].bias.add_(1)
    torch.testing.assert_close(model(x), run_apart(model, x), **EXACT)


# Forwards that a graph does not hold: they must run as they are written.


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = run()


class PythonRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if random.random() < 0.9 else self.net(x) * 3


class NumpyRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if np.random.rand() < 0.9 else self.net(x) * 3


class TorchRandom(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if torch.rand(()) < 0.9 else self.net(x) * 3


class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn_like(x))


class Counter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(len(x))
        return self.net(x) * self.calls


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.net(x)
        return y + x.mean()


class Mixed(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x.float())


class AsksForGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (2.0 if torch.is_grad_enabled() else 5.0)


class AsksForTensor(Base):
    def forward(self, x: Any) -> Tensor:
        return self.net(x) if isinstance(x, Tensor) else self.net(x[0]) * 7


class Constant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)


class HeldTensor(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.full((4,), 2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


class Optional(Base):
    def forward(self, x: Tensor, scale: float = 2.0, shift: Tensor | None = None) -> Tensor:
        y = self.net(x) * scale
        return y if shift is None else y + shift


class Star(Base):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(inputs[0])


class DoubleStar(Base):
    def forward(self, x: Tensor, **named: Tensor) -> Tensor:
        return self.net(x) + sum(named.values())


class ByShape(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.shape[0] > 3 else self.net(x) * 2


class Loops(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x[i : i + 2]).sum() for i in range(len(x) - 1)])


AWKWARD = [
    PythonRandom,
    NumpyRandom,
    TorchRandom,
    Noise,
    Counter,
    NoGrad,
    Mixed,
    AsksForGradients,
    AsksForTensor,
    Constant,
    HeldTensor,
    Optional,
    Star,
    DoubleStar,
    ByShape,
    Loops,
]


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("kind", AWKWARD, ids=lambda k: k.__name__)
def test_awkward_forwards_do_the_same(kind: type[Base], x: Tensor) -> None:
    plain = kind().double() if kind is not Mixed else kind()
    model = copy.deepcopy(plain)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    lk.convert(model)
    assert (random.random(), np.random.rand(), torch.rand(())) == state  # looking at the forward draws nothing
    results = []
    for network in (plain, model):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        ys = [network(x) for _ in range(30)]
        ys += [network(x[:3])]
        with torch.no_grad():
            ys.append(network(x))
        results.append(ys)
        assert (getattr(network, "calls", 32), getattr(network, "log", [6])[-1]) == (32, 6)
    for got, want in zip(results[1], results[0]):
        assert got.requires_grad == want.requires_grad and got.dtype == want.dtype
        torch.testing.assert_close(got, want, **(EXACT if got.dtype == torch.float64 else {"rtol": 3e-2, "atol": 3e-2}))


def test_keyword_and_optional_arguments(x: Tensor) -> None:
    plain = Optional().double()
    model = lk.convert(copy.deepcopy(plain))
    for arguments in ({"x": x}, {"x": x, "scale": 3.0}, {"x": x, "shift": x.mean()}):
        torch.testing.assert_close(model(**arguments), plain(**arguments), **EXACT)
    star = lk.convert(DoubleStar().double())
    torch.testing.assert_close(star(x, shift=x.mean()), star(x=x) + x.mean(), **EXACT)
    torch.testing.assert_close(lk.convert(Residual().double())(x=x).shape, torch.Size([6, 5]))


def test_attributes_changed_later_count(x: Tensor) -> None:
    class Settings:
        scale = 2.0

    class Configured(Base):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.options, self.names, self.settings = 2.0, {"scale": 2.0}, {"scaled"}, Settings()
            self.settings.scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x) * self.scale * self.options["scale"] * self.settings.scale
            return y * 2.0 if "scaled" in self.names else y

    model: Any = lk.convert(Configured().double())
    y = model(x)
    model.scale = 4.0
    torch.testing.assert_close(model(x), 2 * y, **EXACT)
    model.options["scale"] = 4.0
    torch.testing.assert_close(model(x), 4 * y, **EXACT)
    model.settings.scale = 4.0
    torch.testing.assert_close(model(x), 8 * y, **EXACT)
    model.names.clear()
    torch.testing.assert_close(model(x), 4 * y, **EXACT)
    model.net[3] = nn.AvgPool2d(2)
    torch.testing.assert_close(model(x), model.net(x) * 64, **EXACT)


def test_modules_shared_in_another_way_are_another_network(x: Tensor) -> None:
    class Two(nn.Module):
        def __init__(self, second: str) -> None:
            super().__init__()
            self.first = run(3, 3)
            self.register_module("second", {"same": self.first, "none": None}[second])

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            second: Any = self.second
            return y if second is None else second(y)

    assert lk.convert(Two("same").double())(x).shape == (6, 3, 2, 2)
    assert lk.convert(Two("none").double())(x).shape == (6, 3, 4, 4)


def test_the_result_can_be_viewed_as_before(x: Tensor) -> None:
    model = lk.convert(run().double())
    assert model(x).view(6, -1).shape == (6, 64)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), model(x), **EXACT)


def test_a_submodule_first_and_the_root_later(x: Tensor) -> None:
    plain = nn.Sequential(nn.Sequential(*run(), *run(4)), nn.Flatten(), nn.Linear(16, 5)).double()
    model = copy.deepcopy(plain)
    lk.convert(model[0])
    assert_same(outcome(model, x), outcome(plain, x))
    lk.convert(model)
    assert len(program_of(model).fusions) == 2 and lk.report(model).startswith("Sequential: 2 fused blocks")
    assert_same(outcome(model, x), outcome(plain, x))


def test_errors_are_those_of_the_layers(x: Tensor) -> None:
    model = lk.convert(Residual())
    with pytest.raises(TypeError, match="weight is torch.float32, x is torch.float64"):
        model(x)
    with pytest.raises(ValueError, match="more than one value per channel, got N=1"):
        lk.convert(run())(torch.zeros(1, 3, 1, 1))


def test_compiles(x: Tensor) -> None:
    torch._dynamo.reset()
    model = lk.convert(nn.Sequential(*run(), nn.Flatten(), nn.Linear(64, 5)).double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)  # dynamo's own, about every autograd.Function
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), **EXACT)


def test_report() -> None:
    model = Residual()
    before = lk.report(model)
    assert "  head: Linear, torch's" in before.splitlines()
    text = lk.report(lk.convert(model))
    assert text == lk.report(lk.convert(model)) and text.startswith("Residual: 2 fused blocks")
    for line in (
        "  stem: lambda_kernels.Conv2d, fused with norm1 (norm, ReLU)",
        "  conv: lambda_kernels.Conv2d, fused with norm2 (norm, ReLU, max-pool 2)",
        "  norm2: BatchNorm2d, computed in the block of conv",
        "  skip: lambda_kernels.Conv2d, not fused: no BatchNorm2d alone follows it",
        "  head: lambda_kernels.Linear",
    ):
        assert line in text.splitlines()
    assert "not fused: the norm is in evaluation mode" in lk.report(model.eval())
    assert "torch.fx cannot trace it, so nothing is fused" in lk.report(lk.convert(ByShape()))


def test_a_model_converted_in_evaluation_mode_is_fused_once_it_trains():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    twin, x = copy.deepcopy(model), torch.randn(4, 2, 9, 9)
    lk.convert(model)
    torch.testing.assert_close(model(x), twin(x))
    assert "0 fused blocks" in lk.report(model)
    torch.testing.assert_close(model.train()(x), twin.train()(x), rtol=1e-5, atol=1e-5)
    assert "1 fused block," in lk.report(model)
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)
