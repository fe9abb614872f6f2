"""One run at a time writes into a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lambda_kernels.files import NO_LOCKS, is_at

from .say import say_once

NAME = ".lock"
"""The file in the folder; it is there as long as the run."""


@contextmanager
def locked(folder: str | Path, what: str) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if absent, as long as the block lasts. One that was made and stays
    empty is removed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(folder, "train"):
    ...     os.listdir(folder)
    ['.lock']

    what: the name of the run, for the one that is refused. The lock is the operating system's (flock; NFS keeps it for
    all of its clients), so that it ends with its process, however that ends. A file system without locks is said once.

    Raises:
        ValueError: another run holds the folder; the message names it, its process and its host.
    """
    path = Path(folder) / NAME
    is_new = not path.parent.exists()
    descriptor = _take(path)
    try:
        text = json.dumps({"run": what, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # the run wrote into it
                path.parent.rmdir()


def _take(path: Path) -> int:
    """The open file, locked; one that its run has just removed is left alone."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the folder was new to a run that has just been refused, and is gone with it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                say_once(f"{path.parent}: the file system has no locks ({error.strerror}): start no second run there")
                return descriptor
            told = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise ValueError(f"{path.parent}: {_holder(told)}") from error
            raise
        if is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _holder(told: bytes) -> str:
    end = "wait for its end, or give another folder"
    try:
        found = json.loads(told)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f"{found['run']} writes here since {since} (process {found['pid']} on {found['host']}): {end}"
    except (ValueError, KeyError, TypeError):
        return f"another run writes here: {end}"
