"""What is read and computed from adapter files, kept within a number of bytes; the least recently used goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

_LEAST = 4096


class ByteCache:
    """A mapping with a budget of bytes, for several threads.

    What was computed gives way to files as long as these take at most half of the budget: they are small next to it,
    and slow to read again. Values are not removed one by one, since what nobody asks for goes first.

    Args:
        budget: bytes of all values together. A larger value is not kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._files, self._computed = _Values(), _Values()
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes of all values together."""
        return self._files.used + self._computed.used

    def get(self, key: Hashable) -> Any:
        """The value, or None."""
        with self._lock:
            for values in (self._files, self._computed):
                if key in values:
                    values.move_to_end(key)
                    return values[key][0]
        return None

    def peek(self, key: Hashable) -> Any:
        """The value, or None; it does not count as a use."""
        with self._lock:
            return (self._files.get(key) or self._computed.get(key) or (None,))[0]

    def put(self, key: Hashable, value: Any, size: int, file: bool = False) -> None:
        """Keeps a value.

        Args:
            key: by which `get` finds it.
            value: any.
            size: its bytes. Each counts for at least 4 KiB, so that the number of values is limited too.
            file: it is a file's content.
        """
        size = max(size, _LEAST)
        with self._lock:
            values = self._files if file else self._computed
            values.drop(key)
            if size > self.budget:
                return
            values[key] = value, size
            values.used += size
            while self.used > self.budget:
                values = self._files if self._files.used > self.budget // 2 else self._computed
                values.drop(next(iter(values)))


class _Values(OrderedDict[Hashable, tuple[Any, int]]):
    """Values with their bytes, the least recently used first."""

    used = 0

    def drop(self, key: Hashable) -> None:
        if (found := self.pop(key, None)) is not None:
            self.used -= found[1]
