"""What an engine has yet to do: the runs without a completed row, those that another process is at, those lost once."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from nola_vision.results import identity
from nola_vision.results.row import Row
from nola_vision.results.store import find_completed, write_row
from nola_vision.sweep.plan import RunSpec

TRIES = 2
_ELSEWHERE_SECONDS = 2.0  # between two looks at a run that another process is at

Note = Callable[[RunSpec, Row | None], None]
Key = tuple[str, str]  # method's name and run hash: equal settings under two names are two runs

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
        self._waiting = deque(specs)
        self._later: list[tuple[float, RunSpec]] = []  # when to look again
        self._tries: Counter[tuple[Key, int]] = Counter()
        self._rows: dict[Key, Row] = {}
        self._told: set[Key] = set()

    @property
    def ended(self) -> bool:
        """Whether every run has its row."""
        return len(self._rows) == len({_key(spec) for spec in self._specs})

    def rows(self) -> list[Row]:
        """One row a spec, in their order."""
        return [self._rows[_key(spec)] for spec in self._specs]

    def folder(self, spec: RunSpec) -> Path:
        """Of a run."""
        return identity.run_folder(self._out, spec.config, spec.stage)

    def take(self) -> RunSpec | None:
        """The next run to start, None where there is none now; one that has a completed row is settled by the way."""
        now = time.monotonic()
        self._waiting.extend(spec for due, spec in self._later if due <= now)
        self._later = [(due, spec) for due, spec in self._later if due > now]
        while self._waiting:
            spec = self._waiting.popleft()
            if not self._settled(spec):
                self._note(spec, None)
                return spec
        return None

    def settle(self, spec: RunSpec, row: Row) -> None:
        """A run has ended, and its row is in its folder."""
        self._rows[_key(spec)] = row
        self._note(spec, row)

    def postpone(self, spec: RunSpec) -> None:
        """Another process is at a run: it is looked at again later."""
        if _key(spec) not in self._told:
            self._told.add(_key(spec))
            _log.warning("another process is at the run in %s: its row is waited for", self.folder(spec))
        self._later.append((time.monotonic() + _ELSEWHERE_SECONDS, spec))

    def lose(self, spec: RunSpec, why: str, tries: int = TRIES) -> None:
        """What was doing a run is gone. It is tried again, and fails after so many tries of this kind."""
        if self._settled(spec):  # lost after its row, or another sweep was at it too
            return
        self._tries[_key(spec), tries] += 1
        if self._tries[_key(spec), tries] < tries:
            self._waiting.appendleft(spec)
            return
        row = Row.of(spec.config, spec.stage, "failed", error=f"{why}, {tries} times")
        self.folder(spec).mkdir(parents=True, exist_ok=True)
        write_row(self.folder(spec), row)
        self.settle(spec, row)

    def _settled(self, spec: RunSpec) -> bool:
        row = find_completed(self.folder(spec))
        if row is not None:
            self.settle(spec, row)
        return row is not None


def _key(spec: RunSpec) -> Key:
    return spec.method, spec.run_hash
