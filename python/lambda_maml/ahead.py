"""The next meta-batch is made in a thread while this one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Ahead"]

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make(0)`, `make(1)`, ... to `make(end - 1)`, each begun when the one before is taken.

    What `make` raises, `take` raises. The thread ends with the `with` block.

    >>> with Ahead(lambda k: k * k, end=3) as squares:
    ...     [squares.take(k) for k in range(3)]
    [0, 1, 4]
    """

    def __init__(self, make: Callable[[int], T], end: int) -> None:
        self._make, self._end = make, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lambda_maml-ahead")
        self._next: tuple[int, Future[T]] | None = None

    def take(self, k: int) -> T:
        """What `make(k)` gives."""
        made = self._next[1] if self._next is not None and self._next[0] == k else self._pool.submit(self._make, k)
        value = made.result()
        self._next = (k + 1, self._pool.submit(self._make, k + 1)) if k + 1 < self._end else None
        return value

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
