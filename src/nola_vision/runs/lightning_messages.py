"""What Lightning prints and warns of, hidden where it is wrong or says nothing new here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what Lightning prints in every healthy run: tips, a device report, and advice that is wrong here."""
    loggers = [logging.getLogger(f"lightning.{n}") for n in ("pytorch.utilities.rank_zero", "fabric.utilities.seed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for advice in (
            ".*does not have many workers.*",  # workers cost more than they bring for a set kept in memory
            ".*in eval mode at the start of training.*",  # frozen batch norms are meant to be
            ".*treespec.*is deprecated.*",
            ".*Total length of `.*` across ranks is zero.*",  # no validation pool: the run reports it
            ".*The dirpath has changed from.*",  # `validate` and `test` write next to the run
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*Experiment logs directory .* exists and is not empty.*",
        ):
            warnings.filterwarnings("ignore", message=advice)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
