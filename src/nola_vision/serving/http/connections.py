"""Limits on connections that the application does not see: slow or large headers. For uvicorn, with httptools."""

from __future__ import annotations

import asyncio
import http
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEADER_SECONDS = 10.0
_REQUEST_SECONDS = 120.0  # the whole request, also what is still sent after its answer
_HEADER_BYTES = 64 * 1024
_PART_BYTES = 16 * 1024


class LimitedConnection(HttpToolsProtocol):
    """A connection that is closed if a request's headers take more than 10 s or 64 KiB, or the request 120 s."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._header_bytes = 0
        self._in_headers = self._begun = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit(_HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is None:  # between two requests, where uvicorn's own limit ends with the first byte
            self._limit(_REQUEST_SECONDS)
        for first in range(0, len(data), _PART_BYTES):
            if self.transport.is_closing():
                return
            part = data[first : first + _PART_BYTES]
            self._begun = False
            super().data_received(part)
            # the part in which a request begins is not counted: other requests, sent ahead, may take most of it
            if self._in_headers and not self._begun and not self.transport.is_closing():
                self._header_bytes += len(part)
                if self._header_bytes > _HEADER_BYTES:
                    self.send_400_response("")

    def on_message_begin(self) -> None:
        self._in_headers, self._begun, self._header_bytes = True, True, 0
        self._limit(_HEADER_SECONDS)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._header_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if self._header_bytes > _HEADER_BYTES:
            raise ValueError("the headers are too large")  # answered by `data_received`
        self._limit(_REQUEST_SECONDS)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._limit(None)
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        large = self._header_bytes > _HEADER_BYTES
        status = 431 if large else 400
        reason = f"the headers have more than {_HEADER_BYTES:,} bytes" if large else "the request is not valid HTTP"
        body = json.dumps({"error": reason}).encode()
        lines = [
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            "",
            "",
        ]
        self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()

    def _limit(self, seconds: float | None) -> None:
        """Closes the connection after this time; None: not any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)
