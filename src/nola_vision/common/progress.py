"""Progress as plain lines of text, and the remaining time. Does not import torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import parent_process
from statistics import median

from nola_vision.common.text import printable

LINE_SECONDS = 10.0  # at least, between two lines about the same work


def say(text: str) -> None:
    """Writes one line to stdout at once."""
    print(printable(text), flush=True)


def say_aside(text: str) -> None:
    """Writes one line to stderr at once: for verbs whose stdout is read by programs."""
    print(f"nola-vision: {printable(text)}", file=sys.stderr, flush=True)


def say_start(verb: str) -> None:
    """Reports that a verb starts to import torch, which takes seconds; silent if torch is imported already."""
    if "torch" not in sys.modules:
        say_aside(f"{verb} starts: importing PyTorch")


def is_live() -> bool:
    """Whether a progress bar can be drawn on stdout: it is a terminal, or a notebook."""
    from rich.console import Console

    console = Console()
    terminal = sys.stdout.isatty() and not console.is_dumb_terminal  # `is_terminal` is true of a pipe by FORCE_COLOR
    return terminal or console.is_jupyter


class PlainLines:
    """Prints at most one line per `LINE_SECONDS`; the first one `LINE_SECONDS` after construction.

    Args:
        clock: monotonic seconds.
        say: writes a line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] = say) -> None:
        self._clock, self._say = clock, say
        self._last = clock()

    def say(self, text: Callable[[], str]) -> None:
        """Prints what `text` returns, if it is time for a line."""
        if (now := self._clock()) - self._last >= LINE_SECONDS:
            self._last = now
            self._say(text())


class PlainCount:
    """Progress lines with a count: `testing: 1,200 of 5,000 images, about 40 s left`.

    Args:
        what: the work, such as `testing`.
        unit: what is counted, in the plural.
        clock, say: as in `PlainLines`.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = say,
    ) -> None:
        self._what, self._unit, self._clock = what, unit, clock
        self._began = clock()
        self._lines = PlainLines(clock, say)

    def show(self, done: int, total: int) -> None:
        """Prints how many are done, if it is time for a line."""
        self._lines.say(lambda: f"{self._what}: {done:,} of {total:,} {self._unit}{self._left(done, total)}")

    def _left(self, done: int, total: int) -> str:
        seconds = self._clock() - self._began
        return f", {time_left(seconds * (total - done) / done)}" if 0 < done < total else ""


def count_aside(what: str, unit: str) -> PlainCount:
    """A `PlainCount` on stderr; silent in a worker process, so that lines of several processes do not mix."""
    return PlainCount(what, unit, say=say_aside if parent_process() is None else lambda line: None)


def duration(seconds: float) -> str:
    """A readable duration: `40 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 and whole % 60 else f"{round(whole / 60)} min"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def time_left(seconds: float) -> str:
    """`about 3 min 20 s left`."""
    return f"about {duration(seconds)} left"


def seconds_left(left: Mapping[str, int], finished: Mapping[str, Sequence[float]], workers: int = 1) -> float | None:
    """Estimates how long the remaining runs take.

    Args:
        left: the number of runs to do, by method.
        finished: the seconds of each finished run, by method.
        workers: runs at a time.

    Returns:
        The sum over the runs left of the median seconds of their method's finished runs (of all finished runs, if
        there are none of the method), divided by the workers; None before the first run has finished.
    """
    every = [seconds for runs in finished.values() for seconds in runs]
    if not every:
        return None
    total = sum(count * median(finished.get(method) or every) for method, count in left.items())
    return total / max(1, min(workers, sum(left.values())))


def let_idle_threads_sleep() -> None:
    """Makes threads that wait for other threads sleep instead of spin, unless the environment sets the policy.

    By default OpenMP threads spin for a while. Where other processes use the cores, spinning threads slow down the
    threads that they wait for, and a training step takes many times as long. Results do not change. OpenMP reads the
    variables when torch is imported, so call this before; child processes inherit them.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ.update(_WAITING)


_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}  # GNU's, and Intel's and LLVM's
