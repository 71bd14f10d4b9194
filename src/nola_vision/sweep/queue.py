"""Queue of pending runs: not yet completed, locked by another process, or waiting for a retry."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from nola_vision.runs import run_id
from nola_vision.runs.environment import environment
from nola_vision.runs.record import Row, Status
from nola_vision.runs.store import ROW_FILE, BusyError, find_row, lock_run, write_row
from nola_vision.sweep.plan import RunSpec

TRIES = 2
HANG_SECONDS = 1800.0
FIRST_BATCH = 4  # times as long as `HANG_SECONDS` may pass before a run's first batch
POLL_SECONDS = 0.5  # of an engine's loop
_LOCKED_SECONDS = 2.0  # until a run that another process has locked is tried again

RunCallback = Callable[[RunSpec, Row | None], None]

_log = logging.getLogger(__name__)


class RunQueue:
    """The runs of some specs, until each has a row.

    An engine takes a run, and then reports how it ended: `finish`, `postpone` or `crash`.

    Args:
        specs: the runs.
        out: the folder of all runs.
        callback: called with a spec and None when its run starts, and with its row, old or new, when it has ended.
    """

    def __init__(self, specs: Sequence[RunSpec], out: Path, callback: RunCallback) -> None:
        self._specs, self._out, self._callback = specs, out, callback
        self._began = time.time()
        self._waiting = deque(specs)
        self._later: list[tuple[float, RunSpec]] = []  # when to try again
        self._tries: Counter[tuple[tuple[str, str], int]] = Counter()
        self._rows: dict[tuple[str, str], Row] = {}
        self._warned: set[tuple[str, str]] = set()

    @property
    def ended(self) -> bool:
        """Whether every run has a row."""
        return len(self._rows) == len({spec.key for spec in self._specs})

    def rows(self) -> list[Row]:
        """One row per spec, in their order."""
        return [self._rows[spec.key] for spec in self._specs]

    def folder(self, spec: RunSpec) -> Path:
        """The folder of a run."""
        return run_id.run_folder(self._out, spec.config, spec.stage)

    def take(self) -> RunSpec | None:
        """The next run to start, or None if no run is waiting. Finishes runs that are already done on the way."""
        now = time.monotonic()
        self._waiting.extend(spec for due, spec in self._later if due <= now)
        self._later = [(due, spec) for due, spec in self._later if due > now]
        while self._waiting:
            spec = self._waiting.popleft()
            if not self.finish_if_done(spec):
                self._callback(spec, None)
                return spec
        return None

    def finish(self, spec: RunSpec, row: Row) -> None:
        """Reports that a run has ended, with the row in its folder."""
        self._rows[spec.key] = row
        self._callback(spec, row)

    def postpone(self, spec: RunSpec) -> None:
        """Puts back a run that another process has locked, to try it again later."""
        if spec.key not in self._warned:
            self._warned.add(spec.key)
            _log.warning("another process is running %s: waiting for its row", self.folder(spec))
        self._later.append((time.monotonic() + _LOCKED_SECONDS, spec))

    def crash(self, spec: RunSpec, reason: str, tries: int = TRIES) -> None:
        """Reports that the worker of a run died. The run is tried again; after `tries` such crashes it has failed."""
        self._tries[spec.key, tries] += 1
        if self._tries[spec.key, tries] < tries:
            self._waiting.appendleft(spec)
            return
        try:
            with lock_run(self.folder(spec)):
                if not self.finish_if_done(spec):  # the worker may have died after the row, or another sweep ran it
                    row = crashed_row(spec, "failed", f"{reason}, {tries} times")
                    write_row(self.folder(spec), row)
                    self.finish(spec, row)
        except BusyError:
            self.postpone(spec)

    def finish_if_done(self, spec: RunSpec) -> bool:
        """Finishes a run with a final row: completed, or failed since this queue began. Returns whether it has one."""
        row = find_row(self.folder(spec))
        if row is None:
            return False
        if row.status == "completed" or (
            row.status == "failed" and (self.folder(spec) / ROW_FILE).stat().st_mtime > self._began
        ):
            self.finish(spec, row)
            return True
        return False


def crashed_row(spec: RunSpec, status: Status, error: str) -> Row:
    """The row of a run whose worker can no longer write it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Row.of(spec.config, spec.stage, status, error=error, started=now, versions=environment())
