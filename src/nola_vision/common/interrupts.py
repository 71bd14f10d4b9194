"""Ctrl-C at moments where it cannot lose a result."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

_SAME_SECONDS = 1.0  # a terminal and a sweep's engine both send the same Ctrl-C


class Interrupts:
    """Defers SIGINT to the end of the block, except within `allowed`, where the previous handler is called at once.

    Inside `allowed` the handler raises KeyboardInterrupt and every later signal is deferred, so that the code that
    records the interruption is not interrupted itself. A signal that comes more than a second later and still inside
    `allowed` is passed on as well: the first exception may have been swallowed (Python ignores one raised in
    `__del__`). Has no effect outside the main thread and where SIGINT is ignored.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._open = self._pending = False
        self._raised = -_SAME_SECONDS

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and callable(found := signal.getsignal(signal.SIGINT)):
            self._previous = found
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if self._pending and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Lets SIGINT interrupt this block; one that came before interrupts it now."""
        self._open = True
        try:
            if self._pending:
                self._pending = False
                raise KeyboardInterrupt
            yield
        finally:
            self._open = False
            if self._previous is not None:
                signal.signal(signal.SIGINT, self._handle)  # Lightning ignores SIGINT once it has been interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._open or time.monotonic() - self._raised < _SAME_SECONDS:
            self._pending = True
            return
        self._raised = time.monotonic()
        try:
            self._previous(number, frame)
        finally:
            if (found := signal.getsignal(signal.SIGINT)) != self._handle:  # a worker of a sweep handles one only
                self._previous = found if callable(found) else self._ignore
                signal.signal(signal.SIGINT, self._handle)

    @staticmethod
    def _ignore(number: int, frame: FrameType | None) -> None:
        """For a previous handler that has switched SIGINT off."""
