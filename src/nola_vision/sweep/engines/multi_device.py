"""Runs on several devices, each a process of its own that Lightning starts again for every device.

The process is `python -m nola_vision.sweep.engines.multi_device CONFIG.json DIR STAGE`: Lightning starts the command
line again, and all processes of a run must meet the same run there.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs.record import Row
from nola_vision.runs.store import ROW_FILE, BusyError, read_row
from nola_vision.sweep.plan import RunSpec
from nola_vision.sweep.queue import POLL_SECONDS, Note, RunQueue
from nola_vision.sweep.worker import heed_one_interrupt

_BUSY, _NO_ROW = 75, 2  # exit statuses
_END_SECONDS = 60.0  # for a run that is interrupted to leave its row


def execute(specs: Sequence[RunSpec], out: Path, note: Note) -> list[Row]:
    """Does every run that has no row of a completed run yet, one after another, each with all devices it asks for.

    Args:
        specs: the runs.
        out: the folder of all runs.
        note: as in `RunQueue`.

    Raises:
        NolaVisionError: a row cannot be written.
    """
    queue = RunQueue(specs, out, note)
    with TemporaryDirectory() as scratch:
        config = Path(scratch) / "run.json"
        while not queue.ended:
            if (spec := queue.take()) is None:
                time.sleep(POLL_SECONDS)
                continue
            config.write_text(json.dumps(spec.config), encoding="utf-8")
            process = subprocess.Popen([sys.executable, "-m", __spec__.name, str(config), str(out), spec.stage])
            try:
                status = process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_SECONDS)
                process.kill()
                raise
            if status == 0:
                queue.settle(spec, read_row(queue.folder(spec) / ROW_FILE))
            elif status == _BUSY:
                queue.postpone(spec)
            elif status == _NO_ROW:
                raise NolaVisionError(f"the run in {queue.folder(spec)} could not leave its row: see above")
            else:
                queue.lose(spec, f"its process ended (exit status {status})")
    return queue.rows()


def main() -> int:
    from nola_vision.runs.runner import run

    heed_one_interrupt()
    config, out, stage = sys.argv[1:]
    try:
        run(json.loads(Path(config).read_text(encoding="utf-8")), out, stage, keep_going=True)  # type: ignore[arg-type]
    except BusyError:
        return _BUSY
    except NolaVisionError as error:
        print(error, file=sys.stderr)
        return _NO_ROW
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
