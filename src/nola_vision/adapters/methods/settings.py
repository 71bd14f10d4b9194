"""The values that an adapter's settings may have. Imports no torch, so that a config can be checked without it."""

from __future__ import annotations

from typing import Literal

from nola_vision.common.errors import NolaVisionError

Storage = Literal["cached", "streamed"]
Scope = Literal["shared", "per_layer"]
Start = Literal["a0", "released", "random"]
FLOAT_BITS = (16, 32)


def check_bits(name: str, bits: int) -> None:
    """Raises NolaVisionError unless `bits` is 2 to 8, 16 (float16) or 32 (float32)."""
    if not (2 <= bits <= 8 or bits in FLOAT_BITS):
        raise NolaVisionError(f"{name} is {bits}: use 2 to 8 for integers, 16 or 32 for floats")
