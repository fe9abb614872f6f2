"""Targets and labels of any kind, and networks that vmap cannot follow, in float64 beside the plain loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import far, plain
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from users import D, Loss, Q, X, Y, doubled, every_way, mlp, seeded

from lambda_maml import adapt, adapt_tasks, explain, say
from lambda_maml.network import layers_of


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    say._said.clear()
    yield


# Targets.


def contrast(out: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(out, dim=-1)
    same = (y[..., :, None] == y[..., None, :]).to(out.dtype)
    return -(F.log_softmax(z @ z.transpose(-1, -2) / 0.5, -1) * same).mean()


def binary(o: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(o.squeeze(-1), y.to(o.dtype))


WHOLE_NUMBERS: dict[str, tuple[int, list[Any], Loss]] = {
    "binary, one logit": (1, [0, 1] * 3, binary),
    "ages": (1, [12, 30, 7, 44, 5, 60], lambda o, y: F.mse_loss(o.squeeze(-1), y.to(o.dtype) / 60)),
    "all the same": (1, [2] * 6, lambda o, y: F.mse_loss(o.squeeze(-1), y.to(o.dtype))),
    "hinge": (1, [-1, 1] * 3, lambda o, y: F.relu(1 - y * o.squeeze(-1)).mean()),
    "counts": (1, [0, 3, 9, 1, 0, 4], lambda o, y: F.poisson_nll_loss(o.squeeze(-1), y.to(o.dtype))),
    "global class numbers": (3, [10, 10, 41, 41, 63, 63], contrast),
    "multi-hot": (3, [[1, 1, 1]] * 6, binary),
    "bool": (1, [True, False] * 3, binary),
}


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_are_class_numbers_for_cross_entropy_alone(name: str) -> None:
    width, labels, loss = WHOLE_NUMBERS[name]
    every_way(mlp(width), X, torch.tensor(labels), Q, loss)


STRUCTURES: dict[str, tuple[Any, Loss]] = {
    "none": (None, lambda o, _: -(o.softmax(-1) * o.log_softmax(-1)).sum(-1).mean()),
    "dict": ({"a": Y, "b": Y.flip(0)}, lambda o, t: F.cross_entropy(o, t["a"]) + F.cross_entropy(o, t["b"])),
    "tuple": ((Y, Y.flip(0)), lambda o, t: F.cross_entropy(o, t[0]) + F.cross_entropy(o, t[1])),
    "one per bag": (torch.tensor([1]), lambda o, t: F.cross_entropy(o.mean(0, keepdim=True), t)),
    "probabilities": (torch.softmax(torch.randn(6, 3, dtype=D), -1), F.cross_entropy),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_targets_of_any_structure(name: str) -> None:
    ys, loss = STRUCTURES[name]
    every_way(mlp(), X, ys, Q, loss)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's word on pdist under vmap
def test_pairwise_targets_which_vmap_cannot_follow_are_adapted_task_by_task(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lambda_maml"):
        every_way(mlp(), X, torch.rand(15, dtype=D), Q, lambda o, t: F.mse_loss(F.pdist(o), t))


segments = torch.randint(0, 3, (4, 5, 5))
VOID, VOID255 = segments.clone(), segments.clone()
VOID[:, 0], VOID255[:, 0] = -100, 255
fcn = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
PICTURES = torch.randn(4, 1, 5, 5, dtype=D)


@pytest.mark.parametrize(
    ("network", "xs", "ys", "loss"),
    [
        (mlp(), X, torch.tensor([0, 1, 2, -100, -100, 0]), F.cross_entropy),
        (mlp(), X, torch.tensor([0, 1, 2, -100, -100, 0]), nn.CrossEntropyLoss()),
        (mlp(), X, torch.tensor([0, 1, 2, 255, 255, 0]), nn.CrossEntropyLoss(ignore_index=255)),
        (mlp(), X, torch.tensor([0, 1, 2, 1, 1, 0]), nn.CrossEntropyLoss(ignore_index=1)),
        (seeded(fcn), PICTURES, segments, F.cross_entropy),
        (seeded(fcn), PICTURES, VOID, F.cross_entropy),
        (seeded(fcn), PICTURES, VOID255, nn.CrossEntropyLoss(ignore_index=255)),
        (seeded(fcn), PICTURES, torch.zeros_like(segments), F.cross_entropy),
    ],
    ids=["-100", "module", "255", "a known class", "segments", "void", "void 255", "background"],
)
def test_labels_that_cross_entropy_leaves_out(network: nn.Module, xs: Tensor, ys: Tensor, loss: Loss) -> None:
    every_way(network, xs, ys, xs, loss)


def conv4() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (1, 3):
        layers += [nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return seeded(nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_class_numbers_of_any_whole_dtype(dtype: torch.dtype) -> None:
    for model, x in ((mlp(), X), (conv4(), torch.randn(6, 1, 8, 8, dtype=D))):
        want = plain(model, lambda c: F.cross_entropy(c(x), Y))(x)  # noqa: B023
        bits = "1" * len(layers_of(model))
        for _ in range(2):  # the second call goes the remembered way
            assert far(adapt(model, x, Y.to(dtype), pattern=bits, steps=3, lr=0.1)(x), want) < 1e-9
        both = adapt_tasks(model, *map(doubled, (x, Y.to(dtype), x)), pattern=bits, steps=3, lr=0.1)
        assert far(both[1], want) < 1e-9


@pytest.mark.parametrize("images", [1, 2, 6])
def test_a_support_set_of_one_class_is_adapted_to_with_a_word_in_the_log(
    images: int, caplog: pytest.LogCaptureFixture
) -> None:
    for model, x in ((mlp(), X), (conv4(), torch.randn(6, 1, 8, 8, dtype=D))):
        say._said.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lambda_maml"):
            every_way(model, x[:images], torch.ones(images, dtype=torch.int64), x)
        assert [r.message for r in caplog.records if "one class only" in r.message]


@pytest.mark.parametrize("ignored", [-100, 255, 1])
def test_labels_that_are_all_left_out_are_named(ignored: int) -> None:
    labels = torch.full((6,), ignored)
    with pytest.raises(ValueError, match=f"all labels are {ignored}"):
        adapt(mlp(), X, labels, pattern="11", loss=nn.CrossEntropyLoss(ignore_index=ignored))
    total = nn.CrossEntropyLoss(ignore_index=ignored, reduction="sum")  # 0, and nothing moves
    network = mlp()
    assert far(adapt(network, X, labels, pattern="11", loss=total)(X), network(X)) == 0.0


def test_labels_beyond_the_outputs_are_named_for_one_and_many_tasks() -> None:
    for wrong in (torch.tensor([0, 1, 3, 0, 1, 2]), torch.tensor([0, 1, -1, 0, 1, 2])):
        for call in (
            lambda y: adapt(conv4(), torch.randn(6, 1, 8, 8, dtype=D), y, pattern="111"),
            lambda y: adapt_tasks(mlp(), *map(doubled, (X, y, Q)), pattern="11"),
        ):
            with pytest.raises(ValueError, match=r"labels run from (0|-1) to (2|3), the network's outputs from 0 to 2"):
                call(wrong)


# What vmap cannot follow.


class Sequence(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.net, self.head = kind(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x.view(x.shape[0], 2, 2))[0][:, -1])


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[h < 0] = 0
        return self.head(h)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.a, self.net, self.head = nn.Linear(4, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.a(x)[:, None].expand(-1, 3, -1)).mean(1))


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.head(h * h.detach().abs().amax().item())


UNMAPPED: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: Sequence(nn.GRU),
    "LSTM": lambda: Sequence(nn.LSTM),
    "mask": Masked,
    "transformer in eval mode": lambda: Transformer().eval(),
    "item": Reads,
    "spectral norm in eval mode": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)
    ).eval(),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", UNMAPPED)
def test_what_vmap_cannot_follow_is_adapted_task_by_task_and_said_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(UNMAPPED[name]())
    xs, ys, xq = torch.randn(3, 6, 4, dtype=D), Y.repeat(3, 1), torch.randn(3, 9, 4, dtype=D)
    given: dict[str, Any] = {"pattern": "1" * len(layers_of(model)), "steps": 2, "lr": 0.1}
    want = [adapt(model, x, y, **given)(q) for x, y, q in zip(xs, ys, xq)]
    with caplog.at_level(logging.WARNING, "lambda_maml"):
        for _ in range(2):
            got = adapt_tasks(model, xs, ys, xq, **given)
            assert max(far(a, b) for a, b in zip(got, want)) < 1e-12
    said = [r.message for r in caplog.records if "one task at a time" in r.message]
    assert len(said) <= 1
    if said:
        assert "adapt_tasks goes task by task" in explain(model, xs[0], ys[0], **given)


class Checkpointed(nn.Module):
    """Recomputes a layer in the backward pass: with the weights of the forward pass, not with the model's own."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.a, self.b, self.checkpointed = nn.Linear(4, 8), nn.Linear(8, 3), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return torch.tanh(self.a(x))

        return self.b(checkpoint(body, x, use_reentrant=False) if self.checkpointed else body(x))


def test_activation_checkpointing_recomputes_with_the_adapted_weights() -> None:
    """torch.func.functional_call recomputes with the model's own weights; the network without checkpoints is right."""
    want = plain(seeded(Checkpointed(False)), lambda c: F.cross_entropy(c(X), Y), 3)(Q)
    model = seeded(Checkpointed(True))
    given: dict[str, Any] = {"steps": 3, "lr": 0.1}
    assert far(adapt(model, X, Y, pattern="11", **given)(Q), want) < 1e-12
    both = adapt_tasks(model, *map(doubled, (X, Y, Q)), pattern="11", **given)
    assert max(far(z, want) for z in both) < 1e-12


def test_an_error_of_the_users_own_is_theirs_for_many_tasks_too() -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        adapt_tasks(mlp(), *map(doubled, (X, Y, Q)), pattern="11", loss=loss)


def test_explaining_without_labels_says_nothing_of_labels(caplog: pytest.LogCaptureFixture) -> None:
    explain(mlp(3), X, pattern=None)
    assert not [told for told in caplog.messages if "one class" in told]
