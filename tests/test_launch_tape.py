"""Both GPU backends under a CUDA graph's rules on the CPU: launches by ctypes and by Triton, replayed on poisoned
memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from cases import STEPS
from chains import Given, Layer, Network, given
from launch_tape import rehearse_launches, taping
from loops import CONV4, all_close, close
from tape import Rehearsed
from torch import Tensor

import lambda_kernels as lk
from lambda_kernels import backends
from lambda_kernels.backends import Cuda, Reference, Triton
from lambda_kernels.spec import BlockSpec
from lambda_maml import adapt, adapt_tasks
from lambda_maml.inner import recorded

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Network((2, 8, 9), (Layer(8), Layer(9)), images=4)
STEPS_TAKEN, RATE = 2, 0.1


@pytest.fixture
def cuda(emulated_library: Path) -> Cuda:
    return Cuda(emulated_library, "cpu")


@pytest.fixture
def emulated(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adaptations run on the emulated kernels, recordings are tapes."""
    cuda.name = "emulated"
    monkeypatch.setitem(backends._BACKENDS, "emulated", cuda)
    rehearse_launches(monkeypatch)
    recorded.RECORDINGS.clear()
    with lk.use_backend("emulated"):
        yield
    recorded.RECORDINGS.clear()
    backends._chosen.clear()


def made(tasks: int = 1) -> Given:
    task = given(SMALL, tasks=tasks)
    return task._replace(labels=task.labels.clone())


def steps(backend: Any, task: Given, updated: list[bool]) -> tuple[Tensor, ...]:
    done = backend.inner_loop(
        task.x, task.labels, task.parameters, updated, SMALL.specs, STEPS_TAKEN, [RATE], task.query
    )
    return (done.rows, *done.updated, done.logits)


def changed(task: Given) -> None:
    """Another task, in the same memory."""
    for t in (task.x, task.query, *task.parameters):
        t.copy_(t.flip(0) + 0.1 * torch.randn_like(t))
    task.labels.copy_(task.labels.roll(1, -1))


def check_replays(backend: Any, updated: list[bool], tasks: int) -> list[str]:
    task = made(tasks)
    first = steps(Reference(), task, updated)
    with taping() as tape:
        found = steps(backend, task, updated)
    torch.testing.assert_close(found, first, **STEPS)
    before = [t.data_ptr() for t in found]
    for _ in range(2):
        changed(task)
        tape.replay()
        torch.testing.assert_close(found, steps(Reference(), task, updated), **STEPS)
    assert [t.data_ptr() for t in found] == before
    return tape.names


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_cuda_backends_steps_are_replayed(cuda: Cuda, first: int, tasks: int) -> None:
    names = check_replays(cuda, SMALL.from_layer(first), tasks)
    if "cuda last_steps" not in names:  # all steps by one launch
        assert names.count("cuda sgd") == names.count("cuda cross_entropy_grad") == STEPS_TAKEN
        assert ("cuda norm_relu_pool_grad" in names) is (first < 2)
    assert ("cuda image_block_grad" in names) is (first == 0)


def test_the_triton_backends_steps_are_replayed() -> None:
    names = check_replays(Triton(), SMALL.from_layer(1), 1)
    for kernel in ("convolve", "merge", "normalise", "weight_gradient", "head_forward", "head_backward", "sgd"):
        assert f"triton {kernel}" in names


@pytest.mark.parametrize("pattern", ["11111", "00011", "01000", "11111,00001"])
def test_adaptations_are_replayed_on_the_emulated_kernels(pattern: str, emulated: None) -> None:
    model = loops.own_conv4(loops.torch_conv4())
    options: dict[str, Any] = {"pattern": pattern, "steps": 2, "lr": 0.1}
    for seed in range(4):
        xs, ys, xq, _ = CONV4.task(seed=seed)
        got = adapt(model, xs, ys, **options)
        with lk.use_backend("reference"):
            want = adapt(copy.deepcopy(model), xs, ys, **options)
            # here and below: float64 of some steps by kernels whose sums have an order of their own
            all_close(got.parameters_dict(), want.parameters_dict(), f"task {seed}", rtol=1e-8)
            close(got(xq), want(xq), "logits", rtol=1e-8)  # as above
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
    assert (Rehearsed.made, Rehearsed.replays) == (1, 3)


def test_many_tasks_are_replayed_on_the_emulated_kernels(emulated: None) -> None:
    model = loops.own_conv4(loops.torch_conv4())
    options: dict[str, Any] = {"pattern": "11111", "steps": 2, "lr": 0.1}
    for turn in range(3):
        xs, ys, xq, _ = (torch.stack(part) for part in zip(*(CONV4.task(seed=2 * turn + i) for i in range(2))))
        with torch.no_grad():
            got = adapt_tasks(model, xs, ys, xq, **options)
            with lk.use_backend("reference"):
                # as above
                close(got, adapt_tasks(copy.deepcopy(model), xs, ys, xq, **options), f"turn {turn}", rtol=1e-8)
    assert Rehearsed.replays >= 2


@pytest.mark.parametrize("wrong", ["label", "image"])
def test_wrong_tasks_are_found_in_a_replay(wrong: str, emulated: None) -> None:
    model = loops.own_conv4(loops.torch_conv4())
    for seed in range(3):
        adapt(model, *CONV4.task(seed=seed)[:2], pattern="00011", steps=2, lr=0.1)
    xs, ys, _, _ = CONV4.task(seed=5)
    if wrong == "label":
        ys[0] = 2
    else:
        xs[0, 0, 1, 1] = torch.nan
    replays = Rehearsed.replays
    with pytest.raises(ValueError if wrong == "label" else FloatingPointError):
        adapt(model, xs, ys, pattern="00011", steps=2, lr=0.1)
    assert Rehearsed.replays > replays


@pytest.mark.parametrize("keeps", [True, False])
def test_parameters_that_lie_elsewhere_are_read_there(keeps: bool, emulated: None) -> None:
    model: Any = loops.own_conv4(loops.torch_conv4())
    options: dict[str, Any] = {"pattern": "00011", "steps": 2, "lr": 0.1}
    for seed in range(3):  # recorded, and prepared
        adapt(model, *CONV4.task(seed=seed)[:2], **options)
    before = model.block2.conv.weight.data if keeps else None
    model.block2.conv.weight.data = model.block2.conv.weight.data * 2
    xs, ys, _, _ = CONV4.task(seed=5)
    for _ in range(3):
        got = adapt(model, xs, ys, **options).parameters_dict()
        with lk.use_backend("reference"):
            want = adapt(copy.deepcopy(model), xs, ys, **options).parameters_dict()
        all_close(got, want, "moved", rtol=1e-8)  # as above
    assert Rehearsed.made == 2 and (before is None) is not keeps


# What the tape is there to find: backends that are right at once and wrong in a graph.


class Faulty(Cuda):
    name = "faulty"

    def __init__(self, library: Path, fault: str) -> None:
        super().__init__(library, "cpu")
        self.fault = fault
        self.kept: Tensor | None = None

    def norm_relu_pool(self, z: Tensor, gamma: Tensor, beta: Tensor, block: BlockSpec) -> Any:
        if self.fault == "waits":
            assert float(gamma.sum()) != 0.0
        elif self.fault == "depends":
            gamma = gamma.new_tensor(gamma.tolist())
        elif self.fault == "keeps":
            self.kept = gamma.clone() if self.kept is None else self.kept
            gamma = self.kept
        elif self.fault == "stale":
            gamma = StaleAddress(gamma)
        return super().norm_relu_pool(z, gamma, beta, block)


class StaleAddress(Tensor):
    """Gives the address of a copy that is gone when it is used."""

    @staticmethod
    def __new__(cls, t: Tensor) -> Any:
        return t.as_subclass(cls)

    def data_ptr(self) -> int:
        return self.as_subclass(Tensor).clone().data_ptr()


def test_a_wait_is_an_error(emulated_library: Path) -> None:
    task = made()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), taping():
        steps(Faulty(emulated_library, "waits"), task, SMALL.from_layer(1))


def test_an_address_of_memory_given_back_is_an_error(emulated_library: Path) -> None:
    task = made()
    with pytest.raises(RuntimeError, match="norm_relu_pool is launched on memory that was given back"), taping():
        steps(Faulty(emulated_library, "stale"), task, SMALL.from_layer(1))


def test_values_that_went_through_python_are_no_values_of_a_replay(emulated_library: Path) -> None:
    with taping() as tape:
        steps(Faulty(emulated_library, "depends"), made(), SMALL.from_layer(1))
    with pytest.raises(RuntimeError, match="was there before the recording, and was given back"):
        tape.replay()


def test_memory_of_before_that_is_gone_is_an_error(emulated_library: Path) -> None:
    task, backend, updated = made(), Faulty(emulated_library, "keeps"), SMALL.from_layer(1)
    steps(backend, task, updated)  # as a warm-up
    with taping() as tape:
        steps(backend, task, updated)
    tape.replay()
    backend.kept = None
    with pytest.raises(RuntimeError, match="was there before the recording, and was given back"):
        tape.replay()


def test_what_is_read_before_it_is_written_is_poison() -> None:
    with taping() as tape:
        scratch = torch.empty(4)
        scratch[:2].fill_(1.0)
        result = scratch * 2
        freed = torch.ones(3) * 2
        del freed
        last = torch.zeros(2) + 1
    tape.replay()
    assert result[:2].tolist() == [2.0, 2.0] and result[2:].isnan().all() and last.tolist() == [1.0, 1.0]
    assert tape.names.count("freed") >= 2
