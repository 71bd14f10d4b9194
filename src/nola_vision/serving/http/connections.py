"""Limits on connections that the application does not see: slow or large headers, unread answers. For uvicorn, with
httptools."""

from __future__ import annotations

import asyncio
import http
import json
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

_HEADER_SECONDS = 10.0
_REQUEST_SECONDS = 120.0  # the whole request, also what is still sent after its answer
_ANSWER_SECONDS = 30.0
_HEADER_BYTES = 64 * 1024
_PART_BYTES = 16 * 1024


class LimitedConnection(HttpToolsProtocol):
    """A connection that ends if a client is too slow or sends too many headers.

    It ends if a request's headers take more than 10 s or 64 KiB, the request 120 s, or the client to read an answer
    30 s. The headers after a chunked body (trailers) are dropped, and count like the others.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._header_bytes = 0
        self._complete = False  # the headers; those that follow are trailers
        self._in_headers = self._begun = False
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # calls `pause_writing` whenever the client does not take all of an answer
        self._limit(_HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        if self._answering is not None:  # uvicorn tells only the last of several requests that were sent ahead
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.resume_writing()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        super().pause_writing()
        # `close` would wait until the answer is read, so it is not enough
        self._unread = self._unread or self.loop.call_later(_ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        self._unread = None
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._timer is None:  # between two requests, where uvicorn's own limit ends with the first byte
            self._limit(_REQUEST_SECONDS)
        for first in range(0, len(data), _PART_BYTES):
            if self.transport.is_closing():
                return
            part = data[first : first + _PART_BYTES]
            self._begun = False
            super().data_received(part)
            # the part in which the headers begin is not counted: a body or other requests may take most of it
            if self._in_headers and not self._begun and not self.transport.is_closing():
                self._header_bytes += len(part)
                if self._header_bytes > _HEADER_BYTES:
                    self.send_400_response("")

    def on_message_begin(self) -> None:
        self._complete = False
        self._begin_headers()
        self._limit(_HEADER_SECONDS)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._complete:  # `super` would add trailers to the headers that the application reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._complete, self._in_headers = True, False
        self._header_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if self._header_bytes > _HEADER_BYTES:
            raise ValueError("the headers are too large")  # answered by `data_received`
        self._limit(_REQUEST_SECONDS)
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._begin_headers()  # trailers follow if this is the last chunk, and else its bytes, see `on_body`

    def on_body(self, body: bytes) -> None:
        self._in_headers = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_headers = False
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

    def _begin_headers(self) -> None:
        self._in_headers, self._begun, self._header_bytes = True, True, 0

    def _limit(self, seconds: float | None) -> None:
        """Ends the connection after this time; None: not any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
