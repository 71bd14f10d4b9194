"""Time of this process by part of the work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_SHOWN = 0.03  # of the total; shorter parts are in `other`

_began = time.monotonic()
_since = _began  # the seconds up to here are counted
_running: list[str] = []  # the parts that are being done, the innermost last
_spent: dict[str, float] = {}


def start(began: float) -> None:
    """Starts again, at a time of `time.monotonic`; everything until `started` is the part "start-up"."""
    global _began, _since
    _began = _since = began
    _spent.clear()
    _running[:] = ["start-up"]


def started() -> None:
    """Ends the part that `start` has begun."""
    _count()
    _running.clear()


@contextmanager
def timed(part: str) -> Iterator[None]:
    """Counts the time of a block, or of a decorated function, for a part. Parts inside are not counted twice."""
    depth = len(_running)
    begin(part)
    try:
        yield
    finally:
        _count()
        del _running[depth:]


def begin(part: str) -> None:
    """Begins a part where a block is not possible, such as between two callbacks."""
    _count()
    _running.append(part)


def end() -> None:
    """Ends what `begin` has begun."""
    _count()
    _running.pop()


def spent(before: Mapping[str, float] | None = None) -> dict[str, float]:
    """Seconds by part since `start`, or since an earlier `spent()`; parts that were not done are left out."""
    _count()
    parts = {part: seconds - (before or {}).get(part, 0.0) for part, seconds in _spent.items()}
    return {part: seconds for part, seconds in parts.items() if seconds > 0}


def summary() -> str:
    """The seconds since `start`, and those of the longest parts: `40.1, of which training 27.0, other 13.1`."""
    parts = sorted(spent().items(), key=lambda part: -part[1])
    total = _since - _began
    shown = {part: seconds for part, seconds in parts if seconds >= _SHOWN * total}
    shown["other"] = total - sum(shown.values())
    return f"{total:,.1f}, of which {', '.join(f'{part} {seconds:,.1f}' for part, seconds in shown.items())}"


def _count() -> None:
    global _since
    now = time.monotonic()
    if _running:
        _spent[_running[-1]] = _spent.get(_running[-1], 0.0) + now - _since
    _since = now
