"""Reading the user's files, limited to regular files of a maximum size, and caching what was computed from them.

`remembered` stores results in this process and in the user's cache folder, so that neither this process nor the next
reads 10,000 images again. An entry is reused only while size, times and inode of the file are the same. The cache
folder can be deleted at any time; if it cannot be read or written, each process computes everything once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from nola_vision.common.files import write_whole
from nola_vision.common.hashing import sha256
from nola_vision.common.progress import count_aside
from nola_vision.common.text import printable

_log = logging.getLogger(__name__)

RACY_NS = 2 * 10**9  # a file that changed so recently may change again without its times showing it
_MOST_THREADS = 8
_ANNOUNCED_BYTES = 2**30  # reading more than this is announced

Entries = dict[str, list[Any]]  # `[size, mtime, ctime, inode, value]` of a file by its path under a folder

_in_process: dict[tuple[str, Path], Entries] = {}  # by kind and folder


@contextmanager
def open_regular(path: str | Path, most_bytes: int | None = None) -> Iterator[BufferedReader]:
    """Opens a regular file for reading. Does not block, and does not open devices.

    Args:
        path: of the file.
        most_bytes: larger files are refused.

    Raises:
        OSError: there is no such file, it is not a regular file (`strerror` names what it is), or it is too large.
    """
    _refuse_irregular(os.stat(path), path, most_bytes)
    # between the two looks the file may have been replaced; without O_NONBLOCK opening a FIFO waits for its writer
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        _refuse_irregular(os.fstat(descriptor), path, most_bytes)
        yield file


def read_file(path: str | Path, most_bytes: int) -> bytes:
    """The content of a file.

    Raises:
        OSError: as `open_regular`.
    """
    with open_regular(path, most_bytes) as file:
        # not more than the file seems to have: Python allocates what is asked for
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size, most_bytes) + 1)
        if len(content) > size:  # it grows, or its size is reported as 0, as in /proc
            content += file.read(most_bytes + 1 - len(content))
    if len(content) > most_bytes:
        raise _too_large(path, most_bytes)
    return content


def _refuse_irregular(status: os.stat_result, path: str | Path, most_bytes: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise OSError(0, f"it is {kind}, not a regular file", str(path))
    if most_bytes is not None and status.st_size > most_bytes:
        raise _too_large(path, most_bytes)


def _too_large(path: str | Path, most_bytes: int) -> OSError:
    return OSError(0, f"it is larger than {most_bytes / 2**20:g} MiB", str(path))


def file_digest(path: str | Path, most_bytes: int | None = None) -> str | None:
    """SHA-256 over a file in hexadecimal digits; None if it cannot be read or is larger than `most_bytes`."""
    path = Path(path)
    return file_digests(path.parent, [path], most_bytes)[0]


def file_digests(base: Path, paths: Sequence[Path], most_bytes: int | None = None) -> list[str | None]:
    """`file_digest` of each file; all paths are under the folder `base`."""
    return remembered("sha256", base, paths, _sha256, most_bytes)


def _sha256(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def remembered(
    kind: str,
    base: Path,
    paths: Sequence[Path],
    compute: Callable[[Path], str | None],
    most_bytes: int | None = None,
) -> list[str | None]:
    """`compute(path)` of each file, in threads, or what it returned before for the same unchanged file.

    Args:
        kind: what is computed; part of the name of the cache.
        base: the folder that all paths are under; the other part.
        paths: of the files.
        compute: must depend on the file's content only, and be safe in threads. None is not remembered.
        most_bytes: the result is None for larger files, as for what is not a regular file.
    """
    place = base.resolve()
    known = _in_process.setdefault((kind, place), {})
    keys = [str(path).removeprefix(f"{base}{os.sep}") for path in paths]
    identities = [_identity(path, most_bytes) for path in paths]
    results: list[str | None] = [None] * len(paths)
    missing = {index: identity for index, identity in enumerate(identities) if identity is not None}

    def look_up(entries: Entries) -> None:  # moves what it finds from `missing` to `results`
        for index, identity in [*missing.items()]:
            *found, value = entries.get(keys[index], [None])
            if found == identity:
                known[keys[index]], results[index] = [*identity, value], value
                del missing[index]

    look_up(known)
    if not missing:
        return results
    cache = _cache_file(kind, place)
    stored = read_cache(cache)
    look_up(stored)
    size = sum(identity[0] for identity in missing.values())
    if size > _ANNOUNCED_BYTES:
        _log.warning("reading %d files in %s, %.1f GB: this is done once", len(missing), base, size / 1e9)
    threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
    try:
        values, count = {}, count_aside("reading", f"files in {base}")
        for index, value in zip(missing, threads.map(lambda index: compute(paths[index]), missing), strict=True):
            values[index] = value
            count.show(len(values), len(missing))
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all files
    recent = time.time_ns() - RACY_NS
    new: Entries = {}
    for index, value in values.items():
        results[index], identity = value, missing[index]
        _, modified, changed, _ = identity
        if value is not None and identity == _identity(paths[index], most_bytes) and max(modified, changed) < recent:
            new[keys[index]] = [*identity, value]
    known |= new
    if new:
        write_cache(cache, stored | known)
    return results


def _identity(path: Path, most_bytes: int | None) -> list[int] | None:
    """Size, times and inode of a regular file: what cannot all stay the same when its content changes."""
    try:
        status = os.stat(path)
        _refuse_irregular(status, path, most_bytes)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _cache_file(kind: str, place: Path) -> Path | None:
    """Where facts of a kind about the files under a resolved folder are stored; None without a home folder."""
    name = sha256(os.fsencode(f"{kind}\0{place}"))[:32]
    return None if (folder := cache_folder()) is None else folder / "files" / f"{name}.json"


def cache_folder() -> Path | None:
    """This package's folder in the user's cache, which need not exist yet; None without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nola-vision"
    except RuntimeError:
        return None


def read_cache(path: Path | None) -> Entries:
    """The entries of a cache file, each a list of whole numbers and a text; empty if the file has other content.

    The keys are any text, also one that no file can have as its path.
    """
    if path is None:
        return {}
    try:
        checksum, _, text = read_file(path, 2**28).partition(b"\n")
        if sha256(text).encode() != checksum:
            return {}
        loaded = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) and all(map(_is_entry, loaded.values())) else {}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and [type(value) for value in entry[-1:]] == [str]
        and all(type(value) is int for value in entry[:-1])
    )


def write_cache(path: Path | None, entries: Entries) -> None:
    """Writes a cache file for `read_cache`; warns once per process where it cannot be written."""
    text = json.dumps(entries, separators=(",", ":")).encode()  # ASCII, so file names of any bytes are kept
    if path is None:
        return warn_not_stored("there is no home folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, sha256(text).encode() + b"\n" + text)
    except OSError as error:
        warn_not_stored(f"{path.parent}: {error.strerror}")


_warned = False


def warn_not_stored(reason: str) -> None:
    """Warns once per process."""
    global _warned
    if not _warned:
        _warned = True
        _log.warning(
            "%s",
            printable(
                f"the cache cannot be written ({reason}), so every process computes digests of files and features of "
                "images again: make room, or set XDG_CACHE_HOME to a folder that can be written"
            ),
        )
