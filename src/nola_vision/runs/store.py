"""Rows on disk: one `row.json` per run folder, written atomically, by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import why_not_a_file, write_whole
from nola_vision.common.local_files import read_file
from nola_vision.common.text import printable
from nola_vision.runs.record import Row

ROW_FILE = "row.json"
ADAPTER_FILE = "adapter.safetensors"
LOCK_FILE = ".lock"
_MOST_BYTES = 2**25  # a row lists the indices of its training images: two million take 32 MB


class BusyError(NolaVisionError):
    """Another process is running the same run."""


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Locks the folder of a run against other processes; the system releases the lock if this process dies.

    Raises:
        BusyError: another process holds the lock.
        NolaVisionError: the folder cannot be created, written to or locked, or as `refuse_other_things`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NolaVisionError(
            f"the folder {folder} cannot be created ({error.strerror}): give another --out"
        ) from error
    if not os.access(folder, os.W_OK):
        raise NolaVisionError(f"the folder {folder} cannot be written to: give another --out")
    refuse_other_things(folder)
    lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        lock.acquire(blocking=False)
    except Timeout:  # an OSError too
        raise BusyError(f"another process is running {folder}: wait for it, or end it") from None
    except OSError as error:
        raise NolaVisionError(
            f"{folder} cannot be locked ({error.strerror or error}): give an --out on a file system with file locks"
        ) from error
    try:
        yield
    finally:
        lock.release()


def refuse_other_things(folder: Path) -> None:
    """Refuses a folder in which the run could not write.

    Raises:
        NolaVisionError: `row.json` is not a file, or the folder for a completed run to be repeated is not a folder.
    """
    path, aside = folder / ROW_FILE, _aside(folder)
    if os.path.lexists(path) and not path.is_file():
        raise NolaVisionError(f"{path} {why_not_a_file(path)}, but the run writes its row there: remove it")
    if os.path.lexists(aside) and (aside.is_symlink() or not aside.is_dir()):
        raise NolaVisionError(f"{aside} is not a folder, but --again moves the completed run there: remove it")


def refuse_links(folder: Path) -> None:
    """Refuses symbolic links in the folder of a run that lead out of it: the run would write to where they point.

    Raises:
        NolaVisionError: there is one.
    """
    own = os.path.realpath(folder)
    for path in folder.rglob("*"):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(own):
            raise NolaVisionError(
                f"{path} is a symbolic link to {os.path.realpath(path)}, but the run writes its files in this folder: "
                "remove the link"
            )


def set_aside(folder: Path) -> None:
    """Moves a completed run that is to be repeated to a folder next to its own, atomically.

    `read_rows` finds its row there, and a table counts it until the repetition is completed (`count_once`); then
    `drop_aside` removes it. A run that is not completed is not moved.

    Raises:
        BusyError: another process is running it.
        NolaVisionError: the row cannot be read, or the folder cannot be moved.
    """
    if not folder.is_dir():
        return
    with lock_run(folder):
        try:
            if find_completed(folder) is None:
                return
        except NolaVisionError:  # a row that cannot be read is replaced
            return
        try:
            drop_aside(folder)  # left by a completed repetition whose process died before it removed this
            os.rename(folder, _aside(folder))
        except OSError as error:
            raise NolaVisionError(
                f"{folder} cannot be moved ({error.strerror}): check the permissions of the folder around it"
            ) from error


def drop_aside(folder: Path) -> None:
    """Removes the folder that `set_aside` moved, once the repetition is completed."""
    if _aside(folder).is_dir():
        shutil.rmtree(_aside(folder))


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.before")


def write_row(folder: str | Path, row: Row) -> Path:
    """Write `row` as the `row.json` of a run's folder and return its path.

    The file is replaced atomically: a reader, or a crash at any moment, finds the old row or the new one.

    Raises:
        NolaVisionError: the folder is missing or cannot be written to.
    """
    path = Path(folder) / ROW_FILE
    try:
        write_whole(path, row.to_json().encode())
    except OSError as error:
        raise NolaVisionError(
            f"the row cannot be written to {folder} ({error.strerror}): free disk space, or give a writable folder"
        ) from error
    return path


def read_row(path: str | Path) -> Row:
    """Read one `row.json`.

    Raises:
        NolaVisionError: it cannot be read, or is not a row.
    """
    path = Path(path)
    try:
        text = read_run_file(path, _MOST_BYTES).decode()
    except UnicodeDecodeError:
        raise NolaVisionError(f"{path} is not JSON: delete it and run again") from None
    return Row.from_json(text, path)


def read_run_file(path: Path, most_bytes: int) -> bytes:
    """Read a file in a run's folder.

    Raises:
        NolaVisionError: it cannot be read, is not a regular file, or is too large; its cause is the OSError.
    """
    try:
        return read_file(path, most_bytes)
    except OSError as error:
        fix = "check its permissions, or delete it" if error.errno else "it is left out"  # 0: `read_file`, too large
        raise NolaVisionError(f"{path} cannot be read ({error.strerror}): {fix}") from error


def read_rows(*folders: str | Path) -> tuple[list[Row], list[tuple[Path, str]]]:
    """Read every `row.json` in some folders and their subfolders, in the order of their paths.

    Returns:
        The rows, each with its `folder`, and the problems: each unreadable path, and one line with the path
        and the reason.

    Raises:
        NolaVisionError: one of the folders does not exist.
    """
    problems: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        problems.append((path, f"{printable(str(path))} cannot be read ({error.strerror}): check its permissions"))

    paths: set[Path] = set()
    for folder in folders:
        if not Path(folder).is_dir():
            raise NolaVisionError(
                f"there is no folder {folder}: change to the folder where fit ran, or give the folder that it wrote to"
            )
        # links under it are not followed, so only the folder itself is resolved
        for found, inner, files in os.walk(Path(folder).resolve(), onerror=unreadable):
            if ROW_FILE in files or ROW_FILE in inner:
                paths.add(Path(found) / ROW_FILE)

    rows = []
    for path in sorted(paths):
        try:
            rows.append(read_row(path))
        except NolaVisionError as error:
            problems.append((path, str(error)))
    return rows, problems


def find_completed(folder: str | Path) -> Row | None:
    """Return the row of a run's folder if the run was completed, else None."""
    row = find_row(folder)
    return row if row is not None and row.status == "completed" else None


def find_row(folder: str | Path) -> Row | None:
    """Return the row of a run's folder, or None if there is none.

    Raises:
        NolaVisionError: it cannot be read.
    """
    try:
        return read_row(Path(folder) / ROW_FILE)
    except NolaVisionError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise
