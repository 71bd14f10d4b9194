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
from nola_vision.common.files import write_whole
from nola_vision.common.validation import quoted
from nola_vision.serving.adapter import BASE, ServedAdapter
from nola_vision.serving.bank import SUFFIX, AdapterBank, AdapterInfo, UnknownAdapter
from nola_vision.serving.http.errors import RequestError, busy, without_folders

_log = logging.getLogger(__name__)
_SCAN_SECONDS = 1.0  # at least, between two scans of the folder
_SCAN_SHARE = 50  # and this many times as long as a scan takes
_TEMPORARY = re.compile(r"\.(?:\.[0-9a-f]{32}\.tmp\.)?[0-9a-f]{32}\.tmp")  # of `store` and `write_whole`
_LEFT_SECONDS = 3600.0  # a temporary file that is older was left by a service that was killed
_NEW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class AdapterFolder:
    """The adapters of a folder in a bank. Any thread may use it; each method may read files.

    The folder is scanned when a request comes and the last scan is a second ago, or when a name is not known and
    the folder has changed. Without requests it is not looked at.

    Args:
        bank: what the adapters are loaded into.
        path: of the folder.
    """

    def __init__(self, bank: AdapterBank, path: Path) -> None:
        self.bank, self._path = bank, path
        self._scanning, self._changing = threading.Lock(), threading.Lock()
        self._next_scan, self._seen = 0.0, -1
        self._scan()

    def refresh(self) -> None:
        """Scans the folder if that is due and no other thread is doing it."""
        if time.monotonic() >= self._next_scan and self._scanning.acquire(blocking=False):
            try:
                self._scan()
            finally:
                self._scanning.release()

    def info(self, name: str) -> AdapterInfo:
        """What is known of an adapter, without reading its file.

        Raises:
            RequestError: 404: there is no such adapter.
        """
        try:
            return self.bank.info(name)
        except UnknownAdapter as error:
            raise _unknown(name, error) from error

    def find(self, name: str) -> ServedAdapter:
        """An adapter that was read, from its file if this is its first use.

        Raises:
            RequestError: 404: there is no such adapter. 422: its file cannot be used.
        """
        self.refresh()
        try:
            try:
                return self.bank.adapter(name)
            except UnknownAdapter:
                with self._scanning:
                    if self._changed() == self._seen:
                        raise
                    self._scan()
                return self.bank.adapter(name)
        except UnknownAdapter as error:
            raise _unknown(name, error) from error
        except NolaVisionError as error:
            raise RequestError(422, without_folders(str(error))) from error

    def store(self, name: str, content: bytes | bytearray) -> bool:
        """Writes an adapter file into the folder if the bank can use it. Returns whether the name is new.

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
            try:
                write_whole(temporary, bytes(content))
                self.bank.check(temporary)
                new = not os.path.lexists(path)
                os.replace(temporary, path)
            except NolaVisionError as error:
                reason = without_folders(str(error)).replace(temporary.name, name)
                raise RequestError(422, reason) from error
            except OSError as error:
                raise busy(f"the adapter cannot be stored ({error.strerror})") from error
            finally:
                temporary.unlink(missing_ok=True)
        self._scan_now()
        return new

    def remove(self, name: str) -> None:
        """Deletes an adapter's file.

        Raises:
            RequestError: 404: there is no such adapter. 422: it is the backbone. 503: the file cannot be deleted.
        """
        if name == BASE:
            raise RequestError(422, f"{BASE} is the backbone, which cannot be deleted")
        self._scan_now()
        self.info(name)
        with self._changing:
            try:
                self._file(name).unlink(missing_ok=True)
            except OSError as error:
                raise busy(f"the adapter cannot be deleted ({error.strerror})") from error
        self._scan_now()

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

    def _scan_now(self) -> None:
        with self._scanning:
            self._scan()

    def _scan(self) -> None:
        start, self._seen = time.monotonic(), self._changed()
        try:
            self.bank.load_folder(self._path)
        except NolaVisionError as error:  # what is known stays
            _log.warning("%s", error)
        end = time.monotonic()
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
