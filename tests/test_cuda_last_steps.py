"""All steps of the last block and the linear layer by one launch, emulated on the CPU and on a device, beside plain
loops of autograd in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import assert_as_exact, name_of
from chains import Given, Layer, Network, drawn_rates, flat, given, near, plain, run, same
from cuda_checks import Runner

from lambda_kernels.agreement import tolerance
from lambda_kernels.backends import cuda
from lambda_kernels.backends.cuda import Cuda, Limits, last_steps
from lambda_kernels.backends.reference import Reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "float32_has_its_digits")
SHARED = 227 * 1024


class Case(NamedTuple):
    network: Network
    tasks: int
    processors: int
    shared: int = SHARED
    # what the plan makes of it: channels of a block, groups of them, parts of the images, images in shared memory at a
    # time, whether the convolution and the features lie there, tasks a launch
    plan: tuple[int, int, int, int, int, int, int] = (8, 1, 1, 1, 1, 1, 1)
    bits: str = "11111"
    steps: int = 3


TWO = Network((3, 9, 8), (Layer(8), Layer(6)), images=5, ways=5)
ODD = Network((5, 7, 9), (Layer(19, (3, 3), eps=1e-3),), images=7, ways=3)
WIDE = Network((9, 5, 5), (Layer(40, pool=1),), images=3, ways=4)
STRIDE = Network((3, 12, 11), (Layer(10, pool=1), Layer(9, (2, 3), (2, 1), (0, 2), (2, 1))), images=4, ways=2)
ALONE = Network((33,), (), images=6, ways=7)
CASES = {
    "one-block": Case(TWO, 1, 1, plan=(8, 1, 1, 5, 1, 1, 1)),
    "parts": Case(TWO, 1, 6, plan=(8, 1, 5, 1, 1, 1, 1), steps=5),
    "uneven-parts": Case(ODD, 1, 6, plan=(8, 3, 2, 4, 1, 1, 1)),
    "groups": Case(ODD, 2, 6, plan=(8, 3, 1, 7, 1, 1, 2), steps=2),
    "many-channels": Case(WIDE, 3, 6, plan=(32, 2, 1, 3, 1, 1, 3)),
    "several-launches": Case(WIDE, 3, 4, plan=(32, 2, 1, 3, 1, 1, 2), bits="11101", steps=2),
    "images-in-turn": Case(WIDE, 1, 2, 104000, plan=(32, 2, 1, 1, 0, 1, 1), steps=2),
    "little-memory": Case(ODD, 1, 3, 20000, plan=(8, 3, 1, 1, 0, 0, 1), steps=2),
    "parts-in-turn": Case(ODD, 1, 6, 20000, plan=(8, 3, 2, 1, 0, 0, 1), steps=1),
    "stride": Case(STRIDE, 2, 6, plan=(8, 2, 1, 4, 1, 1, 2)),
    "no-norm": Case(TWO, 1, 3, plan=(8, 1, 3, 2, 1, 1, 1), bits="10011"),
    "block-alone": Case(TWO, 2, 6, plan=(8, 1, 3, 2, 1, 1, 2), bits="11100"),
    "head-behind-blocks": Case(TWO, 2, 6, plan=(0, 3, 1, 0, 1, 1, 2), bits="00011"),
    "head": Case(ALONE, 1, 6, plan=(0, 6, 1, 0, 1, 1, 1), bits="00011", steps=5),
    "head-in-turn": Case(ALONE, 3, 1, 5000, plan=(0, 1, 1, 0, 1, 0, 1), bits="00010"),
}
PLAN = ("channels", "groups", "parts", "images_at_once", "keeps_z", "keeps_y", "tasks_at_once")


def flags(case: Case) -> list[bool]:
    bits = case.bits[-2:] if not case.network.layers else case.bits
    return [False] * (3 * len(case.network.layers) + 2 - len(bits)) + [bit == "1" for bit in bits]


def prepared(case: Case, runner: Runner, dtype: torch.dtype = torch.float64) -> tuple[Any, Given, Given, list[bool]]:
    """The backend with the case's limits, its task, the same in float64 on the CPU, which parameters are updated."""
    shared = case.shared * dtype.itemsize // 8 if case.shared < SHARED else SHARED
    runner.backend._limits = Limits(case.processors, shared)
    own = [i % 3 == 1 for i in range(3 * len(case.network.layers) + 2)]
    task = given(case.network, dtype, case.tasks, own)
    return runner.backend, task.to(runner.device), task.to(torch.float64), flags(case)


def counted(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the launchers that are called from now on."""
    names: list[str] = []
    launch = type(backend).launch

    def noted(name: str, *rest: Any) -> None:
        names.append(name)
        launch(backend, name, *rest)

    monkeypatch.setattr(backend, "launch", noted)
    return names


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_a_plain_loop(name: str, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    backend, task, truth, updated = prepared(case, runner)
    rates = drawn_rates(updated, case.steps)
    before = [p.clone() for p in task.parameters]
    plan = last_steps.planned(
        backend, *task[:2], task.parameters, updated, case.network.specs, case.steps, flat(rates)
    )  # fmt: skip
    assert not isinstance(plan, list), plan
    assert tuple(getattr(plan, field) for field in PLAN) == case.plan
    launches = counted(backend, monkeypatch)
    got = run(backend, case.network, task, updated, case.steps, flat(rates), query=True)
    assert launches.count("last_steps") == 1 and not {"cross_entropy_grad", "sgd"} & set(launches)
    want = plain(case.network, truth, updated, rates)
    near("rows", got.rows.cpu(), want.rows)
    for mine, theirs in zip(got.updated, want.updated, strict=True):
        near("updated", mine.cpu().reshape(theirs.shape), theirs)
    assert got.logits is not None and want.logits is not None
    near("logits", got.logits.cpu(), want.logits)
    assert all(map(torch.equal, task.parameters, before))


@pytest.mark.parametrize("name", ["one-block", "uneven-parts", "images-in-turn", "head"])
def test_bits_do_not_depend_on_the_order_of_blocks(name: str, runner: Runner) -> None:
    case = CASES[name]
    backend, task, _, updated = prepared(case, runner, torch.float32)
    first, second = (run(backend, case.network, task, updated, case.steps, [0.05]) for _ in range(2))
    assert same(first, second)
    rows = run(backend, case.network, task, updated, case.steps, [0.05] * (case.steps * sum(updated)))
    assert same(first, rows)


@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "tf32"])
@pytest.mark.parametrize("name", ["parts", "many-channels", "images-in-turn", "head"])
def test_float32(name: str, tf32: bool, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as stock float32 with three products of rounded numbers; with one, TF32's digits are left."""
    case = CASES[name]
    backend, task, truth, updated = prepared(case, runner, torch.float32)
    for module in (last_steps, cuda):
        monkeypatch.setattr(module, "allows_tf32", lambda _: tf32)
    rates = [0.05] * (case.steps * sum(updated))
    got = run(backend, case.network, task, updated, case.steps, rates)
    want = plain(case.network, truth, updated, torch.tensor(rates).double().view(case.steps, -1))
    stock = plain(case.network, task.to("cpu"), updated, torch.tensor(rates).view(case.steps, -1))
    off = 0.0
    for mine, theirs, exact in zip([got.rows, *got.updated], [stock.rows, *stock.updated], [want.rows, *want.updated]):
        mine = mine.cpu().reshape(exact.shape)
        if tf32:
            assert (mine - exact).norm() < tolerance(torch.float32).pair * exact.norm()
            off = max(off, float((mine - exact).norm() / exact.norm()))
        else:
            assert_as_exact("steps", mine, theirs, exact, terms=16)
    assert not tf32 or not case.network.layers or off > 1e-5  # it is TF32 that was tried


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", ["uneven-parts", "groups", "many-channels", "images-in-turn", "little-memory", "head"])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype, runner: Runner) -> None:
    """Beside the same steps in float64, from the same values: within one rounding, though there were several steps."""
    case = CASES[name]
    backend, task, _, updated = prepared(case, runner, dtype)
    truth = task.to("cpu").to(torch.float64)
    rates = [0.05] * (case.steps * sum(updated))
    got = run(backend, case.network, task, updated, case.steps, rates)
    assert got.rows.dtype == torch.float32 and {t.dtype for t in got.updated} == {dtype}
    want = plain(case.network, truth, updated, torch.tensor(rates).double().view(case.steps, -1))
    for mine, exact in zip(got.updated, want.updated, strict=True):
        off = (mine.cpu().reshape(exact.shape) - exact).norm()
        assert off <= 0.6 * torch.finfo(dtype).eps * exact.norm()  # on average a rounding is 0.29 of it
    # losses in floats, of products rounded to TF32: far closer than half precision's own digits
    torch.testing.assert_close(got.rows.cpu().double(), want.rows.double(), rtol=2e-3, atol=2e-3)


def test_the_prefix_runs_on_another_backend(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a backend that chooses for each operation calls it."""
    case = CASES["parts"]
    backend, task, _, updated = prepared(case, runner)
    operands = *task[:2], task.parameters, updated, case.network.specs, 2, [0.1]
    want = backend.inner_loop(*operands, task.query)
    plan = last_steps.planned(backend, *operands)
    assert not isinstance(plan, list), plan
    for name in ("block", "linear", "conv2d"):
        monkeypatch.setattr(Cuda, name, None)
    got = last_steps.inner_loop(backend, Reference(), plan, *operands, task.query)
    assert got.logits is not None and want.logits is not None
    for mine, theirs in zip([got.rows, got.logits, *got.updated], [want.rows, want.logits, *want.updated]):
        near("result", mine, theirs)


def test_a_block_that_rests_in_some_steps(runner: Runner) -> None:
    """A schedule: the block moves in the second step alone, the head in the others; both rest in the last."""
    case = CASES["parts"]
    backend, task, truth, updated = prepared(case, runner)
    rates = torch.tensor([[0, 0, 0, 0.1, 0.2], [0.1, 0.2, 0.3, 0, 0], [0, 0, 0, 0.3, 0], [0.0] * 5]).double()
    got = run(backend, case.network, task, updated, 4, flat(rates))
    want = plain(case.network, truth, updated, rates)
    near("rows", got.rows.cpu(), want.rows)
    for mine, theirs in zip(got.updated, want.updated, strict=True):
        near("updated", mine.cpu().reshape(theirs.shape), theirs)


def test_what_is_no_label_or_not_finite_stays_with_its_task(runner: Runner) -> None:
    case = CASES["groups"]._replace(tasks=3)
    backend, task, _, updated = prepared(case, runner)
    labels = task.labels.clone()
    labels[1, 2] = 3
    want = run(backend, case.network, task, updated, 2, [0.1])
    got = run(backend, case.network, task._replace(labels=labels), updated, 2, [0.1])
    assert got.rows[:2, 1].isnan().all() and torch.equal(got.rows[:, [0, 2]], want.rows[:, [0, 2]])
    x = task.x.clone()
    x[2, 0, 0, 3, 3] = float("inf")
    got = run(backend, case.network, task._replace(x=x), updated, 2, [0.1])
    assert got.rows[-1].isnan().tolist() == [False, False, True] and torch.equal(got.rows[:, 0], want.rows[:, 0])


def test_operands_in_other_memory(runner: Runner) -> None:
    """Images that the tasks share, weights whose memory has another order, rows of one tensor at odd addresses."""
    case = CASES["groups"]
    backend, task, _, updated = prepared(case, runner)
    tasks = case.tasks
    flat_row = torch.cat([task.x.new_zeros(tasks, 1)] + [p.expand(tasks, *p.shape[-n:]).flatten(1) for p, n in zip(
        task.parameters, [4, 1, 1, 2, 1])], 1)  # fmt: skip
    sizes = [p[0].numel() if p.dim() > n else p.numel() for p, n in zip(task.parameters, [4, 1, 1, 2, 1])]
    views = [
        v.view(tasks, *p.shape[-n:])
        for v, p, n in zip(flat_row[:, 1:].split(sizes, 1), task.parameters, [4, 1, 1, 2, 1])
    ]
    want = run(backend, case.network, task, updated, 2, [0.1])
    got = run(backend, case.network, task._replace(parameters=views), updated, 2, [0.1])
    torch.testing.assert_close(got.updated, want.updated, rtol=0, atol=0)
    turned = [p.to(memory_format=torch.channels_last) if p.dim() == 4 else p for p in task.parameters]
    assert same(want, run(backend, case.network, task._replace(parameters=turned), updated, 2, [0.1]))
    shared = task.x[:1].expand(task.x.shape)
    one = run(backend, case.network, task._replace(x=shared), updated, 2, [0.1])
    two = run(backend, case.network, task._replace(x=task.x[:1]), updated, 2, [0.1])
    assert same(one, run(backend, case.network, task._replace(x=shared.contiguous()), updated, 2, [0.1]))
    assert same(one, two)


REFUSALS = {
    "below": (TWO, "11111111", 3, torch.float64, Limits(6, SHARED), "block 1 of 2 moves"),
    "memory": (TWO, "00011111", 3, torch.float64, Limits(6, 2000), "do not fit into 2000 bytes of shared memory"),
    "steps": (TWO, "00011111", 33, torch.float64, Limits(6, SHARED), "1 to 32 steps"),
    "pool": (
        Network((3, 9, 9), (Layer(4, pool=3),)), "11111", 2, torch.float64, Limits(6, SHARED), "1 or 2, not 3"
    ),
    "groups": (
        Network((4, 9, 9), (Layer(4, groups=2),)), "11111", 2, torch.float64, Limits(6, SHARED), "of 2 groups"
    ),
}  # fmt: skip


def test_tensors_of_several_dtypes_are_refused(runner: Runner) -> None:
    task = given(TWO).to(runner.device)
    mixed = [*task.parameters[:-1], task.parameters[-1].float()]
    why = last_steps.planned(runner.backend, *task[:2], mixed, [False] * 3 + [True] * 5, TWO.specs, 3, [0.1])
    assert why == ["all its tensors are of one dtype of float32, float64, float16, bfloat16, not float32, float64"]


@pytest.mark.parametrize("name", REFUSALS)
def test_what_one_launch_refuses_runs_in_the_ordinary_loop(
    name: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, bits, steps, dtype, limits, words = REFUSALS[name]
    backend, updated = runner.backend, [bit == "1" for bit in bits]
    backend._limits = limits
    task = given(network, dtype, 2).to(runner.device)
    launches = counted(backend, monkeypatch)
    why = last_steps.planned(backend, *task[:2], task.parameters, updated, network.specs, steps, [0.01])
    assert isinstance(why, list) and len(why) == 1 and words in why[0]
    if name == "pool":  # the backend's other operations refuse it
        return
    got = run(backend, network, task, updated, steps, [0.01])
    want = run(Reference(), network, task.to("cpu"), updated, steps, [0.01])
    assert "last_steps" not in launches
    # float64 losses of some steps, whose sums the blocks take apart
    torch.testing.assert_close(got.rows.cpu(), want.rows, rtol=1e-8, atol=1e-8)


def test_tensors_of_another_device_are_refused(emulated_library: Path) -> None:
    task = given(TWO)
    backend = Cuda(emulated_library, "cuda")
    why = last_steps.planned(backend, *task[:2], task.parameters, [True] * 8, TWO.specs, 3, [0.1])
    assert isinstance(why, list) and "it runs on CUDA devices, the tensors are on cpu" in why


def test_wrong_numbers_of_rates(runner: Runner) -> None:
    task = given(TWO).to(runner.device)
    with pytest.raises(ValueError, match="2 rates for 3 steps of 5 parameters"):
        run(runner.backend, TWO, task, [False] * 3 + [True] * 5, 3, [0.1, 0.2])


@pytest.mark.parametrize(("tasks", "plan"), [(1, (8, 8, 13, 2, 1, 1, 1)), (64, (32, 2, 1, 1, 0, 1, 64))])
def test_how_conv4_is_spread_over_an_h100(tasks: int, plan: tuple[int, ...], emulated_library: Path) -> None:
    """One task on most of the multiprocessors, all of it in shared memory; 64 tasks on two multiprocessors each."""
    last = Network((64, 10, 10), (Layer(64),), images=25, ways=5)
    task, backend = given(last, torch.float32, tasks), Cuda(emulated_library, "cpu", Limits(132, SHARED))
    got = last_steps.planned(backend, *task[:2], task.parameters, [True] * 5, last.specs, 5, [0.1])
    assert not isinstance(got, list) and tuple(getattr(got, field) for field in PLAN) == plan
