"""One run at a time in a folder: the second is refused, and a run that was killed keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from machine import PATIENCE
from ranks import CONTEXT
from small_runs import run

from lambda_maml import cli, say
from lambda_maml.lock import NAME, locked


def hold(folder: Path, held: Any) -> None:
    with locked(folder, "train"):
        held.set()
        threading.Event().wait()


def test_a_second_run_into_the_folder_is_refused_until_the_first_is_dead(tmp_path, capsys):
    run(tmp_path, 1)
    files = sorted(path.name for path in tmp_path.iterdir())
    held = CONTEXT.Event()
    first = CONTEXT.Process(target=hold, args=(tmp_path, held))
    first.start()
    assert held.wait(PATIENCE)
    words = rf"{tmp_path}: train writes here since .* \(process {first.pid} on {socket.gethostname()}\): wait"
    with pytest.raises(ValueError, match=words):
        run(tmp_path, 2, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, *files]
    assert cli.run(["select", str(tmp_path / "best.safetensors")]) == 2
    assert f"process {first.pid} on" in capsys.readouterr().err
    first.kill()
    first.join(PATIENCE)
    assert (tmp_path / NAME).exists()  # nobody removed it, and it keeps nobody out
    assert run(tmp_path, 2, resume=True).iteration == 2
    assert not (tmp_path / NAME).exists()


def test_one_process_is_refused_its_own_folder_and_gets_it_again(tmp_path):
    with locked(tmp_path / "new", "select"):
        with pytest.raises(ValueError, match=rf"select writes here since .* \(process {os.getpid()} on"):
            with locked(tmp_path / "new", "train"):
                raise AssertionError("two runs in one folder")
        with locked(tmp_path, "train"):
            pass
    assert not (tmp_path / "new").exists()  # it was made for the lock, and nothing was written into it
    with pytest.raises(KeyError), locked(tmp_path / "new", "train"):
        raise KeyError
    with locked(tmp_path / "new", "train"):
        pass


def test_a_lock_whose_file_was_just_removed_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, the run that held it may end and remove it, and a third one begin."""
    flock, calls = fcntl.flock, list[int]()

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / NAME).unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path, "train"):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="train writes here"), locked(tmp_path, "train"):
            pass


def test_a_lock_that_says_nothing_is_one_all_the_same(tmp_path):
    with locked(tmp_path, "train"):
        (tmp_path / NAME).write_text("")
        with pytest.raises(ValueError, match="another run writes here: wait for its end"), locked(tmp_path, "train"):
            pass


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, caplog):
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(say, "_said", set())
    with locked(tmp_path, "train"), locked(tmp_path / "b", "train"):
        pass
    assert [record.getMessage() for record in caplog.records][0].endswith(
        "(No locks available): start no second run there"
    )
