"""Runs on several devices, each in a separate process whose command line Lightning starts again for every device.

The command line is `python -m nola_vision.sweep.engines.multi_device CONFIG.json DIR STAGE`, so that all processes of a
run do the same run.
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
from nola_vision.sweep.queue import POLL_SECONDS, RunCallback, RunQueue
from nola_vision.sweep.worker import handle_first_interrupt

_BUSY, _NO_ROW = 75, 2  # exit statuses
_END_SECONDS = 60.0  # for an interrupted run to write its row


def execute(specs: Sequence[RunSpec], out: Path, callback: RunCallback) -> list[Row]:
    """Does every run that is not completed yet, one after another, each on the devices of its config.

    Args:
        specs: the runs.
        out: the folder of all runs.
        callback: as in `RunQueue`.

    Raises:
        NolaVisionError: a run's files cannot be written (`runner.run` with `keep_going`).
    """
    queue = RunQueue(specs, out, callback)
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
                queue.finish(spec, read_row(queue.folder(spec) / ROW_FILE))
            elif status == _BUSY:
                queue.postpone(spec)
            elif status == _NO_ROW:
                raise NolaVisionError(f"the run {queue.folder(spec)} cannot be written: see above")
            else:
                queue.crash(spec, f"the worker died (exit status {status})")
    return queue.rows()


def main() -> int:
    from nola_vision.runs.runner import run

    handle_first_interrupt()
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
