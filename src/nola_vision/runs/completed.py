"""Completed runs: whether a run's folder has a row and the files that it needs later."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from nola_vision.adapters.serialization import open_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.evaluation.predictions import PREDICTIONS_FILE, load_predictions
from nola_vision.runs.record import Row
from nola_vision.runs.store import ADAPTER_FILE, ROW_FILE, find_completed, refuse_other_things

_log = logging.getLogger(__name__)


def completed_row(folder: Path) -> Row | None:
    """The row of a completed run, or None if the run must be repeated.

    A completed run is repeated if its row cannot be read, or if a file that it wrote is missing or damaged: a fold's
    predictions, or the adapter of a final run. A warning states the reason, once per process.

    Raises:
        NolaVisionError: as `store.refuse_other_things`.
    """
    refuse_other_things(folder)
    try:
        row = find_completed(folder)
    except NolaVisionError as error:
        _warn_once(f"the row of this run replaces one that cannot be read: {error}")
        return None
    problem = None if row is None else _unusable(row, folder)
    if problem is None:
        return row
    _warn_once(f"this run was completed, but it is repeated: {problem}")
    return None


@cache
def _warn_once(sentence: str) -> None:
    """A `fit` checks each run several times."""
    _log.warning("%s", sentence)


def _unusable(row: Row, folder: Path) -> str | None:
    """Why the files of a completed run are unusable, or None."""
    class_names, counts = row.data.get("class_names"), row.data.get("counts") or {}
    if row.stage != "search" and not class_names:
        return f"{folder / ROW_FILE} lacks data.class_names"
    try:
        if row.stage == "fold":
            found = load_predictions(folder, len(class_names or ()), counts.get("test"))
            if found is None or found.logits is None:
                return f"{folder / PREDICTIONS_FILE} {'does not exist' if found is None else 'lacks logits'}"
        elif row.stage == "final" and row.adapter_file_bytes is not None:
            open_adapter(folder / ADAPTER_FILE)
    except NolaVisionError as error:
        return str(error)
    return None
