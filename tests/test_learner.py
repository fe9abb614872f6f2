"""What PyTorch's users expect of a learner and a clone: a module that holds the adapted parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import far, plain
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import lambda_kernels as lk
from lambda_maml import LambdaMAML, adapt

D = torch.float64
X, Y = torch.randn(6, 4, dtype=D), torch.arange(3).repeat(2)
Q, YQ = torch.randn(9, 4, dtype=D), torch.arange(3).repeat(3)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def normed(dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    return layers.double()


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(27, 3)).double()


def ce(network: Any) -> Tensor:
    return F.cross_entropy(network(X), Y)


def by_verbs(model: nn.Module, steps: int = 1, **given: Any) -> Any:
    task = LambdaMAML(model, 0.1, **given).clone()
    for _ in range(steps):
        task.adapt(ce(task))
    return task


def by_adapt(model: nn.Module, steps: int = 1, **given: Any) -> Any:
    return adapt(model, X, Y, pattern="11", steps=steps, lr=0.1, **given)


WAYS: dict[str, Callable[..., Any]] = {"verbs": by_verbs, "adapt": by_adapt}
either = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# Modes.


@either
@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
def test_eval_uses_the_learners_own_running_statistics(way: Any, converted: bool) -> None:
    model = normed()
    twin = copy.deepcopy(model)
    learner = way(lk.convert(model) if converted else model)
    if way is by_adapt:
        learner.train()
    want = plain(twin, ce, 1)
    twin.eval()
    assert far(learner.eval()(Q), want(Q)) < 1e-12
    assert model.training and learner.training is False
    twin.train()
    assert far(learner.train()(Q), want(Q)) < 1e-12


@either
def test_dropout_follows_the_learners_mode_and_not_the_models(way: Any) -> None:
    model = normed(0.5)
    learner = way(model)
    assert not torch.equal(learner(Q), learner(Q))
    learner.eval()
    assert torch.equal(learner(Q), learner(Q))
    model.eval()  # the model's mode was the learner's when it was made; later changes are the model's own
    assert not torch.equal(learner.train()(Q), learner(Q))
    other = way(model)
    model.train()
    assert torch.equal(other(Q), other(Q))


@either
def test_the_mode_of_a_part(way: Any) -> None:
    """Freezing a norm's statistics is often done on one layer: learner[1].eval()."""
    model = normed()
    twin = copy.deepcopy(model)
    learner = way(model)
    want = plain(twin, ce, 1)
    twin[1].eval()
    learner.get_submodule("1").eval()
    assert far(learner(Q), want(Q)) < 1e-12 and model[1].training


# Parameters.


@either
def test_parameters_are_the_adapted_ones_by_the_models_names(way: Any) -> None:
    model = mlp()
    learner, want = way(model, 2), plain(model, ce, 2)
    assert [n for n, _ in learner.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert sum(p.numel() for p in learner.parameters()) == 67
    for name, p in learner.named_parameters():
        assert far(p, want.fast[name]) < 1e-12
    assert next(learner.parameters()).device.type == "cpu"
    assert nn.utils.parameters_to_vector(learner.parameters()).numel() == 67
    grads = torch.autograd.grad(ce(learner), list(learner.parameters()))
    assert [g.shape for g in grads] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("kind", ["l2", "proximal"])
@pytest.mark.parametrize("pattern", ["11", "01"])
@pytest.mark.parametrize("second_order", [True, False])
def test_a_penalty_over_parameters_inside_the_inner_loss(kind: str, pattern: str, second_order: bool) -> None:
    model = mlp()

    def penalty(parameters: Any) -> Tensor:
        start = model.parameters() if kind == "proximal" else (0.0 for _ in model.parameters())
        terms = [((p - s) ** 2).sum() for p, s in zip(parameters, start)]
        return 0.5 * torch.stack(terms).sum()

    task = LambdaMAML(model, 0.1, not second_order, pattern=pattern).clone()
    for _ in range(3):
        task.adapt(ce(task) + penalty(task.parameters()))
    names = [n for n, _ in model.named_parameters()][-2 if pattern == "01" else 0 :]
    want = plain(model, lambda c: ce(c) + penalty(c.fast.values()), names=names, order=2 if second_order else 1)
    assert max(far(task.parameters_dict()[n], want.fast[n]) for n in want.fast) < 1e-12
    got, hoped = (torch.autograd.grad(F.cross_entropy(c(Q), YQ), list(model.parameters())) for c in (task, want))
    assert max(far(a, b) for a, b in zip(got, hoped)) < 1e-12


def test_gradients_may_be_looked_at_between_loss_and_step() -> None:
    model = mlp()
    task = LambdaMAML(model, 0.1).clone()
    grads = task.gradients(ce(task))
    task.update({n: g.clamp(-0.01, 0.01) for n, g in grads.items()})
    fast = {n: p - 0.1 * g.clamp(-0.01, 0.01) for (n, p), g in zip(model.named_parameters(), grads.values())}
    assert all(far(p, fast[n]) < 1e-15 for n, p in task.named_parameters())
    with pytest.raises(ValueError, match="update: 9.weight is not updated in step 2, 0.weight"):
        task.update({"9.weight": X})


# Saving, loading, copying.


@either
def test_state_dict_holds_the_adapted_network(way: Any) -> None:
    model: Any = normed()
    learner = way(model)
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    fresh: Any = normed(seed=1)
    assert str(fresh.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    assert far(fresh.eval()(Q), learner.eval()(Q)) < 1e-15
    assert not torch.equal(fresh[1].running_mean, model[1].running_mean)


@either
def test_load_state_dict_reaches_the_learner_alone(way: Any) -> None:
    model, other = mlp(), mlp(1)
    learner = way(model, pattern="01") if way is by_verbs else adapt(model, X, Y, pattern="01", steps=1, lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner.load_state_dict(other.state_dict())
    assert far(learner(Q), other(Q)) < 1e-15
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@either
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_go_their_own_way(way: Any, copied: Any) -> None:
    model = mlp()
    learner = way(model)
    twin = copied(learner)
    assert far(twin(Q), learner(Q)) < 1e-15
    assert all(p.is_leaf and p.requires_grad for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(Q).any() and learner(Q).any() and model(Q).any()


def test_a_copied_clone_adapts_on() -> None:
    task = by_verbs(mlp())
    twin = copy.deepcopy(task)
    for one in (task, twin):
        one.adapt(ce(one))
    assert far(twin(Q), task(Q)) < 1e-12


@either
def test_to_changes_the_learner_and_leaves_the_model(way: Any) -> None:
    model = mlp()
    learner = way(model)
    want = learner(Q).detach()
    assert learner.float()(Q.float()).dtype == torch.float32
    assert far(learner(Q.float()).double(), want) < 1e-5
    assert {p.dtype for p in learner.parameters()} == {torch.float32} and {p.dtype for p in model.parameters()} == {D}
    assert far(learner.to(D)(Q), want) < 1e-5
    loss = F.cross_entropy(learner(Q), YQ)
    grads = torch.autograd.grad(loss, list(model.parameters()))  # through the casts
    assert all(g.any() for g in grads)
    learner.requires_grad_(False)
    assert not learner(Q).requires_grad and all(p.requires_grad for p in model.parameters())


@either
def test_to_module_is_a_network_of_the_models_class(way: Any) -> None:
    model = normed()
    learner = way(model)
    module = learner.to_module()
    assert type(module) is nn.Sequential and far(module(Q), learner(Q)) < 1e-12
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())


# Going on.


def test_a_learner_can_be_adapted_and_meta_trained_further() -> None:
    model = mlp()
    first = adapt(model, X, Y, pattern="11", steps=2, lr=0.1, second_order=True)
    second = adapt(first, X, Y, pattern="11", steps=2, lr=0.1, second_order=True)
    want = plain(model, ce, 4)
    assert far(second(Q), want(Q)) < 1e-12
    got, hoped = (torch.autograd.grad(F.cross_entropy(c(Q), YQ), list(model.parameters())) for c in (second, want))
    assert max(far(a, b) for a, b in zip(got, hoped)) < 1e-12
    maml = LambdaMAML(first, 0.1)
    assert maml.module is first.module and far(by_verbs(first)(Q), plain(model, ce, 3)(Q)) < 1e-12


# Attributes.


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scale = nn.Linear(4, 3), 2.0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def log_prob(self, x: Tensor, action: Tensor) -> Tensor:
        return self.scale * F.log_softmax(self(x), -1).gather(1, action[:, None])


def test_methods_and_layers_are_those_of_the_adapted_network() -> None:
    model = Policy()
    maml = LambdaMAML(model, 0.1)
    task = maml.clone()
    for _ in range(2):
        task.adapt(-task.log_prob(X, Y).mean())
    want = plain(model, lambda c: -2.0 * F.log_softmax(c(X), -1).gather(1, Y[:, None]).mean(), 2)
    assert far(task.log_prob(Q, YQ), 2.0 * F.log_softmax(want(Q), -1).gather(1, YQ[:, None])) < 1e-12
    assert far(task.body(Q), want(Q)) < 1e-12 and isinstance(task.body, nn.Linear) and task.scale == 2.0
    assert torch.equal(maml.log_prob(X, Y), model.log_prob(X, Y)) and maml.body is model.body
    assert isinstance(task.module, Policy) and task.module.body.weight is task.parameters_dict()["body.weight"]
    learner = adapt(model, X, Y, pattern="1", steps=1, lr=0.1)
    assert learner.log_prob(X, Y).shape == (6, 1)
    for thing in (task, learner):
        with pytest.raises(AttributeError, match="neither .* nor its network, a Policy, has 'nothing'"):
            thing.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="nothing"):
        maml.nothing  # noqa: B018


# Hooks and wrappers.

OLD_STYLE: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    "parametrised": lambda m: parametrizations.weight_norm(m),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", OLD_STYLE)
def test_layers_whose_hooks_make_their_weights(name: str) -> None:
    def made() -> nn.Module:
        model = mlp()
        OLD_STYLE[name](model[0])
        return model.eval() if name == "spectral_norm" else model  # in training each forward moves its estimate

    model, want = made(), plain(made(), ce, 3)
    learner = adapt(model, X, Y, pattern="11", steps=3, lr=0.1)
    assert far(learner(Q), want(Q)) < 1e-12
    assert far(learner.to_module()(Q), want(Q)) < 1e-12
    if name in ("spectral_norm", "parametrised"):  # torch cannot copy a model with the others at any time
        copy.deepcopy(model)  # nothing of the adaptation stays in the model
    task = by_verbs(model, 3)
    assert far(task(Q), want(Q)) < 1e-12


def test_data_parallel_as_learn2learns_authors_advise() -> None:
    model = mlp()
    want = plain(model, ce, 1)
    assert far(by_verbs(nn.DataParallel(model))(Q), want(Q)) < 1e-12
    assert far(adapt(nn.DataParallel(model), X, Y, pattern="11", steps=1, lr=0.1)(Q), want(Q)) < 1e-12
    assert far(nn.DataParallel(by_verbs(model))(Q), want(Q)) < 1e-12


# Gradient modes.


def test_what_is_computed_without_gradients_says_so() -> None:
    model = mlp()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match=r"no graph: it was detached, or computed under torch.no_grad\(\)"):
            by_verbs(model)
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        x = X.clone()
        assert by_verbs(model)(x).requires_grad


@either
def test_query_sets_of_inference_mode(way: Any) -> None:
    """As Lightning's validation steps load and run them."""
    for pattern in ("11", "01"):
        model = mlp()
        learner = (
            way(model, pattern=pattern) if way is by_verbs else adapt(model, X, Y, pattern=pattern, steps=1, lr=0.1)
        )
        want = learner(Q).detach()
        with torch.inference_mode():
            query = Q.clone()
            for _ in range(2):
                assert far(learner(query), want) == 0.0
        with torch.no_grad():
            for _ in range(2):
                assert far(learner(query), want) == 0.0


# The remembered prefix.


@pytest.mark.parametrize("network", [mlp, cnn])
def test_the_prefix_never_serves_an_input_or_a_mode_that_it_was_not_computed_for(network: Any) -> None:
    model = network()
    x = torch.randn(6, 1, 6, 6, dtype=D) if network is cnn else X.clone()
    task = LambdaMAML(model, 0.1, pattern="01").clone()
    task(x)
    x.data = x.data + 1.0  # no version counts this
    assert far(task(x), model(x)) < 1e-12
    x.numpy()[...] *= 0.5  # nor this
    assert far(task(x), model(x)) < 1e-12
    with torch.no_grad():
        assert not task(x).requires_grad
    task.adapt(task(x).square().mean())  # the values of the pass without a graph have none
    with torch.autocast("cpu", torch.bfloat16):
        low = task(x)
        assert torch.equal(low, task(x))
    high = task(x)
    assert far(high, task(x.clone())) < 1e-12
    with torch.no_grad():
        next(task.parameters()).mul_(2.0)  # a frozen weight of the clone's own
    assert far(task(x), task(x.clone())) < 1e-12 and far(task(x), high) > 1e-6
    task.double()
    assert far(task(x), task(x.clone())) < 1e-12


def test_the_prefix_is_not_held_across_modes_of_the_network() -> None:
    model = normed(0.0)
    task = LambdaMAML(model, 0.1, pattern="01").clone()
    task(X)
    assert (
        far(task.eval()(X), model.eval()(X)) > 1e-6
    )  # the first call has moved the clone's statistics, not the model's
    twin = task.to_module()
    assert torch.equal(task(X), twin.eval()(X))
