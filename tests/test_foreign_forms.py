"""Models of other tools, other devices and other forms: they work, or are refused with reason and remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import far, plain
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_maml import LambdaMAML, adapt, adapt_tasks, explain, models, rules, select_pattern

D = torch.float64
XS, YS, XQ = torch.randn(6, 2, 6, 6, dtype=D), torch.arange(3).repeat(2), torch.randn(4, 2, 6, 6, dtype=D)


def body(track: bool = False) -> Any:
    torch.manual_seed(0)
    block = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=track), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(36, 3)).double()


def lost_statistics() -> nn.Module:
    model = body(track=True)
    model[1].running_mean = model[1].running_var = None
    return model


def run(model: Any, xs: Tensor = XS, ys: Tensor = YS) -> Tensor:
    return adapt(model, xs, ys, pattern="11", steps=2, lr=0.1)(XQ)


def verbs(model: Any) -> Tensor:
    task = LambdaMAML(model, 0.1, True).clone()
    for _ in range(2):
        task.adapt(F.cross_entropy(task(XS), YS))
    return task(XQ)


WORKS: dict[str, Callable[[], nn.Module]] = {
    "statistics that are None": lost_statistics,
    "the same, converted": lambda: lk.convert(lost_statistics()),
    "DataParallel": lambda: nn.DataParallel(body()),
}


@pytest.mark.parametrize("name", WORKS)
def test_these_models_adapt_as_in_the_plain_loop(name: str) -> None:
    want = plain(body(), lambda c: F.cross_entropy(c(XS), YS), 2, order=1)(XQ)
    for way in (run, verbs):
        assert far(way(WORKS[name]()), want) < 1e-12


ANYTHING: dict[str, Any] = {"a class": nn.Linear, "a function": F.relu, "None": None, "a dict": body().state_dict()}
WAYS: dict[str, Callable[[Any], Any]] = {
    "adapt": lambda m: adapt(m, XS, YS, pattern="11"),
    "adapt_tasks": lambda m: adapt_tasks(m, XS[None], YS[None], XQ[None], pattern="11"),
    "explain": lambda m: explain(m, XS, pattern="11"),
    "LambdaMAML": lambda m: LambdaMAML(m, 0.1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_adapted_is_refused_with_the_way_out(way: str) -> None:
    for thing in ANYTHING.values():
        with pytest.raises(TypeError, match="the model must be a torch.nn.Module, got"):
            WAYS[way](thing)
    for made in (torch.jit.script(body()), torch.jit.trace(body(), (XS,))):
        with pytest.raises(TypeError, match="a module of torch.jit.*adapt the module that it was made of"):
            WAYS[way](made)


def test_a_network_without_values_is_refused() -> None:
    model = body().to("meta")
    for call in (lambda: run(model, XS.to("meta"), YS.to("meta")), lambda: run(model), LambdaMAML(model, 0.1).clone):
        with pytest.raises(ValueError, match="0.weight is on the meta device, which holds shapes and no values"):
            call()
    with pytest.raises(ValueError, match="xs on meta, ys on cpu, the network on cpu: move them together"):
        run(body(), XS.to("meta"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_without_a_graph_says_how_it_gets_one(mode: Any) -> None:
    words = {torch.no_grad: r"take the loss under torch.enable_grad\(\)",
             torch.inference_mode: r"take the loss under torch.inference_mode\(False\)"}  # fmt: skip
    model = body()
    with mode():
        task = LambdaMAML(model, 0.1, True).clone()
        with pytest.raises(ValueError, match=words[mode]):
            task.adapt(F.cross_entropy(task(XS), YS))
    for _ in range(2):  # a clone that was made there adapts outside
        task.adapt(F.cross_entropy(task(XS), YS))
    assert far(task(XQ), verbs(model)) < 1e-12


@pytest.mark.parametrize("track", [False, True, None])
def test_a_query_of_no_images_gives_what_torch_gives(track: bool | None) -> None:
    for made in (lambda m: m, lk.convert):
        model = made(body(bool(track)) if track is not None else lost_statistics())
        stock = lk.to_torch(model)(XQ[:0])
        learner, task = adapt(model, XS, YS, pattern="11", steps=1), LambdaMAML(model, 0.1).clone()
        for logits in (learner(XQ[:0]), task(XQ[:0]), model(XQ[:0])):
            assert logits.shape == stock.shape == (0, 3) and logits.requires_grad
        stacked = adapt_tasks(model, XS[None], YS[None], XQ[None, :0], pattern="11", steps=1)
        assert stacked.shape == (1, 0, 3)
        assert learner(XQ).shape == (4, 3)


def wrong(**given: Any) -> None:
    adapt(body(), given.pop("xs", XS), given.pop("ys", YS), pattern="11", **given)


def maml(*places: Any, **given: Any) -> Any:
    return LambdaMAML(body(), 0.1, *places, **given)


def selected(tasks: Any) -> None:
    select_pattern(body(), tasks, steps=1)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no loss": (lambda: wrong(loss=None), TypeError, "loss must be a function.* got None"),
    "a loss's class": (
        lambda: wrong(loss=nn.CrossEntropyLoss),
        TypeError,
        r"got the class CrossEntropyLoss: make one, CrossEntropyLoss\(\)",
    ),
    "a rule's class": (lambda: wrong(rule=rules.sgd), TypeError, "got the class sgd"),
    "labels in a list": (lambda: wrong(ys=YS.tolist()), TypeError, r"torch.as_tensor\(ys\)"),
    "labels of NumPy": (lambda: wrong(ys=YS.numpy()), TypeError, r"torch.as_tensor\(ys\)"),
    "images of NumPy": (lambda: wrong(xs=XS.numpy()), TypeError, r"torch.as_tensor\(xs\)"),
    "sparse images": (lambda: wrong(xs=XS.to_sparse()), TypeError, r"with .to_dense\(\)"),
    "a complex loss": (
        lambda: wrong(loss=lambda z, _: z.sum() * 1j),
        ValueError,
        "the loss must be a real number, got torch.complex128",
    ),
    "a complex loss of a clone": (lambda: stepped(lambda c: c.adapt(c(XS).sum() * 1j)), ValueError, "a real number"),
    "gradients in a list": (lambda: stepped(lambda c: c.update([XS])), TypeError, "a mapping from parameter names"),
    "gradients that are None": (lambda: stepped(lambda c: c.update({"5.bias": None})), TypeError, "names to tensors"),
    "a gradient's shape": (
        lambda: stepped(lambda c: c.update({"5.bias": torch.zeros(1, dtype=D)})),
        ValueError,
        r"5.bias \[3\], got \[1\]",
    ),
    "labels of other images to select by": (
        lambda: selected([(XS, YS, XQ, YS)]),
        ValueError,
        "task 0: 4 images in xq, 6 labels in yq; the order is xs, ys, xq, yq",
    ),
    "stacked tasks to select by": (
        lambda: selected(XS),
        TypeError,
        r"task 0 is a Tensor, expected Task\(xs, ys, xq, yq\)",
    ),
    "a positional too many": (lambda: maml(True, True, True, True), TypeError, "got 4 more"),
    "an order given twice": (lambda: maml(True, first_order=False), TypeError, "first_order twice"),
    "a pattern given twice": (lambda: maml("11", pattern="01"), TypeError, "pattern twice"),
    "a number for an order": (lambda: maml(1), ValueError, "must be True or False, got 1"),
    "a clone's order": (lambda: maml().clone("01"), ValueError, "first_order must be True"),
}  # fmt: skip


def stepped(step: Callable[[Any], Any]) -> None:
    step(LambdaMAML(body(), 0.1).clone())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_with_the_way_out(name: str) -> None:
    call, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        call()


# torch.jit and torch.fx, which know only torch's own operators.

MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: lk.convert(body()),
    "not fused": lambda: lk.convert(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 3)).double()),
    "conv4": lambda: models.conv4(3, 2, 4, 16).double(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_torch_jit_takes_a_converted_model_and_any_batch(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    size = 16 if name == "conv4" else 6
    few, many = (torch.randn(n, 2, size, size, dtype=D) for n in (3, 7))
    before = copy.deepcopy(model.state_dict())
    for tool in (lambda m: torch.jit.trace(m, (few,)), torch.jit.script):
        made = tool(model)
        for x in (few, many):
            assert far(made(x), model(x)) < 1e-12
        assert not any("^" in str(node) for node in made.inlined_graph.nodes())  # torch's operators alone
    assert list(model.state_dict()) == list(before)


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_traces_a_learner() -> None:
    learner = adapt(lk.convert(body()), XS, YS, pattern="01", steps=2, lr=0.1)
    made = torch.jit.trace(learner, (XQ,))
    assert far(made(XS), learner(XS)) < 1e-12


def test_torch_fx_traces_converted_models() -> None:
    for model in (MODELS["not fused"](), lk.convert(body())):
        assert far(torch.fx.symbolic_trace(model)(XQ), model(XQ)) < 1e-12


# Networks whose frozen part hands over more than tensors.


class Sizes(nn.Module):
    """A forward that asks for sizes, and carries them, None and containers past its frozen layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.b, self.fc = kind, nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(108, 3)

    def forward(self, x: Tensor) -> Tensor:
        sizes: Any = x.size(0) if self.kind == "int" else x.shape
        if self.kind == "nested":
            sizes = {"rows": (x.shape[0], None), "rest": [x.shape[1:], {"half": x.size(0) / 2}]}
        h = torch.relu(self.b(torch.relu(self.a(x))))
        if self.kind == "int":
            return self.fc(h.reshape(sizes, -1))
        if self.kind == "unpacked":
            n, _, height, width = sizes
            return self.fc(h.reshape(n, 3 * height * width))
        return self.fc(h.reshape(sizes["rows"][0] if self.kind == "nested" else sizes[0], -1))


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", ["int", "shape", "unpacked", "nested"])
def test_sizes_that_a_frozen_part_hands_over(kind: str, converted: bool) -> None:
    made = lk.convert if converted else lambda m: m
    names = ["b.weight", "b.bias", "fc.weight", "fc.bias"]
    for second_order in (False, True):
        model = made(Sizes(kind).double())
        want = plain(Sizes(kind).double(), lambda c: F.cross_entropy(c(XS), YS), 2, names=names)(XQ)
        given: dict[str, Any] = {"pattern": "011", "steps": 2, "lr": 0.1, "second_order": second_order}
        assert far(adapt(model, XS, YS, **given)(XQ), want) < 1e-12
        both = adapt_tasks(model, [XS, XS[:3], XS], [YS, YS[:3], YS], [XQ] * 3, **given)
        assert far(both[0], want) < 1e-12 and far(both[2], want) < 1e-12
        task = LambdaMAML(model, 0.1, "011", first_order=not second_order).clone()
        for _ in range(2):
            task.adapt(F.cross_entropy(task(XS), YS))
        assert far(task(XQ), want) < 1e-12
