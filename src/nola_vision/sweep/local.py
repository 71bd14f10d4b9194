"""The local engine: one process a slot, doing one run after another; one that dies costs its run one retry."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from nola_vision.results import identity
from nola_vision.results.row import Row
from nola_vision.results.store import find_completed, write_row
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.worker import ALIVE, BUSY, Answer, serve

TRIES = 2
_POLL_SECONDS = 0.5
_ELSEWHERE_SECONDS = 2.0  # between two looks at a run that another process is at
_END_SECONDS = 20.0  # for a worker to leave the row of a run that is interrupted

Note = Callable[[RunSpec, Row], None]
Key = tuple[str, str]  # method's name and run hash: equal settings under two names are two runs

_log = logging.getLogger(__name__)


@dataclass
class _Slot:
    """A place for one process, and the run it is at."""

    work: Callable[[Connection, str | None], None]
    gpu: str | None
    process: BaseProcess | None = None
    connection: Connection | None = None
    spec: RunSpec | None = None
    ready: bool = False  # it has imported what it needs
    begun: bool = False  # its run has ended a batch
    heard: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process has no use of a GPU
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=self.work, args=(theirs, self.gpu)
        )  # not as a daemon: it may have loaders
        heed = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C in its imports would print a traceback
        self.process.start()
        signal.signal(signal.SIGINT, heed)
        theirs.close()
        self.ready = False

    def give(self, spec: RunSpec, out: Path) -> None:
        self.spec, self.begun, self.heard = spec, False, time.monotonic()
        message = (spec.config, str(out), spec.stage)
        if self.connection is not None:
            with suppress(OSError):  # one that was idle may have ended
                self.connection.send(message)
                return
            _end([self], 0)
            self.spec = spec
        self.start()
        assert self.connection is not None
        self.connection.send(message)


def _end(slots: Sequence[_Slot], patience: float) -> None:
    """Ends processes: gently, and by force where that takes longer than `patience` seconds in all."""
    for slot in slots:
        if slot.process is not None and slot.process.pid is not None and slot.spec is not None and slot.ready:
            with suppress(ProcessLookupError):
                os.kill(slot.process.pid, signal.SIGINT)
        if slot.connection is not None:
            slot.connection.close()  # an idle one ends by that
    deadline = time.monotonic() + patience
    for slot in slots:
        if slot.process is None:
            continue
        if slot.ready or slot.spec is None:
            slot.process.join(max(0.0, deadline - time.monotonic()))
        if slot.process.is_alive():
            slot.process.kill()
            slot.process.join()
        slot.process = slot.connection = slot.spec = None


def execute(
    specs: Sequence[RunSpec],
    out: Path,
    note: Note,
    slots: int = 1,
    gpus: Sequence[str] = (),
    hang_seconds: float = 1800.0,
    work: Callable[[Connection, str | None], None] = serve,
) -> list[Row]:
    """Does every run that has no row of a completed run yet; several sweeps may share the folder.

    Args:
        specs: the runs.
        out: the folder of all runs.
        note: called with each spec and its row, an old one or a new one.
        slots: processes at a time.
        gpus: a GPU for each slot (as in CUDA_VISIBLE_DEVICES); none for the CPU.
        hang_seconds: a run that ends no batch for so long is taken for hung; four times that before its first batch,
            when data and weights are fetched and decoded.
        work: what a process does.

    Returns:
        One row a spec, in their order. A run that failed leaves a row that says so, as does one whose process died or
        hung twice, and the next one starts; Ctrl-C ends the sweep.
    """
    places = [_Slot(work, gpus[number % len(gpus)] if gpus else None) for number in range(slots)]
    waiting = deque(specs)
    later: list[tuple[float, RunSpec]] = []  # runs that another process is at, and when to look again
    tries: Counter[Key] = Counter()
    rows: dict[Key, Row] = {}
    told: set[Path] = set()

    def settle(spec: RunSpec, row: Row) -> None:
        rows[_key(spec)] = row
        note(spec, row)

    def lost(slot: _Slot, why: str) -> None:
        spec = slot.spec
        _end([slot], 0)
        if spec is None:
            return
        folder = identity.run_folder(out, spec.config, spec.stage)
        tries[_key(spec)] += 1
        if (row := find_completed(folder)) is not None:  # it died after its last word, or another sweep was at it too
            settle(spec, row)
        elif tries[_key(spec)] < TRIES:
            waiting.appendleft(spec)
        else:
            row = Row.of(spec.config, spec.stage, "failed", error=f"{why}, {TRIES} times")
            folder.mkdir(parents=True, exist_ok=True)
            write_row(folder, row)
            settle(spec, row)

    try:
        while waiting or later or any(slot.spec for slot in places):
            now = time.monotonic()
            waiting.extend(spec for due, spec in later if due <= now)
            later = [(due, spec) for due, spec in later if due > now]
            for slot in places:
                while slot.spec is None and waiting:
                    spec = waiting.popleft()
                    if (row := find_completed(identity.run_folder(out, spec.config, spec.stage))) is not None:
                        settle(spec, row)
                    else:
                        slot.give(spec, out)
            busy = [slot for slot in places if slot.spec and slot.connection and slot.process]
            ready = wait([slot.connection for slot in busy if slot.connection], _POLL_SECONDS) if busy else []
            if not busy and later:
                time.sleep(_POLL_SECONDS)
            for slot in busy:
                assert slot.connection is not None and slot.process is not None and slot.spec is not None
                if slot.connection in ready:
                    try:
                        answer: Answer = slot.connection.recv()
                    except (EOFError, OSError):
                        slot.process.join(_END_SECONDS)
                        lost(slot, f"its process ended ({_how(slot.process.exitcode)})")
                        continue
                    slot.heard = time.monotonic()
                    if isinstance(answer, Row):
                        spec, slot.spec = slot.spec, None
                        settle(spec, answer)
                    elif answer == BUSY:
                        folder = identity.run_folder(out, slot.spec.config, slot.spec.stage)
                        if folder not in told:
                            told.add(folder)
                            _log.warning("another process is at the run in %s: its row is waited for", folder)
                        later.append((time.monotonic() + _ELSEWHERE_SECONDS, slot.spec))
                        slot.spec = None
                    else:
                        slot.ready, slot.begun = True, answer == ALIVE
                elif time.monotonic() - slot.heard > hang_seconds * (1 if slot.begun else 4):
                    lost(slot, f"it ended no batch for {time.monotonic() - slot.heard:.0f} seconds")
    finally:
        _end(places, _END_SECONDS)
    return [rows[_key(spec)] for spec in specs]


def execute_here(specs: Sequence[RunSpec], out: Path, note: Note) -> list[Row]:
    """Does the runs one after another in this process: those on several devices, which start processes themselves."""
    from nola_vision.run import BusyError, run

    rows: dict[Key, Row] = {}
    waiting = deque(specs)
    while waiting:
        spec = waiting.popleft()
        row = find_completed(identity.run_folder(out, spec.config, spec.stage))
        try:
            rows[_key(spec)] = row or run(spec.config, out, spec.stage, keep_going=True)
        except BusyError:
            waiting.append(spec)
            time.sleep(_ELSEWHERE_SECONDS)
            continue
        note(spec, rows[_key(spec)])
    return [rows[_key(spec)] for spec in specs]


def _key(spec: RunSpec) -> Key:
    return spec.method, spec.run_hash


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name}, as when memory runs out" if name == "SIGKILL" else name
    return f"exit status {exit_code}"
