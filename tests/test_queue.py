"""The queue of a sweep's runs: what is tried again, and what has failed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nola_vision.runs.record import Row
from nola_vision.runs.store import ROW_FILE, find_row
from nola_vision.sweep.plan import RunSpec, final_specs
from nola_vision.sweep.queue import TRIES, RunQueue
from tiny import TINY


def test_a_crashed_run_is_tried_again_and_a_failed_one_by_the_next_sweep(tmp_path: Path) -> None:
    (spec,) = final_specs(TINY, [0], [0], ["linear"], {})
    calls: list[tuple[RunSpec, Row | None]] = []
    queue = RunQueue([spec], tmp_path, lambda *call: calls.append(call))
    for _ in range(TRIES):
        assert queue.take() is spec
        queue.crash(spec, "killed")
    assert queue.take() is None and queue.ended
    (row,) = queue.rows()
    assert calls == [(spec, None)] * TRIES + [(spec, row)]
    assert row.status == "failed" and row.error == f"killed, {TRIES} times"

    written = queue.folder(spec) / ROW_FILE
    os.utime(written, (time.time() - 60,) * 2)  # the clock of the file system may be coarse
    following = RunQueue([spec], tmp_path, lambda *_: None)
    assert find_row(following.folder(spec)) == row
    assert following.take() is spec
    os.utime(written, (time.time() + 60,) * 2)  # another process runs it at the same time, and it fails there
    assert following.finish_if_done(spec) and following.ended
