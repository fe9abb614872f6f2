"""A shadow computes what its module does with tensors of its own, and the module is left as it is."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import pytest
import torch
from cases import EXACT
from holders import NETWORKS, Around, Holder, made
from programs import program_of
from torch import Tensor, nn

import lambda_kernels as lk
from lambda_kernels.program import lookup, modes_of, shadow
from lambda_kernels.program.calls import WholeCall
from lambda_kernels.program.capture import capture
from lambda_maml import adapt

D = torch.float64


def others(model: nn.Module) -> dict[str, Tensor]:
    """Other tensors for all of a network's, equal for the names of one, none of them a leaf."""
    torch.manual_seed(1)
    found: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moves = tensor.is_floating_point() and not any(tensor is b for b in model.buffers())
        found[id(tensor)] = tensor + 0.1 * torch.randn_like(tensor) if moves else tensor.clone()
    both = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: found[id(tensor)] for name, tensor in both}


def looked_at(model: nn.Module) -> dict[str, Any]:
    """All that a forward could have written: identities of what modules hold, and values of tensors."""
    held: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            held[f"{path}.{name}"] = (id(value), value._version) if isinstance(value, Tensor) else id(value)
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                held[f"{path}:{name}"] = id(tensor), None if tensor is None else tensor.detach().clone().tolist()
    return held


@pytest.mark.parametrize("name", NETWORKS)
def test_a_shadow_computes_with_its_tensors_and_leaves_the_module_alone(name: str) -> None:
    model, twin = made(name), made(name)
    x, state = torch.randn(5, 4, dtype=D), others(model)
    with torch.no_grad():
        for own, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            tensor.copy_(state[own])
    before = looked_at(model)
    mine = shadow(model, state)
    assert type(mine) is type(model)
    torch.testing.assert_close(mine(x), twin(x), **EXACT)
    assert looked_at(model) == before
    for own, buffer in twin.named_buffers():  # what the forward updates is what was given
        torch.testing.assert_close(state[own], buffer, **EXACT)
    mine(x).sum().backward()
    assert any(p.grad is not None for p in model.parameters())  # the given tensors are no leaves


@pytest.mark.parametrize("name", ["plain", "tied", "closure", "spectral_norm by hooks"])
def test_without_tensors_parameters_are_shared_and_buffers_are_copies(name: str) -> None:
    model = made(name)
    before, x = looked_at(model), torch.randn(5, 4, dtype=D)
    mine = shadow(model)
    assert all(a is b for a, b in zip(mine.parameters(), model.parameters(), strict=True))
    mine(x)
    assert looked_at(model) == before
    assert [n for n, _ in mine.named_buffers()] == [n for n, _ in model.named_buffers()]
    model.train()(x)
    for (_, a), (_, b) in zip(mine.named_buffers(), model.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_second_name_may_be_left_out() -> None:
    model, x = made("tied"), torch.randn(5, 4, dtype=D)
    state = others(model)
    first = {name: state[name] for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert len(first) < len(state)
    mine: Any = shadow(model, first)
    assert mine.other.weight is mine.body[0].weight is state["other.weight"]
    assert mine.again is mine.body[4]
    last = {name: tensor for name, tensor in state.items() if name != "body.0.weight"}
    theirs: Any = shadow(model, last)  # any of the names does
    assert theirs.body[0].weight is state["body.0.weight"]
    torch.testing.assert_close(mine(x), shadow(model, state)(x), **EXACT)


def test_modes_are_set_by_path() -> None:
    model: Any = made("plain")
    mine: Any = shadow(model, modes={"body.1": False, "": False})
    assert (mine.training, mine.body.training, mine.body[1].training) == (False, True, False)
    assert all(module.training for module in model.modules())
    mine.eval()
    assert model.body.training
    assert modes_of(model) == {path: True for path, _ in model.named_modules()}
    assert shadow(model.eval(), modes=modes_of(made("plain"))).body[1].training  # type: ignore[union-attr, index]


def test_hooks_run_on_the_shadow_and_are_its_own() -> None:
    model: Any = made("plain")
    seen: list[nn.Module] = []
    model.body[0].register_forward_hook(lambda module, args, result: seen.append(module))
    mine: Any = shadow(model)
    mine(torch.randn(5, 4, dtype=D))
    assert seen == [mine.body[0]]
    mine.body[0].register_forward_hook(lambda *_: seen.clear())
    model(torch.randn(5, 4, dtype=D))
    assert seen[1:] == [model.body[0]]


def test_attributes_and_children_that_a_shadow_sets_are_its_own() -> None:
    model: Any = made("plain")
    before = looked_at(model)
    mine: Any = shadow(model)
    mine.features, mine.extra = torch.ones(1), nn.Linear(1, 1)
    mine.body[0].weight = nn.Parameter(torch.zeros(8, 4, dtype=D))
    mine.register_buffer("more", torch.ones(1))
    assert looked_at(model) == before and not hasattr(model, "features") and "extra" not in model._modules


def test_what_cannot_be_copied_is_shared_where_it_leads_to_no_module() -> None:
    model: Any = made("plain")
    model.lock, model.words, model.holder = threading.Lock(), {"a": 1}, Holder(threading.Condition())
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    mine: Any = shadow(model)
    assert mine.lock is model.lock and mine.words is model.words and mine.holder is model.holder
    model.holder.held = [model.body, model.lock]
    mine = shadow(model)
    assert mine.holder is not model.holder and mine.holder.words is model.holder.words
    assert mine.holder.held[0] is mine.body and mine.holder.held[1] is model.lock


def test_a_module_that_is_held_but_not_registered_is_a_copy_with_the_same_parameters() -> None:
    model: Any = made("plain")
    model.side = [nn.BatchNorm1d(4, dtype=D)]
    mine: Any = shadow(model)
    assert mine.side[0] is not model.side[0] and mine.side[0].weight is model.side[0].weight
    mine.side[0](torch.randn(5, 4, dtype=D))
    assert int(model.side[0].num_batches_tracked) == 0 and int(mine.side[0].num_batches_tracked) == 1


def test_what_cannot_have_a_shadow_is_said() -> None:
    model: Any = made("plain")
    model.holder = Holder(weakref.proxy(model))
    with pytest.raises(TypeError, match=r"Around\.holder leads to a module and cannot be copied: it is a weak proxy"):
        shadow(model)
    scripted = nn.Sequential(silently_scripted())
    with pytest.raises(TypeError, match=r"0 is a module of torch\.jit: its tensors cannot be replaced"):
        shadow(scripted)


def silently_scripted() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(2, 2))


class Opaque(nn.Module):
    """Not traceable: it asks for a value."""

    seen: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        self.features = self.inner(x)
        return self.features * (1 if x.sum() > -1e9 else -1)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_opaque_step_leaves_the_module_alone(name: str) -> None:
    model, x = Opaque(made(name)), torch.randn(6, 4, dtype=D)
    program = program_of(model, x)
    assert program.untraceable is not None and type(program.steps[0].call) is WholeCall
    before = looked_at(model)
    learner = adapt(model, x, torch.arange(3).repeat(2), pattern="MAML", steps=2, lr=0.1)
    assert learner(x).isfinite().all() and looked_at(model) == before


def test_what_the_forward_writes_is_kept_from_run_to_run_of_a_binding() -> None:
    model, x = Opaque(made("plain")), torch.randn(5, 4, dtype=D)
    program, state = program_of(model, x), others(model)
    modules, given = program.bind(model), state["seen"]
    for run in (1, 2, 3):
        result = program.evaluate(modules, state, x)
        held: Any = modules[""]
        assert held is not model and held.calls == run and torch.equal(held.features, result)
        assert float(state["seen"]) == run  # a buffer that the forward replaces is the state's from then on
    assert float(given) == 0 and model.calls == 0 and float(model.seen) == 0 and not hasattr(model, "features")


def test_another_thread_is_not_disturbed() -> None:
    model = lk.convert(Opaque(nn.Sequential(nn.Flatten(), nn.Linear(4, 3))).double())
    x, y = torch.randn(6, 4, dtype=D), torch.arange(3).repeat(2)
    want, wrong, stop = model.inner(x).detach(), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            if not torch.equal(model.inner(x), want):
                wrong.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(20):
            adapt(model, x, y, pattern="1", steps=3, lr=0.5)
    finally:
        stop.set()
        reader.join()
    assert not wrong


def test_a_checkpoint_computes_again_with_the_tensors_of_its_run() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checked(Around):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False) if x.sum() > -1e9 else x

    torch.manual_seed(0)
    model, plain = Checked().double().eval(), Around().double().eval()
    plain.load_state_dict(model.state_dict())
    x, state = torch.randn(5, 4, dtype=D), others(model)
    weights = [state[name] for name, _ in model.named_parameters()]
    program = program_of(model, x)
    assert program.untraceable is not None
    got = torch.autograd.grad(program.evaluate(program.bind(model), state, x).square().sum(), weights)
    want = torch.autograd.grad(torch.func.functional_call(plain, state, (x,)).square().sum(), weights)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("name", ["spectral_norm by hooks", "pruned"])
def test_a_model_can_be_copied_after_adapt_as_before(name: str) -> None:
    x = torch.randn(6, 4, dtype=D)
    model = made(name) if name == "pruned" else made(name).eval()
    if name == "pruned":  # its weight is a result of autograd's until a forward under no_grad
        with torch.no_grad():
            model(x)
    copy.deepcopy(model)
    adapt(model, x, torch.arange(3).repeat(2), pattern="111", steps=2, lr=0.1)
    copy.deepcopy(model)


class Counting(nn.Module):
    """It writes to itself, which no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.head = 0, nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.block(x).flatten(1))


def test_what_no_graph_holds_is_looked_at_once_for_all_shadows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looks = lk.convert(Counting().to(D)), []

    def counted(*args: Any) -> Any:
        looks.append(args)
        return capture(*args)

    monkeypatch.setattr(lookup, "capture", counted)
    xs, ys = torch.randn(3, 1, 4, 4, dtype=D), torch.arange(3)
    seen = []
    for steps in (1, 5):
        adapt(model, xs, ys, pattern="11", steps=steps)(xs)
        seen.append(len(looks))
    assert seen[0] == seen[1] > 0
