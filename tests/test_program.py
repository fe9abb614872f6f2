"""The program of a module: its steps, what they read and touch, and runs of parts with other parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.program import Arguments, Fusion, program_for, program_of


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
    program = program_of(Net())
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
        "drop": "module",
        "head": "linear",
        "scale": "attribute",
        "mul": "function",
    }
    block = by_label["conv1"]
    assert set(block.parameters) == {"conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias"}
    assert block.layer == ("conv1", "norm1") and by_label["conv2"].layer == ("conv2", "norm2")
    assert {label for label, step in by_label.items() if step.tracks} == {"conv1", "norm2"}
    assert by_label["scale"].parameters == ("scale",) and by_label["add"].reads == (by_label["norm2"].slot, block.slot)
    used = [name for step in program.steps for name in step.parameters]
    assert sorted(used) == sorted(name for name, _ in Net().named_parameters())


def test_what_may_not_be_left_out() -> None:
    def reasons(model: nn.Module) -> dict[str, str]:
        return {step.label: step.not_reusable for step in program_of(model).steps if step.not_reusable}

    assert reasons(Net()).keys() == {"drop"}
    assert reasons(Net(0.5)) == {"drop": "Dropout draws random numbers in training mode"}
    assert reasons(Net(0.5).eval()) == {}
    hooked = Net().eval()
    hooked.conv2.register_forward_hook(lambda *_: None)
    assert "hooks" in reasons(hooked)["conv2"]


def test_the_program_computes_what_the_module_does() -> None:
    models: list[Any] = [Net().double(), lk.convert(Net().double())]
    for model in models:
        x = example()
        want = Net.forward(model, x)
        torch.testing.assert_close(program_of(model)(model, x), want, **EXACT)


def test_parts_run_with_other_parameters() -> None:
    model, x = Net().double().eval(), example()
    program = program_of(model)
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
    program = program_of(model)
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
    one, two = Net(), Net()
    assert program_of(one) is program_of(two)
    assert program_of(one) is not program_of(two.eval())
    assert program_of(one) is not program_of(Net(0.5))
    two.train()
    two.norm1.track_running_stats = False
    assert program_of(one) is not program_of(two)


def test_tied_parameters_are_known_by_their_first_name() -> None:
    model = Net()
    model.conv2.bias = model.conv1.bias
    assert program_of(model).aliases == {"conv2.bias": "conv1.bias"}
    assert program_of(model) is not program_of(Net())


def test_looking_leaves_the_module_as_it_was() -> None:
    model = Net(0.5)
    before, attributes = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.__dict__)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    program_of(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.__dict__ == attributes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Called(nn.Module):
    """Takes whatever it is given; not traceable, since it asks for a value."""

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
    assert program.untraceable is not None and program.inputs == 1 and program is program_of(model)
    assert program.pack(args, kwargs) == (Arguments(args, kwargs),)
    state = {name: p * 2 for name, p in model.named_parameters()}
    own_state: dict[str, Tensor] = dict(model.named_parameters())
    for given in (state, own_state):
        want = torch.func.functional_call(model, given, args, kwargs)
        got = program.evaluate(program.bind(model), given, *args, **kwargs)
        assert torch.equal(got[0], want[0]) and got[1] == want[1]
    own = program(model, *args, **kwargs)
    assert torch.equal(own[0], model(*args, **kwargs)[0])


def test_the_program_of_a_call_is_the_trace_where_it_stands_for_that_call() -> None:
    model, x = Net(), example()
    traced = program_of(model)
    assert program_for(model, (x,), {}) is traced and traced.pack((x,), {}) == (x,)
    others = {
        "it is called with the keyword 'x'": ((), {"x": x}),
        "it is called with 2 arguments, its trace has 1": ((x, x), {}),
        "it is called with 0 arguments, its trace has 1": ((), {}),
        "it is called with a dict, where its trace has a tensor": (({"x": x},), {}),
    }
    for why, (args, kwargs) in others.items():
        opaque = program_for(model, args, kwargs)
        assert opaque.untraceable == why and len(opaque.steps) == 1
        assert program_for(model, args, kwargs) is opaque
    model.eval()
    assert program_for(model, (), {"x": x}) is not program_for(Net(), (), {"x": x})
    torch.testing.assert_close(
        program_for(model.double(), (), {"x": x}).evaluate({"": model}, dict(model.state_dict()), x=x), model(x)
    )


def test_other_programs_of_a_network_that_cannot_be_told_unchanged_are_one_too() -> None:
    model = Net()
    model.conv1.register_forward_hook(lambda *_: None)
    opaque = program_for(model, (), {"x": example()})
    assert opaque.untraceable and program_for(model, (), {"x": example()}) is opaque


def test_a_call_with_hooks_of_its_own_is_opaque_and_a_forward_is_not() -> None:
    model = Net()
    model.register_forward_hook(lambda *_: None)
    assert program_for(model, (example(),), {}).untraceable == "it has hooks of its own"
    assert program_for(model, (example(),), {}, called=False).untraceable is None


def test_a_call_that_a_trace_does_not_stand_for_is_said() -> None:
    program = program_of(Net())
    with pytest.raises(TypeError, match="takes 1 positional inputs, got 2 and 1 by keyword: program_for"):
        program.pack((1, 2), {"a": 3})


def test_inputs_of_a_traced_program_are_its_first_slots() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": self.head(a + b), "a": a}

    model, a, b = Two(), torch.randn(2, 3), torch.randn(2, 3)
    program = program_for(model, (a, b), {})
    assert program.untraceable is None and program.inputs == 2
    assert program.pack((a, b), {}) == (a, b)
    got = program(model, a, b)
    assert torch.equal(got["sum"], model(a, b)["sum"]) and got["a"] is a


def test_a_layer_whose_reparametrisation_has_code_or_state_may_not_be_left_out() -> None:
    class Noise(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w + torch.randn_like(w)

    def reason(change: Any) -> str | None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        change(model[0])
        return program_of(model).steps[0].not_reusable

    from torch.nn.utils import parametrizations, parametrize

    assert reason(lambda m: parametrize.register_parametrization(m, "weight", Noise())) == (
        "Noise is a module that the program knows nothing of"
    )
    assert "spectral_norm" in str(reason(parametrizations.spectral_norm))
    assert reason(lambda m: parametrizations.spectral_norm(m).eval()) is None
    assert reason(parametrizations.weight_norm) is None
