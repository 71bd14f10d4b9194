"""What an engine has yet to do: the runs without a completed row, those that another process is at, those lost once."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from nola_vision.runs import record, run_id
from nola_vision.runs.record import Row
from nola_vision.runs.store import ROW_FILE, BusyError, claim, find_row, write_row
from nola_vision.sweep.plan import RunSpec

TRIES = 2
HANG_SECONDS = 1800.0
FIRST_BATCH = 4  # times that, before the first batch
POLL_SECONDS = 0.5  # of an engine's loop
_ELSEWHERE_SECONDS = 2.0  # between two looks at a run that another process is at

Note = Callable[[RunSpec, Row | None], None]

_log = logging.getLogger(__name__)


class RunQueue:
    """The runs of some specs, until each has its row.

    An engine takes a run, and then says how it went: `settle`, `postpone` or `lose`.

    Args:
        specs: the runs.
        out: the folder of all runs.
        note: called with a spec when its run is taken, and with its row, an old one or a new one, when it has one.
    """

    def __init__(self, specs: Sequence[RunSpec], out: Path, note: Note) -> None:
        self._specs, self._out, self._note = specs, out, note
        self._began = time.time()
        self._waiting = deque(specs)
        self._later: list[tuple[float, RunSpec]] = []  # when to look again
        self._tries: Counter[tuple[tuple[str, str], int]] = Counter()
        self._rows: dict[tuple[str, str], Row] = {}
        self._told: set[tuple[str, str]] = set()

    @property
    def ended(self) -> bool:
        """Whether every run has its row."""
        return len(self._rows) == len({spec.key for spec in self._specs})

    def rows(self) -> list[Row]:
        """One row a spec, in their order."""
        return [self._rows[spec.key] for spec in self._specs]

    def folder(self, spec: RunSpec) -> Path:
        """Of a run."""
        return run_id.run_folder(self._out, spec.config, spec.stage)

    def take(self) -> RunSpec | None:
        """The next run to start, None where there is none now; one that has its row is settled by the way."""
        now = time.monotonic()
        self._waiting.extend(spec for due, spec in self._later if due <= now)
        self._later = [(due, spec) for due, spec in self._later if due > now]
        while self._waiting:
            spec = self._waiting.popleft()
            if not self.settled(spec):
                self._note(spec, None)
                return spec
        return None

    def settle(self, spec: RunSpec, ended: Row) -> None:
        """A run has ended, and its row is in its folder."""
        self._rows[spec.key] = ended
        self._note(spec, ended)

    def postpone(self, spec: RunSpec) -> None:
        """Another process is at a run: it is looked at again later."""
        if spec.key not in self._told:
            self._told.add(spec.key)
            _log.warning("another process is at the run in %s: its row is waited for", self.folder(spec))
        self._later.append((time.monotonic() + _ELSEWHERE_SECONDS, spec))

    def lose(self, spec: RunSpec, why: str, tries: int = TRIES) -> None:
        """What was doing a run is gone. It is tried again, and fails after so many tries of this kind."""
        self._tries[spec.key, tries] += 1
        if self._tries[spec.key, tries] < tries:
            self._waiting.appendleft(spec)
            return
        try:
            with claim(self.folder(spec)):
                if not self.settled(spec):  # lost after its row, or another sweep was at it too
                    lost = row_of_a_lost_run(spec, "failed", f"{why}, {tries} times")
                    write_row(self.folder(spec), lost)
                    self.settle(spec, lost)
        except BusyError:
            self.postpone(spec)

    def settled(self, spec: RunSpec) -> bool:
        """Whether a run has a row to stay: a completed one, or one of a failure since this queue began."""
        left = find_row(self.folder(spec))
        if left is None:
            return False
        if left.status == "completed" or (
            left.status == "failed" and (self.folder(spec) / ROW_FILE).stat().st_mtime > self._began
        ):
            self.settle(spec, left)
            return True
        return False


def row_of_a_lost_run(spec: RunSpec, status: record.Status, error: str) -> Row:
    """The row of a run whose process cannot write it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Row.of(spec.config, spec.stage, status, error=error, started=now, versions=record.environment())
