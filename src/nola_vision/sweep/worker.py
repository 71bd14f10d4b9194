"""A process of the local engine: does runs as they are asked for, and tells that it is alive."""

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
_BEAT_SECONDS = 1.0


def heed_one_interrupt() -> None:
    """From now on the first SIGINT interrupts this process, and no other: the terminal and the engine send one each."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def serve(connection: Connection, gpu: str | None) -> None:
    """Does each run that comes as (run config, folder, stage) and answers with its row, until the connection ends.

    It says `READY` once it has imported what it needs, `ALIVE` about once a second of progress, and answers `BUSY`
    where another process is at the run, or with the error where a run cannot leave a row (no room on the disk). Its
    run is interrupted where the process that it answers to has died.

    Args:
        connection: to the engine.
        gpu: which GPU it shall see; None for all there are.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from nola_vision.common import process_cache
    from nola_vision.runs.cross_validation import run_with_estimate

    process_cache.keep()
    heed_one_interrupt()
    try:
        connection.send(READY)
    except OSError:
        return
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > _BEAT_SECONDS:
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
            answer: Answer = run_with_estimate(config, out, stage, keep_going=True, beat=beat)
        except BusyError:
            answer = BUSY
        except NolaVisionError as error:
            answer = NolaVisionError(str(error))  # alone: its cause may not travel
        except KeyboardInterrupt:
            return
        try:
            connection.send(answer)
        except OSError:
            return
