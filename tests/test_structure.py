"""Results of any structure: taken apart and put together again, and what a traced forward returns keeps its class."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import EXACT
from programs import program_of
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.program import flatten
from lambda_kernels.program.structure import opened
from lambda_maml import LambdaMAML, adapt


class Output(OrderedDict):
    """As the outputs of transformers: keys are attributes too, and code of the class runs in its making."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__.update(values)
        self.made = "by hand"

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if "made" in self.__dict__:
            raise TypeError("an output is not changed")
        super().__setitem__(key, value)


class Words(list):
    pass


class Named(NamedTuple):
    logits: Any
    hidden: Any


Plain = namedtuple("Plain", "logits hidden")


class Marked(Plain):
    """A named tuple with an attribute of its own."""


@dataclasses.dataclass
class Data:
    logits: Any
    hidden: Any
    size: int = 3

    def __post_init__(self) -> None:
        self.doubled = self.size * 2


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    logits: Any
    hidden: Any


def marked(logits: Any, hidden: Any) -> Marked:
    made = Marked(logits, hidden)
    made.extra = hidden  # type: ignore[attr-defined]
    return made


def moved(logits: Any, hidden: Any) -> Any:
    made = OrderedDict(logits=logits, hidden=hidden)
    made.move_to_end("logits")
    return made


# name -> how a forward makes its result, and how its logits are found in it
KINDS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda z, h: (z, h), lambda r: r[0]),
    "list": (lambda z, h: [z, h], lambda r: r[0]),
    "dict": (lambda z, h: {"logits": z, "hidden": h}, lambda r: r["logits"]),
    "nested": (lambda z, h: {"out": [Named(z, (h, None))], "n": 3}, lambda r: r["out"][0].logits),
    "named tuple": (lambda z, h: Named(z, h), lambda r: r.logits),
    "named tuple with an attribute": (marked, lambda r: r.logits + 0 * r.extra.sum()),
    "ordered dict": (moved, lambda r: r["logits"]),
    "default dict": (lambda z, h: defaultdict(int, logits=z), lambda r: r["logits"] + r["other"]),
    "output": (lambda z, h: Output(logits=z, hidden=h), lambda r: r.logits + 0 * r[0] + 0 * r["logits"]),
    "list of a class": (lambda z, h: Words([z, h]), lambda r: r[0]),
    "data class": (lambda z, h: Data(z, h, 4), lambda r: r.logits * (r.doubled == 8)),
    "frozen data class": (lambda z, h: Frozen(z, h), lambda r: r.logits),
    "structure in a structure": (lambda z, h: Data(Output(logits=z), Words([h])), lambda r: r.logits.logits),
}
KIND = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False)
        self.relu, self.head, self.kind = nn.ReLU(), nn.Linear(108, 3), kind

    def forward(self, x: Tensor) -> Any:
        h = self.relu(self.norm(self.conv(x)))
        return KINDS[self.kind][0](self.head(h.flatten(1)), h)


def network(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(kind).double()


def task() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.arange(3).repeat(2)


def same(got: Any, want: Any) -> None:
    """Of the same classes and attributes all the way down, with close tensors."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, **EXACT)
    elif (found := opened(want)) is not None:
        again = opened(got)
        assert again is not None and repr(again[0]) == repr(found[0])
        for mine, theirs in zip(again[1], found[1], strict=True):
            same(mine, theirs)
    else:
        assert got == want


@KIND
def test_a_traced_forward_keeps_its_result(kind: str) -> None:
    stock, ours = network(kind), lk.convert(network(kind))
    x, _ = task()
    program = program_of(ours, x)
    assert program.untraceable is None and len(program.fusions) == 1
    same(ours(x), stock(x))
    state = {name: p * 0.5 for name, p in stock.named_parameters()}
    same(program.evaluate(program.bind(ours), state, x), torch.func.functional_call(stock, state, (x,)))


@KIND
def test_an_adaptation_keeps_the_result(kind: str) -> None:
    x, y = task()
    get, model = KINDS[kind][1], network(kind)

    def loss(result: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(get(result), y)

    learner = adapt(model, x, y, pattern="01", steps=2, lr=0.1, loss=loss)
    want = torch.func.functional_call(model, learner.parameters_dict(), (x,))
    same(learner(x), want)
    task_learner = LambdaMAML(model, 0.1, pattern="01").clone()
    for _ in range(2):
        task_learner.adapt(loss(task_learner(x), y))
    same(task_learner(x), want)


@KIND
def test_flatten_gives_the_tensors_and_puts_others_in_their_places(kind: str) -> None:
    result = network(kind)(task()[0])
    tensors, rebuild = flatten(result)
    assert tensors and all(isinstance(t, Tensor) for t in tensors)
    same(rebuild(tensors), result)
    doubled, _ = flatten(rebuild([t * 2 for t in tensors]))
    assert all(torch.equal(mine, t * 2) for mine, t in zip(doubled, tensors, strict=True))
    same(rebuild(tensors), result)  # the result itself is as it was


def test_a_tensor_is_a_result_of_one() -> None:
    tensors, rebuild = flatten(torch.ones(2))
    assert len(tensors) == 1 and rebuild(["x"]) == "x"


def test_what_holds_no_tensor_stays_the_same_object() -> None:
    settings = {"names": ["a", "b"], "n": 3}
    tensors, rebuild = flatten((torch.ones(1), settings, None))
    assert len(tensors) == 1 and rebuild([torch.zeros(1)])[1] is settings
    with pytest.raises(ValueError, match="1 tensors cannot be made of 2 values"):
        rebuild([1, 2])


def test_a_result_of_torchs_own_kind() -> None:
    result = torch.max(torch.randn(3, 4), 1)
    tensors, rebuild = flatten(result)
    again = rebuild([t.clone() for t in tensors])
    assert type(again) is type(result) and torch.equal(again.values, result.values)


def test_a_structure_goes_to_a_module_that_is_not_traced_as_it_is() -> None:
    class Reads(nn.Module):
        def forward(self, given: Any) -> Tensor:
            assert type(given) is Data and given.doubled == 6
            return given.logits * 2

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = Reads()
            self.reads.register_forward_hook(lambda *_: None)  # so that the trace goes around it

        def forward(self, x: Tensor) -> Tensor:
            return self.reads(Data(x + 1, x)) + 1

    model, x = Whole(), torch.ones(2)
    program = program_of(model, x)
    assert program.untraceable is None
    assert torch.equal(program(model, x), torch.full((2,), 5.0))


@KIND
def test_tensors_of_a_converted_models_result_can_be_viewed_as_before(kind: str) -> None:
    x, _ = task()
    for model in (network(kind), lk.convert(network(kind))):
        tensors, _ = flatten(model(x.contiguous()))
        assert [t.view(6, -1).shape[0] for t in tensors] == [6] * len(tensors)
