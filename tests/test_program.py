"""The program of a module: its steps, what they read and touch, and runs of parts with other parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases import EXACT
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.program import Fusion, program_of


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
