"""The local engine: worker processes that do one run after another; the run of one that dies is tried once more."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs.record import Row
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.queue import FIRST_BATCH, HANG_SECONDS, POLL_SECONDS, RunCallback, RunQueue
from nola_vision.sweep.worker import ALIVE, READY, Answer, serve

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

_END_SECONDS = 20.0  # for a worker to write the row of an interrupted run
_FORKS = sys.platform == "linux"


def import_ahead() -> None:
    """Starts the process that workers on the CPU are forked from; it imports what they need, in the background.

    The imports take seconds of processor time. A worker that is forked starts at once, also after a crash. The process
    ends with this one.
    """
    if _FORKS:
        forkserver.set_forkserver_preload(["nola_vision.sweep.worker_imports"])
        with _sigint_ignored():
            forkserver.ensure_running()


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    """For the start of a process, which inherits it: Ctrl-C during its imports would print a traceback."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@dataclass
class _Worker:
    """A worker process, started when it gets its first run, and the run that it is doing."""

    work: Callable[[Connection, str | None], None]
    gpu: str | None
    process: BaseProcess | None = None
    connection: Connection | None = None
    spec: RunSpec | None = None
    ready: bool = False  # its imports are done
    begun: bool = False  # a batch of its run has ended
    last_message: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        # workers with a GPU are spawned: an import that initialised CUDA in the common process would break every fork
        forks = _FORKS and self.gpu is None
        if forks:
            import_ahead()
        context: ForkServerContext | SpawnContext = (
            multiprocessing.get_context("forkserver") if forks else multiprocessing.get_context("spawn")
        )
        self.connection, theirs = context.Pipe()
        arguments = dict(os.environ), self.work, theirs, self.gpu
        self.process = context.Process(target=_start_work, args=arguments)  # no daemon: it may start loaders
        try:
            with _sigint_ignored():
                self.process.start()
        finally:
            theirs.close()
        self.ready = False

    def start_run(self, spec: RunSpec, out: Path) -> None:
        self.spec, self.begun, self.last_message = spec, False, time.monotonic()
        message = (spec.config, str(out), spec.stage)
        if self.connection is not None:
            with suppress(OSError):  # an idle worker may have died
                self.connection.send(message)
                return
            _stop([self], 0)
            self.spec = spec
        self.start()
        assert self.connection is not None
        self.connection.send(message)


def _start_work(
    environment: dict[str, str], work: Callable[[Connection, str | None], None], connection: Connection, gpu: str | None
) -> None:
    """The main function of a worker process; a forked one would have the environment of an earlier sweep."""
    os.environ.clear()
    os.environ.update(environment)
    work(connection, gpu)


def _stop(workers: Sequence[_Worker], patience: float) -> None:
    """Interrupts workers, and kills those that have not ended after `patience` seconds in all."""
    for worker in workers:
        if worker.process is not None and worker.process.pid is not None and worker.spec is not None:
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGINT if worker.ready else signal.SIGKILL)
        if worker.connection is not None:
            worker.connection.close()  # an idle worker then ends
    deadline = time.monotonic() + patience
    for worker in workers:
        if worker.process is None:
            continue
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process = worker.connection = worker.spec = None


def execute(
    specs: Sequence[RunSpec],
    out: Path,
    callback: RunCallback,
    workers: int = 1,
    gpus: Sequence[str] = (),
    hang_seconds: float = HANG_SECONDS,
    work: Callable[[Connection, str | None], None] = serve,
) -> list[Row]:
    """Does every run that is not completed yet; several sweeps may share the folder.

    Args:
        specs: the runs.
        out: the folder of all runs.
        callback: as in `RunQueue`.
        workers: processes at a time.
        gpus: a GPU for each worker (as in CUDA_VISIBLE_DEVICES); empty for the CPU.
        hang_seconds: a run hangs if no batch ends for so long; before the first batch, while data and weights are
            downloaded and decoded, for `FIRST_BATCH` times as long.
        work: what a worker does.

    Returns:
        One row per spec, in their order. A failed run has a failed row, as has one whose worker died or hung twice, and
        the sweep continues; Ctrl-C ends it.

    Raises:
        NolaVisionError: a run's files cannot be written (`runner.run` with `keep_going`).
    """
    pool = [_Worker(work, gpus[number % len(gpus)] if gpus else None) for number in range(workers)]
    queue = RunQueue(specs, out, callback)
    try:
        while not queue.ended:
            for worker in pool:
                if worker.spec is None and (spec := queue.take()) is not None:
                    worker.start_run(spec, out)
            busy = {worker.connection: worker for worker in pool if worker.spec and worker.connection}
            answered = wait(list(busy), 0 if queue.ended else POLL_SECONDS)
            for connection, worker in busy.items():
                if connection in answered:
                    _receive(worker, queue)
                elif (silent := time.monotonic() - worker.last_message) > hang_seconds * (
                    1 if worker.begun else FIRST_BATCH
                ):
                    _crashed(worker, queue, f"no batch ended for {silent:.0f} seconds")
    finally:
        _stop(pool, _END_SECONDS)
    return queue.rows()


def _receive(worker: _Worker, queue: RunQueue) -> None:
    """Handles a message of a worker, or its death."""
    assert worker.connection is not None and worker.process is not None and worker.spec is not None
    try:
        answer: Answer = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(_END_SECONDS)
        _crashed(worker, queue, f"the worker died ({_exit_reason(worker.process.exitcode)})")
        return
    worker.last_message = time.monotonic()
    if isinstance(answer, NolaVisionError):  # the files of the next run could not be written either
        worker.spec = None
        raise answer
    if answer in (READY, ALIVE):
        worker.ready, worker.begun = True, answer == ALIVE
        return
    spec, worker.spec = worker.spec, None
    if isinstance(answer, Row):
        queue.finish(spec, answer)
    else:
        queue.postpone(spec)


def _crashed(worker: _Worker, queue: RunQueue, reason: str) -> None:
    """Stops a worker that died or hangs, and reports it to the queue."""
    spec = worker.spec
    _stop([worker], 0)
    if spec is not None:
        queue.crash(spec, reason)


def _exit_reason(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"{name}, as when memory runs out" if name == "SIGKILL" else name
    return f"exit status {exit_code}"
