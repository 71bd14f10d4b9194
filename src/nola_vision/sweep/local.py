"""The local engine: runs specs one after another in this process and skips those that have a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from nola_vision.results import identity
from nola_vision.results.row import Row
from nola_vision.results.store import find_row
from nola_vision.sweep.plan import RunSpec

RunFunction = Callable[[identity.Config, Path, identity.Stage], Row]


def execute(
    specs: Iterable[RunSpec], out: Path, run: RunFunction, progress: Callable[[RunSpec, Row], None]
) -> list[Row]:
    """Does every run that has no row of a completed run yet.

    Args:
        specs: what to do, in this order.
        out: the folder of all runs.
        run: does one run and leaves its row, also when it raises.
        progress: called with each spec and its row, an old one or a new one.

    Returns:
        One row a spec. A run that failed leaves a row that says so, and the next one starts; Ctrl-C ends the sweep.
    """
    rows = []
    for spec in specs:
        folder = identity.run_folder(out, spec.config, spec.stage)
        row = find_row(folder)
        if row is None or row.status != "completed":
            try:
                row = run(spec.config, out, spec.stage)
            except Exception:
                row = find_row(folder)
                if row is None:  # nothing could be recorded, so nothing later could be
                    raise
        progress(spec, row)
        rows.append(row)
    return rows
