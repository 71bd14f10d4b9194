"""The settings and limits of a service."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Settings and limits of a service.

    Args:
        max_batch_size: images per forward pass.
        max_delay: seconds that the first image of a batch waits for others.
        api_key: the key that requests must have; None: requests need no key, and must name this machine as their host.
        allow_changes: whether `PUT` and `DELETE /v1/adapters/{name}` exist.
        body_bytes: largest body of a request.
        held_bytes: of all bodies at once.
        pixels: largest image.
        request_images: images per request.
        waiting_images: images of all requests at once, from the end of their body to their result.
        body_seconds: for the whole body of a request.
        idle_seconds: between two parts of a body.
        answer_seconds: from the end of the body to the result.
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
