"""The local engine: one process a slot, doing one run after another; one that dies costs its run one retry."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs.record import Row
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.queue import FIRST_BATCH, HANG_SECONDS, POLL_SECONDS, Note, RunQueue
from nola_vision.sweep.worker import ALIVE, READY, Answer, serve

_END_SECONDS = 20.0  # for a worker to leave the row of a run that is interrupted


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
        self.process = context.Process(target=self.work, args=(theirs, self.gpu))  # no daemon: it may have loaders
        heed = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C in its imports would print a traceback
        try:
            self.process.start()
        finally:
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
        if slot.process is not None and slot.process.pid is not None and slot.spec is not None:
            with suppress(ProcessLookupError):
                os.kill(slot.process.pid, signal.SIGINT if slot.ready else signal.SIGKILL)
        if slot.connection is not None:
            slot.connection.close()  # an idle one ends by that
    deadline = time.monotonic() + patience
    for slot in slots:
        if slot.process is None:
            continue
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
    hang_seconds: float = HANG_SECONDS,
    work: Callable[[Connection, str | None], None] = serve,
) -> list[Row]:
    """Does every run that has no row of a completed run yet; several sweeps may share the folder.

    Args:
        specs: the runs.
        out: the folder of all runs.
        note: as in `RunQueue`.
        slots: processes at a time.
        gpus: a GPU for each slot (as in CUDA_VISIBLE_DEVICES); none for the CPU.
        hang_seconds: a run that ends no batch for so long is taken for hung; four times that before its first batch,
            when data and weights are fetched and decoded.
        work: what a process does.

    Returns:
        One row a spec, in their order. A run that failed leaves a row that says so, as does one whose process died or
        hung twice, and the next one starts; Ctrl-C ends the sweep.

    Raises:
        NolaVisionError: a row cannot be written.
    """
    places = [_Slot(work, gpus[number % len(gpus)] if gpus else None) for number in range(slots)]
    queue = RunQueue(specs, out, note)
    try:
        while not queue.ended:
            for slot in places:
                if slot.spec is None and (spec := queue.take()) is not None:
                    slot.give(spec, out)
            busy = {slot.connection: slot for slot in places if slot.spec and slot.connection}
            answered = wait(list(busy), 0 if queue.ended else POLL_SECONDS)
            for connection, slot in busy.items():
                if connection in answered:
                    _hear(slot, queue)
                elif (silent := time.monotonic() - slot.heard) > hang_seconds * (1 if slot.begun else FIRST_BATCH):
                    _lose(slot, queue, f"it ended no batch for {silent:.0f} seconds")
    finally:
        _end(places, _END_SECONDS)
    return queue.rows()


def _hear(slot: _Slot, queue: RunQueue) -> None:
    """Takes a process's word, or its end."""
    assert slot.connection is not None and slot.process is not None and slot.spec is not None
    try:
        answer: Answer = slot.connection.recv()
    except (EOFError, OSError):
        slot.process.join(_END_SECONDS)
        _lose(slot, queue, f"its process ended ({_how(slot.process.exitcode)})")
        return
    slot.heard = time.monotonic()
    if isinstance(answer, NolaVisionError):  # the next run's row would meet the same
        slot.spec = None
        raise answer
    if answer in (READY, ALIVE):
        slot.ready, slot.begun = True, answer == ALIVE
        return
    spec, slot.spec = slot.spec, None
    if isinstance(answer, Row):
        queue.settle(spec, answer)
    else:
        queue.postpone(spec)


def _lose(slot: _Slot, queue: RunQueue, why: str) -> None:
    spec = slot.spec
    _end([slot], 0)
    if spec is not None:
        queue.lose(spec, why)


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name}, as when memory runs out" if name == "SIGKILL" else name
    return f"exit status {exit_code}"
