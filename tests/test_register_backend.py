"""A backend of one's own: registered without a change of the package, named, run, and found where its name is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import STEPS
from machine import needs_native
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels import backends, functional
from lambda_kernels.backends import Backend, Call, Native, Reference
from lambda_kernels.spec import BlockSpec, ConvSpec
from lambda_maml import adapt, adapt_tasks, models


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    monkeypatch.setattr(backends, "_chosen", {})
    yield


class Counting(Reference):
    name = "counting"

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def norm_relu_pool(
        self, z: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.calls["norm_relu_pool"] += 1
        return super().norm_relu_pool(z, gamma, beta, block)


class Convolving(Native):
    """Overrides one part of what the native backend computes as one."""

    name = "convolving"

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        self.calls["conv2d"] += 1
        return super().conv2d(x, weight, bias, spec)


@pytest.mark.parametrize("kind", [Counting, pytest.param(Convolving, marks=needs_native)])
@pytest.mark.parametrize("pattern", ["1111", "0001", "0110"])
def test_a_backend_that_overrides_one_operation_runs_everywhere(kind: Any, pattern: str) -> None:
    backend = kind()
    backend.name = f"{kind.name}-{pattern}"  # what is known of a name is kept for the process
    lk.register_backend(backend)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(lk.ConvBlock(c, 8) for c in (2, 8, 8)), torch.nn.Flatten(), torch.nn.Linear(8 * 2 * 2, 3)
    ).double()
    xs, ys = torch.randn(2, 6, 2, 16, 16, dtype=torch.float64), (torch.arange(6) % 3).expand(2, 6)
    given: dict[str, Any] = dict(pattern=pattern, steps=3, lr=0.1)
    with lk.use_backend("reference"):
        want = adapt(model, xs[0], ys[0], **given)(xs[1])
        together = adapt_tasks(model, xs, ys, xs, **given)
    with lk.use_backend(backend.name):
        (operation,) = {"norm_relu_pool", "conv2d"} & vars(kind).keys()
        first = pattern.index("1")
        for _ in range(2):  # the second one may be remembered
            backend.calls.clear()
            got = adapt(model, xs[0], ys[0], **given)
            assert backend.calls[operation] == min(first, 3) + 3 * (3 - min(first, 3))
        torch.testing.assert_close(got(xs[1]), want, **STEPS)
        with torch.no_grad():
            torch.testing.assert_close(adapt_tasks(model, xs, ys, xs, **given), together, **STEPS)
        assert backends.current() == backend.name


def test_auto_does_not_take_it() -> None:
    backend = Counting()
    lk.register_backend(backend)
    functional.conv_block(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, None, None)
    assert not backend.calls and "counting" in backends.names()
    with lk.use_backend("counting"):
        functional.conv_block(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), None, None, None)
    assert backend.calls["norm_relu_pool"] == 1


def test_names_that_are_wrong() -> None:
    class Nameless(Backend):
        pass

    class Inherits(Native):
        pass

    class Auto(Reference):
        name = "auto"

    wrong: list[tuple[Any, type[Exception], str]] = [
        (Nameless(), ValueError, "Nameless has no name: give the class one, such as name = 'nameless'"),
        (Inherits(), ValueError, "a backend 'native' already, which Inherits has from its parent class: give Inherits"),
        (Auto(), ValueError, "there is a backend 'auto' already: give Auto a name of its own"),
        (Counting, TypeError, "got the class Counting: call it"),
        ("counting", TypeError, "got str"),
    ]
    for given, kind, words in wrong:
        with pytest.raises(kind, match=words):
            lk.register_backend(given)
    lk.register_backend(Counting())
    with pytest.raises(ValueError, match="there is a backend 'counting' already: give Counting a name of its own"):
        lk.register_backend(Counting())


class Fussy(Reference):
    name = "fussy"

    def reasons(self) -> list[str]:
        return ["it has no licence"]


def test_a_backend_that_cannot_run_says_why() -> None:
    lk.register_backend(Fussy())
    with pytest.raises(lk.BackendError, match="'fussy' cannot run here: it has no licence"), lk.use_backend("fussy"):
        pass


def test_a_call_that_no_backend_takes_is_listed_with_every_reason() -> None:
    shapes = torch.Size((2, 3, 8, 8)), torch.Size((4, 3, 3, 3))
    call = Call("conv_block", torch.device("cpu"), torch.float32, shapes, None, 3, norm="group", slope=0.1)
    with pytest.raises(lk.BackendError) as error:
        backends.choose_for(call)
    assert str(error.value).splitlines() == [
        "no backend runs conv_block on cpu in torch.float32 (x [2, 3, 8, 8], weight [4, 3, 3, 3], pool=3, "
        "norm='group', slope=0.1):",
        "  native: it has no group norm; it has no ReLU with a slope of 0.1 below zero; it pools by 1 or 2, not 3",
        "  reference: it has no group norm; it has no ReLU with a slope of 0.1 below zero",
    ]


def test_what_overrides_a_part_is_composed_of_it() -> None:
    second: Any = Convolving.__mro__[2]
    assert Convolving.inner_loop is second.inner_loop is Reference.inner_loop
    assert Convolving.block is Reference.block and Convolving.prepared is Reference.prepared
    assert Convolving.image_refusals is Reference.image_refusals
    assert Native.inner_loop is not Reference.inner_loop and Native.block is not Reference.block

    class Whole(Convolving):
        name = "whole"

        def inner_loop(self, *args: Any) -> Any:
            return super().inner_loop(*args)

    assert Whole.inner_loop is not Reference.inner_loop and Whole.prepared is Reference.prepared


def test_the_readmes_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(backends.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    code = code.replace("...  # every call", "adapt(model, xs, ys, pattern='11111', steps=1, lr=0.1)  # every call")
    assert "adapt(" in code
    names = dict(adapt=adapt, model=models.conv4(3, 1, 4, 16), xs=torch.randn(6, 1, 16, 16), ys=torch.arange(6) % 3)
    exec(code, names)
    assert "norm, ReLU and pool of [1, 6, 4, 16, 16]" in capsys.readouterr().out
