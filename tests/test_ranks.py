"""Several ranks against one process and a plain loop: gradients, training, selection, and how a run ends."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GRADIENT
from ranks import End, launch
from small_runs import TRAIN, VAL, network, small, state
from test_train import plain_meta_gradient

from lambda_maml import checkpoint, data, processes, signs
from lambda_maml.evaluate import evaluate
from lambda_maml.lock import NAME
from lambda_maml.ranks import ALONE, Lost, Ranks
from lambda_maml.select import select_pattern
from lambda_maml.timing import Timing, is_tie
from lambda_maml.train import BEST, meta_gradient, train

SETTINGS = small(meta_batch=5, val_tasks=5)


def values(ends: list[End]) -> list[Any]:
    """What the ranks gave; an error of one of them is raised."""
    for end in ends:
        if end.error is not None:
            raise end.error
    assert [end.status for end in ends] == [0] * len(ends)
    return [end.value for end in ends]


# Gradients


def gradient(ranks: Ranks, tasks: int) -> tuple[float, dict[str, torch.Tensor]]:
    model, share = network().double(), ranks.share(tasks)
    batch = data.sample_tasks(TRAIN, tasks, ways=3, shots=1, query=2, seed=4)[share.start : share.stop]
    loss = ranks.mean_gradient(
        list(model.parameters()), len(share) / tasks, lambda: meta_gradient(model, batch, SETTINGS)
    )
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tasks", [4, 5, 2], ids=lambda tasks: f"{tasks}-tasks")
@pytest.mark.parametrize("count", [2, 3], ids=lambda count: f"{count}-ranks")
def test_the_ranks_together_have_the_gradient_of_a_plain_loop(count, tasks):
    batch = data.sample_tasks(TRAIN, tasks, ways=3, shots=1, query=2, seed=4)
    wanted = plain_meta_gradient(network().double(), batch, SETTINGS, "11111")
    loss, own = gradient(ALONE, tasks)
    for found_loss, found in values(launch(count, gradient, tasks)):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        # float64, added up in another order
        torch.testing.assert_close(found, own, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, wanted, **GRADIENT)


def odd_gradients(ranks: Ranks) -> list[torch.Tensor | None]:
    """A parameter that has a gradient on one rank alone, one of none, one in another layout, a complex one."""
    parameters = [torch.zeros(2), torch.zeros(3), torch.zeros(1, 2, 2, 2), torch.zeros(2, dtype=torch.complex64)]
    parameters[2] = parameters[2].to(memory_format=torch.channels_last)

    def compute() -> float:
        if ranks.rank == 1:
            parameters[0].grad = torch.tensor([1.0, 2.0])
        parameters[2].grad = torch.arange(8.0).view(1, 2, 2, 2).to(memory_format=torch.channels_last)
        parameters[3].grad = torch.tensor([1 + 2j, 3 - 1j])
        return 1.0

    assert ranks.mean_gradient(parameters, 0.5, compute) == 1.0
    return [p.grad for p in parameters]


def test_gradients_that_some_ranks_lack_and_odd_layouts():
    for scarce, none, image, complex_ in values(launch(2, odd_gradients)):
        assert none is None
        assert scarce.tolist() == [0.5, 1.0]
        assert image.flatten().tolist() == list(range(8)) and image.is_contiguous(memory_format=torch.channels_last)
        assert complex_.tolist() == [1 + 2j, 3 - 1j]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_task_has_one_rank(count):
    ranks = [Ranks() for _ in range(count)]
    for rank, own in enumerate(ranks):
        own.rank, own.count = rank, count
    for tasks in range(9):
        shares = [list(own.share(tasks)) for own in ranks]
        assert sum(shares, []) == list(range(tasks))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Training and selection


def trained(ranks: Ranks, out: Path, iterations: int, resume: bool = False) -> tuple[Any, ...]:
    """A run of a network that rank 0 alone has: the others begin with another one."""
    model = network(seed=ranks.rank).double()
    result = train(model, TRAIN, VAL, out=out, settings=SETTINGS, iterations=iterations, ranks=ranks, resume=resume)
    return result.stopped, result.iteration, [line[:2] for line in result.history], model.state_dict()


def _told(name: str, message: str) -> str:
    return f"{name}: {message}"


def assert_same_state(folder: Path, wanted: Path) -> None:
    (tensors, history, iteration), (own, own_history, own_iteration) = state(folder), state(wanted)
    assert tensors.keys() == own.keys() and iteration == own_iteration
    for name in tensors.keys() - {"random"}:
        # float64, over some updates
        torch.testing.assert_close(tensors[name], own[name], rtol=1e-9, atol=1e-11, msg=partial(_told, name))
    assert [line[:3] for line in history] == [line[:3] for line in own_history]
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in wanted.iterdir())


def test_a_run_is_the_same_with_other_numbers_of_ranks_also_from_part_to_part(tmp_path):
    trained(ALONE, tmp_path / "whole", 4)
    whole = trained(ALONE, tmp_path / "whole", 6, resume=True)
    one, *others = values(launch(3, trained, tmp_path / "three", 4))
    assert one[:2] == ("iterations", 4) and all(other[:3] == one[:3] for other in others)
    assert all(torch.equal(value, other[3][name]) for other in others for name, value in one[3].items())
    for found in values(launch(2, trained, tmp_path / "three", 6, True)):
        assert found[:3] == whole[:3]
    assert_same_state(tmp_path / "three", tmp_path / "whole")
    model, meta = checkpoint.load(tmp_path / "three" / BEST)
    assert meta["metrics"] == checkpoint.load(tmp_path / "whole" / BEST)[1]["metrics"]


def selected(ranks: Ranks, tasks: list[data.Task]) -> tuple[Any, ...]:
    calls: list[str] = []
    chosen = select_pattern(
        network(), tasks[:9], test_tasks=tasks[9:], steps=2, lr=0.1, patterns=["00001", "00011"], seconds=0.0,
        max_drop=1.0, ranks=ranks, progress=lambda done, total, what: calls.append(what),
    )  # fmt: skip
    raced = select_pattern(
        network(), tasks, steps=2, lr=0.1, patterns=["00001", "11110"], seconds=0.0, search="race", rule="point",
        ranks=ranks,
    )  # fmt: skip
    return chosen.to_dict(), any(call == "timing rounds" for call in calls), raced.to_dict()


def spread(row: dict[str, Any]) -> Timing:
    return Timing(*(row["time"][key] for key in ("median", "low", "high")))


def test_ranks_choose_what_one_process_would_by_the_times_of_rank_0():
    tasks = data.sample_tasks(VAL, 14, ways=3, shots=1, query=4, seed=1)
    found, (other, other_timed, raced) = values(launch(2, selected, tasks))
    assert found == (other, True, raced) and not other_timed and raced["search"]["kind"] == "race"
    times = {row["pattern"]: row["time_ms"] for row in other["candidates"]}
    alone, *_ = selected(ALONE, tasks)
    for report in (other, alone):  # the same but for the times
        ordered = sorted(report["candidates"], key=lambda row: (row["time_ms"], -row["accuracy"], row["pattern"]))
        tied = [row for row in ordered if row is ordered[0] or is_tie(spread(row), spread(ordered[0]))]
        assert report["chosen"]["pattern"] == max(tied, key=lambda row: row["accuracy"])["pattern"]
    accuracies = ("accuracy", "ci95", "drop", "drop_bound")
    rows = [{r["pattern"]: [r[k] for k in accuracies] for r in report["candidates"]} for report in (other, alone)]
    assert rows[0] == rows[1] and times.keys() == rows[0].keys()
    assert other["test"]["full_accuracy"] == alone["test"]["full_accuracy"]


def divided(ranks: Ranks, tasks: list[data.Task]) -> tuple[list[float], list[tuple[int, int]]]:
    calls: list[tuple[int, int]] = []
    found = evaluate(
        network(), tasks, pattern="00011", steps=2, lr=0.1, batch=2, ranks=ranks,
        progress=lambda done, total, what: calls.append((done, total)),
    )  # fmt: skip
    return found.accuracies.tolist(), calls


@pytest.mark.parametrize("count", [2, 3])
def test_accuracies_are_those_of_one_process_where_ranks_have_none(count):
    tasks = data.sample_tasks(VAL, 2, ways=3, shots=1, query=4, seed=1)
    tasks += data.sample_tasks(VAL, 3, ways=3, shots=2, query=3, seed=1)
    for some in (tasks, tasks[:2], tasks[:1]):
        wanted, _ = divided(ALONE, some)
        ends = values(launch(count, divided, some))
        assert [accuracies for accuracies, _ in ends] == [wanted] * count
        assert sum(calls[-1][0] for _, calls in ends if calls) == len(some)


# The end of a run


def ended(ranks: Ranks, out: Path, how: str, who: int) -> tuple[str, int]:
    """A run in which something befalls one rank after its second iteration."""
    model = network().double()

    def progress(done: int, total: int, what: str) -> None:
        if done != 2 or ranks.rank != who:
            return
        if how in ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT"):
            os.kill(os.getpid(), getattr(signal, how))
        elif how == "exception":
            raise MemoryError("no memory is left")
        elif how == "not finite":
            with torch.no_grad():
                next(iter(model.parameters())).fill_(torch.nan)
        elif how == "changed":
            with torch.no_grad():
                next(iter(model.parameters()))[0, 0, 0, 0] += 1e-9
        elif how == "late":
            while ranks.signs.word_of(0) is None:  # type: ignore[attr-defined]
                time.sleep(0.05)

    if how == "late":
        signs.BEAT, signs.SILENT_BROKEN = 0.05, 2.0
    result = train(model, TRAIN, VAL, out=out, settings=SETTINGS, iterations=5, ranks=ranks, progress=progress)
    return result.stopped, result.iteration


def assert_goes_on(out: Path, tmp_path: Path) -> None:
    """What is saved is the state after two iterations, and a run goes on from it to that without a break."""
    assert state(out)[2] == 2 and not (out / NAME).exists()
    trained(ALONE, out, 5, resume=True)
    trained(ALONE, tmp_path / "alone", 5)
    assert_same_state(out, tmp_path / "alone")


@pytest.mark.parametrize(("count", "who"), [(2, 1), (3, 1), (3, 0)], ids=["1-of-2", "1-of-3", "0-of-3"])
def test_a_rank_that_is_killed_ends_the_run_and_those_left_save(tmp_path, count, who):
    ends = launch(count, ended, tmp_path / "run", "SIGKILL", who)
    assert ends[who].status == -signal.SIGKILL
    left = [end.error for rank, end in enumerate(ends) if rank != who]
    assert all(isinstance(error, Lost) and error.ranks == (who,) for error in left)
    assert all(f"rank {who} died (process" in str(error) for error in left)
    assert [getattr(error, "told", None) for error in left] == [
        False,
        *[True] * (count - 2),
    ]  # by the heir
    assert "state after iteration 2 is saved: continue with --resume" in str(left[0])
    assert_goes_on(tmp_path / "run", tmp_path)


@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_in_a_rank_ends_all_and_those_left_save(tmp_path, who):
    ends = launch(2, ended, tmp_path / "run", "exception", who)
    assert isinstance(ends[who].error, MemoryError)
    other = ends[1 - who].error
    assert isinstance(other, Lost) and other.ranks == (who,) and not other.told
    assert f"rank {who} ended: MemoryError: no memory is left. The state after iteration 2 is saved" in str(other)
    assert_goes_on(tmp_path / "run", tmp_path)


@pytest.mark.parametrize(("how", "who"), [("SIGINT", 1), ("SIGTERM", 0), ("SIGUSR1", 2)])
def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(tmp_path, how, who):
    assert values(launch(3, ended, tmp_path, how, who)) == [("interrupt" if how == "SIGINT" else how, 3)] * 3
    assert state(tmp_path)[2] == 3 and not (tmp_path / BEST).exists()


def test_divergence_of_one_rank_is_that_of_all(tmp_path):
    ends = launch(2, ended, tmp_path, "not finite", 1)
    assert all(isinstance(end.inside, FloatingPointError) for end in ends)
    assert str(ends[0].inside) == str(ends[1].inside)
    assert "training diverged at iteration 3 (inner lr 0.1, meta lr 0.005)" in str(ends[0].inside)
    assert isinstance(ends[0].error, FloatingPointError)
    assert isinstance(ends[1].error, Lost) and ends[1].error.told  # so that it is said once


def test_a_network_that_was_changed_on_one_rank_is_found_at_the_validation(tmp_path):
    ends = launch(3, ended, tmp_path, "changed", 1)
    assert ["rank 1 differs from rank 0 in " in str(end.inside) for end in ends] == [True] * 3, ends
    assert not (tmp_path / BEST).exists()


def test_a_rank_that_does_not_come_in_time_is_named(tmp_path):
    first, late = launch(2, ended, tmp_path, "late", 1, timeout=5.0)
    assert isinstance(first.error, Lost) and first.error.ranks == (1,) and not first.error.told
    assert "rank 1 lives and did not come: no answer within 5 s. The state after iteration 2" in str(first.error)
    assert isinstance(late.error, Lost) and late.error.told


def stopped(ranks: Ranks) -> None:
    """Rank 1 neither computes nor gives signs of life, as on a node that hangs; rank 0 ends it when all is over."""
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        ranks.total(1, lambda own: own.add_(1))
    finally:
        os.kill(json.loads(ranks.signs.beat_of(1))[1], signal.SIGKILL)  # type: ignore[attr-defined]


def test_a_rank_that_gives_no_sign_of_life_is_named():
    first, _ = launch(2, stopped, timeout=2.0)
    assert isinstance(first.error, Lost) and first.error.ranks == (1,)
    assert "rank 1 has given no sign of life for " in str(first.error)


def alone_first(ranks: Ranks) -> int:
    return ranks.first(lambda: dict[str, int]()["missing"]) if ranks.rank == 0 else ranks.first(int)


def test_what_fails_on_rank_0_alone_ends_the_others():
    first, second = launch(2, alone_first)
    assert isinstance(first.error, KeyError)
    assert isinstance(second.error, Lost) and "rank 0 ended: KeyError: 'missing'" in str(second.error)
    assert second.error.told


def interrupted(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_sigterm_that_a_dead_rank_brought_about_names_it():
    first, _ = launch(2, interrupted)
    assert isinstance(first.inside, KeyboardInterrupt)
    assert isinstance(first.error, Lost) and first.error.ranks == (1,) and "rank 1 died" in str(first.error)


def random_numbers(ranks: Ranks) -> list[float]:
    torch.manual_seed(3)
    ranks.own_random_numbers(3, 0)
    return torch.rand(2).tolist()


def test_random_numbers_differ_among_ranks_and_are_the_same_again():
    found = values(launch(3, random_numbers))
    assert found[0] == random_numbers(ALONE) and len({tuple(one) for one in found}) == 3
    assert values(launch(3, random_numbers)) == found


# One process alone, bad requests


def test_without_torchrun_nothing_begins(monkeypatch):
    monkeypatch.setattr(processes, "_Group", None)
    with processes.joined() as ranks:
        assert ranks is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes.joined() as ranks:
        assert ranks is ALONE and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "timeout", "words"),
    [("cuda:1", None, "device cuda:1: ranks do not share one"), ("cpu", "-1", r"timeout of ranks is -1\.0 s"),
     ("cpu", "0.2", r"rank 1 did not come within 0\.2 s")],
)  # fmt: skip
def test_what_ranks_cannot_be_asked(monkeypatch, device, timeout, words):
    import torch.distributed as dist

    store: Any = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    given = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    for name, value in {**given, "TORCHELASTIC_USE_AGENT_STORE": True, "LAMBDA_MAML_RANK_TIMEOUT": timeout}.items():
        if value is not None:
            monkeypatch.setenv(name, str(value))
    with pytest.raises((ValueError, Lost), match=words), processes.joined(device):
        pass
