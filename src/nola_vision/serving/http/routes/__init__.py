"""The routes of the service, one file per convention."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from nola_vision.serving.http.messages import Failure
from nola_vision.serving.http.service import Service


def service_of(request: Request) -> Service:
    """The service that a route belongs to."""
    service: Service = request.app.state.service
    return service


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers that a route may give instead of its result, for OpenAPI."""
    reasons = {
        400: "not an image",
        401: "the API key is missing or wrong",
        404: "unknown adapter",
        408: "the body came too slowly",
        413: "too many bytes, pixels, images or results",
        415: "unsupported Content-Type",
        422: "the message, or the adapter's file, cannot be used",
        503: "too many requests: try again",
    }
    return {status: {"model": Failure, "description": reasons[status]} for status in sorted(statuses)}
