"""A bounded cache: what was used last stays."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["Bounded"]

Value = TypeVar("Value")


class Bounded(Generic[Value]):
    """At most `size` values by key; the one that was used the longest ago goes first. Threads may share it.

    cache = Bounded(2)
    cache.put("a", 1)
    cache.get("a"), cache.get("b")              # 1, None
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._known: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        """The key's value, None where there is none."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key]

    def put(self, key: Hashable, value: Value) -> None:
        """Keep a value, in place of the key's present one."""
        with self._lock:
            self._keep(key, value)

    def setdefault(self, key: Hashable, value: Value) -> Value:
        """The key's value; `value`, from now on, where there is none."""
        with self._lock:
            value = self._known.get(key, value)
            self._keep(key, value)
            return value

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._known.clear()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._known

    def __iter__(self) -> Iterator[Hashable]:
        """The keys, the last used at the end."""
        with self._lock:
            return iter(list(self._known))

    def _keep(self, key: Hashable, value: Value) -> None:
        self._known[key] = value
        self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
