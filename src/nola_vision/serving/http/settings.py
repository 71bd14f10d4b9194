"""The settings and limits of a service."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.validation import check_types, quoted

KEY_VARIABLE = "NOLA_VISION_API_KEY"


@dataclass(frozen=True)
class Settings:
    """Settings and limits of a service.

    Args:
        max_batch_size: images per forward pass.
        max_delay: seconds that the first image of a batch waits for others.
        api_key: the key that requests must have; None: requests need no key, and must name this machine as their host.
        allow_changes: whether `PUT` and `DELETE /v1/adapters/{name}` exist; needs a key.
        body_bytes: largest body of a request.
        held_bytes: of all bodies at once.
        pixels: largest image.
        request_images: images per request.
        waiting_images: images of all requests at once, from the end of their body to their result.
        body_seconds: for the whole body of a request.
        idle_seconds: between two parts of a body.
        answer_seconds: from the end of the body to the result.

    Raises:
        NolaVisionError: a key that is easy to guess or that a request could not have, changes without a key, or a
            number out of its range.
    """

    max_batch_size: int = 64
    max_delay: float = 0.005
    api_key: str | None = None
    allow_changes: bool = False
    body_bytes: int = 32 * 2**20
    held_bytes: int = 512 * 2**20
    pixels: int = 50_000_000
    request_images: int = 64
    waiting_images: int = 256
    body_seconds: float = 60
    idle_seconds: float = 10
    answer_seconds: float = 60

    def __post_init__(self) -> None:
        if self.api_key is not None:
            _check_key("api_key", self.api_key)
        elif self.allow_changes:
            raise NolaVisionError("allow_changes needs an API key: give api_key")
        check_types(self)
        for name in ("max_batch_size", "body_bytes", "held_bytes", "pixels", "request_images", "waiting_images"):
            if getattr(self, name) < 1:
                raise NolaVisionError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        for name in ("body_seconds", "idle_seconds", "answer_seconds"):
            if not (0 < getattr(self, name) < math.inf):
                raise NolaVisionError(f"{name} is {quoted(getattr(self, name))}: it must be greater than 0")
        if not 0 <= self.max_delay < math.inf:
            raise NolaVisionError(f"max_delay is {quoted(self.max_delay)}: it must be 0 or more seconds")


def service_settings(max_batch_size: int, max_delay_ms: int, allow_changes: bool = False) -> Settings:
    """The settings of a service that requests reach from other processes, with the API key of the environment.

    Raises:
        NolaVisionError: as `Settings`.
    """
    return Settings(
        max_batch_size=max_batch_size,
        max_delay=max_delay_ms / 1000,
        api_key=api_key(),
        allow_changes=allow_changes,
        waiting_images=max(Settings.waiting_images, 4 * max_batch_size),
    )


def api_key() -> str | None:
    """The API key of the environment; None if there is none.

    Raises:
        NolaVisionError: a request could not have it, or it is easy to guess.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        return None
    _check_key(KEY_VARIABLE, key)
    return key


def _check_key(name: str, key: Any) -> None:
    if not isinstance(key, str) or not re.fullmatch(r"[!-~]{16,}", key):
        raise NolaVisionError(
            f"{name} must have 16 or more ASCII characters without spaces: "
            "python -c 'import secrets; print(secrets.token_urlsafe())' prints one"
        )
