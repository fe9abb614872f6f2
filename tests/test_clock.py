"""How backends and tiles are timed: as a recorded loop runs them, on their own device, once, and not at all where the
same result is wanted everywhere. The devices are those of fake_cuda.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fake_cuda import Cuda, kernels
from test_autotune import SPEC, Fast, operands, tuned
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lambda_kernels import _say, cuda_graph
from lambda_kernels._capture import rehearse
from lambda_kernels.backends.autotune import Autotune, Table
from lambda_kernels.backends.clock import cuda_clock
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec

SECOND = torch.device("cuda:1")
# ms of a kernel, and of Python to launch it: eagerly "aten" is ahead, in a recorded loop "triton".
SHORT = {"triton": (0.002, 0.05), "aten": (0.010, 0.008)}
BLOCK = BlockSpec(SPEC, 1e-5, 2)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_say, "_said", set())


def test_the_time_is_that_of_a_recorded_loop(cuda: Cuda) -> None:
    times = cuda_clock(kernels(cuda, **SHORT))
    assert times["triton"] < times["aten"]
    assert times["triton"] == pytest.approx(0.002, abs=0.001) and times["aten"] == pytest.approx(0.010, abs=0.001)
    assert len({id(g.pool) for g in cuda.captures}) == 1 and [len(g.work) for g in cuda.captures] == [10, 10]


def test_long_calls_are_not_repeated_in_a_graph(cuda: Cuda) -> None:
    times = cuda_clock(kernels(cuda, one=(30.0, 0.1), two=(20.0, 0.1)))
    assert times == pytest.approx({"one": 30.0, "two": 20.0}, abs=0.1)
    assert [len(g.work) for g in cuda.captures] == [1, 1]
    assert cuda.host < 500.0


def test_where_one_cannot_be_recorded_all_are_timed_by_launches(cuda: Cuda) -> None:
    runs = kernels(cuda, **SHORT)

    def waits() -> None:
        cuda.launch(0.5, 0.01)
        torch.ones(1).item()

    times = cuda_clock({**runs, "waits": waits})
    assert times["aten"] < times["triton"] < times["waits"]
    assert cuda.streams == cuda.usual


def test_too_little_memory_is_told(cuda: Cuda) -> None:
    def run() -> None:
        if cuda.graph is not None:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        cuda_clock({"one": run})
    assert cuda.streams == cuda.usual and cuda.graph is None


def test_the_stream_waits_for_what_came_before_and_is_waited_for(cuda: Cuda) -> None:
    cuda.usual[0].idle_at = 70.0
    begun: list[float] = []

    def run() -> None:
        begun.append(torch.cuda.current_stream().idle_at)  # type: ignore[attr-defined]
        cuda.launch(1.0)

    cuda_clock({"one": run})
    assert min(begun) >= 70.0 and cuda.usual[0].idle_at > 80.0


# By whom a call is measured, and where.


def test_a_tensors_own_device_is_measured(cuda: Cuda) -> None:
    table = Table(None)
    backend = Autotune([Fast(), Reference()], lambda device: table)
    runs = kernels(cuda, **SHORT)
    assert backend._fastest("call", SECOND, runs, {}) == "triton"
    assert {g.stream.device for g in cuda.captures} == {1} and cuda.device == 0
    (choice,) = table.choices.values()
    assert choice.milliseconds["triton"] == pytest.approx(0.002, abs=0.001)


def test_two_devices_are_measured_apart(cuda: Cuda) -> None:
    tables = {torch.device("cuda:0"): Table(None), SECOND: Table(None)}
    backend = Autotune([Fast(), Reference()], tables.__getitem__)
    for device in tables:
        backend._fastest("call", device, kernels(cuda, **SHORT), {})
    assert [g.stream.device for g in cuda.captures] == [0, 0, 1, 1]
    assert all(len(table.choices) == 1 for table in tables.values())


def test_nothing_is_measured_while_a_graph_is_made(cuda: Cuda) -> None:
    table = Table(None)
    backend = Autotune([Fast(), Reference()], lambda device: table)
    runs = kernels(cuda, **SHORT)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        if len(cuda.captures) or table.choices:
            backend._fastest("another", SECOND, runs, {})
        return (x,)

    assert rehearse(lambda: backend._fastest("call", SECOND, runs, {})) == "triton"
    table.choices["a"] = None  # type: ignore[assignment]
    memory = cuda_graph.Memory(SECOND)
    with torch.cuda.device(1):
        memory.capture(lambda: call(torch.ones(1)))
    assert list(table.choices) == ["a"]


def test_the_first_slow_call_says_what_it_does_once(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    backend = Autotune([Fast(), Reference()], lambda device: Table(None))
    with caplog.at_level(logging.WARNING):
        for key in "ab":
            backend._fastest(key, SECOND, kernels(cuda, **SHORT), {})
    assert [r.message.partition(",")[0] for r in caplog.records] == ["cuda:1: the first calls of each shape are slow"]


# What is known is looked up before anything is done.


class Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_known_update_copies_nothing() -> None:
    backend, _, _ = tuned(Fast(), "fast", "reference")
    parameters, gradients = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)]
    backend.sgd_(parameters, gradients, [0.5])
    with Operators() as plain:
        Reference().sgd_(parameters, gradients, [0.5])
    with Operators() as ours:
        backend.sgd_(parameters, gradients, [0.5])
    assert ours.names == plain.names and "clone" not in ours.names


@pytest.mark.parametrize("order", [("fast", "over z"), ("over z", "fast")])
def test_a_known_first_block_computes_nothing(order: tuple[str, str]) -> None:
    backend, clock, _ = tuned(Fast(), *order)
    x, weight, _, _ = operands()
    first = backend.image_refusals(x, weight, BLOCK)
    asked = clock.asked
    with Operators() as seen:
        assert backend.image_refusals(x, weight, BLOCK) == first
    assert seen.names == [] and clock.asked == asked


class NoMoments(Fast):
    """Its kernel for the moments of the first block does not compile."""

    def image_moments(self, x: Tensor, kernel: tuple[int, int], spec: Any) -> Tensor:
        raise RuntimeError("ptxas fatal")


def test_a_first_block_whose_kernels_fail_is_left_out() -> None:
    backend, _, table = tuned(NoMoments(), "fast", "over z")
    (why,) = backend.image_refusals(*operands()[:2], BLOCK)
    assert "ptxas fatal" in why
    assert [c.chosen for key, c in table.choices.items() if key.startswith("first block")] == ["over z"]


# Switches.


def test_switches_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, clock, table = tuned(Fast(), "fast", "reference")
    usual = torch.backends.cudnn.benchmark
    for benchmark in (usual, not usual, usual, not usual):
        with torch.backends.cudnn.flags(benchmark=benchmark, allow_tf32=True):
            backend.conv2d(*operands())
            backend.image_refusals(*operands()[:2], BLOCK)
            backend.sgd_([torch.ones(2)], [torch.ones(2)], [0.1])
    assert torch.backends.cudnn.benchmark == usual
    plain = [key for key in table.choices if "cudnn.benchmark" not in key]
    assert len(plain) >= 3 and sorted(table.choices) == sorted([*plain, *(f"{k} cudnn.benchmark=True" for k in plain)])
    assert clock.asked == len(table.choices)


def test_deterministic_algorithms_take_the_first_backend(poisoned_memory: None) -> None:
    fast = Fast()
    backend, clock, table = tuned(fast, "reference", "fast")
    torch.use_deterministic_algorithms(False)
    backend.conv2d(*operands())
    assert [c.chosen for c in table.choices.values()] == ["reference"]
    torch.use_deterministic_algorithms(True)
    fast.calls.clear()
    measured = clock.asked
    for size in (6, 7):  # whatever was measured
        backend.conv2d(*operands(size))
    parameters = [torch.ones(2)]
    backend.sgd_(parameters, [torch.ones(2)], [0.5])
    assert backend.image_refusals(*operands()[:2], BLOCK) == []
    assert fast.calls == ["conv2d", "conv2d", "sgd_"] and clock.asked == measured and len(table.choices) == 1


# Tiles.


@pytest.fixture
def launch(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    pytest.importorskip("triton")
    from lambda_kernels.backends.triton import launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    return launch


class Kernel:
    __name__, cache_key = "kernel", "source"


class Where:
    """What a tuner asks of a tensor."""

    device = SECOND


def compile_errors() -> Mapping[str, Exception]:
    errors = pytest.importorskip("triton.runtime.errors")
    compiler = pytest.importorskip("triton.compiler.errors")
    return {
        "shared memory": errors.OutOfResources(300000, 232448, "shared memory"),
        "ptxas": errors.PTXASError("Internal Triton PTX codegen error"),
        "assertion": compiler.CompileTimeAssertionFailure(None, None, None),
        "compiler": RuntimeError("PassManager::run failed"),
    }


def tiles_of(launch: Any) -> list[Any]:
    return [launch.Tile(rows, 16, 16, 4, 2) for rows in (16, 32, 64)]


def runs(cuda: Cuda, times: Mapping[int, float | Exception], seen: list[Any] | None = None) -> Any:
    def run(tile: Any) -> None:
        if seen is not None:
            seen.append((tile.rows, cuda.device))
        time = times[tile.rows]
        if isinstance(time, Exception):
            raise time
        cuda.launch(time, 0.05, 1)

    return run


def test_tiles_are_timed_as_in_a_recorded_loop_on_their_device(launch: Any, cuda: Cuda) -> None:
    seen: list[Any] = []
    tiles = tiles_of(launch)
    tuner = launch.Tuner(Kernel)
    assert tuner.tile((1,), tiles, Where, runs(cuda, {16: 0.004, 32: 0.002, 64: 0.003}, seen)) == tiles[1]
    assert {device for _, device in seen} == {1} and {g.stream.device for g in cuda.captures} == {1}
    count = len(seen)
    assert launch.Tuner(Kernel).tile((1,), tiles, Where, runs(cuda, {}, seen)) == tiles[1] and len(seen) == count


@pytest.mark.parametrize("name", ["shared memory", "ptxas", "assertion", "compiler"])
@pytest.mark.parametrize("measure", [True, False])
def test_a_tile_that_does_not_compile_is_left_out(
    launch: Any, cuda: Cuda, name: str, measure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDA_KERNELS_MEASURE", "1" if measure else "0")
    tiles = tiles_of(launch)
    run = runs(cuda, {16: compile_errors()[name], 32: 0.003, 64: 0.002})
    assert launch.Tuner(Kernel).tile((1,), tiles, Where, run) == tiles[2 if measure else 1]


@pytest.mark.parametrize("measure", ["1", "0"])
def test_where_no_tile_compiles_the_first_error_is_told(
    launch: Any, cuda: Cuda, measure: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("LAMBDA_KERNELS_MEASURE", measure)
    run = runs(cuda, {16: ValueError("one"), 32: ValueError("two"), 64: ValueError("three")})
    tuner = launch.Tuner(Kernel)
    with pytest.raises(ValueError, match="one"):
        tuner.tile((1,), tiles_of(launch), Where, run)
    assert tuner.chosen == {} and not list(tmp_path.rglob("*.json"))


def test_tiles_for_which_memory_does_not_suffice_are_timed_later(launch: Any, cuda: Cuda) -> None:
    tiles, tuner = tiles_of(launch), launch.Tuner(Kernel)
    full = runs(cuda, {16: 0.003, 32: torch.OutOfMemoryError("full"), 64: 0.002})
    assert tuner.tile((1,), tiles, Where, full) == tiles[0]
    assert tuner.tile((1,), tiles, Where, runs(cuda, {16: 0.003, 32: 0.001, 64: 0.002})) == tiles[1]


@pytest.mark.parametrize("how", ["deterministic", "environment"])
def test_the_first_tile_is_taken_where_none_is_to_be_timed(
    launch: Any, cuda: Cuda, how: str, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    seen: list[Any] = []
    tiles, tuner = tiles_of(launch), launch.Tuner(Kernel)
    run = runs(cuda, {16: 0.003, 32: 0.001, 64: 0.002}, seen)
    torch.use_deterministic_algorithms(False)
    assert tuner.tile((1,), tiles, Where, run) == tiles[1]  # measured, and on disk
    torch.use_deterministic_algorithms(how == "deterministic")
    monkeypatch.setenv("LAMBDA_KERNELS_MEASURE", "0" if how == "environment" else "1")
    seen.clear()
    for _ in range(2):
        assert tuner.tile((1,), tiles, Where, run) == tiles[0]
    assert seen == [(16, 1)]


def test_no_tile_is_tried_while_a_graph_is_made(launch: Any, cuda: Cuda) -> None:
    seen: list[Any] = []
    tiles, tuner = tiles_of(launch), launch.Tuner(Kernel)
    run = runs(cuda, {16: 0.003, 32: 0.001, 64: 0.002}, seen)
    assert rehearse(lambda: tuner.tile((1,), tiles, Where, run)) == tiles[0]
    with torch.cuda.device(1):
        cuda_graph.Memory(SECOND).capture(lambda: (tuner.tile((1,), tiles, Where, run), ())[1])
    assert seen == [] and tuner.chosen == {}
