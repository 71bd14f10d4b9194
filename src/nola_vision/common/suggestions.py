"""What to suggest for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

_LONGEST_NAME = 100  # comparing longer ones takes seconds
_MOST_COMPARED = 500  # names


def did_you_mean(name: object, known: Iterable[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """The second half of a message on an unknown name: `did you mean rank or bits?`.

    Args:
        name: what the user gave.
        known: the possible names.
        otherwise: what to return if no name is similar. Default: `use one of ...` with all known names.
        cutoff: how similar a name must be, from 0 to 1.
    """
    known = list(known)
    if close := difflib.get_close_matches(str(name)[:_LONGEST_NAME], known, n=3, cutoff=cutoff):
        return f"did you mean {' or '.join(close)}?"
    return f"use one of {', '.join(known)}" if otherwise is None else otherwise


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of many names that are similar to one. The time is bounded: few that start alike are compared."""
    short = name[:_LONGEST_NAME]
    alike = (one for one in known if one[:1].lower() == short[:1].lower() and abs(len(one) - len(short)) < 4)
    return difflib.get_close_matches(short, islice(alike, _MOST_COMPARED), n=3)
