"""The plan: what belongs to the frozen prefix, what is run again, and that plans do not pile up."""

from __future__ import annotations

import copy
from typing import Any

import loops
import pytest
import torch
from loops import NETWORKS
from programs import program_of
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.program import tensors_of
from lambda_kernels.program.lookup import _FAMILIES
from lambda_maml import Pattern, adapt, models
from lambda_maml import plan as plans
from lambda_maml.plan import Plan, plan_of, with_copies

pytestmark = pytest.mark.usefixtures("one_thread")


def planned(model: nn.Module, x: Any) -> Plan:
    return plan_of(model, program_of(model, x))


def labels(model: nn.Module, bits: str, x: Any) -> tuple[list[str], list[str]]:
    """The steps of the prefix and of the rest."""
    plan = planned(model, x)
    part = plan.part(plan.updated(bits, "follow"))
    return [step.label for step, _ in part.prefix], [step.label for step, _ in part.rest]


def test_the_prefix_of_conv4_ends_at_the_first_updated_layer() -> None:
    names, x = ["block1", "block2", "block3", "block4", "flatten", "head"], torch.randn(4, 1, 16, 16)
    for pattern in map(str, Pattern.all(5)):
        first = pattern.index("1") + (pattern == "00001")
        stock = lk.convert(loops.torch_conv4())
        assert labels(models.conv4(2, 1, 3, 16), pattern, x) == (names[:first], names[first:])
        prefix, rest = labels(stock, pattern, x)
        assert (len(prefix), len(rest)) == (first, 6 - first)


def test_branches_that_no_updated_parameter_reaches_are_prefix_too() -> None:
    case = loops.branches()
    prefix, rest = labels(case.network, "1000", case.task()[0])  # left, right, join, head
    assert "right" in prefix and "gelu" in prefix and "left" in rest and "cat" in rest
    case = loops.residual()
    prefix, rest = labels(case.network, "000010", case.task()[0])
    assert "conv4" in " ".join(prefix) and any("down" in label for label in rest)
    assert not any("conv4" in label for label in rest)


def test_what_is_written_in_place_is_made_anew() -> None:
    case = loops.writes_prefix("value")
    prefix, rest = labels(case.network, "010", case.task()[0])
    assert "first" in prefix and "add_" in rest and "mul" in rest  # mul made the value that add_ writes to
    case = loops.writes_prefix("relu")
    prefix, rest = labels(case.network, "010", case.task()[0])
    assert "relu_" in prefix and "second" in rest


def test_a_copy_that_is_a_view_of_a_fused_blocks_result_is_made_anew_where_it_is_written_to() -> None:
    """Flattening channels-last memory is a copy, and a view where the block's result is contiguous."""

    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False)
            self.mid, self.head = nn.Linear(48, 48), nn.Linear(48, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.relu(self.norm(self.conv(x))).flatten(1)
            rows.add_(torch.tanh(self.mid(rows.clone())))
            return self.head(rows)

    groups = [(loops.pair("conv"), loops.pair("norm")), (loops.pair("mid"), []), (loops.pair("head"), [])]
    case = loops.Case(Flattens().double(), groups, (2, 4, 4))
    xs, ys, xq, yq = case.task()
    xs, xq = (x.contiguous(memory_format=torch.channels_last) for x in (xs, xq))
    prefix, rest = labels(case.network, "010", xs)
    assert not prefix and "add_" in rest and program_of(case.network, xs).fusions
    want = loops.plain_loop(case.network, case.groups, "010", xs, ys, xq, yq, steps=3, lr=0.1)
    loops.close(adapt(case.network, xs, ys, pattern="010", steps=3, lr=0.1)(xq), want.logits, "logits")


@pytest.mark.parametrize("name", NETWORKS)
def test_prefix_and_rest_are_the_program(name: str) -> None:
    case = NETWORKS[name]()
    x = case.task()[0]
    program = program_of(case.network, x)
    for pattern in Pattern.all(len(case.groups)):
        prefix, rest = labels(case.network, str(pattern), x)
        assert sorted(prefix + rest) == sorted(step.label for step in program.steps)


def test_the_value_of_the_prefix_is_not_changed_by_the_rest() -> None:
    for name in ("residual", "in-place-relu", "in-place-value", "in-place-view", "in-place-setitem", "in-place-order"):
        case = NETWORKS[name]()
        xs, *_ = case.task()
        plan, state = planned(case.network, xs), with_copies(*tensors_of(case.network))
        modules = plan.program.bind(case.network)
        want = case.network(xs.clone())
        for pattern in Pattern.all(len(case.groups)):
            with torch.no_grad():
                frozen = plan.part(plan.updated(str(pattern), "follow")).freeze(
                    modules, state, plan.program.pack((xs,), {})
                )
                before = [v.clone() if isinstance(v, Tensor) else v for v in frozen.boundary]
                for _ in range(3):
                    loops.close(frozen(modules, state), want, f"{name} under {pattern}")
            for a, b in zip(before, frozen.boundary):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_the_state_holds_copies_of_buffers_and_the_parameters_themselves() -> None:
    model = loops.residual(track=True).network
    state = with_copies(*tensors_of(model))
    assert all(state[n] is p for n, p in model.named_parameters())
    assert all(state[n] is not b and torch.equal(state[n], b) for n, b in model.named_buffers())
    shared = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    shared.append(shared[1])
    state = with_copies(*tensors_of(shared))
    assert state["3.running_mean"] is state["1.running_mean"] and state["3.weight"] is state["1.weight"]


def test_the_mode_of_the_network_has_a_plan_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    x = torch.randn(4, 3)
    assert labels(model, "01", x) == (["_0"], ["_1", "_2"])
    training = planned(model, x)
    model.eval()
    assert labels(model, "01", x) == (["_0", "_1"], ["_2"])
    model.train()
    assert planned(model, x) is training


def test_networks_of_the_same_structure_share_a_plan() -> None:
    model = loops.torch_conv4()
    x = torch.randn(4, 1, 16, 16)
    assert planned(model, x) is planned(copy.deepcopy(model), x)
    assert planned(model, x) is not planned(loops.torch_conv4(width=6), x)


def test_why_tasks_are_not_batched() -> None:
    def why(case: Any) -> str | None:
        return planned(case.network, case.task()[0]).why_not_batched

    assert why(loops.residual()) is None
    assert why(loops.residual(track=True)) == "it updates running statistics"
    drops = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    assert "random" in str(planned(drops, torch.randn(3, 2)).why_not_batched)
    assert why(loops.untraceable()) is not None


def test_programs_and_plans_are_bounded() -> None:
    for width in range(_FAMILIES.size + 40):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2 + width))
        adapt(model, torch.randn(2, 4), torch.arange(2), pattern="1", steps=1)
    assert len(_FAMILIES) <= _FAMILIES.size and len(plans._PLANS) <= plans._LIMIT
