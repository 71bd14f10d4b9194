"""How much a service holds at once, in images or bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nola_vision.serving.http.errors import busy


class Budget:
    """A number of images or bytes that may be held at once. Used by the event loop's thread only.

    Args:
        most: the number.
        what: for messages, such as `images`.
    """

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self._held = 0

    def take(self, count: int) -> None:
        """Adds to what is held.

        Raises:
            RequestError: 503: there would be too much.
        """
        if self._held + count > self._most:
            raise busy(f"too many {self._what} are waiting: try again later")
        self._held += count

    def give_back(self, count: int) -> None:
        self._held -= count

    @contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Holds a number during the block.

        Raises:
            RequestError: as `take`.
        """
        self.take(count)
        try:
            yield
        finally:
            self.give_back(count)
