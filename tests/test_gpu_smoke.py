"""The first look of `make gpu` at a device: every kernel once, and what is said of a wrong one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import module
from torch import Tensor

from lambda_kernels.backends.cuda import Cuda
from lambda_kernels.backends.cuda.library import LAUNCHERS, Library
from lambda_kernels.backends.triton import Triton

smoke = module("gpu_smoke")
CPU = torch.device("cpu")


def checked(backend: Any) -> list[dict[str, Any]]:
    cases = smoke.cases()
    return [smoke.check(backend, name, cases[name], CPU) for name in smoke.own(backend)]


def test_every_launcher_of_the_cuda_library_is_run(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    launch = Library.launch

    def noted(self: Library, name: str, *more: Any) -> None:
        launched.add(name)
        launch(self, name, *more)

    monkeypatch.setattr(Library, "launch", noted)
    rows = checked(Cuda(emulated_library, "cpu"))
    assert {row["status"] for row in rows} == {"right"}, rows
    assert launched == set(LAUNCHERS), "add a case to bench/gpu_smoke.py"


def test_every_triton_kernel_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = Triton()
    if why := triton.reasons():
        pytest.skip("; ".join(why))
    package = importlib.import_module("lambda_kernels.backends.triton")
    start: Any = importlib.import_module(f"{package.__name__}.launch").launch
    kernels: dict[str, str] = {}  # and their sources
    launched: set[str] = set()
    kind = type(importlib.import_module(f"{package.__name__}.loss").cross_entropy)

    def launch(kernel: Any, *more: Any, **options: Any) -> None:
        launched.add(kernel.__name__)
        start(kernel, *more, **options)

    # All are imported before one is changed: else a new one would keep what stands in for `launch` here.
    names_of_modules = [f"{package.__name__}.{one.name}" for one in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(name) for name in names_of_modules]
    for names in map(vars, modules):
        if names.get("launch") is start:
            monkeypatch.setitem(names, "launch", launch)
        own = {n: v for n, v in names.items() if type(v) is kind and v.fn.__module__ == names["__name__"]}
        kernels.update((name, inspect.getsource(value.fn)) for name, value in own.items())
    inner = {n for n in kernels if any(f" {n}(" in text.partition(":\n")[2] for text in kernels.values())}
    rows = checked(triton)
    assert {row["status"] for row in rows} == {"right"}, rows
    assert launched == kernels.keys() - inner, "add a case to bench/gpu_smoke.py"


def test_a_wrong_kernel_is_told_and_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cases = smoke.REFERENCE, smoke.cases()
    right = type(backend).linear
    for wrong, status, why in (
        (lambda *o: right(*o) * 1.1, "wrong", "0.1 of its length away from float64"),
        (lambda *o: right(*o) * float("nan"), "wrong", "nan of its length away from float64"),
        (lambda *o: right(*o).unknown, "failed", "AttributeError: 'Tensor' object has no attribute 'unknown'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(backend), "linear", wrong)
            patch.setattr(smoke, "truth", lambda name, case: [right(backend, *(t.double() for t in case.operands))])
            row = smoke.check(backend, "linear", cases["linear"], CPU)
        assert (row["status"], row["reason"]) == (status, why)
    assert smoke.check(backend, "linear", cases["linear"], CPU)["status"] == "right"


def test_operands_are_written_behind_the_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, whose streams and tensors are stood in for."""
    order: list[str] = []

    class Device(Tensor):
        """A tensor on it."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.copy_:
                order.append("copied over NaN" if bool(args[0].isnan().all()) else "copied")
            return super().__torch_function__(func, types, args, kwargs or {})

    @contextmanager
    def stream(side: Any) -> Any:
        order.append("side stream")
        yield
        order.append("back")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("stalled"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("waited"))
    monkeypatch.setattr(Tensor, "to", lambda self, device: self.as_subclass(Device))

    def run(x: Tensor) -> Tensor:
        order.append("ran on NaN" if bool(x.isnan().any()) else "ran")
        return x + 1

    (result,) = smoke.behind_a_stall(run, [torch.ones(2)], torch.device("cuda"))
    assert order == ["ran", "waited", "side stream", "stalled", "copied over NaN", "ran", "back", "waited"]
    assert result.tolist() == [2.0, 2.0]
