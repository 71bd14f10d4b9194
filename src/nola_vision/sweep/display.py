"""What a sweep prints: its plan as a table, a line per finished run, and the progress as a bar or as plain lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from nola_vision.common.progress import PlainLines, duration, is_live, say, time_left
from nola_vision.common.text import printable
from nola_vision.runs.record import Row
from nola_vision.runs.search_grid import trial_in_words
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.progress import EntryProgress, planned_seconds, remaining_seconds


def threads_warning(workers: int, threads: int, cores: int) -> str | None:
    """What to say if the threads of all workers are more than the cores: they would wait for each other."""
    if workers * threads <= cores:
        return None
    fits = [f"--workers {cores // threads}"] if threads <= cores and workers > 1 else []
    fits += [f"--threads {cores // workers}"] if workers <= cores else []
    if workers > cores and threads > 1 or not fits:
        fits.append(f"--workers {cores} --threads 1")
    each = f"{threads} {'thread' if threads == 1 else 'threads'}"
    used = f"{workers} workers x {each}" if workers > 1 else each
    return f"{used} on {cores} {'core' if cores == 1 else 'cores'} is slow: give {' or '.join(fits)}"


def plan_table(
    entries: Sequence[EntryProgress],
    workers: int | None,
    shard: tuple[int, int],
    shared: float = 0.0,
    sizes: Mapping[str, tuple[str, int]] | None = None,
) -> Table:
    """The plan as a table: runs of each method, those that are done, and the time that the others take.

    Args:
        entries: of the sweep.
        workers: runs at a time; None if a cluster decides.
        shard: which part of the final runs this is.
        shared: estimated seconds of what the runs of a worker share.
        sizes: of entries with byte budgets: the setting that was solved for, and the bytes of the file.
    """
    estimated = any(entry.estimated for entry in entries)
    names = ["size", "file,|bytes"] if sizes else []
    names += ["search|runs", "final|runs", "done", "seconds|per run", *(["time|left"] if estimated else [])]
    table = Table(Column("method", no_wrap=True), box=None, pad_edge=False)
    for name in names:  # with sizes, 80 columns have room for the methods' names if these have two lines
        table.add_column(name.replace("|", "\n" if sizes else " "), justify="left" if name == "size" else "right")
    for entry in entries:
        seconds = "-" if entry.seconds is None else f"{'~' if entry.estimated else ''}{entry.seconds:.1f}"
        left = None if entry.seconds is None else planned_seconds([entry], workers or 1)
        setting, size = (sizes or {}).get(entry.method, ("", None))
        shown = [setting, "-" if size is None else f"{size:,}"] if sizes else []
        cells = [entry.method, *shown, str(entry.search), str(entry.final), str(entry.done), seconds]
        table.add_row(*cells, *(["-" if left is None else duration(left)] if estimated else []))
    runs, done = sum(entry.runs for entry in entries), sum(entry.done for entry in entries)
    caption = f"{runs} runs, {done} done"
    if (seconds_left := planned_seconds(entries, workers or 1)) is not None:
        caption += f"; {time_left(seconds_left + shared)} "
        caption += f"with {workers} at a time" if workers else "one after another"
    caption += f"; shard {shard[0]} of {shard[1]} of the final runs" if shard[1] > 1 else ""
    table.caption = caption + ("\n~ is an estimate from a few timed steps" if estimated else "")
    return table


class SweepDisplay:
    """Prints the progress of a sweep while it is open as a context manager; `update` is the callback of an engine.

    Args:
        planned: all runs of the sweep.
        workers: runs at a time; None if a cluster decides: then the number of running ones.
        console: to print to.
        accuracy: the text for the accuracy of a run.
        best: the text for the best entry so far; empty before the first accuracy.
    """

    def __init__(
        self,
        planned: Sequence[RunSpec],
        workers: int | None,
        console: Console,
        accuracy: Callable[[Row], str],
        best: Callable[[Sequence[Row]], str],
    ) -> None:
        self._workers, self._accuracy, self._best = workers, accuracy, best
        self._left, self._count = Counter(spec.method for spec in planned), len(planned)
        self._ended: list[Row] = []
        self._running: set[tuple[str, str]] = set()
        self._live, self._lines = is_live(), PlainLines()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not self._live)
        self._task = self._bar.add_task("", total=self._count)

    def __enter__(self) -> Self:
        self._bar.start()
        if not self._live:
            say("the runs that are left start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, spec: RunSpec, row: Row | None) -> None:
        """Counts a run that has started (None) or has ended with a row."""
        if row is None:
            self._running.add(spec.key)
        else:
            before = "" if spec.key in self._running else " (completed before)"
            self._running.discard(spec.key)
            self._ended.append(row)
            self._left[spec.method] -= 1
            self.say(self._line(spec, row) + before)
        state = self._state()
        self._bar.update(self._task, completed=len(self._ended), description=state)
        if not self._live:
            self._lines.say(lambda: f"{len(self._ended)} of {self._count} runs ended, {state}")

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=not self._live)

    def _state(self) -> str:
        """Running (if displayed live) and failed runs, the best mean so far, and how long the remaining runs take."""
        parts = [f"{len(self._running)} running"] if self._live else []
        if failed := sum(row.status != "completed" for row in self._ended):
            parts.append(f"{failed} failed")
        if best := self._best(self._ended):
            parts.append(best)
        seconds = remaining_seconds(self._ended, self._left, self._workers or len(self._running))
        return ", ".join([*parts, *([] if seconds is None else [time_left(seconds)])])

    def _line(self, spec: RunSpec, row: Row) -> str:
        run = f"{spec.method} split {spec.split}" + (f" init {spec.init}" if spec.init is not None else "")
        if row.status != "completed":
            return printable(f"{run}: {row.status}, {row.error}")
        if spec.stage == "search":
            return trial_in_words(run, spec.searched, row)
        return f"{run}: {self._accuracy(row)}, {row.seconds_total:.1f} s"
