"""How far a sweep is: the runs of each entry, those that are completed, and the time that the others take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.progress import seconds_left
from nola_vision.runs import run_id
from nola_vision.runs.record import Row, count_once
from nola_vision.sweep.plan import final_specs, search_specs, shard_of
from nola_vision.sweep.search import choose_settings


@dataclass(frozen=True)
class EntryProgress:
    """The runs of one entry.

    `seconds` is the median of its completed runs; before the first None, or an estimate from timed steps, `estimated`.
    """

    method: str
    search: int
    final: int
    done: int
    seconds: float | None
    estimated: bool = False

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return self.search + self.final

    @property
    def left(self) -> int:
        """How many runs are not completed."""
        return self.runs - self.done


def entry_progress(
    config: Mapping[str, Any],
    splits: Sequence[int],
    inits: Sequence[int],
    rows: Iterable[Row],
    shard: tuple[int, int] = (1, 1),
    final: Sequence[str] | None = None,
) -> list[EntryProgress]:
    """The progress of each entry of a sweep, from the rows so far; `final` names those with final runs, if not all."""
    rows = count_once(rows)
    completed = [row for row in rows if row.status == "completed"]
    hashes = {(row.method, row.run_hash) for row in completed}
    methods = list(run_id.need(config, "methods"))
    finals = final_specs(config, splits, inits, methods if final is None else final, {})
    mine = {(s.method, s.split, s.init) for s in shard_of(finals, shard)}
    found = []
    for method in methods:
        search = search_specs(config, [method]) if run_id.searched_at(config, method) == method else []
        try:
            chosen = choose_settings(config, rows, [method])
        except NolaVisionError:  # its search has not ended
            chosen = {}
        every = final_specs(config, splits, inits, [method], chosen)
        own = [spec for spec in every if (spec.method, spec.split, spec.init) in mine]
        seconds = [row.seconds_total for row in completed if row.method == method and row.seconds_total is not None]
        done = sum((method, spec.run_hash) in hashes for spec in (*search, *(own if chosen else ())))
        found.append(EntryProgress(method, len(search), len(own), done, median(seconds) if seconds else None))
    return found


def planned_seconds(entries: Sequence[EntryProgress], workers: int) -> float | None:
    """How long the runs that are not completed will take; None before the first run of all is completed."""
    left = {entry.method: entry.left for entry in entries}
    finished = {entry.method: [entry.seconds] for entry in entries if entry.seconds is not None}
    return seconds_left(left, finished, workers)


def remaining_seconds(ended: Sequence[Row], left: Counter[str], workers: int) -> float | None:
    """How long the remaining runs will take; None before the first completed run, and after the last one.

    Args:
        ended: the rows of this sweep so far.
        left: the number of remaining runs of each method.
        workers: runs at a time.
    """
    finished: dict[str, list[float]] = defaultdict(list)
    for row in ended:
        if row.status == "completed" and row.seconds_total is not None:
            finished[row.method].append(row.seconds_total)
    return seconds_left(left, finished, workers) if left.total() else None
