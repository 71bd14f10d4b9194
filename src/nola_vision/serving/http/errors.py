"""Answers that are not a success: JSON with a status and a reason."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        reason: for the client.
        headers: of the answer.
        **fields: more fields of the answer.
    """

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None, **fields: Any) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers, self.fields = status, reason, headers, fields

    def response(self) -> Response:
        return JSON({"error": self.reason, **self.fields}, self.status, self.headers)


def busy(reason: str) -> RequestError:
    """A refusal for now: 503, to be tried again after a second."""
    return RequestError(503, reason, {"Retry-After": "1"})


class JSON(Response):
    """JSON in ASCII: names of files and classes may have characters that UTF-8 cannot encode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()
