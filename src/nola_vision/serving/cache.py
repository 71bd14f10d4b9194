"""What is computed from adapter files, kept within a number of bytes; the least recently used goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

_LEAST = 4096


class ByteCache:
    """A mapping with a budget of bytes, for several threads.

    Args:
        budget: bytes of all values together. A larger value is not kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        """The value, or None."""
        with self._lock:
            if (found := self._values.get(key)) is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keeps a value of `size` bytes. Each counts for at least 4 KiB, so that their number is limited too."""
        size = max(size, _LEAST)
        with self._lock:
            self._drop(key)
            if size > self.budget:
                return
            self._values[key] = value, size
            self.used += size
            while self.used > self.budget:
                self._drop(next(iter(self._values)))

    def drop(self, key: Hashable) -> None:
        """Forgets a value, if it is there."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        if (found := self._values.pop(key, None)) is not None:
            self.used -= found[1]
