"""How users call networks: inputs and results of any structure, networks of any kind, learn2learn's arguments."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain import far, plain
from torch import Tensor, nn
from users import D, Q, X, Y, doubled, every_way, first, mlp, seeded

import lambda_kernels as lk
from lambda_maml import LambdaMAML, Pattern, adapt, adapt_tasks, say
from lambda_maml.network import layers_of


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    say._said.clear()
    yield


# Results.


class Output(OrderedDict):
    """As transformers' outputs: keys that are attributes too, and tuple-like indexing."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


Named = namedtuple("Named", "logits hidden")


@dataclass
class Record:
    logits: Tensor
    hidden: Tensor


class Listed(list):
    pass


RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda z, h: (z, h),
    "list": lambda z, h: [z, h],
    "dict": lambda z, h: {"logits": z, "hidden": h},
    "OrderedDict": lambda z, h: OrderedDict(logits=z, hidden=h),
    "defaultdict": lambda z, h: defaultdict(int, logits=z),
    "model output": lambda z, h: Output(logits=z, hidden=h),
    "named tuple": Named,
    "data class": Record,
    "subclass of list": lambda z, h: Listed([z, h]),
    "nested": lambda z, h: (z, {"hidden": [h, (h + 1,)]}),
    "with None": lambda z, h: (z, None),
    "with a number and a word": lambda z, h: (z, 7, "seven"),
}


class Gives(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.a(x))
        return RESULTS[self.kind](self.b(hidden), hidden)


@pytest.mark.parametrize("kind", RESULTS)
def test_results_of_any_structure(kind: str) -> None:
    model = seeded(Gives(kind))
    every_way(model, X, Y, Q, lambda o, y: F.cross_entropy(first(o), y))
    given: dict[str, Any] = {"pattern": "11", "steps": 1, "loss": lambda o, y: F.cross_entropy(first(o), y)}
    converted = lk.convert(seeded(Gives(kind)))
    for result in (
        adapt(model, X, Y, **given)(Q),
        adapt_tasks(model, *map(doubled, (X, Y, Q)), **given),
        LambdaMAML(model, 0.1).clone()(Q),
        converted(Q),
    ):
        assert type(result) is type(model(Q))
    if kind == "model output":
        assert converted(Q).logits.shape == (9, 3) and converted(Q)[1].shape == (9, 8)


# Inputs.


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x) + self.b(z)))


class Optional(Two):
    def forward(self, x: Tensor, z: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return scale * self.head(torch.tanh(self.a(x) if z is None else self.a(x) + self.b(z)))


class Batch(Two):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"], batch["z"])


class Pair(Two):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*pair)


class Labelled(Two):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.head(torch.tanh(self.a(x)))
        return out if labels is None else (F.cross_entropy(out, labels), out)


class Controller(nn.Module):
    """Embedding, LSTMCell and one decoder per decision; the state is handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell = nn.Embedding(32, 10), nn.LSTMCell(10, 10)
        self.decoders = nn.ModuleDict({"size": nn.Linear(10, 4), "kind": nn.Linear(10, 3)})

    def forward(self, x: Tensor, state: Any, which: str) -> Any:
        h, c = self.cell(self.encoder(x), state)
        return self.decoders[which](h), (h, c)


Z, TOKENS, STATE = torch.randn(6, 3, dtype=D), torch.arange(6), (torch.zeros(6, 10, dtype=D),) * 2
CALLS: dict[str, tuple[type[nn.Module], Callable[[Any], Tensor]]] = {
    "two inputs": (Two, lambda c: F.cross_entropy(c(X, Z), Y)),
    "an optional input, given": (Optional, lambda c: F.cross_entropy(c(X, Z), Y)),
    "an optional input, left out": (Optional, lambda c: F.cross_entropy(c(X), Y)),
    "a keyword": (Optional, lambda c: F.cross_entropy(c(X, z=Z), Y)),
    "a keyword that is no tensor": (Optional, lambda c: F.cross_entropy(c(X, scale=2.0), Y)),
    "one way and the other": (Optional, lambda c: F.cross_entropy(c(X) + c(X, z=Z) + c(X, Z, 0.5), Y)),
    "labels": (Labelled, lambda c: c(X, labels=Y)[0]),
    "a dict": (Batch, lambda c: F.cross_entropy(c({"x": X, "z": Z}), Y)),
    "a tuple": (Pair, lambda c: F.cross_entropy(c((X, Z)), Y)),
    "a state and a choice of head": (Controller, lambda c: F.cross_entropy(c(TOKENS, STATE, "kind")[0], Y)),
}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_the_verbs_call_a_network_as_it_is_called(name: str, first_order: bool) -> None:
    kind, loss = CALLS[name]
    model = seeded(kind())
    want = plain(model, loss, 3, order=1 if first_order else 2)
    maml = LambdaMAML(model, 0.1, first_order)
    task = maml.clone()
    for _ in range(3):
        task.adapt(loss(task))
    assert max(far(task.parameters_dict()[n], p) for n, p in want.fast.items()) < 1e-12
    assert far(loss(task), loss(want)) < 1e-12 and far(loss(maml), loss(model)) == 0.0
    got, hoped = (torch.autograd.grad(loss(c), list(model.parameters()), allow_unused=True) for c in (task, want))
    assert all((a is None) == (b is None) and (a is None or far(a, b) < 1e-12) for a, b in zip(got, hoped))


def test_batches_of_several_tensors() -> None:
    every_way(seeded(Batch()), {"x": X, "z": Z}, Y, {"x": X + 1, "z": Z - 1})
    every_way(seeded(Pair()), (X, Z), Y, (X + 1, Z - 1))
    with pytest.raises(ValueError, match="Two.forward takes 2 inputs.*one tuple or dict, or use LambdaMAML"):
        adapt(seeded(Two()), (X, Z), Y, pattern="111")
    with pytest.raises(ValueError, match="must agree on T"):
        adapt_tasks(seeded(Pair()), doubled((X, Z)), Y[None], doubled((X, Z)), pattern="111")


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(x).mean(1))))


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x.double() / 255)).flatten(1))


class Mixed(nn.Module):
    """A float32 scale in front of a float64 layer: the first parameter is not what takes the input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(1)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.scale


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


def test_inputs_and_weights_of_any_dtype() -> None:
    every_way(seeded(Text()), torch.randint(0, 20, (6, 5)), Y, torch.randint(0, 20, (9, 5)))
    images = torch.randint(0, 255, (15, 1, 6, 6), dtype=torch.uint8)
    every_way(seeded(Bytes()), images[:6], Y, images[6:])
    mixed = Mixed()
    seeded(mixed.head)
    want = plain(mixed, lambda c: F.cross_entropy(c(X), Y))(Q)
    given: dict[str, Any] = {"pattern": "1", "steps": 3, "lr": 0.1}
    assert far(adapt(mixed, X, Y, **given)(Q), want) < 1e-6
    assert far(adapt_tasks(mixed, *map(doubled, (X, Y, Q)), **given)[1], want) < 1e-6
    torch.manual_seed(0)
    every_way(Complex(), X, Y, Q)
    with pytest.raises(TypeError, match="xs is torch.float32, the network torch.float64"):
        adapt(mlp(), X.float(), Y, pattern="11")


# Networks whose weights lie elsewhere than in convolutions and linear layers.


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 1, 3, 3), (3,), (3, 48), (3,)]
        self.vars = nn.ParameterList([nn.Parameter(torch.empty(s)) for s in shapes])

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(F.conv2d(x, self.vars[0], self.vars[1]))
        return F.linear(hidden.flatten(1), self.vars[2], self.vars[3])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x[:, 0])[0][:, -1]


class Prompt(nn.Module):
    """A fixed feature extractor as buffers, a learnt prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(36))
        self.register_buffer("w", torch.randn(3, 36, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x.flatten(1) + self.prompt), self.get_buffer("w"))


class Toy(nn.Module):
    """No input at all: a distribution whose mean and scale are learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma = (nn.Parameter(torch.zeros(5, dtype=D)) for _ in range(2))

    def forward(self) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.mu, self.sigma.exp())


@pytest.mark.parametrize("kind", [Functional, Recurrent, Prompt])
def test_a_network_without_known_layers_is_one_layer(kind: type[nn.Module]) -> None:
    model = seeded(kind())
    images = torch.randn(15, 1, 6, 6, dtype=D)
    assert len(layers_of(model)) == 1
    every_way(model, images[:6], Y, images[6:])


def test_bare_layers_and_networks_without_an_input() -> None:
    every_way(seeded(nn.Linear(4, 3)), X, Y, Q)
    every_way(seeded(nn.Conv2d(1, 3, 3)), X.view(6, 1, 2, 2).repeat(1, 1, 2, 2), Y[:, None, None].repeat(1, 2, 2),
              Q.view(9, 1, 2, 2).repeat(1, 1, 2, 2))  # fmt: skip
    assert str(LambdaMAML(nn.Linear(20, 10), 0.1).pattern) == "1"
    toy = Toy()
    task = LambdaMAML(toy, 0.1).clone()
    for _ in range(3):
        task.adapt((task().mean - 1).pow(2).sum())
    want = plain(toy, lambda c: (c().mean - 1).pow(2).sum())
    assert far(task().mean, want().mean) < 1e-15
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        LambdaMAML(nn.ReLU(), 0.1)


# learn2learn's arguments.


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.pooler, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_learn2learns_arguments() -> None:
    model = seeded(Unused())
    want = plain(model, lambda c: F.cross_entropy(c(X), Y), 1)

    def after(maml: LambdaMAML, clone: dict[str, Any] | None = None, step: dict[str, Any] | None = None) -> Any:
        task = maml.clone(**(clone or {}))
        task.adapt(F.cross_entropy(task(X), Y), **(step or {}))
        assert max(far(task.parameters_dict()[n], p) for n, p in want.fast.items()) < 1e-12
        return task

    for maml in (
        LambdaMAML(model, 0.1, False),
        LambdaMAML(model, 0.1, True, True, True),
        LambdaMAML(model, lr=0.1, first_order=False, allow_unused=True, allow_nograd=True),
    ):
        task = after(maml, {"first_order": True, "allow_unused": True, "allow_nograd": True})
        after(maml, step={"first_order": True, "allow_unused": True, "allow_nograd": True})
        second = after(maml, {"first_order": False})
        for one, order in ((task, 1), (second, 2)):
            hoped = plain(model, lambda c: F.cross_entropy(c(X), Y), 1, order=order)
            got, right = (
                torch.autograd.grad(F.cross_entropy(c(Q), Y.repeat(2)[:9]), list(model.parameters())[:2])
                for c in (one, hoped)
            )
            assert max(far(g, r) for g, r in zip(got, right)) < 1e-12
        twin = task.clone(first_order=False)
        twin.adapt(F.cross_entropy(twin(X), Y))
    for refuse in (
        lambda: after(LambdaMAML(model, 0.1, allow_unused=False)),
        lambda: after(LambdaMAML(model, 0.1), {"allow_unused": False}),
        lambda: after(LambdaMAML(model, 0.1), step={"allow_unused": False}),
    ):
        with pytest.raises(
            ValueError, match="does not depend on pooler.weight, pooler.bias, and allow_unused is False"
        ):
            refuse()


def test_the_third_place_is_learn2learns_first_order_or_a_pattern() -> None:
    model = mlp()
    for maml, first_order, pattern in (
        (LambdaMAML(model, 0.1, True), True, "11"),
        (LambdaMAML(model, 0.1, True, pattern="01"), True, "01"),
        (LambdaMAML(model, 0.1, "01"), False, "01"),
        (LambdaMAML(model, 0.1, "01", first_order=True), True, "01"),
        (LambdaMAML(model, 0.1, Pattern("10"), True, first_order=True), True, "10"),
        (LambdaMAML(model, 0.1, None), False, "11"),
    ):
        assert (maml.first_order, str(maml.pattern)) == (first_order, pattern)
        want = plain(model, lambda c: F.cross_entropy(c(X), Y), 2, names=[
            n for n, _ in model.named_parameters() if pattern[int(n[0]) // 2] == "1"
        ])  # fmt: skip
        task = maml.clone()
        for _ in range(2):
            task.adapt(F.cross_entropy(task(X), Y))
        assert far(task(Q), want(Q)) < 1e-12


def test_a_loss_of_something_else_moves_nothing_where_the_user_allows_it() -> None:
    """As learn2learn has it with allow_unused=True; a loss without any graph is refused all the same."""
    model = mlp()
    task = LambdaMAML(model, 0.1).clone()
    task.adapt(F.cross_entropy(model(X), Y), allow_unused=True)
    assert far(task(Q), model(Q)) == 0.0
    with pytest.raises(ValueError, match="does not depend on the parameters"):
        task.adapt(F.cross_entropy(model(X), Y))
    with pytest.raises(ValueError, match="it has no graph"):
        task.adapt(F.cross_entropy(model(X), Y).detach(), allow_unused=True)


def test_parameters_that_the_user_froze_stay_frozen_unless_a_pattern_names_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index]
    frozen = plain(model, lambda c: F.cross_entropy(c(X), Y), names=["2.weight", "2.bias"], order=1)
    moved = plain(mlp(), lambda c: F.cross_entropy(c(X), Y), order=1)
    with caplog.at_level(logging.WARNING, "lambda_maml"):
        for pattern, want in ((None, frozen), ("01", frozen), ("11", moved)):
            task = LambdaMAML(model, 0.1, True, pattern=pattern).clone()
            for _ in range(3):
                task.adapt(F.cross_entropy(task(X), Y))
            learner = adapt(model, X, Y, pattern=pattern, steps=3, lr=0.1)
            both = adapt_tasks(model, *map(doubled, (X, Y, Q)), pattern=pattern, steps=3, lr=0.1)
            for result in (task(Q), learner(Q), both[0], both[1]):
                assert far(result, want(Q)) < 1e-12
            said = [r.message for r in caplog.records if "do not require a gradient: 0.weight, 0.bias" in r.message]
            assert len(said) == (pattern == "11")
    assert not any(p.requires_grad for p in model[0].parameters())  # type: ignore[index]
    with pytest.raises(ValueError, match="no parameter of Sequential requires a gradient"):
        adapt(mlp().requires_grad_(False), X, Y, pattern=None)


# Numbers of NumPy.


def test_steps_and_rates_of_numpy() -> None:
    model = mlp()
    want = adapt(model, X, Y, pattern="11", steps=3, lr=0.125)(Q)
    steps: Any = np.int64(3)
    rates: list[Any] = [np.float32(0.125), np.float64(0.125), np.array(0.125), torch.tensor(0.125)]
    for lr in rates:
        assert far(adapt(model, X, Y, pattern="11", steps=steps, lr=lr)(Q), want) == 0.0
        assert LambdaMAML(model, lr).clone()(Q).shape == (9, 3)
