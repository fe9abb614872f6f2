"""Files that are either whole or absent: everything is written beside its place and renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

__all__ = ["NO_LOCKS", "atomic", "is_at", "one_at_a_time", "remove_leftovers"]

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What flock says on a file system that has no locks."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a new, empty file in the folder of `path` (made if absent); rename it to `path` if the block succeeds.

    >>> with atomic(folder / "a.json") as part:
    ...     _ = part.write_text("{}")

    The new file's name keeps the suffix of `path`, its mode is the umask's, and it is on the disk before it is renamed.
    Threads, processes and machines may write to one `path` at a time: a reader finds one of their files, whole. If the
    block raises, the new file is removed and `path` stays as it was. What a killed process left is removed by the next
    one that writes to `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    part, descriptor = _new(path)
    try:
        yield part
        os.fsync(descriptor)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        os.close(descriptor)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def one_at_a_time(path: str | Path) -> Iterator[None]:
    """Let others that read `path` and write it anew within such a block wait until this one ends.

    >>> with one_at_a_time(folder / "a.json"), atomic(folder / "a.json") as part:
    ...     _ = part.write_text("{}")

    The lock is that of the folder. On a file system that has none for folders, as NFS, nobody waits.
    """
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (*NO_LOCKS, errno.EBADF):
                raise
        yield
    finally:
        os.close(descriptor)


def _new(path: Path) -> tuple[Path, int]:
    """A file that nobody has, open and locked."""
    while True:
        part = path.with_name(f".{path.stem}.part-{secrets.token_hex(8)}{path.suffix}")
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process takes it for a leftover
            os.close(descriptor)
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                part.unlink(missing_ok=True)
                raise
        if is_at(descriptor, part):
            return part, descriptor
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still lies at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def remove_leftovers(path: Path) -> None:
    """Remove the new files beside `path` that `atomic` made in processes that are dead: their locks are free."""
    stem, suffix = escape(path.stem), escape(path.suffix)
    for part in path.parent.glob(f".{stem}.part-{'[0-9a-f]' * 16}{suffix}"):
        with suppress(OSError):  # it is gone, is no file of ours, or has no locks
            descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(descriptor)
