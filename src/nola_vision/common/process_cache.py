"""What a process that does many runs loads once: data sets, decoded images and backbones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_kept: dict[str, tuple[Hashable, object]] | None = None


def keep() -> None:
    """From now on, in this process, `once` keeps what it is given."""
    global _kept
    _kept = {} if _kept is None else _kept


@contextmanager
def keeping() -> Iterator[None]:
    """Within this, `once` keeps what it is given; after it, the files on disk may have changed."""
    global _kept
    before = _kept
    keep()
    try:
        yield
    finally:
        _kept = before


def once(kind: str, key: Hashable, make: Callable[[], T], copy: Callable[[T], T] | None = None) -> T:
    """What `make` gives; where this process keeps things, the last of each kind is kept and given again.

    Args:
        kind: of thing.
        key: what the thing is made of.
        make: makes it.
        copy: makes another of it, where whoever gets it may change it.
    """
    if _kept is None:
        return make()
    if kind not in _kept or _kept[kind][0] != key:
        _kept.pop(kind, None)  # not both at a time
        _kept[kind] = (key, make())
    made: T = _kept[kind][1]  # type: ignore[assignment]
    return made if copy is None else copy(made)


def latest(kind: str, key: Hashable, make: Callable[[], T], size: Callable[[T], int], limit: int) -> T:
    """As `once`, but the things of this kind that were used last are kept, as many as fit into the limit together.

    Args:
        kind: of thing.
        key: what the thing is made of.
        make: makes it.
        size: of a thing, in bytes.
        limit: of all kept things of this kind together, in bytes.
    """
    if _kept is None:
        return make()
    things: dict[Hashable, T] = _kept.setdefault(kind, (None, {}))[1]  # type: ignore[assignment]
    thing = things.pop(key) if key in things else make()
    things[key] = thing
    while sum(map(size, things.values())) > limit:
        del things[next(iter(things))]
    return thing
