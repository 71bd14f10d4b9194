"""Silences the log messages of libraries while they load a model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Sets loggers to the level ERROR; with the hub offline, for example, its client logs each of ten attempts.

    Levels are global, so one thread at a time is inside.
    """
    with _lock:
        loggers = [logging.getLogger(name) for name in names]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
