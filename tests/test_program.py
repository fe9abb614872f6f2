"""The program of a call: its steps, what they read and touch, and runs of parts with other parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from programs import program_of
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.agreement import within
from lambda_kernels.program import Arguments, Fusion, program_for


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.drop, self.head, self.scale = nn.Dropout(dropout), nn.Linear(3 * 4 * 4, 5), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        y = self.norm2(self.conv2(x)) + x
        return self.head(self.drop(torch.flatten(y, 1))) * self.scale


def example() -> Tensor:
    return torch.randn(4, 2, 8, 8, dtype=torch.float64)


def test_steps_name_what_they_touch() -> None:
    program = program_of(Net().double(), example())
    assert program.untraceable is None and program.inputs == 1
    assert program.fusions == (Fusion("conv1", "norm1", "", "", 2),)
    assert program.left_alone == {"conv2": "no ReLU alone follows its norm"}
    by_label = {step.label: step for step in program.steps}
    kinds = {label: step.kind for label, step in by_label.items()}
    assert kinds == {
        "conv1": "block",
        "conv2": "conv",
        "norm2": "norm",
        "add": "function",
        "flatten": "flatten",
        "dropout": "function",
        "head": "linear",
        "scale": "attribute",
        "mul": "function",
    }
    block = by_label["conv1"]
    assert set(block.parameters) == {"conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias"}
    layers = {step.label: step.layer for step in program.steps if step.layer is not None}
    assert layers == {"conv1": "conv1", "conv2": "conv2", "head": "head"}
    assert {label for label, step in by_label.items() if step.tracks} == {"conv1", "norm2"}
    assert by_label["scale"].parameters == ("scale",) and by_label["add"].reads == (by_label["norm2"].slot, block.slot)
    used = [name for step in program.steps for name in step.parameters]
    assert sorted(used) == sorted(name for name, _ in Net().named_parameters())


def test_what_may_not_be_left_out() -> None:
    def reasons(model: nn.Module) -> dict[str, str]:
        steps = program_of(model.double(), example()).steps
        return {step.label: step.not_reusable for step in steps if step.not_reusable}

    assert reasons(Net()) == {}
    assert reasons(Net(0.5)) == {"dropout": "aten.bernoulli_ draws random numbers"}
    assert reasons(Net(0.5).eval()) == {}


def test_a_hook_is_captured_with_the_layer_that_has_it() -> None:
    """The layer is then its operations, among which the hook's stand; what no graph can hold makes the call opaque."""
    hooked, x, seen = Net().double().eval(), example(), []
    hooked.conv2.register_forward_hook(lambda module, args, y: 2 * y)
    program = program_of(hooked, x)
    assert program.untraceable is None and not any(step.not_reusable for step in program.steps)
    assert "conv2" not in {step.label for step in program.steps} and not program.fusions
    torch.testing.assert_close(program(hooked, x), hooked(x), **EXACT)
    hooked.conv2.register_forward_hook(lambda module, args, y: seen.append(y))
    assert "its forward writes to" in str(program_of(hooked, x).untraceable) and not seen


def test_the_program_computes_what_the_module_does() -> None:
    models: list[Any] = [Net().double(), lk.convert(Net().double())]
    for model in models:
        x = example()
        want = Net.forward(model, x)
        torch.testing.assert_close(program_of(model, x)(model, x), want, **EXACT)


def test_parts_run_with_other_parameters() -> None:
    model, x = Net().double().eval(), example()
    program = program_of(model, x)
    other = {k: v + torch.randn_like(v).abs() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    want = torch.func.functional_call(model, other, (x,))
    modules = program.bind(model)
    for cut in range(len(program.steps) + 1):
        env = {0: x}
        later = range(cut, len(program.steps))
        keep = {slot for i in later for slot in program.steps[i].reads}
        program.run(program.part(range(cut), keep), modules, other, env)
        again = dict(env)
        for values in (env, again):  # the second part twice, as inner steps do
            program.run(program.part(later, ()), modules, other, values)
            torch.testing.assert_close(program.take(values), want, **EXACT)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in model.state_dict().items())


def test_running_statistics_of_a_run_with_other_parameters_go_to_their_own_buffers() -> None:
    model, x = Net().double(), example()
    program = program_of(model, x)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    twin = Net().double()
    twin.load_state_dict(own)
    state, before = {k: v.clone() for k, v in own.items()}, {k: v.clone() for k, v in own.items()}
    effects: list[Any] = []
    env = {0: x}
    program.run(program.whole, program.bind(model), state, env, effects)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    twin(x)
    torch.testing.assert_close(state, dict(twin.state_dict()), **EXACT)
    assert len(effects) == 2
    for effect in effects:  # as a second run would
        effect()
    twin(x)
    torch.testing.assert_close(state, dict(twin.state_dict()), **EXACT)


def test_modules_of_one_structure_share_a_program() -> None:
    one, two, x = Net().double(), Net().double(), example()
    assert program_of(one, x) is program_of(two, x)
    assert program_of(one, x) is not program_of(two.eval(), x)
    assert program_of(one, x) is not program_of(Net(0.5).double(), x)
    two.train()
    two.norm1.track_running_stats = False
    assert program_of(one, x) is not program_of(two, x)


def test_each_form_of_call_has_a_program_of_its_own_and_finds_it_again() -> None:
    model, x = Net().double(), example()
    calls = [
        lambda: program_of(model, x),
        lambda: program_of(model, x[:3]),
        lambda: program_of(model, x.float().double()),
    ]
    first, fewer, same = (call() for call in calls)
    assert first is same and fewer is not first
    assert all(program_of(model, x + 1) is first for _ in range(3)) and program_of(model, x[1:]) is fewer


def test_tied_parameters_are_known_by_their_first_name() -> None:
    model, x = Net().double(), example()
    model.conv2.bias = model.conv1.bias
    assert program_of(model, x).aliases == {"conv2.bias": "conv1.bias"}
    assert program_of(model, x) is not program_of(Net().double(), x)


def test_looking_leaves_the_module_as_it_was() -> None:
    model, x = Net(0.5).double(), example()
    before, attributes = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.__dict__)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert program_of(model, x).untraceable is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.__dict__ == attributes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Called(nn.Module):
    """Takes whatever it is given; opaque, since it asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, *images: Tensor, state: Tensor | None = None, modules: Any = None) -> Any:
        x = sum(images, torch.zeros(1, 3)) + (0 if state is None else state)
        return (self.head(x), modules) if bool((x < 1e9).all()) else None


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "nothing": ((), {}),
    "one": ((torch.ones(2, 3),), {}),
    "two": ((torch.ones(2, 3), torch.ones(1, 3)), {}),
    "keywords": ((torch.ones(2, 3),), {"state": torch.ones(2, 3), "modules": {"a": 1}}),
    "keywords alone": ((), {"state": torch.ones(2, 3)}),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_opaque_program_takes_any_call(call: str) -> None:
    model, (args, kwargs) = Called(), CALLS[call]
    program = program_for(model, args, kwargs)
    assert program.untraceable is not None and program.inputs == 1 and program is program_for(model, args, kwargs)
    assert program.pack(args, kwargs) == (Arguments(args, kwargs),)
    state = {name: p * 2 for name, p in model.named_parameters()}
    own_state: dict[str, Tensor] = dict(model.named_parameters())
    for given in (state, own_state):
        want = torch.func.functional_call(model, given, args, kwargs)
        got = program.evaluate(program.bind(model), given, *args, **kwargs)
        assert torch.equal(got[0], want[0]) and got[1] == want[1]
    own = program(model, *args, **kwargs)
    assert torch.equal(own[0], model(*args, **kwargs)[0])


def test_a_call_of_any_form_is_captured() -> None:
    model, x = Net().double(), example()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((x,), {}), ((), {"x": x})]
    for args, kwargs in calls:
        program = program_for(model, args, kwargs)
        assert program.untraceable is None and program_for(model, args, kwargs) is program
        assert program.pack(args, kwargs) == (x,)
        torch.testing.assert_close(program(model, *args, **kwargs), Net.forward(model, x), **EXACT)
    model.eval()
    assert program_for(model, (), {"x": x}) is not program_for(Net().double(), (), {"x": x})


def test_a_network_of_torchs_layers_takes_one_tensor() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.ones(2, 3)
    walked = program_of(model, x)
    assert walked.untraceable is None and program_of(model, x[:1]) is walked and walked.pack((x,), {}) == (x,)
    others: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "it is called with the keyword 'input'": ((), {"input": x}),
        "it is called with 2 arguments, its layers take 1": ((x, x), {}),
        "it is called with 0 arguments, its layers take 1": ((), {}),
        "it is called with a dict, its layers take a tensor": (({"x": x},), {}),
    }
    for why, (args, kwargs) in others.items():
        opaque = program_for(model, args, kwargs)
        assert opaque.untraceable == why and len(opaque.steps) == 1
        assert program_for(model, args, kwargs) is opaque
    opaque = program_for(model, (), {"input": x})
    assert torch.equal(opaque.evaluate({"": model}, dict(model.state_dict()), input=x), model(x))


def test_a_call_has_the_networks_own_hooks_and_a_forward_has_not() -> None:
    model, x = Net().double(), example()
    model.register_forward_hook(lambda module, args, y: 3 * y)
    called, forward = program_for(model, (x,), {}), program_for(model, (x,), {}, called=False)
    assert called.untraceable is None and forward.untraceable is None and called.called and not forward.called
    torch.testing.assert_close(called(model, x), 3 * Net.forward(model, x), **EXACT)
    torch.testing.assert_close(forward(model, x), Net.forward(model, x), **EXACT)


def test_a_call_that_a_program_does_not_stand_for_is_said() -> None:
    program, x = program_of(Net().double(), example()), example()
    with pytest.raises(TypeError, match="is of calls with 1 tensors, got 3: program_for gives"):
        program.pack((x, x), {"a": x})


def test_tensors_of_a_call_are_the_programs_first_slots() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": self.head(a + b), "a": a}

    model, a, b = Two(), torch.randn(2, 3), torch.randn(2, 3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((a, b), {}), ((a,), {"b": b}), ((), {"a": a, "b": b})]
    for args, kwargs in calls:
        program = program_for(model, args, kwargs)
        assert program.untraceable is None and program.inputs == 2
        assert program.pack(args, kwargs) == (a, b)
        got = program(model, *args, **kwargs)
        assert torch.equal(got["sum"], model(a, b)["sum"]) and got["a"] is a


def test_a_reparametrised_layer_is_captured_with_all_that_its_code_does() -> None:
    class Noise(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w + torch.randn_like(w)

    def reasons(change: Any) -> list[str]:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3)
        change(model[0])
        program = program_of(model, x)
        torch.manual_seed(1)
        want = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(program(model, x), want, **within(x.dtype))
        return [step.not_reusable for step in program.steps if step.not_reusable]

    from torch.nn.utils import parametrizations, parametrize

    assert reasons(lambda m: parametrize.register_parametrization(m, "weight", Noise())) == [
        "aten.randn_like draws random numbers"
    ]
    (moving,) = reasons(parametrizations.spectral_norm)  # its estimate moves in training mode
    assert moving.startswith("its forward writes to ")
    assert reasons(lambda m: parametrizations.spectral_norm(m).eval()) == []
    assert reasons(parametrizations.weight_norm) == []
    assert reasons(parametrizations.orthogonal) == []
