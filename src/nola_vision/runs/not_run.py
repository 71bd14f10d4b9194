"""Why an entry with a byte budget has no runs: a small file in the entry's folder, for reports."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_whole
from nola_vision.runs.store import read_run_file

NOT_RUN_FILE = "not_run.json"
_MOST_BYTES = 10_000


@dataclass(frozen=True)
class NotRun:
    """Why an entry is not run.

    Args:
        reason: in words.
        same_as: the entry with the same settings, whose runs count for this one too; None if no file is small enough.
    """

    reason: str
    same_as: str | None = None


def note_not_run(folder: Path, why: NotRun | None) -> None:
    """Writes why the entry of a folder is not run, or removes the note of an earlier sweep.

    Raises:
        NolaVisionError: the folder cannot be written to.
    """
    path = folder / NOT_RUN_FILE
    try:
        if why is None:
            path.unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(why)).encode())
    except OSError as error:
        raise NolaVisionError(f"{path} cannot be changed ({error.strerror}): give a writable --out") from error


def read_not_run(cell_folder: Path) -> dict[str, NotRun]:
    """The entries of a cell's folder that are not run, by name. Files that are not such notes are left out."""
    found = {}
    for path in sorted(cell_folder.glob(f"*/{NOT_RUN_FILE}")):
        with suppress(NolaVisionError, ValueError, KeyError, TypeError, RecursionError):
            read = json.loads(read_run_file(path, _MOST_BYTES))
            reason, same_as = read["reason"], read["same_as"]
            if isinstance(reason, str) and isinstance(same_as, str | None):
                found[path.parent.name] = NotRun(reason, same_as)
    return found
