"""Searches for the smallest and the largest integer with a property."""

from __future__ import annotations

import bisect
from collections.abc import Callable


def smallest(is_allowed: Callable[[int], bool], most: int) -> int | None:
    """The smallest allowed number, where the allowed ones follow each other; None if there is none.

    Powers of two are tried first, so they must include an allowed one.
    """
    high = next((2**power for power in range(most.bit_length()) if is_allowed(2**power)), None)
    if high is None:
        return None
    return bisect.bisect_left(range(high), True, lo=high // 2 + 1, key=is_allowed) if high > 1 else 1


def largest(fits: Callable[[int], bool], limit: int, first: int = 1) -> int:
    """The largest number from `first` to `limit` that fits, where `first` does and no number after a misfit does."""
    low, high = first, 2 * first
    while high <= limit and fits(high):  # trying a number may cost memory in proportion to it
        low, high = high, 2 * high
    between = range(low + 1, min(high, limit + 1))
    return low + bisect.bisect_left(between, True, key=lambda number: not fits(number))
