"""The local engine: one process a slot, doing one run after another; one that dies costs its run one retry."""

from __future__ import annotations

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
from nola_vision.sweep.worker import BUSY, Answer, serve

TRIES = 2
_POLL_SECONDS = 0.5
_ELSEWHERE_SECONDS = 2.0  # between two looks at a run that another process is at
_END_SECONDS = 20.0  # for a worker to leave the row of a run that is interrupted

Note = Callable[[RunSpec, Row], None]


@dataclass
class _Slot:
    """A place for one process, and the run it is at."""

    work: Callable[[Connection, str | None], None]
    gpu: str | None
    process: BaseProcess | None = None
    connection: Connection | None = None
    spec: RunSpec | None = None
    heard: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process has no use of a GPU
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=self.work, args=(theirs, self.gpu), daemon=True)
        heed = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C in its imports would print a traceback
        self.process.start()
        signal.signal(signal.SIGINT, heed)
        theirs.close()

    def give(self, spec: RunSpec, out: Path) -> None:
        if self.process is None or not self.process.is_alive():
            self.start()
        assert self.connection is not None
        self.spec, self.heard = spec, time.monotonic()
        self.connection.send((spec.config, str(out), spec.stage))

    def end(self, patience: float) -> None:
        """Ends the process: gently, and by force where that takes longer than `patience` seconds."""
        if self.process is None:
            return
        if self.connection is not None:
            self.connection.close()  # an idle one ends by that
        if self.spec is not None and self.process.pid is not None and patience:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)
        self.process.join(patience or 0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process = self.connection = self.spec = None


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
        hang_seconds: a run that ends no batch for so long is taken for hung.
        work: what a process does.

    Returns:
        One row a spec, in their order. A run that failed leaves a row that says so, as does one whose process died or
        hung twice, and the next one starts; Ctrl-C ends the sweep.
    """
    places = [_Slot(work, gpus[number % len(gpus)] if gpus else None) for number in range(slots)]
    waiting = deque(specs)
    later: list[tuple[float, RunSpec]] = []  # runs that another process is at, and when to look again
    tries: Counter[str] = Counter()
    rows: dict[str, Row] = {}

    def settle(spec: RunSpec, row: Row) -> None:
        rows[spec.run_hash] = row
        note(spec, row)

    def lost(slot: _Slot, why: str) -> None:
        spec = slot.spec
        slot.end(0)
        if spec is None:
            return
        tries[spec.run_hash] += 1
        if tries[spec.run_hash] < TRIES:
            waiting.appendleft(spec)
            return
        row = Row.of(spec.config, spec.stage, "failed", error=f"{why}, {TRIES} times")
        folder = identity.run_folder(out, spec.config, spec.stage)
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
                        later.append((time.monotonic() + _ELSEWHERE_SECONDS, slot.spec))
                        slot.spec = None
                elif time.monotonic() - slot.heard > hang_seconds:
                    lost(slot, f"it ended no batch for {hang_seconds:g} seconds")
    except BaseException:
        for slot in places:
            slot.end(_END_SECONDS)
        raise
    for slot in places:
        slot.end(_END_SECONDS)
    return [rows[spec.run_hash] for spec in specs]


def execute_here(specs: Sequence[RunSpec], out: Path, note: Note) -> list[Row]:
    """Does the runs one after another in this process: those on several devices, which start processes themselves."""
    from nola_vision.run import run

    rows = []
    for spec in specs:
        row = find_completed(identity.run_folder(out, spec.config, spec.stage))
        rows.append(row or run(spec.config, out, spec.stage, keep_going=True))
        note(spec, rows[-1])
    return rows


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name}, as when memory runs out" if name == "SIGKILL" else name
    return f"exit status {exit_code}"
