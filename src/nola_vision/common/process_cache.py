"""A cache for processes that do many runs: data sets, decoded images and backbones are loaded once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_kept: dict[str, tuple[Hashable, object]] | None = None


def keep() -> None:
    """Switches the cache of this process on."""
    global _kept
    _kept = {} if _kept is None else _kept


@contextmanager
def keeping() -> Iterator[None]:
    """Switches the cache on within a block, and drops it afterwards, since files on disk may change."""
    global _kept
    before = _kept
    keep()
    try:
        yield
    finally:
        _kept = before


def has(kind: str) -> bool:
    """Whether a result of a kind is cached."""
    return kind in (_kept or {})


def last(kind: str, key: Hashable, make: Callable[[], T], copy: Callable[[T], T] | None = None) -> T:
    """The result of `make`. If the cache is on, the last result of each kind is cached and returned for the same key.

    Args:
        kind: the name of the cache.
        key: what the result depends on.
        make: computes the result.
        copy: copies the cached result for each caller, if callers may change it.
    """
    if _kept is None:
        return make()
    if kind not in _kept or _kept[kind][0] != key:
        _kept.pop(kind, None)  # so that the old and the new result are not in memory together
        _kept[kind] = (key, make())
    made: T = _kept[kind][1]  # type: ignore[assignment]
    return made if copy is None else copy(made)


def recent(kind: str, key: Hashable, make: Callable[[], T], size: Callable[[T], int], limit: int) -> T:
    """As `last`, but caches several results of a kind, up to a limit; the least recently used ones are dropped.

    Args:
        kind: the name of the cache.
        key: what the result depends on.
        make: computes the result.
        size: of a result, in bytes.
        limit: of all cached results of this kind together, in bytes.
    """
    if _kept is None:
        return make()
    things: dict[Hashable, T] = _kept.setdefault(kind, (None, {}))[1]  # type: ignore[assignment]
    thing = things.pop(key) if key in things else make()
    things[key] = thing
    while sum(map(size, things.values())) > limit:
        del things[next(iter(things))]
    return thing
