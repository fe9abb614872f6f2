"""Choice by measurement, with a clock that the test sets: who runs a call, why, and what is kept of it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EXACT
from machine import PATIENCE
from torch import Tensor

from lambda_kernels import autograd, backends, info
from lambda_kernels.backends.autotune import Autotune, Table
from lambda_kernels.backends.base import Call
from lambda_kernels.backends.native import Native
from lambda_kernels.backends.reference import Reference
from lambda_kernels.spec import BlockSpec, ConvSpec

SPEC = ConvSpec((1, 1), (1, 1), (1, 1), 1)
CPU = torch.device("cpu")


class Fast(Reference):
    """A backend that counts what it runs; `wrong` spoils its results, `fails` raises."""

    name = "fast"

    def __init__(self, wrong: float = 0.0, fails: bool = False, refuses: str = "") -> None:
        self.wrong, self.fails, self.refuses = wrong, fails, refuses
        self.calls: list[str] = []

    def refusals(self, call: Call) -> list[str]:
        return [self.refuses] if self.refuses else []

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
        self.calls.append("conv2d")
        if self.fails:
            raise RuntimeError("no kernel image\nand more")
        return super().conv2d(x, weight, bias, spec) * (1 + self.wrong)

    def sgd_(self, parameters: list[Tensor], gradients: list[Tensor], rates: Sequence[float]) -> None:
        self.calls.append("sgd_")
        super().sgd_(parameters, gradients, [rate * (1 + self.wrong) for rate in rates])

    def image_refusals(self, x: Tensor, weight: Tensor, block: BlockSpec) -> list[str]:
        return []


class Clock:
    """Says which times were measured; the backends' order is given."""

    def __init__(self, *order: str) -> None:
        self.order, self.asked = order, 0

    def __call__(self, runs: Mapping[str, Any]) -> dict[str, float]:
        self.asked += 1
        for run in runs.values():
            run()
        return {name: 1.0 + self.order.index(name) if name in self.order else 99.0 for name in runs}


def tuned(fast: Fast, *order: str, table: Table | None = None) -> tuple[Autotune, Clock, Table]:
    clock, table = Clock(*order), table or Table(None)
    return Autotune([fast, Reference()], lambda device: table, clock), clock, table


def operands(size: int = 6) -> tuple[Tensor, Tensor, None, ConvSpec]:
    return torch.randn(1, 2, 3, size, size), torch.randn(1, 4, 3, 3, 3), None, SPEC


@pytest.mark.parametrize("order", [("fast", "reference"), ("reference", "fast")])
def test_the_fastest_is_taken_and_measured_once_a_shape(order: tuple[str, str]) -> None:
    fast = Fast()
    backend, clock, table = tuned(fast, *order)
    for size in (6, 6, 7, 6):
        call = operands(size)
        torch.testing.assert_close(backend.conv2d(*call), Reference().conv2d(*call))
    assert clock.asked == 2 and len(table.choices) == 2
    assert {choice.chosen for choice in table.choices.values()} == {order[0]}
    fast.calls.clear()
    backend.conv2d(*operands())
    assert fast.calls == (["conv2d"] if order[0] == "fast" else [])


def test_layouts_and_dtypes_are_measured_apart() -> None:
    backend, clock, _ = tuned(Fast(), "fast")
    x, weight, _, _ = operands()
    for variant in (x, x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3), x.double()):
        backend.conv2d(variant, weight.to(variant.dtype), None, SPEC)
    backend.conv2d(x, weight, None, SPEC._replace(padding=(0, 0)))
    assert clock.asked == 4


@pytest.mark.parametrize(
    ("fast", "words"),
    [(Fast(wrong=0.1), "away from ATen's"), (Fast(fails=True), "no kernel image"), (Fast(wrong=torch.nan), "nan")],
    ids=["wrong", "fails", "nan"],
)
def test_a_backend_that_is_not_right_is_not_used(fast: Fast, words: str, caplog: pytest.LogCaptureFixture) -> None:
    backend, _, table = tuned(fast, "fast", "reference")
    call = operands()
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(backend.conv2d(*call), Reference().conv2d(*call))
    (choice,) = table.choices.values()
    assert choice.chosen == "reference" and "fast" not in choice.milliseconds
    assert words in choice.reason and words in caplog.text
    assert "and more" not in caplog.text


def test_where_memory_does_not_suffice_the_first_one_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, clock, table = tuned(Fast(), "reference", "fast")

    def full(runs: Mapping[str, Any]) -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.9 GiB.\nand more")

    monkeypatch.setattr(backend, "_clock", full)
    call = operands()
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(backend.conv2d(*call), Reference().conv2d(*call))
    assert not table.choices
    assert "memory does not suffice: CUDA out of memory. Tried to allocate 2.9 GiB." in caplog.text
    monkeypatch.setattr(backend, "_clock", clock)
    backend.conv2d(*call)
    assert [c.chosen for c in table.choices.values()] == ["reference"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_disagreement(dtype: torch.dtype) -> None:
    near, far = Fast(wrong=float(torch.finfo(dtype).eps)), Fast(wrong=0.2)
    for fast, chosen in ((near, "fast"), (far, "reference")):
        backend, _, table = tuned(fast, "fast")
        x, weight, _, spec = operands()
        backend.conv2d(x.to(dtype), weight.to(dtype), None, spec)
        assert [c.chosen for c in table.choices.values()] == [chosen]


def test_a_backend_that_refuses_is_named_with_its_reason() -> None:
    backend, clock, _ = tuned(Fast(refuses="not today"), "fast")
    backend.conv2d(*operands())
    assert clock.asked == 0  # one is left: there is nothing to choose


def test_without_measuring_the_first_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_KERNELS_MEASURE", "0")
    fast = Fast()
    backend, clock, table = tuned(fast, "reference", "fast")
    backend.conv2d(*operands())
    assert fast.calls == ["conv2d"] and clock.asked == 0 and not table.choices


def test_the_table_is_kept_and_other_processes_entries_too(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "choices.json"
    first, clock, table = tuned(Fast(), "fast", "reference", table=Table(path))
    first.conv2d(*operands())
    stored = json.loads(path.read_text())["choices"]
    ((key, choice),) = stored.items()
    assert key.startswith("conv2d float32[1x2x3x6x6]") and choice["chosen"] == "fast"
    assert choice["milliseconds"] == {"fast": 1.0, "reference": 2.0}

    other = Table(path)
    assert other.choices == table.choices
    assert other.choices[key].reason == "fast 1.0000 ms, reference 2.0000 ms"
    second, clock, _ = tuned(Fast(), "reference", table=other)
    second.conv2d(*operands())
    assert clock.asked == 0
    first.conv2d(*operands(7))
    second.conv2d(*operands(8))
    assert len(json.loads(path.read_text())["choices"]) == 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_processes_that_write_one_table_at_a_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    program = (
        "import sys; from pathlib import Path; from lambda_kernels.backends.table import Choice, Table\n"
        "print(flush=True); input()\n"
        "for i in range(25): Table(Path(sys.argv[1])).add(f'{sys.argv[2]} {i}', Choice('a', {'a': 1.0}, {}))"
    )
    pipe = subprocess.PIPE
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(k)], stdin=pipe, stdout=pipe, text=True)
        for k in range(3)
    ]
    for writer in writers:  # all are ready
        assert writer.stdout is not None and writer.stdout.readline() == "\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=PATIENCE)
        assert writer.returncode == 0
    assert set(Table(path).choices) == {f"{k} {i}" for k in range(3) for i in range(25)}


@pytest.mark.parametrize("text", ["{", "[]", '{"choices": {"a": 1}}', '{"choices": {"a": {"chosen": "fast"}}}'])
def test_a_damaged_table_is_said_and_measured_again(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "choices.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        table = Table(path)
    assert table.choices == {} and "choices.json cannot be read" in caplog.text


def test_a_table_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    backend, _, table = tuned(Fast(), "fast", table=Table(tmp_path / "file" / "choices.json"))
    with caplog.at_level(logging.WARNING):
        for size in (6, 7):
            backend.conv2d(*operands(size))
    assert len(table.choices) == 2
    assert len([r for r in caplog.records if "kept in this process only" in r.message]) == 1


def test_an_update_is_measured_on_copies() -> None:
    for fast, chosen in ((Fast(), "fast"), (Fast(wrong=0.1), "reference")):
        backend, _, table = tuned(fast, "fast", "reference")
        parameters = [torch.randn(3, 4), torch.randn(5)]
        gradients = [torch.randn(3, 4), torch.randn(5)]
        want = [p - 0.5 * g for p, g in zip(parameters, gradients)]
        backend.sgd_(parameters, gradients, [0.5])
        torch.testing.assert_close(parameters, want)
        assert [c.chosen for c in table.choices.values()] == [chosen]
    backend.sgd_([], [], [0.5])


@pytest.mark.parametrize("order", [("fast", "over z"), ("over z", "fast")])
def test_the_first_block_is_chosen_as_a_whole(order: tuple[str, str]) -> None:
    backend, _, table = tuned(Fast(), *order)
    x, weight, _, spec = operands()
    refused = backend.image_refusals(x, weight, BlockSpec(spec, 1e-5, 2))
    assert bool(refused) == (order[0] == "over z")
    key = next(key for key in table.choices if key.startswith("first block"))
    assert table.choices[key].chosen == order[0]


def test_the_inner_loop_over_tuned_operations_is_the_native_one() -> None:
    backend, _, _ = tuned(Fast(), "fast", "over z", "parts")
    spec = [BlockSpec(SPEC, 1e-5, 2)] * 2
    shapes = [(6, 2, 3, 3), (6,), (6,), (6, 6, 3, 3), (6,), (6,), (3, 24), (3,)]
    parameters = [torch.randn(2, *s, dtype=torch.float64) / 4 for s in shapes]
    x, labels = torch.randn(2, 6, 2, 9, 8, dtype=torch.float64), torch.arange(3).repeat(2, 2)
    results = []
    for who in (backend, Native()):
        found = who.inner_loop(x, labels, parameters, [True] * 8, spec, 3, [0.1])
        results.append([found.rows.double(), *found.updated])
    torch.testing.assert_close(results[0], results[1], **EXACT)


def test_info_prints_the_choices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--choices"])
    if not torch.cuda.is_available():
        assert "no CUDA device" in capsys.readouterr().out
    backend, _, table = tuned(Fast(), "fast", "reference")
    backend.conv2d(*operands())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(backends, "choices", lambda device: table)
    info.main(["--choices"])
    assert ": fast (fast 1.0000 ms, reference 2.0000 ms)" in capsys.readouterr().out
    info.main(["--choices", "--json"])
    ((choice,),) = (list(c.values()) for c in json.loads(capsys.readouterr().out).values())
    assert choice["chosen"] == "fast" and choice["reason"].startswith("fast 1.0000 ms")


def test_autograd_functions_run_over_it() -> None:
    backend, _, _ = tuned(Fast(), "fast", "reference")
    x, weight = (t.double().requires_grad_() for t in operands()[:2])
    torch.autograd.gradcheck(lambda x, w: autograd.Conv2d.apply(x, w, None, SPEC, backend), (x, weight))
