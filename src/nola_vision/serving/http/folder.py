"""The folder of adapter files that a service answers from, and changes to it."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import uuid
from pathlib import Path

from nola_vision.common.errors import NolaVisionError, one_line
from nola_vision.common.hashing import sha256
from nola_vision.common.validation import quoted
from nola_vision.serving.adapter import BASE, UnreadableAdapter
from nola_vision.serving.bank import AdapterInfo, UnknownAdapter
from nola_vision.serving.files import SUFFIX
from nola_vision.serving.http.bank import Adapter, Bank
from nola_vision.serving.http.errors import RequestError, busy

_log = logging.getLogger(__name__)
_SCAN_SECONDS = 1.0  # at least, between two scans of the folder
_SCAN_SHARE = 50  # and this many times as long as a scan takes
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")  # of `store`
_LEFT_SECONDS = 3600.0  # a temporary file that is older was left by a service that was killed
_NEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class AdapterFolder:
    """The adapters of a folder in a bank. Any thread may use it; each method but `loaded` may read files.

    The folder is scanned when a request comes and the last scan is a second ago (fifty times the duration of a scan if
    that is more), after a change by this service, or if a name is unknown or its file cannot be read, and the folder
    has changed.

    Args:
        bank: what the adapters are loaded into.
        path: of the folder.

    Raises:
        NolaVisionError: the folder does not exist or cannot be read.
    """

    def __init__(self, bank: Bank, path: Path) -> None:
        self.bank, self._path = bank, path
        self._scanning, self._changing = threading.Lock(), threading.Lock()
        self._next_scan, self._seen = 0.0, -1
        # how many changes this service has made to files, and how many of them were made before the last scan began
        self._changes = self._found = 0
        self._scan()

    def refresh(self) -> None:
        """Scans the folder if that is due. If another thread is doing it, waits for it only after a change."""
        if not self._due():
            return
        if self._scanning.acquire(blocking=self._changes > self._found):
            try:
                if self._due():
                    self._rescan()
            finally:
                self._scanning.release()

    def _due(self) -> bool:
        return self._changes > self._found or time.monotonic() >= self._next_scan

    def loaded(self, name: str) -> Adapter | None:
        """What `find` gives, if it reads neither a file nor the folder for it; None otherwise."""
        return None if self._due() else self.bank.loaded(name)

    def info(self, name: str) -> AdapterInfo:
        """What is known of an adapter, without reading its file.

        Raises:
            RequestError: 404: there is no such adapter.
        """
        try:
            return self.bank.info(name)
        except UnknownAdapter as error:
            raise _unknown(name, error) from error

    def find(self, name: str) -> Adapter:
        """An adapter that was read, from its file if this is its first use.

        Raises:
            RequestError: 404: there is no such adapter. 422: its file cannot be used. 503: it cannot be read now.
        """
        self.refresh()
        try:
            try:
                return self.bank.adapter(name)
            except (UnknownAdapter, UnreadableAdapter):  # its file may be new, or gone
                with self._scanning:
                    if self._changed() == self._seen:
                        raise
                    self._rescan()
                return self.bank.adapter(name)
        except UnknownAdapter as error:
            raise _unknown(name, error) from error
        except UnreadableAdapter as error:
            raise busy(str(error)) from error
        except NolaVisionError as error:
            raise RequestError(422, str(error)) from error

    def store(self, name: str, content: bytes) -> tuple[bool, str]:
        """Writes an adapter file into the folder if the bank can use it. Requests that come afterwards find it.

        Returns:
            Whether the name is new, and the file's SHA-256.

        Raises:
            RequestError: 422: the name or the file cannot be used; the folder is as it was. 503: the folder cannot be
                written to.
        """
        if not _NEW_NAME.fullmatch(name) or name.endswith(SUFFIX):
            raise RequestError(
                422,
                "an adapter's name has 1 to 128 letters, digits, dots, - and _, begins with a letter or digit, and "
                f"does not end with {SUFFIX}",
            )
        path = self._file(name)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # not a name of an adapter
        with self._changing:
            self._remove_left()
            if path.is_dir():
                raise RequestError(422, f"{path.name} is a folder: give the adapter another name")
            try:
                with open(temporary, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self.bank.check(temporary, shown=Path(path.name))
                new = not os.path.lexists(path)
                os.replace(temporary, path)
                self._changes += 1
            except UnreadableAdapter as error:
                raise busy(str(error)) from error
            except NolaVisionError as error:
                raise RequestError(422, str(error)) from error
            except OSError as error:
                raise busy(f"the adapter cannot be stored ({error.strerror})") from error
            finally:
                temporary.unlink(missing_ok=True)
        return new, sha256(content)

    def remove(self, name: str) -> None:
        """Deletes an adapter's file.

        Raises:
            RequestError: 404: there is no such adapter. 422: it is the backbone. 503: the file cannot be deleted.
        """
        if name == BASE:
            raise RequestError(422, f"{BASE} is the backbone, which cannot be deleted")
        with self._scanning:
            self._rescan()  # the name may be that of a new file
        self.info(name)
        with self._changing:
            try:
                self._file(name).unlink(missing_ok=True)
            except OSError as error:
                raise busy(f"the adapter cannot be deleted ({error.strerror})") from error
            self._changes += 1

    def _remove_left(self) -> None:
        """Removes temporary files of services that were killed while they stored an adapter."""
        try:
            for file in self._path.iterdir():
                if _TEMPORARY.fullmatch(file.name) and time.time() - file.lstat().st_mtime > _LEFT_SECONDS:
                    file.unlink(missing_ok=True)
        except OSError:
            pass  # another service removed it, or the folder cannot be written to, which `store` reports

    def _file(self, name: str) -> Path:
        path = self._path / f"{name}{SUFFIX}"
        assert path.parent == self._path and os.sep not in name
        return path

    def _rescan(self) -> None:
        """Scans; if that fails, what is known stays."""
        try:
            self._scan()
        except NolaVisionError as error:
            _log.warning("%s", error)

    def _scan(self) -> None:
        start, changes = time.monotonic(), self._changes
        self._seen = self._changed()
        try:
            self.bank.load_folder(self._path)
        finally:
            end, self._found = time.monotonic(), changes
            self._next_scan = end + max(_SCAN_SECONDS, _SCAN_SHARE * (end - start))

    def _changed(self) -> int:
        """When files were added to the folder, removed or replaced, by its own time of modification."""
        try:
            return os.stat(self._path).st_mtime_ns
        except OSError:
            return -1


def _unknown(name: str, error: UnknownAdapter) -> RequestError:
    hint = f"did you mean {' or '.join(error.close)}?" if error.close else "GET /v1/models lists them"
    return RequestError(404, one_line(f"there is no adapter {quoted(name)}: {hint}"), close=error.close)
