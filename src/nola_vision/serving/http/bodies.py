"""The bodies of requests: read within limits, and parsed as JSON."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from nola_vision.common.errors import one_line
from nola_vision.serving.http.budget import Budget
from nola_vision.serving.http.errors import RequestError
from nola_vision.serving.http.settings import Settings

_MOST_VALUES = 10_000  # of JSON: a body of brackets would take a hundred times its size in memory
Model = TypeVar("Model", bound=BaseModel)


@asynccontextmanager
async def body_of(request: Request, settings: Settings, held: Budget) -> AsyncIterator[io.BytesIO]:
    """Reads the body of a request, and counts it as held until the end of the block. `getvalue` does not copy it.

    Raises:
        RequestError: 408: it comes too slowly. 413: it is too large, whatever its Content-Length. 415: it is
            compressed. 503: too many bytes are held.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(415, "the body is compressed: send it without Content-Encoding")
    too_large = RequestError(413, f"the body is larger than {settings.body_bytes:,} bytes: send a smaller one")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > settings.body_bytes:
        raise too_large
    body, size, end, more = io.BytesIO(), 0, time.monotonic() + settings.body_seconds, True
    try:
        while more:
            try:
                seconds = min(settings.idle_seconds, end - time.monotonic())
                message = await asyncio.wait_for(request.receive(), seconds)
            except TimeoutError:
                raise RequestError(408, "the body came too slowly: send it again", {"Connection": "close"}) from None
            if message["type"] == "http.disconnect":
                raise gone()
            part = message.get("body", b"")
            if size + len(part) > settings.body_bytes:
                raise too_large
            held.take(len(part))
            size += len(part)
            body.write(part)
            more = message.get("more_body", False)
        yield body
    finally:
        held.give_back(size)


def gone() -> RequestError:
    """The client closed the connection, so it does not read the answer."""
    return RequestError(408, "the connection was closed")


def content_type(request: Request) -> str:
    """The Content-Type in lower case without parameters; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(body: io.BytesIO, model: type[Model]) -> Model:
    """A body as the message that it must be. The body is closed: what the message has of it is in memory only once.

    Raises:
        RequestError: 422: it is not JSON, or another message.
    """
    with body:
        content = body.getvalue()
    if sum(content.count(sign) for sign in (b"[", b"{", b",")) > _MOST_VALUES:
        raise RequestError(422, f"the JSON has more than {_MOST_VALUES:,} values")
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise unprocessable(error.errors(include_url=False, include_context=False, include_input=False)) from None


def unprocessable(errors: Sequence[Any]) -> RequestError:
    """422 with the first of pydantic's errors."""
    first = errors[0]
    place = ".".join(map(str, first["loc"]))
    return RequestError(422, one_line(f"{place}: {first['msg']}" if place else str(first["msg"])))
