"""What a run leaves in its folder, and how it ends: metrics, signals, a full disk, kill -9, other images."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import one_path
import pytest
import torch
from machine import fresh
from small_runs import TRAIN, VAL, assert_same_bits, image_set, network, run, small, state

from lambda_maml import checkpoint, cli, data, outer
from lambda_maml import train as train_module
from lambda_maml.ahead import Ahead
from lambda_maml.metrics import METRICS, Pace
from lambda_maml.stopping import stoppable
from lambda_maml.train import BEST, LAST, train

pytestmark = pytest.mark.usefixtures("one_thread")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    times = ("seconds", "tasks_per_second")
    return [{key: value for key, value in line.items() if key not in times} for line in lines(folder)]


def test_metrics_have_a_line_per_interval_and_per_validation(tmp_path: Path) -> None:
    losses = []

    def progress(done: int, total: int, what: str) -> None:
        losses.append(float(what.split("loss ")[1].split(",")[0]))
        assert " tasks/s, " in what and what.split(" tasks/s, ")[1].split(" left")[0].endswith((" s", "min"))

    result = run(tmp_path, 6, log_every=2, progress=progress)
    assert [(line["kind"], line["iteration"]) for line in lines(tmp_path)] == [
        ("train", 2), ("validation", 3), ("train", 4), ("train", 6), ("validation", 6)
    ]  # fmt: skip
    first, validation, *_ = lines(tmp_path)
    assert first["loss"] == pytest.approx(sum(losses[:2]) / 2, abs=1e-3) and first["tasks_per_second"] > 0
    assert validation["accuracy"] == result.history[0].accuracy and validation["ci95"] == result.history[0].ci95
    assert validation["train_loss"] == pytest.approx(sum(losses[:3]) / 3, abs=1e-3)


def test_metrics_of_a_resumed_run_are_those_of_one_without_a_break(tmp_path: Path) -> None:
    run(tmp_path / "whole", 7, log_every=2)

    def stop(done: int, total: int, what: str) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    run(tmp_path / "parts", 7, log_every=2, progress=stop)
    with (tmp_path / "parts" / METRICS).open("a") as file:  # what a killed run left behind its last saved state
        for line in ({"kind": "train", "iteration": 6, "loss": 1.0}, {"kind": "validation", "iteration": 5}):
            file.write(json.dumps(line) + "\n")
        file.write('{"kind": "tra')
    run(tmp_path / "parts", 7, log_every=2, resume=True)
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    run(tmp_path / "parts", 1, log_every=1, overwrite=True)
    assert [line["iteration"] for line in lines(tmp_path / "parts")] == [1, 1]


def test_time_left_is_told_in_words() -> None:
    pace = Pace(tasks=4)
    pace._seconds.append(2.0)
    assert pace.tasks_per_second == 2
    assert [pace.left(n) for n in (10, 100, 6100)] == ["20 s left", "3 min left", "3 h 23 min left"]
    assert pace.left(6100, minutes=1.5) == "2 min left" and pace.left(6100, minutes=0.5) == "30 s left"


def test_tensorboard_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            got.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            got.append((name, value, iteration))

        def close(self) -> None:
            got.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(tmp_path, 3, log_every=2, tensorboard=True)
    loss, accuracy = lines(tmp_path)[0]["loss"], lines(tmp_path)[1]["accuracy"]
    assert got[0] == (str(tmp_path), 1) and got[-1] == "closed"
    assert ("train/loss", loss, 2) in got and ("validation/accuracy", accuracy, 3) in got


def test_tensorboard_that_is_not_installed_is_said_before_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match="TensorBoard is not installed .*pip install tensorboard, or leave --tensorboard"
    ):
        run(tmp_path / "out", 3, tensorboard=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP"), (signal.SIGUSR1, "SIGUSR1")],
    ids=["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"],
)
def test_a_signal_saves_and_ends_the_run(number: signal.Signals, reason: str, tmp_path: Path) -> None:
    def send(done: int, total: int, what: str) -> None:
        if done == 4:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    run(tmp_path / "whole", 6)
    first = run(tmp_path / "parts", 6, progress=send)
    assert (first.stopped, first.iteration, state(tmp_path / "parts")[2]) == (reason, 4, 4)
    assert signal.getsignal(number) is handler
    assert run(tmp_path / "parts", 6, model=network(seed=9), resume=True).stopped == "iterations"
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_in_a_validation_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(val_tasks=64)
    run(tmp_path / "whole", 6, settings)
    evaluate, seen = train_module.evaluate, []  # type: ignore[attr-defined]

    def counted(*args: Any, progress: Callable[..., None], **options: Any) -> Any:
        def told(done: int, total: int, what: str) -> None:
            seen.append(done)
            torch.rand(1)
            os.kill(os.getpid(), signal.SIGTERM)
            progress(done, total, what)

        return evaluate(*args, progress=told, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", counted)
        result = run(tmp_path / "parts", 6, settings)
    assert seen == [16] and (result.stopped, result.iteration, result.history) == ("SIGTERM", 3, [])
    run(tmp_path / "parts", 6, settings, resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    assert torch.equal(state(tmp_path / "whole")[0]["random"], state(tmp_path / "parts")[0]["random"])


def test_ctrl_c_stops_what_a_shell_began_in_the_background_and_nohup_is_kept() -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason is None
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.reason == "interrupt"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_the_command_ends_with_the_signals_status(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gradient = outer.meta_gradient

    def signalled(*args: Any, **options: Any) -> float:
        os.kill(os.getpid(), number)
        return gradient(*args, **options)

    monkeypatch.setattr(train_module, "meta_gradient", signalled)
    options = ["--width", "4", "--steps", "1", "--query", "2", "--val-tasks", "2"]
    assert cli.run(["train", "--out", str(tmp_path), *options]) == status
    assert "at iteration 1 and saved; continue with --resume" in capsys.readouterr().err
    assert state(tmp_path)[2] == 1


def test_a_run_killed_at_twenty_moments_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    fresh("import sys, killed; killed.twenty_times(sys.argv[1])", str(tmp_path), PYTHONPATH=path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert_same_bits(whole, parts)
    assert timeless(whole) == timeless(parts)
    killed.same_best(whole, parts)


def test_a_killed_selection_goes_on_and_a_killed_demo_begins_anew(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    for kind, how_far in (("selection", "evaluated"), ("demo", "iterations")):
        code = f"import sys, pathlib, killed as k; k.killed(pathlib.Path(sys.argv[1]), k.{kind}, k.{how_far}, 4)"
        fresh(code, str(tmp_path / kind), PYTHONPATH=path)
        whole, parts = tmp_path / kind / "whole", tmp_path / kind / "parts"
        assert killed.scores(whole / "pattern.json") == killed.scores(parts / "pattern.json")
    killed.same_best(whole, parts)


def test_who_reads_a_path_that_threads_and_processes_write_finds_no_part(tmp_path: Path) -> None:
    one_path.all_processes(tmp_path, 2)
    kind = one_path.KINDS[0]
    (tmp_path / kind.name).write_text("[3, 3]")
    with pytest.raises(AssertionError, match="a part of a file"):
        one_path.seen(kind, tmp_path / kind.name)


def test_what_killed_processes_left_half_written_is_removed(tmp_path: Path) -> None:
    part = f"part-{'0a' * 8}"
    left = [f".last.{part}.safetensors", f".best.{part}.safetensors", f".best.{part}.json", f".metrics.{part}.jsonl"]
    others = [".last.mine.safetensors", f".other.{part}.safetensors"]
    for name in [*left, *others]:
        (tmp_path / name).write_text("half")
    run(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.glob(".*")) == others


def test_a_full_disk_names_the_file_and_leaves_the_older_one(tmp_path: Path) -> None:
    run(tmp_path, 3)
    before = (tmp_path / LAST).read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path / LAST}: cannot be written .*before is still there"):
            run(tmp_path, 6, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / LAST).read_bytes() == before and checkpoint.load(tmp_path / BEST)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert run(tmp_path, 6, resume=True).iteration == 6


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / METRICS).mkdir()
    with pytest.raises(OSError, match=METRICS):
        run(tmp_path, 3)
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(
        OSError, match="a.safetensors: cannot be written .No space left on device.*no earlier one"
    ) as told:
        checkpoint.save(tmp_path / "a.safetensors", network(), {})
    assert told.value.errno == errno.ENOSPC and not list(tmp_path.glob(".*"))


def test_other_images_of_the_same_name_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 3)
    pixels = TRAIN.images.copy()
    pixels[-1, 3, 3] ^= 1
    fewer = image_set("train", classes=11)
    renamed = data.ImageSet("pictures", "train", TRAIN.images, TRAIN.counts, ("other", *TRAIN.class_names[1:]),
                            TRAIN.mean, TRAIN.std)  # fmt: skip
    changed = data.ImageSet("pictures", "train", pixels, TRAIN.counts, TRAIN.class_names, TRAIN.mean, TRAIN.std)
    for other, words in ((changed, "12 classes, 96 images"), (fewer, "this one 11 classes, 88"), (renamed, "names ")):
        with pytest.raises(ValueError, match=f"the run to resume has images of training 12 classes.*{words}"):
            train(network(), other, VAL, out=tmp_path, settings=small(), iterations=4, resume=True)
    with pytest.raises(ValueError, match="images of validation 12 classes"):
        train(network(), TRAIN, fewer, out=tmp_path, settings=small(), iterations=4, resume=True)
    tensors, meta = checkpoint.read_tensors(tmp_path / LAST)
    del meta["run"]["images"], meta["run"]["settings"]["learn_lr"]  # as an earlier version wrote it
    checkpoint.write_tensors(tmp_path / LAST, tensors, meta)
    assert run(tmp_path, 4, resume=True).iteration == 4


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("Unable to allocate 2 GiB"),
     RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 8 B")],
    ids=["cuda", "numpy", "cpu"],
)  # fmt: skip
def test_a_meta_batch_that_does_not_fit_says_what_would(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> float:
        raise error

    monkeypatch.setattr(train_module, "meta_gradient", fails)
    words = r"2 tasks of 3 support and 6 query images do not fit in memory at iteration 1 .*--one-by-one.*--meta-batch"
    with pytest.raises(RuntimeError, match=words):
        run(tmp_path, 3)
    monkeypatch.setattr(train_module, "meta_gradient", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="^other$"):
        run(tmp_path, 3)


def test_the_next_meta_batch_is_made_while_this_one_computes(tmp_path: Path) -> None:
    begun = threading.Event()

    def make(k: int) -> tuple[int, str]:
        if k == 1:
            begun.set()
        return k, threading.current_thread().name

    with Ahead(make, end=3) as ahead:
        assert ahead.take(0)[0] == 0
        assert begun.wait(60)  # without anybody taking it
        assert [ahead.take(k)[0] for k in (1, 2)] == [1, 2]
        assert ahead.take(0)[1].startswith("lambda_maml-ahead")
    assert not [t for t in threading.enumerate() if t.name.startswith("lambda_maml-ahead")]


def test_a_fault_in_sampling_comes_through_and_the_thread_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = data.sample_tasks

    def fails(dataset: data.ImageSet, n: int, **options: Any) -> list[data.Task]:
        if options.get("first") == 4:
            raise KeyError("the third meta-batch")
        return sample(dataset, n, **options)

    monkeypatch.setattr(data, "sample_tasks", fails)
    with pytest.raises(KeyError, match="the third meta-batch"):
        run(tmp_path, 6)
    assert not [t for t in threading.enumerate() if t.name.startswith("lambda_maml-ahead")]
