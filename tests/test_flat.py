"""Tensors in one row of memory, and the inner loop's parameters in such a row."""

from __future__ import annotations

import pytest
import torch
from cases import STEPS
from chains import MIXED, TWO_BLOCKS, drawn_rates, flat, given, run, same
from torch import Tensor

from lambda_kernels.backends.reference import Reference, channels_last
from lambda_kernels.flat import joined, lying, split

SHAPES = [torch.Size(s) for s in ((3, 5), (), (16,), (1,), (0,), (2, 1, 7), (64, 3, 3, 3))]


def tensors(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(s).to(dtype) for s in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_a_row_holds_its_tensors_each_from_64_bytes_on(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    row = joined(given)
    parts = split(row, SHAPES)
    assert row.numel() * row.itemsize % 64 == 0 and row.isfinite().all()
    for part, t in zip(parts, given, strict=True):
        assert torch.equal(part, t) and part.is_contiguous()
        assert part.storage_offset() * part.itemsize % 64 == 0
    behind = torch.cat([row, row])[row.numel() :]
    assert all(map(torch.equal, split(behind, SHAPES), given))


def test_dtypes_are_promoted() -> None:
    first, second = torch.randn(3), torch.randn(5, dtype=torch.float64)
    row = joined([first, second])
    assert row.dtype == torch.float64 and row.numel() == 16
    assert torch.equal(split(row, [first.shape, second.shape])[0], first.double())


def test_what_lies_in_a_row_is_found_and_never_taken_for_another() -> None:
    row = torch.cat([torch.zeros(16), joined(tensors(torch.float32))])[16:]
    parts = split(row, SHAPES)
    found = lying(parts)
    assert found is not None and found.data_ptr() == row.data_ptr() and torch.equal(found, row)
    assert lying([p.clone() for p in parts]) is None
    assert lying(parts[1:]) is not None
    assert lying([parts[1], parts[0], *parts[2:]]) is None
    assert lying([parts[0], parts[2]]) is None
    assert lying([parts[0].t(), *parts[1:]]) is None
    assert lying([*parts[:-1], parts[-1].double()]) is None
    assert lying([torch.zeros(17)[:17]]) is None  # what is behind it is not there
    assert joined(parts).data_ptr() != row.data_ptr()


@pytest.mark.parametrize("tasks", [1, 3])
def test_updated_parameters_lie_in_one_row(tasks: int) -> None:
    for network in MIXED.values():
        task = given(network, torch.float32, tasks=tasks)
        shapes = [p.shape for p in task.parameters]
        held = split(joined(task.parameters), shapes)  # the network's own in a row too: it must not be taken for ours
        before = [p.clone() for p in held]
        done = run(Reference(), network, task._replace(parameters=held), network.from_layer(0), 2)
        row = lying(done.updated)
        assert row is not None and row.untyped_storage().data_ptr() != held[0].untyped_storage().data_ptr()
        assert all(map(torch.equal, held, before))
        assert not any(map(torch.equal, done.updated, before))


class ChannelsLast(Reference):
    """Lays images out as the GPU's backends do."""

    name = "channels-last"

    def layout(self, x: Tensor) -> Tensor:
        return channels_last(x)


@pytest.mark.parametrize("tasks", [1, 2])
def test_weights_laid_out_for_channels_last_images_give_the_same(tasks: int) -> None:
    for network in (*MIXED.values(), TWO_BLOCKS):
        task = given(network, tasks=tasks)
        for first in range(len(network.layers) + 1):
            updated = network.from_layer(first)
            updated[-2] = first % 2 == 0  # the linear layer's weight frozen, too
            rates = flat(drawn_rates(updated))
            got, want = (run(b, network, task, updated, 3, rates, query=True) for b in (ChannelsLast(), Reference()))
            assert got.logits is not None
            torch.testing.assert_close(got, want, **STEPS)
            again = run(ChannelsLast(), network, task, updated, 3, rates, query=True)
            assert same(again, got)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(8))
def test_infinite_parameters_are_seen_in_the_last_row(place: int, value: float) -> None:
    task = given(TWO_BLOCKS, torch.float32, tasks=2, own=True)
    updated = [i == place for i in range(8)]
    assert run(Reference(), TWO_BLOCKS, task, updated, 0).rows[-1].tolist() == [0.0, 0.0]
    task.parameters[place][1].view(-1)[-1] = value
    rows = run(Reference(), TWO_BLOCKS, task, updated, 0).rows
    assert rows.shape == (1, 2) and rows[-1, 1].isnan()
    huge = [p * 1e30 for p in task.parameters]
    huge[place][1].view(-1)[-1] = 3e38
    assert run(Reference(), TWO_BLOCKS, task._replace(parameters=huge), updated, 0).rows[-1].tolist() == [0.0, 0.0]
