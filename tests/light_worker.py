"""A worker of the local engine that trains nothing: what goes wrong with a run is written in a file."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id
from nola_vision.runs.record import Row
from nola_vision.runs.store import write_row
from nola_vision.sweep.worker import ALIVE, BUSY, READY


def serve(connection: Connection, gpu: str | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    imported = "lightning" in sys.modules
    connection.send(READY)
    while True:
        try:
            config, out, stage = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        script = Path(out) / f"split{config['data']['split_seed']}.txt"
        event, _, rest = (script.read_text() if script.exists() else "").partition(" ")
        script.write_text(rest)
        connection.send(ALIVE)
        if event == "quit":  # after its row, before its message
            folder = run_id.run_folder(out, config, stage)
            folder.mkdir(parents=True, exist_ok=True)
            write_row(folder, Row.of(config, stage, "completed"))
            os._exit(3)
        if event == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "hang":
            time.sleep(1000)
        if event == "full":
            connection.send(NolaVisionError("the row cannot be written"))
            continue
        if event == "busy":
            connection.send(BUSY)
            continue
        device = f"{os.getpid()} {gpu} {imported} {os.environ.get('NOLA_VISION_TEST')}"
        row = Row.of(config, stage, "failed" if event == "fail" else "completed", device=device)
        folder = run_id.run_folder(out, config, stage)
        folder.mkdir(parents=True, exist_ok=True)
        write_row(folder, row)
        connection.send(row)
