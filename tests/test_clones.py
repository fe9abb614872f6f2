"""Learners and clones at their edges: attributes, modes, copies, and what the frozen prefix reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import far
from torch import Tensor, nn

from lambda_maml import LambdaMAML, adapt, adapt_tasks

STEPS = WAYS = 5


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, WAYS)).double()


def task() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(10, 6, dtype=torch.float64), torch.arange(10) % WAYS


def by_verbs(model: nn.Module, **given: Any) -> Any:
    xs, ys = task()
    clone = LambdaMAML(model, 0.1, **given).clone()
    clone.adapt(F.cross_entropy(clone(xs), ys))
    return clone


def by_adapt(model: nn.Module, **given: Any) -> Any:
    return adapt(model, *task(), **{"pattern": None, "steps": 1, "lr": 0.1, **given})


either = pytest.mark.parametrize("way", [by_verbs, by_adapt])


class Kept(nn.Module):
    """A network whose norm stays in evaluation mode, with a plain number, a list of its weights, and words as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, WAYS)
        self.scale = 1.0

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.norm(self.body(x)))


@either
def test_train_is_the_models_own(way: Any) -> None:
    learner = way(Kept().double().train())
    for mode in (True, False, True):
        learner.train(mode)
        assert (learner.training, learner.head.training, learner.norm.training) == (mode, mode, False)


@either
@pytest.mark.parametrize("opened", [False, True])
def test_what_is_set_on_a_learner_is_there_for_its_forward(way: Any, opened: bool) -> None:
    model, (xs, _) = Kept().double(), task()
    learner = way(model)
    if opened:
        list(learner.parameters())
    before = learner(xs)
    learner.scale = 2.0
    assert far(learner(xs), 2 * before) < 1e-12 and model.scale == 1.0
    learner.head, learner.note = nn.Linear(6, 7).double(), "mine"
    assert learner(xs).shape == (10, 7) and model.head.out_features == WAYS
    assert learner.note == "mine" and not hasattr(learner.module, "note")


class Listed(nn.Module):
    """A network that reads its weights from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6).double(), nn.Linear(6, WAYS).double()
        self.weights: list[Any] = [self.body.weight, {"head": self.head.weight}]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weights[0], self.body.bias), self.weights[1]["head"], self.head.bias)


@either
@pytest.mark.parametrize("change", ["load", "float", "requires_grad_", "deepcopy", "further"])
def test_attributes_that_hold_parameters_follow_them(way: Any, change: str) -> None:
    model, (xs, ys) = Listed(), task()
    learner = way(model)
    list(learner.parameters())
    if change == "load":
        learner.load_state_dict(model.state_dict())
        assert far(learner(xs), model(xs)) == 0.0
    elif change == "float":
        assert learner.float()(xs.float()).dtype == torch.float32
    elif change == "requires_grad_":
        assert not learner.requires_grad_(False)(xs).requires_grad
    elif change == "deepcopy":
        assert far(copy.deepcopy(learner)(xs), learner(xs)) == 0.0
    elif way is by_verbs:
        other = by_verbs(model)
        for clone in (learner, other):  # one that was opened, one that was not
            clone.adapt(F.cross_entropy(clone(xs), ys))
        assert far(learner(xs), other(xs)) == 0.0 and far(learner.module(xs), other(xs)) == 0.0
    assert model.weights[0] is model.body.weight and model.weights[1]["head"] is model.head.weight


@either
def test_loading_into_a_network_that_holds_a_learner_leaves_the_model(way: Any) -> None:
    model = mlp()
    whole: Any = nn.Sequential(way(model, pattern="01"), nn.Linear(WAYS, 2).double())
    before = copy.deepcopy(model.state_dict())
    whole.load_state_dict({n: t + 1.0 for n, t in whole.state_dict().items()})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert far(whole[0].module[0].weight, before["0.weight"] + 1.0) == 0.0


class Codes(nn.Module):
    """A network without an input."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(WAYS, 6))
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, WAYS)

    def forward(self) -> Tensor:
        return self.head(self.body(self.codes))


@pytest.mark.parametrize("pattern", ["01", "11", None])
def test_a_clone_of_a_network_without_an_input(pattern: Any) -> None:
    torch.manual_seed(0)
    model = Codes()
    clone = LambdaMAML(model, 0.1, pattern=pattern).clone()
    losses = []
    for _ in range(3):
        losses.append(F.cross_entropy(clone(), torch.arange(WAYS)))
        clone.adapt(losses[-1])
    assert losses[0].item() > losses[1].item() > losses[2].item()


def test_a_clone_that_was_made_without_gradients_adapts() -> None:
    model, (xs, ys) = mlp(), task()
    want = by_verbs(model)
    maml = LambdaMAML(model, 0.1)
    with torch.no_grad():
        clone = maml.clone()
    clone.adapt(F.cross_entropy(clone(xs), ys))
    assert far(clone(xs), want(xs)) == 0.0


def test_a_clones_clone_has_its_modes_and_not_the_models() -> None:
    torch.manual_seed(0)
    model, (xs, _) = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, WAYS)).double(), task()
    clone: Any = LambdaMAML(model, 0.1).clone()
    model.eval()
    twin = clone.clone()
    assert twin.training and twin.module[1].training and far(twin(xs), clone(xs)) == 0.0
    assert int(twin.module[1].num_batches_tracked) == 1


def test_the_prefix_of_a_copy_counts_in_the_copys_statistics() -> None:
    model, (xs, _) = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, WAYS)).double(), task()
    clone: Any = LambdaMAML(model, 0.1, pattern="1").clone()
    clone(xs)
    twin = copy.deepcopy(clone)
    twin(xs)
    assert [int(m.module[0].num_batches_tracked) for m in (clone, twin)] == [1, 2]


def test_the_prefix_reads_buffers_and_tensors_that_were_handed_out() -> None:
    norm, (xs, _) = nn.BatchNorm1d(6, affine=False), task()
    model: Any = nn.Sequential(norm, nn.Linear(6, 8), nn.Linear(8, WAYS)).double().eval()
    clone: Any = LambdaMAML(model, 0.1, pattern="01").clone()

    def check() -> None:
        assert far(clone(xs), clone(xs.clone())) == 0.0

    clone(xs)
    with torch.no_grad():
        clone.parameters_dict()["1.weight"].mul_(2.0)
    check()
    clone.module[0].running_mean.add_(1.0)
    check()
    for _ in range(3):  # another tensor at, perhaps, the same address
        for _ in range(2):
            clone.module[1].weight = nn.Parameter(torch.randn_like(model[1].weight))
        check()


class Rows(nn.Module):
    """A classifier whose classes are rows: its last layer's outputs are places."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)  # [N, classes, 3]


def test_labels_per_place_are_not_bounded_by_a_linear_layers_outputs() -> None:
    torch.manual_seed(0)
    model, xs, ys = Rows(), torch.randn(4, 10, 6), torch.full((4, 3), 9)
    adapt(model, xs, ys, pattern="1")
    adapt_tasks(model, xs[None], ys[None], xs[None], pattern="1")
    with pytest.raises(ValueError, match="labels run from -1"):
        adapt(model, xs, ys - 10, pattern="1")
