"""A worker process of the local engine: does the runs that it is sent, and sends heartbeats."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs.record import Row
from nola_vision.runs.store import BusyError

READY, ALIVE, BUSY = "ready", "alive", "busy"
Answer = Row | str | NolaVisionError
_HEARTBEAT_SECONDS = 1.0


def handle_first_interrupt() -> None:
    """Raise KeyboardInterrupt on the first SIGINT and ignore later ones: the terminal and the engine both send one."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def serve(connection: Connection, gpu: str | None) -> None:
    """Does each run that it receives as (run config, folder, stage) and sends its row, until the connection closes.

    It sends `READY` once its imports are done, and `ALIVE` about once per second while batches end. Instead of a row it
    sends `BUSY` if another process is running the run, or the error if its files cannot be written (disk full). Its run
    is interrupted if the engine's process has died.

    Args:
        connection: to the engine.
        gpu: the only GPU that it sees; None for all.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from nola_vision.common import process_cache
    from nola_vision.sweep.worker_imports import run_with_estimate

    process_cache.keep()
    handle_first_interrupt()
    try:
        connection.send(READY)
    except OSError:
        return
    last = 0.0

    def heartbeat() -> None:
        nonlocal last
        if time.monotonic() - last > _HEARTBEAT_SECONDS:
            last = time.monotonic()
            try:
                connection.send(ALIVE)
            except OSError:
                raise KeyboardInterrupt from None

    while True:
        try:
            config, out, stage = connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        try:
            answer: Answer = run_with_estimate(config, out, stage, keep_going=True, heartbeat=heartbeat)
        except BusyError:
            answer = BUSY
        except NolaVisionError as error:
            answer = NolaVisionError(str(error))  # without its cause, which may not be picklable
        except KeyboardInterrupt:
            return
        try:
            connection.send(answer)
        except OSError:
            return
