"""Patterns of channels: only the chosen rows are updated, as a plain loop with masked gradients has it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from loops import all_close, close, gradients_of, own_conv4, stage, updated_names
from networks import (
    Case,
    batch_norm_mlp,
    conv1d,
    conv4_groups,
    group_norm,
    layer_norm,
    residual,
    sequential,
    torch_conv4,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lambda_kernels import convert
from lambda_maml import LambdaMAML, Pattern, adapt, adapt_tasks, explain, rules


class Split(NamedTuple):
    case: Callable[[], Case]
    bits: str
    chosen: dict[str, list[int]]
    norm: str = "follow"


def own_network() -> Case:
    return Case(own_conv4(torch_conv4()), conv4_groups(), (1, 16, 16))


def conv3d() -> Case:
    layers = nn.Conv3d(1, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2, bias=False)
    return sequential([(0, None), (3, None)], (1, 4, 4, 4), *layers)


class Listed(nn.Module):
    """Layers that are also reached past the register, by a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.chain: list[Callable[[Tensor], Tensor]] = [self.body, torch.tanh, self.head]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.chain:
            x = part(x)
        return x


def converted() -> Case:
    case = residual()
    return case._replace(network=convert(case.network))


def listed() -> Case:
    return Case(Listed().double(), [(["body.weight", "body.bias"], []), (["head.weight", "head.bias"], [])], (4,))


SPLITS = {
    "conv4": Split(lambda: Case(torch_conv4(), conv4_groups(), (1, 16, 16)), "00011", {"block4.conv": [2, 0]}),
    "two-layers-of-conv4": Split(own_network, "10011", {"block4.conv": [1], "head": [0]}),
    "schedule": Split(own_network, "01001,00001", {"block2.conv": [0, 1], "head": [1]}),
    "norms-stay": Split(own_network, "00110", {"block3.conv": [0]}, "never"),
    "residual-without-biases": Split(residual, "001101", {"conv3": [1], "conv4": [0, 2]}),
    "converted": Split(converted, "011001", {"conv2": [0, 2], "fc": [1]}),
    "running-statistics": Split(lambda: residual(track=True), "000111", {"down.0": [2], "fc": [0]}),
    "mlp": Split(batch_norm_mlp, "110", {"0": [5, 1, 2], "3": [0]}),
    "layer-norm-behind-a-linear-layer": Split(layer_norm, "010", {"4": [3, 4]}),
    "group-and-instance-norm": Split(group_norm, "110", {"0": [1, 2, 3], "3": [0, 2]}),
    "conv1d": Split(conv1d, "110", {"0": [1], "3": [1]}),
    "conv3d": Split(conv3d, "11", {"0": [2], "3": [1]}),
    "all-channels-are-the-layer": Split(conv3d, "11", {"0": [0, 1, 2], "3": [0]}),
    "reached-by-a-list": Split(listed, "11", {"body": [4, 0], "head": [0]}),
}


class Masked(NamedTuple):
    parameters: dict[str, Tensor]
    logits: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def masks(split: Split, case: Case) -> dict[str, Tensor]:
    """1 where a value is chosen, for the parameters of the split layers."""
    found = {}
    for name, rows in split.chosen.items():
        (names,) = [ws + gb for ws, gb in case.groups if ws[0] == f"{name}.weight"]
        for n in names:
            found[n] = torch.zeros_like(case.network.get_parameter(n))
            found[n][rows] = 1.0
    return found


def masked_loop(
    split: Split, case: Case, task: tuple[Tensor, ...], steps: int, lr: float, second_order: bool
) -> Masked:
    xs, ys, xq, yq = task
    network, mask = case.network, masks(split, case)
    meta = dict(network.named_parameters())
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    fast: dict[str, Tensor] = dict(meta)
    for step in range(steps):
        names = updated_names(case.groups, stage(split.bits, step), split.norm)
        fast.update({n: fast[n].view_as(fast[n]) for n in names})
        loss = F.cross_entropy(functional_call(network, {**fast, **buffers}, (xs,)), ys)
        grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=second_order)
        fast.update({n: fast[n] - lr * g * mask.get(n, 1.0) for n, g in zip(names, grads)})
    after = {n: b.clone() for n, b in buffers.items()}
    logits = functional_call(network, {**fast, **buffers}, (xq,))
    outer = torch.autograd.grad(F.cross_entropy(logits, yq), list(meta.values()))
    return Masked({n: t.detach() for n, t in fast.items()}, logits.detach(), dict(zip(meta, outer)), after)


def pattern_of(split: Split, case: Case) -> Pattern:
    return Pattern(split.bits).channels(case.network, split.chosen)


@pytest.mark.parametrize("second_order", [False, True], ids=["first-order", "second-order"])
@pytest.mark.parametrize("name", SPLITS)
def test_adapt_is_the_plain_loop_with_masked_gradients(name: str, second_order: bool) -> None:
    split = SPLITS[name]
    case = split.case()
    task = case.task()
    want = masked_loop(split, case, task, 3, 0.1, second_order)
    xs, ys, xq, yq = task
    options: dict[str, Any] = dict(steps=3, lr=0.1, norm=split.norm, second_order=second_order)
    learner = adapt(case.network, xs, ys, pattern=pattern_of(split, case), **options)
    all_close(learner.parameters_dict(), want.parameters, "adapted")
    all_close(dict(learner.named_buffers()), want.buffers, "buffer")
    for n, mask in masks(split, case).items():  # frozen rows are the model's to the bit
        still = mask == 0
        assert torch.equal(learner.parameters_dict()[n][still], case.network.get_parameter(n)[still])
    logits = learner(xq)
    close(logits, want.logits, "logits")
    F.cross_entropy(logits, yq).backward()
    all_close(gradients_of(case.network), want.gradients, "gradient of")
    assert type(learner.module) is type(case.network)


@pytest.mark.parametrize("second_order", [False, True], ids=["first-order", "second-order"])
@pytest.mark.parametrize("name", ["two-layers-of-conv4", "mlp", "schedule", "running-statistics"])
@pytest.mark.parametrize("as_lists", [False, True], ids=["stacked", "lists"])
def test_adapt_tasks_is_the_plain_loop_for_each_task(name: str, second_order: bool, as_lists: bool) -> None:
    split = SPLITS[name]
    case = split.case()
    tasks = [case.task(seed=seed) for seed in (1, 2)]
    wanted = [masked_loop(split, case, task, 2, 0.1, second_order) for task in tasks]
    xs, ys, xq, yq = (list(part) if as_lists else torch.stack(part) for part in zip(*tasks))
    options: dict[str, Any] = dict(steps=2, lr=0.1, norm=split.norm, second_order=second_order)
    logits = adapt_tasks(case.network, xs, ys, xq, pattern=pattern_of(split, case), **options)
    for got, want in zip(logits, wanted):
        close(got, want.logits, "logits")
    sum(F.cross_entropy(got, y) for got, y in zip(logits, yq)).backward()  # type: ignore[union-attr]
    sums = {n: sum(want.gradients[n] for want in wanted) for n in wanted[0].gradients}
    all_close(gradients_of(case.network), sums, "gradient of")  # type: ignore[arg-type]


class WeightGradients(TorchDispatchMode):
    """Notes the channels of grad_output of every convolution whose weight gradient is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[-1][1]:
            self.channels.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("chosen", "channels"), [({"block4.conv": [2]}, {1}), ({"block4.conv": [0, 2]}, {2}), ({}, {4})]
)
def test_only_the_chosen_rows_of_the_weight_gradient_are_computed(chosen: Any, channels: set[int]) -> None:
    case = Case(torch_conv4(width=4), conv4_groups(), (1, 16, 16))  # patches of 36 numbers: convolutions of torch's
    xs, ys, _, _ = case.task()
    pattern = Pattern("00010").channels(case.network, chosen)
    with WeightGradients() as seen:
        adapt(case.network, xs, ys, pattern=pattern, steps=2, lr=0.1, loss=lambda y, t: F.cross_entropy(y, t))
    assert set(seen.channels) == channels and len(seen.channels) == 2


@pytest.mark.parametrize("rule", [rules.adam(0.05), rules.clip(norm=0.1) | rules.weight_decay(0.1) | rules.sgd(0.3)])
def test_a_rule_sees_and_moves_nothing_but_the_chosen_rows(rule: rules.Rule) -> None:
    case = batch_norm_mlp()
    xs, ys, _, _ = case.task()
    pattern = Pattern("010").channels(case.network, {"3": [1, 3]})
    new = adapt(case.network, xs, ys, pattern=pattern, rule=rule, steps=2).parameters_dict()
    for name, p in case.network.named_parameters():
        rows = {int(i) for i in (new[name] != p).reshape(len(p), -1).any(1).nonzero()}
        assert rows == ({1, 3} if name[0] in "34" else set())


def test_a_learned_rate_gets_its_gradient() -> None:
    split = SPLITS["mlp"]
    case = split.case()
    xs, ys, xq, yq = task = case.task()
    found = []
    for lr in (0.1 - 1e-4, 0.1 + 1e-4):
        found.append(F.cross_entropy(masked_loop(split, case, task, 2, lr, False).logits, yq))
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = dict(steps=2, lr=rate, second_order=True)
    F.cross_entropy(adapt(case.network, xs, ys, pattern=pattern_of(split, case), **options)(xq), yq).backward()
    assert rate.grad is not None
    close(rate.grad, (found[1] - found[0]) / 2e-4, "rate", rtol=1e-5)  # a difference of two losses


@torch.no_grad()
def test_without_gradients_the_values_are_the_same_and_of_no_graph() -> None:
    split = SPLITS["two-layers-of-conv4"]
    case = split.case()
    xs, ys, xq, _ = task = case.task()
    with torch.enable_grad():
        want = masked_loop(split, case, task, 2, 0.1, False)
    learner = adapt(case.network, xs, ys, pattern=pattern_of(split, case), steps=2, lr=0.1)
    assert not any(p.requires_grad for p in learner.parameters_dict().values())
    close(learner(xq), want.logits, "logits")


def test_random_numbers_are_those_of_the_steps_alone() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    pattern = Pattern("11").channels(network, {"0": [2, 5]})
    torch.manual_seed(3)
    new = adapt(network, x, y, pattern=pattern, steps=1, lr=0.5).parameters_dict()
    torch.manual_seed(3)
    grads = torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
    for (name, p), g in zip(network.named_parameters(), grads):
        mask = torch.zeros_like(p)
        mask[[2, 5] if name[0] == "0" else slice(None)] = 1.0
        close(new[name], p - 0.5 * g * mask, name)


def test_channels_belong_to_a_pattern() -> None:
    network = torch_conv4()
    one, two = (Pattern("00011").channels(network, {"head": [i]}) for i in (0, 1))
    same = Pattern("ANIL,00011").channels(network, {"head": [0]})
    assert len({one, two, one.whole(), Pattern("00011").channels(network, {"head": [0]})}) == 3
    assert one != one.whole() == Pattern("00011") and (one < two) and same != one
    assert str(one) == "00011 [channels of head: 0]" and repr(one).endswith("model, {'head': (0,)})")
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_pattern_of_channels_does_not_take_the_prepared_call_of_the_whole_layers() -> None:
    case = own_network()
    network = case.network.float()
    xs, ys, _, _ = case.task(dtype=torch.float32)
    for _ in range(3):
        adapt(network, xs, ys, pattern="00011", steps=1)
    new = adapt(network, xs, ys, pattern=Pattern("00011").channels(network, {"head": [1]}), steps=1)
    assert torch.equal(new.parameters_dict()["head.weight"][0], network.get_parameter("head.weight")[0])


def test_explain_says_that_channels_go_by_autograd_and_why() -> None:
    case = own_network()
    xs, ys, _, _ = case.task()
    told = explain(case.network, xs, ys, pattern=Pattern("00010").channels(case.network, {"block4.conv": [1]}))
    assert "[channels of block4.conv: 1]" in told and ": autograd (" in told and "no fused block computes that" in told


class AsksForTheClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (1.0 if isinstance(self.layer, nn.Linear) else 2.0)


class ReadsTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight.t()


def hooked() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 2))
    network[0].register_forward_hook(lambda *_: None)
    return network


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    return network


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "groups": (lambda: nn.Sequential(nn.Conv1d(2, 2, 1, groups=2), nn.Flatten()), "0", "groups=2"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.Flatten()), "0", "ConvTranspose1d"),
    "norm-over-more": (lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.LayerNorm([3, 5]), nn.Flatten()), "0", "LayerNorm"),
    "prelu": (lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.PReLU(3), nn.Flatten()), "0", "1.weight belongs"),
    "hooks": (hooked, "0", "has hooks"),
    "shared": (tied, "0", "is shared"),
    "asks-for-the-class": (AsksForTheClass, "layer", "computes something else"),
    "reads-the-weight": (ReadsTheWeight, "layer", "has no attribute 'weight'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_channels_of_its_own_is_refused(name: str) -> None:
    make, layer, why = REFUSED[name]
    network = make()
    x = torch.randn(4, 2, 5) if name in ("groups", "transposed", "norm-over-more", "prelu") else torch.randn(4, 3)
    pattern = Pattern("MAML").channels(network, {layer: [1]})
    with pytest.raises(ValueError, match=why):
        adapt(network, x, torch.tensor([0, 1, 0, 1]), pattern=pattern)


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({"body": [0]}, "no layer"),
        ({"block1.conv": [0]}, "bit 0"),
        ({"head": [2]}, "0 to 1"),
        ({"head": [-1]}, "0 to 1"),
        ({"head": []}, "0 to 1"),
        ({"head": [0, 0]}, "0 to 1"),
    ],
)
def test_wrong_channels_are_refused(chosen: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Pattern("00001").channels(torch_conv4(), chosen)


def test_rates_of_layers_and_clones_are_refused() -> None:
    case = batch_norm_mlp()
    xs, ys, _, _ = case.task()
    pattern = Pattern("011").channels(case.network, {"3": [0]})
    for lr in ([0.1, 0.2, 0.3], {"3.weight": 0.1, "3.bias": 0.1}):
        with pytest.raises(ValueError, match="one rate for all layers"):
            adapt(case.network, xs, ys, pattern=pattern, lr=lr)
    with pytest.raises(ValueError, match="patterns of channels are for adapt"):
        LambdaMAML(case.network, pattern=pattern)
