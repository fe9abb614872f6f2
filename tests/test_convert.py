"""convert(): any module keeps its behaviour, its parts and its keys."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EXACT
from converted import MODELS, Residual, assert_same, outcome, run
from programs import program_of
from test_forwards import Base, ByValue
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lambda_kernels as lk
from lambda_kernels.agreement import within
from lambda_kernels.fused import Fused


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
    assert len(program_of(model, x).fusions) == blocks
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
    # Adam divides by the gradient's size: where that is next to nothing, rounding shows
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
    assert [type(m) for m in model.modules()][1:] == kinds[1:] and parametrize.is_parametrized(model[3])
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
    assert len(program_of(model, x).fusions) == 2 and lk.report(model).startswith("Sequential: 2 fused blocks")
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
    x = torch.randn(6, 3, 8, 8)
    assert "report(model, x)" in lk.report(lk.convert(model)).splitlines()[0]
    text = lk.report(model, x)
    assert text == lk.report(lk.convert(model)) and text.startswith("Residual: 2 fused blocks")
    for line in (
        "  stem: lambda_kernels.Conv2d, fused with norm1 (norm, ReLU)",
        "  conv: lambda_kernels.Conv2d, fused with norm2 (norm, ReLU, max-pool 2)",
        "  norm2: BatchNorm2d, computed in the block of conv",
        "  skip: lambda_kernels.Conv2d, not fused: no BatchNorm2d alone follows it",
        "  head: lambda_kernels.Linear",
    ):
        assert line in text.splitlines()
    assert "not fused: the norm is in evaluation mode" in lk.report(model.eval(), x)
    assert "nothing is fused: Data-dependent branching" in lk.report(lk.convert(ByValue()), x)


def test_a_model_converted_in_evaluation_mode_is_fused_once_it_trains():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    twin, x = copy.deepcopy(model), torch.randn(4, 2, 9, 9)
    lk.convert(model)
    torch.testing.assert_close(model(x), twin(x))
    assert "0 fused blocks" in lk.report(model)
    torch.testing.assert_close(model.train()(x), twin.train()(x), **within(torch.float32))
    assert "1 fused block," in lk.report(model)
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)


@pytest.mark.parametrize("function", [lk.convert, lk.to_torch, lk.report])
def test_what_is_no_module_is_named(function: Any) -> None:
    for thing in (None, nn.Linear, [nn.Linear(2, 2)]):
        with pytest.raises(TypeError, match=rf"{function.__name__}: a torch.nn.Module expected, got "):
            function(thing)


class Named(nn.Module):
    """Children with names that vision transformers have, and that a fused class could hide."""

    def __init__(self) -> None:
        super().__init__()
        self.fuses, self.norm = nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2, track_running_stats=False)
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.fuses(x)).relu().mean((2, 3))
        for block in self.blocks:
            x = block(x)
        return x


def test_children_of_any_name_stay_reachable() -> None:
    torch.manual_seed(0)
    model, x = Named(), torch.randn(4, 1, 6, 6)
    want = model(x)
    assert isinstance(lk.convert(model).blocks, nn.ModuleList) and isinstance(model.fuses, nn.Conv2d)
    torch.testing.assert_close(model(x), want)
